"""Wrong ways to train, each planted by replacing one function of the running code."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator
from megatron.core.transformer.moe import moe_utils
from proof.cells import Cell
from proof.layouts import colocated, disjoint, text
from pytest import MonkeyPatch

import mimo_strategy.runtime.gradients as gradients
from faults.registry import Registry
from mimo_strategy import ModuleParallel as P
from mimo_strategy.module import MimoModule
from mimo_strategy.optimizer import ModuleOptimizer
from mimo_strategy.runtime.loss import LossOutput
from mimo_strategy.runtime.model import HeteroMimoModel
from mimo_strategy.runtime.optimizer import HeteroOptimizer
from mimo_strategy.runtime.step_sums import LOSS, StepSums
from mimo_strategy.step_batch import StepShare

# megatron.core.distributed has a function of the same name
megatron_finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]

LANES = Cell(colocated(P(dp=2), P(dp=2, ep=2)), microbatches=2)
SHARDS = Cell(colocated(P(dp=2), P(tp=2, dp=1, ep=2)), microbatches=2)
REPLICAS = Cell(colocated(P(dp=2), P(dp=2)), microbatches=2, optimizer="replicated")
APART = Cell(disjoint(P(dp=1), P(dp=2)), microbatches=2)
STAGES = Cell(text(P(dp=1, pp=2)), microbatches=2)


FAULTS = Registry()
fault = FAULTS.register


def wrap(patch: MonkeyPatch, owner: Any, name: str, wrapper: Callable) -> None:
    """Replace a function by one that is given the original as its first argument."""
    original = getattr(owner, name)
    patch.setattr(owner, name, wraps(original)(lambda *args, **kwargs: wrapper(original, *args, **kwargs)))


def change_gradients(patch: MonkeyPatch, change: Callable[[str, torch.nn.Parameter], None]) -> None:
    """Call ``change`` for every parameter after its gradient is final."""

    def finalize(original, model, *args, **kwargs):
        original(model, *args, **kwargs)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                change(name, parameter)

    wrap(patch, gradients, "finalize_gradients", finalize)
    # imported by name
    patch.setattr("mimo_strategy.runtime.runtime.finalize_gradients", gradients.finalize_gradients)


# ---- reductions


@fault(LANES, "gradient of modality_submodules")
def encoder_gradients_are_not_reduced(patch: MonkeyPatch) -> None:
    def finish(original, ddp, **kwargs):
        if ddp.config.num_moe_experts is not None:
            original(ddp, **kwargs)

    wrap(patch, DistributedDataParallel, "finish_grad_sync", finish)


@fault(LANES, "gradient of language_model")
def language_gradients_are_not_reduced(patch: MonkeyPatch) -> None:
    def finish(original, ddp, **kwargs):
        if ddp.config.num_moe_experts is None:
            original(ddp, **kwargs)

    wrap(patch, DistributedDataParallel, "finish_grad_sync", finish)


@fault(SHARDS, "gradient of language_model.*norm")
def norms_are_not_reduced_over_tensor_ranks(patch: MonkeyPatch) -> None:
    patch.setattr(megatron_finalize, "_allreduce_non_tensor_model_parallel_grads", lambda *args: None)


@fault(REPLICAS, r"gradient of .*experts")
def expert_gradients_are_divided_by_dp(patch: MonkeyPatch) -> None:
    def divide(name, parameter):
        if ".experts." in name:
            parameter.main_grad /= 2

    change_gradients(patch, divide)


@fault(SHARDS, r"linear_fc1.weight\[64:128, :\].*rank 1")
def gradient_of_one_tensor_rank_is_doubled(patch: MonkeyPatch) -> None:
    def double(name, parameter):
        if dist.get_rank() == 1 and name.endswith("layers.3.mlp.linear_fc1.weight"):
            parameter.main_grad *= 2

    change_gradients(patch, double)


@fault(LANES, "gradient of ")
def gradients_are_rounded_to_half_precision(patch: MonkeyPatch) -> None:
    change_gradients(patch, lambda name, parameter: parameter.main_grad.copy_(parameter.main_grad.bfloat16()))


@fault(LANES, "step 2, gradient")
def gradients_of_earlier_steps_stay(patch: MonkeyPatch) -> None:
    def keep(original, ddp):
        data = [buffer.grad_data.clone() for buffer in ddp.buffers + ddp.expert_parallel_buffers]
        original(ddp)
        for buffer, kept in zip(ddp.buffers + ddp.expert_parallel_buffers, data, strict=True):
            buffer.grad_data.copy_(kept)

    wrap(patch, DistributedDataParallel, "zero_grad_buffer", keep)


@fault(LANES, "weight of")
def parameters_are_not_gathered(patch: MonkeyPatch) -> None:
    patch.setattr(_ParamAndGradBucketGroup, "start_param_sync", lambda *args, **kwargs: None)


# ---- the loss and its tokens


@fault(LANES, "step 1, gradient")
def tokens_of_one_lane_are_counted(patch: MonkeyPatch) -> None:
    def reduce(original, sums):
        own = sums._sums[LOSS][1].clone()
        loss = original(sums)
        return LossOutput(loss.sum, own.float())

    wrap(patch, StepSums, "reduce_loss", reduce)


@fault(LANES, "step 1, loss")
def microbatches_weigh_alike(patch: MonkeyPatch) -> None:
    def add(original, sums, loss):
        original(sums, LossOutput(loss.mean, torch.ones_like(loss.count)))

    wrap(patch, StepSums, "add_loss", add)


@fault(LANES, "step 1, loss")
def loss_mask_is_ignored_on_one_rank(patch: MonkeyPatch) -> None:
    def loss_step(original, module, output, microbatch):
        if dist.get_rank() == 1 and dist.get_world_size() > 1:
            microbatch = microbatch | {"loss_mask": torch.ones_like(microbatch["loss_mask"])}
        return original(module, output, microbatch)

    wrap(patch, MimoModule, "loss_step", loss_step)


@fault(APART, "agreement of loss")
def ranks_are_not_told_the_loss(patch: MonkeyPatch) -> None:
    def reduce(original, sums):
        loss = original(sums)
        return LossOutput(loss.sum * (1 + 1e-6 * dist.get_rank()), loss.count)

    wrap(patch, StepSums, "reduce_loss", reduce)


# ---- samples and microbatches


@fault(replace(LANES, data="one"), "step 1, loss")
def a_microbatch_is_dropped(patch: MonkeyPatch) -> None:
    def microbatches(original, share, batch):
        first, *rest = original(share, batch)
        return [first, *[first for _ in rest]]

    wrap(patch, StepShare, "microbatches", microbatches)


@fault(replace(APART, data="one"), "step 1, loss")
def samples_are_swapped_between_lanes_of_the_language_model(patch: MonkeyPatch) -> None:
    def positions(original, share, batch_size):
        if share.num_lanes == 2:
            share.lane = 1 - share.lane
        return original(share, batch_size)

    wrap(patch, StepShare, "positions", positions)


@fault(LANES, "step 1, loss")
def labels_of_one_rank_are_shifted(patch: MonkeyPatch) -> None:
    def forward_step(original, module, microbatch):
        if dist.get_rank() == 1:
            microbatch = microbatch | {"labels": microbatch["labels"].roll(1, dims=1)}
        return original(module, microbatch)

    wrap(patch, MimoModule, "forward_step", forward_step)


# ---- between the modules


def change_embeddings(patch: MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change what the language model gets of the encoder."""

    def align(original, model, modality_embeddings, *args, **kwargs):
        images = modality_embeddings["images"]
        return original(model, modality_embeddings | {"images": change(images)}, *args, **kwargs)

    wrap(patch, HeteroMimoModel, "align_embeddings_by_token_positions", align)


