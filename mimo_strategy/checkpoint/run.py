"""What a run saves of itself and goes on from: weights, optimizer, random streams."""

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor

from mimo_strategy.checkpoint.loading import Checkpoint, Mismatch
from mimo_strategy.checkpoint.random_state import random_streams
from mimo_strategy.checkpoint.shards import model_and_optimizer_shards, model_shards
from mimo_strategy.optimizer import ModuleOptimizer
from mimo_strategy.runtime.optimizer_state import set_num_updates
from mimo_strategy.runtime.runtime import MimoRuntime


def run_shards(runtime: MimoRuntime, optimizer: ModuleOptimizer | None) -> list[ShardedTensor]:
    """This rank's shards of a run; collective over the world.

    Args:
        runtime: the run.
        optimizer: ``None`` for the weights alone.
    """
    runtime.gather_parameters()
    if optimizer is None:
        return model_shards(runtime.model)
    weights, states = model_and_optimizer_shards(runtime.model, optimizer.megatron_optimizer)
    streams = random_streams(runtime.model, runtime.topology, runtime.device)
    return weights + states + [shard for of_owner in streams for shard in of_owner.shards]


def load_run(
    path: Path, runtime: MimoRuntime, optimizer: ModuleOptimizer | None, *, strict: bool
) -> tuple[dict[str, Any], Mismatch]:
    """Load a checkpoint that any layout wrote; collective over the world.

    Args:
        path: the checkpoint.
        runtime: the run that goes on from it.
        optimizer: ``None`` leaves optimizer and random streams as they are; so does a checkpoint without them.
        strict: whether every weight must be in the checkpoint and in the model.

    Returns:
        What Lightning keeps, and the weights that were missing or unexpected.

    Raises:
        CheckpointError: if the checkpoint is not whole or does not fit the model, before anything is loaded.
    """
    checkpoint = Checkpoint(path)
    state = checkpoint.lightning_state()
    weights = model_shards(runtime.model)
    mismatch = checkpoint.compare(weights)
    checkpoint.require(mismatch, strict=strict)
    wanted = [shard for shard in weights if shard.key in checkpoint.shapes]
    saved = state.get("optimizer_states") if optimizer is not None else None
    streams = []
    if saved:
        _, held = model_and_optimizer_shards(runtime.model, optimizer.megatron_optimizer)
        held = [checkpoint.in_best_precision(shard) for shard in held]
        checkpoint.require(checkpoint.compare(held, lambda name: False))
        wanted += held
        streams = [
            (of_owner, all(map(checkpoint.holds, of_owner.shards)))
            for of_owner in random_streams(runtime.model, runtime.topology, runtime.device)
        ]
    wanted += [shard for of_owner, is_there in streams if is_there for shard in of_owner.shards]
    checkpoint.read([checkpoint.in_best_precision(shard) for shard in wanted])
    if saved:
        optimizer.load_settings(saved[0])
        set_num_updates(optimizer.megatron_optimizer, optimizer.num_updates)
    for of_owner, is_there in streams:
        if is_there:
            of_owner.put_back()
        else:
            of_owner.restart(optimizer.num_updates)
    return state, mismatch
