"""Checkpoints: directories that every rank writes its shards to, readable by any layout."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor

from mimo_strategy.checkpoint.errors import CheckpointError, SaveError
from mimo_strategy.checkpoint.loading import Checkpoint
from mimo_strategy.checkpoint.shards import model_shards
from mimo_strategy.checkpoint.writer import CheckpointWriter
from mimo_strategy.runtime.model import HeteroMimoModel

__all__ = ["Checkpoint", "CheckpointError", "CheckpointWriter", "SaveError"]


def sharded_state(model: HeteroMimoModel, optimizer: None, *, is_loading: bool) -> list[ShardedTensor]:
    return model_shards(model)


def save(directory: Path, shards: Sequence[ShardedTensor], lightning_state: dict[str, Any]) -> None:
    writer = CheckpointWriter(in_background=False, on_failure="raise", timeout=timedelta(minutes=30))
    writer.save(Path(directory), shards, lightning_state)
    writer.close()


def load_shards(directory: Path, model: HeteroMimoModel, optimizer: None) -> None:
    checkpoint = Checkpoint(Path(directory))
    shards = model_shards(model)
    checkpoint.require(checkpoint.compare(shards))
    checkpoint.read([checkpoint.in_best_precision(shard) for shard in shards])