@fault(SHARDS, "step 1, loss")
def tokens_of_images_come_in_another_order(patch: MonkeyPatch) -> None:
    change_embeddings(patch, lambda images: images.flip(0))


@fault(APART, "step 1, loss")
def bridge_delivers_the_last_microbatch_again(patch: MonkeyPatch) -> None:
    seen = []

    def deliver_the_last(images):
        seen.append(images.detach().clone())
        last = seen[max(len(seen) - 2, 0)]
        return images + (last[: len(images)] - images).detach() if len(last) >= len(images) else images

    change_embeddings(patch, deliver_the_last)


@fault(APART, "gradient of modality_submodules")
def bridge_returns_gradients_in_another_order(patch: MonkeyPatch) -> None:
    def flip_gradient(images):
        if images.requires_grad:
            images.register_hook(lambda gradient: gradient.flip(0))
        return images

    change_embeddings(patch, flip_gradient)


@fault(SHARDS, "gradient of modality_submodules")
def encoder_gets_no_gradient(patch: MonkeyPatch) -> None:
    change_embeddings(patch, lambda images: images.detach() + 0 * images)


# ---- experts


@fault(LANES, "expert_bias")
def expert_bias_is_not_updated(patch: MonkeyPatch) -> None:
    patch.setattr(megatron_finalize, "_update_router_expert_bias", lambda *args, **kwargs: None)


