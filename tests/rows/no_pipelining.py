"""One step of a GPT-MoE: in megatron-core's schedule without pipeline, and in plain torch on one process."""

import itertools
from typing import NamedTuple

import torch
import torch.distributed as dist
from gpt_moe import GptMoE
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import build_module
from no_global_groups import assert_no_global_groups

from mimo_strategy import ModuleParallel
from mimo_strategy.layout import LANGUAGE, Layout
from mimo_strategy.runtime.seeding import ModuleRng
from mimo_strategy.testing.shards import Shard, assemble
from mimo_strategy.topology import Topology

NUM_SAMPLES, SEQ_LENGTH, NUM_MICROBATCHES = 8, 16, 2


class Reference(NamedTuple):
    """Mean loss per token, and parameters before the step with their gradients, whole, by name."""

    loss: float
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def one_process() -> Reference:
    """A forward and a backward pass over all samples at once, without schedule or ``DistributedDataParallel``."""
    topology, model = build(ModuleParallel())
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        # weights that are alike, as those of norms, would hide that they are exchanged
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    batch = samples(range(NUM_SAMPLES))
    count = batch["loss_mask"].sum()
    # load-balancing losses come as for a sum over tokens
    MoEAuxLossAutoScaler.set_loss_scale(1 / count)
    loss = token_losses(model, batch).sum() / count
    loss.backward()
    weights = [shard._replace(data=shard.data.detach()) for shard in shards(model, topology)]
    gradients = [shard._replace(data=shard.data.grad) for shard in shards(model, topology)]
    reference = Reference(loss.item(), assemble(weights), assemble(gradients))
    topology.destroy()
    return reference


def on_layout(parallel: ModuleParallel, weights: dict[str, torch.Tensor]) -> tuple[float, list[Shard]]:
    """The same step in microbatches and lanes with no other groups than the grid's: loss, and gradients here."""
    assert_no_global_groups()
    topology, model = build(parallel)
    for shard in shards(model, topology):
        shard.data.data.copy_(weights[shard.name][shard.place])
    groups, language = topology.groups[LANGUAGE], topology.layout.modules[LANGUAGE]
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model, pg_collection=groups)
    ddp.zero_grad_buffer()
    model.config.finalize_model_grads_func = finalize_model_grads
    # sum of losses and number of tokens
    total = torch.zeros(2, device=device())

    def forward_step(microbatches, model):
        assert_no_global_groups()
        batch = next(microbatches)

        def loss(losses):
            total.add_(torch.stack([losses.detach().sum(), batch["loss_mask"].sum()]))
            return losses.sum(), batch["loss_mask"].sum().int(), {}

        return token_losses(model, batch), loss

    lane = language.coordinates(dist.get_rank())["dp"]
    size = NUM_SAMPLES // NUM_MICROBATCHES // language.dp
    starts = range(lane * size, NUM_SAMPLES, NUM_SAMPLES // NUM_MICROBATCHES)
    forward_backward_no_pipelining(
        forward_step_func=forward_step,
        data_iterator=(samples(range(start, start + size)) for start in starts),
        model=ddp,
        num_microbatches=NUM_MICROBATCHES,
        seq_length=SEQ_LENGTH,
        micro_batch_size=size,
        pg_collection=groups,
    )
    dist.all_reduce(total, group=groups.dp)
    loss = (total[0] / total[1]).item()
    gradients = [shard._replace(data=shard.data.main_grad) for shard in shards(model, topology)]
    assert_no_global_groups()
    topology.destroy()
    return loss, gradients


def build(parallel: ModuleParallel) -> tuple[Topology, GPTModel]:
    gpt = GptMoE()
    layout = Layout.resolve({LANGUAGE: gpt.sizes()}, dist.get_world_size(), {LANGUAGE: parallel})
    topology = Topology(layout)
    groups = topology.groups[LANGUAGE]
    spec = gpt.spec(layout.modules[LANGUAGE], groups, torch.float32, under_encoder=False)
    rng = ModuleRng(1, groups)
    with rng.building():
        model = build_module(spec).to(device())
    rng.make_current()
    return topology, model


def device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def samples(positions: range) -> dict[str, torch.Tensor]:
    """Random tokens, of which samples count more the later they come: lanes differ in their number of tokens."""
    tokens = torch.randint(
        GptMoE().vocab_size, (NUM_SAMPLES, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(2)
    )
    counted = torch.arange(SEQ_LENGTH) < torch.arange(1, NUM_SAMPLES + 1)[:, None]
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": counted.float()}
    return {name: values[positions.start : positions.stop].to(device()) for name, values in batch.items()}


def token_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    position_ids = torch.arange(SEQ_LENGTH, device=device()).expand_as(batch["input_ids"])
    return model(batch["input_ids"], position_ids, None, labels=batch["labels"]) * batch["loss_mask"]


def shards(model: GPTModel, topology: Topology) -> list[Shard]:
    """This rank's parameters."""
    entries = model.sharded_state_dict(metadata={"dp_cp_group": topology.groups[LANGUAGE].dp_cp}).values()
    held = [
        Shard(entry.key, entry.global_slice(), entry.global_shape, entry.data)
        for entry in entries
        if isinstance(entry, ShardedTensor) and isinstance(entry.data, torch.nn.Parameter)
    ]
    assert len(held) == len(list(model.parameters()))
    return held


def assert_same_gradients(reference: dict[str, torch.Tensor], every_rank: list[list[Shard]], tolerance: float) -> None:
    """Check the shards of every rank against their part of the reference, and that together they are the whole."""
    missing = {name: whole.numel() for name, whole in reference.items()}
    seen = set()
    for shard in itertools.chain(*every_rank):
        expected = reference[shard.name][shard.place]
        assert expected.norm() > 0, shard[:3]
        assert (shard.data - expected).norm() <= tolerance * expected.norm(), shard[:3]
        if str(shard[:3]) not in seen:
            seen.add(str(shard[:3]))
            missing[shard.name] -= shard.data.numel()
    assert set(missing.values()) == {0}
