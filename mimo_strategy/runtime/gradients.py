"""Finalize the gradients of every module with one global token count."""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import (
    _update_router_expert_bias,
    finalize_model_grads,
    reset_model_temporary_tensors,
)
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model

from mimo_strategy.layout import LANGUAGE
from mimo_strategy.runtime.model import HeteroMimoModel
from mimo_strategy.topology import Topology


def finalize_gradients(
    model: HeteroMimoModel, topology: Topology, num_tokens: torch.Tensor, *, force_all_reduce: bool = False
) -> None:
    """Sum each module's gradients over its own groups, then divide all of them by ``num_tokens``.

    Args:
        model: the wrapped model after the backward passes of a step.
        topology: groups of the modules.
        num_tokens: tokens that count in the loss of the whole step, over all lanes; a scalar.
        force_all_reduce: leave the full sum on every rank, also under the distributed optimizer.

    Raises:
        ValueError: if a trainable parameter got no gradient where they are reduced during the backward.
    """
    for name, module in model.own_modules().items():
        _check_complete(name, module)
    scale = num_tokens.clamp_min(1).reciprocal()
    for name, module in model.own_modules().items():
        finalize_model_grads(
            [module], num_tokens=None, pg_collection=topology.groups[name], force_all_reduce=force_all_reduce
        )
        module.scale_gradients(scale)


def _check_complete(name: str, module: DistributedDataParallel) -> None:
    """megatron-core 0.19.2 reduces a bucket when all of it has come, and ends the next step with a bare assertion."""
    groups = module.bucket_groups + module.expert_parallel_bucket_groups
    if not module.ddp_config.overlap_grad_reduce or all(
        len(group.per_param_grad_ready_counts) == len(group.params) for group in groups
    ):
        return
    unused = set().union(*(group.params - group.per_param_grad_ready_counts.keys() for group in groups))
    names = [own for own, parameter in unwrap_model(module).named_parameters() if parameter in unused]
    raise ValueError(
        f"no gradient came for trainable parameters of {name}, which are reduced during the backward "
        f"(overlap_grad_reduce): {', '.join(names)}. Use them in each forward pass, or set requires_grad=False in "
        "configure_model"
    )


def hold_frozen_routers(model: HeteroMimoModel) -> None:
    """Let the expert biases of frozen routers be, which otherwise follow the tokens and not any gradient."""
    for router in model.modules():
        if isinstance(router, TopKRouter):
            router.frozen_expert_bias = not router.weight.requires_grad


def balance_experts(model: HeteroMimoModel, topology: Topology, num_tokens: torch.Tensor) -> None:
    """What schedule and finalization do for experts, between a plain forward and backward pass of a mean loss.

    Their load-balancing losses come as for a sum over ``num_tokens`` tokens, and their biases follow the tokens of
    the forward pass.
    """
    MoEAuxLossAutoScaler.set_loss_scale(num_tokens.float().clamp_min(1).reciprocal())
    if model.config.moe_router_enable_expert_bias:
        _update_router_expert_bias([model], model.config, topology.groups[LANGUAGE].tp_dp_cp)
        reset_model_temporary_tensors(model.config, [model])
