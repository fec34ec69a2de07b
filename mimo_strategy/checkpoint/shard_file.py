"""The file of one rank's shards, in the format of ``torch.distributed.checkpoint``, and the index of all of them."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import override

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

from mimo_strategy.checkpoint.manifest import ChecksummedFile, Files, write_file
from mimo_strategy.checkpoint.safe_reading import INDEX


@dataclass(frozen=True)
class ShardFile:
    """What a rank has written: which shards, where each is, and the file's entry in the manifest."""

    plan: SavePlan
    places: dict[MetadataIndex, _StorageInfo]
    files: Files


class ShardFileStrategy(TorchDistSaveShardedStrategy):
    """Writes one rank's file, one tensor at a time.

    Upstream copies all tensors first, takes part in collectives over the default process group, which a background
    thread must not, and hides why writing failed.

    Attributes:
        written: after :meth:`async_save`.
    """

    written: ShardFile

    @override
    def async_save(
        self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path, async_strategy: str = "nvrx"
    ) -> AsyncRequest:
        by_name, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        planner = _planner()
        planner.set_up_planner(mcore_to_pyt_state_dict(by_name), is_coordinator=False)
        plan = planner.create_local_plan()
        name = f"__{dist.get_rank()}_0.distcp"
        places, files = {}, {}
        if plan.items:
            with ChecksummedFile(Path(checkpoint_dir) / name) as file:
                for item in plan.items:
                    begin = file.tell()
                    data = planner.resolve_data(item)
                    if item.type is WriteItemType.BYTE_IO:
                        file.write(data.getbuffer())
                    else:
                        torch.save(_without_neighbours(data), file)
                    places[item.index] = _StorageInfo(name, begin, file.tell() - begin)
            files[name] = file.entry
        self.written = ShardFile(plan, places, files)
        return AsyncRequest(None, (), [])


def write_index(directory: Path, written: Sequence[ShardFile]) -> Files:
    """Write the index of all ranks' files.

    Raises:
        ValueError: if the shards leave gaps in a tensor or overlap.
    """
    _, index = _planner().create_global_plan([of_rank.plan for of_rank in written])
    index.storage_data = {place: where for of_rank in written for place, where in of_rank.places.items()}
    index.storage_meta = StorageMeta()
    return write_file(directory / INDEX, lambda file: pickle.dump(index, file))


def _planner() -> MCoreSavePlanner:
    return MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def _without_neighbours(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU in storage of its own: ``torch.save`` writes all of a storage."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