@fault(LANES, r"gradient of language_model.*router")
def load_balancing_loss_is_not_scaled(patch: MonkeyPatch) -> None:
    patch.setattr(moe_utils.MoEAuxLossAutoScaler, "set_loss_scale", lambda scale: None)
    patch.setattr(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(3.0))


# ---- optimizer


@fault(LANES, "grad_norm")
def norm_is_that_of_one_module(patch: MonkeyPatch) -> None:
    def norm(original, optimizer):
        return optimizer.module_infos["language"].optimizer.get_grad_norm()

    wrap(patch, HeteroOptimizer, "get_grad_norm", norm)


@fault(LANES, "step 1, update")
def gradients_are_not_clipped(patch: MonkeyPatch) -> None:
    def push(original, optimizer):
        optimizer.clip_grad = 0.0
        original(optimizer)

    wrap(patch, ModuleOptimizer, "_push_settings", push)


@fault(LANES, "step 1, update of .*(norm|bias)")
def norms_and_biases_are_decayed(patch: MonkeyPatch) -> None:
    def push(original, optimizer):
        original(optimizer)
        for info in optimizer.megatron_optimizer.module_infos.values():
            for group in info.optimizer.param_groups:
                group["weight_decay"] = 0.1

    wrap(patch, ModuleOptimizer, "_push_settings", push)


@fault(APART, "step 1, update of modality_submodules")
def encoder_learns_at_half_the_rate(patch: MonkeyPatch) -> None:
    def push(original, optimizer):
        original(optimizer)
        encoder = optimizer.megatron_optimizer.module_infos["images"].optimizer
        for group in encoder.param_groups if encoder else ():
            group["lr"] *= 0.5

    wrap(patch, ModuleOptimizer, "_push_settings", push)


@fault(SHARDS, r"weight of language_model.*final_norm")
def one_parameter_is_never_updated(patch: MonkeyPatch) -> None:
    def step(original, optimizer, closure=None):
        left_out = [parameter for parameter in optimizer.param_groups[-1]["params"] if parameter.ndim == 1][-1]
        before = left_out.detach().clone()
        loss = original(optimizer, closure)
        left_out.data.copy_(before)
        return loss

    wrap(patch, ModuleOptimizer, "step", step)


# ---- pipeline


@fault(STAGES, "gradient of language_model.decoder.layers.0")
def later_stages_return_half_the_gradient(patch: MonkeyPatch) -> None:
    def send(original, communicator, gradients, *args, **kwargs):
        halved = {name: None if gradient is None else gradient * 0.5 for name, gradient in gradients.items()}
        return original(communicator, halved, *args, **kwargs)

    for name in ("send_backward", "send_backward_recv_forward"):
        wrap(patch, MultiModulePipelineCommunicator, name, send)
