"""Weights alone: of all modules or of some, from a checkpoint or from a single file, and written to a single file.

The single file is in safetensors format (https://github.com/huggingface/safetensors): every weight whole, under the
name that it has in a checkpoint, whatever the layout.
"""

import json
import os
import struct
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import override

import lightning
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors import SafetensorError, safe_open

from mimo_strategy.checkpoint.errors import CheckpointError
from mimo_strategy.checkpoint.loading import Checkpoint, Mismatch, TensorSource, is_weight, slices
from mimo_strategy.checkpoint.shards import model_shards, name_prefix
from mimo_strategy.checkpoint.writer import CheckpointWriter
from mimo_strategy.runtime.model import HeteroMimoModel

_SUFFIX = ".safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class WeightsFile(TensorSource):
    """Weights in a single file, of which only what is asked for is read.

    Raises:
        CheckpointError: if it is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, "pt")
            self.shapes = {name: self._file.get_slice(name).get_shape() for name in self._file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    @override
    def read(self, shards: Iterable[ShardedTensor]) -> None:
        for shard in shards:
            stored = self._file.get_slice(shard.key)[slices(shard.global_offset, shard.local_shape)]
            shard.data.detach().copy_(stored)

    def mapped(self) -> list[ShardedTensor]:
        """All of it, for rank 0 to save; on the disk until it is used."""
        rank = dist.get_rank()
        return [
            ShardedTensor.from_rank_offsets(name, self._file.get_tensor(name), replica_id=rank) for name in self.shapes
        ]


def load_weights(
    model: HeteroMimoModel, path: str | Path, *, modules: Collection[str] | None = None, strict: bool = True
) -> Mismatch:
    """Load weights into a model that any layout has built; collective over the world.

    Args:
        model: wrapped or not.
        path: a checkpoint, or a ``.safetensors`` file.
        modules: names of the modules to load; ``None`` is all.
        strict: whether each of their weights must be in ``path``, and no other of theirs.

    Returns:
        The weights that were missing or unexpected.

    Raises:
        ValueError: if the model has no such module.
        CheckpointError: if ``path`` is not whole or does not fit the model, before anything is loaded.
    """
    path = Path(path)
    known = list(model.mimo_config.module_to_grid_map)
    modules = known if modules is None else list(modules)
    if not set(modules) <= set(known):
        raise ValueError(f"the model's modules are {sorted(known)}, cannot load {sorted(set(modules) - set(known))}")
    prefixes = tuple(map(name_prefix, modules))
    source = WeightsFile(path) if path.suffix == _SUFFIX else Checkpoint(path)
    shards = [shard for shard in model_shards(model) if shard.key.startswith(prefixes)]
    mismatch = source.compare(shards, lambda name: name.startswith(prefixes))
    source.require(mismatch, strict=strict)
    source.read([source.in_best_precision(shard) for shard in shards if shard.key in source.shapes])
    return mismatch


def save_weights(path: str | Path, model: HeteroMimoModel) -> None:
    """Write the weights of a model as a checkpoint; collective over the world."""
    _save(Path(path), model_shards(model))


def export_weights(checkpoint: str | Path, file: str | Path) -> None:
    """Write the weights of a checkpoint into a single safetensors file; in one process, holding one tensor at a time.

    Raises:
        CheckpointError: if the checkpoint is not whole.
    """
    source = Checkpoint(Path(checkpoint))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = {dtype: name for name, dtype in _DTYPES.items()}
    stored = {name: source.index.state_dict_metadata[name] for name in sorted(source.shapes) if is_weight(name)}
    for name, tensor in stored.items():
        dtype = tensor.properties.dtype
        begin, end = end, end + prod(tensor.size) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(tensor.size), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    # tensors start at a multiple of 8 bytes
    encoded += b" " * (-len(encoded) % 8)
    file = Path(file)
    unfinished = file.with_name(f".unfinished-{file.name}")
    with unfinished.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)))
        out.write(encoded)
        for name, tensor in stored.items():
            whole = torch.empty(tensor.size, dtype=tensor.properties.dtype)
            source.read([ShardedTensor.from_rank_offsets(name, whole)])
            out.write(whole.flatten().view(torch.uint8).numpy())
        out.flush()
        os.fsync(out.fileno())
    unfinished.replace(file)


def import_weights(file: str | Path, checkpoint: str | Path) -> None:
    """Make a checkpoint of the weights in a safetensors file; in one process, holding one tensor at a time.

    Every verb of a Trainer but ``fit`` takes it; to start a ``fit`` from it see ``MimoModule.load_weights``.

    Raises:
        CheckpointError: if it is no safetensors file.
    """
    source = WeightsFile(Path(file))
    with _process_group():
        _save(Path(checkpoint), source.mapped())


def _save(path: Path, shards: list[ShardedTensor]) -> None:
    # what Lightning needs to load a checkpoint
    state = {"pytorch-lightning_version": lightning.__version__, "epoch": 0, "global_step": 0, "state_dict": {}}
    writer = CheckpointWriter(in_background=False, on_failure="raise", timeout=timedelta(minutes=30))
    writer.save(path, shards, state)
    writer.close()


@contextmanager
def _process_group() -> Iterator[None]:
    """The one that there is, or one of this process alone."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
