"""Reading without running code: nothing in a checkpoint is unpickled but tensors, plain values and one index.

``torch.distributed.checkpoint`` keeps its index, ``.metadata``, as a pickle, and reads it by ``pickle.load``. Here it
may only name the classes that an index is made of.
"""

import io
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mimo_strategy.checkpoint.errors import CheckpointError

INDEX = ".metadata"

_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index needs")


def read_index(directory: Path, files: Collection[str]) -> Metadata:
    """Names, shapes and places of all tensors of a checkpoint.

    Args:
        directory: the checkpoint.
        files: names of the files that tensors may be in.

    Raises:
        CheckpointError: if the index is missing or damaged, holds anything but an index, or points to other files.
    """
    path = directory / INDEX
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(index, Metadata):
            raise TypeError(f"it holds a {type(index).__name__}")
        for place in index.storage_data.values():
            if place.relative_path not in files:
                raise ValueError(f"it points to {place.relative_path!r}, which is not of this checkpoint")
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return index


def tensor_shapes(index: Metadata) -> dict[str, torch.Size]:
    """Shapes of the whole tensors, by name."""
    return {
        name: stored.size
        for name, stored in index.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


def read_object(path: Path, *, offset: int = 0, length: int = -1) -> Any:
    """What ``torch.save`` wrote into a file, or at a place of it; tensors and plain values only.

    Raises:
        CheckpointError: if it is missing or damaged, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} cannot be read: it holds more than tensors and plain values") from None
    except Exception as error:  # a damaged file raises anything
        raise CheckpointError(f"{path} cannot be read: {error}") from None
