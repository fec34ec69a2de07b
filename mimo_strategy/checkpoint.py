"""Checkpoints: directories that every rank writes its shards to, readable by any layout."""

import queue
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.mimo.optimizer import MimoOptimizer

from mimo_strategy.runtime.distributed_optimizer import distributed_parts
from mimo_strategy.runtime.model import HeteroMimoModel

_LIGHTNING_STATE = "lightning.pt"
_UNFINISHED = ".unfinished-"

# Optimizer states that load in any layout, under keys that do not depend on whether there are experts.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

# megatron-core 0.19.2 collects the results of its writer threads through a manager process, spawned per rank, which
# imports the main script again. Threads of one process need no more than a queue.
filesystem_async._results_queue = queue.Queue()


def sharded_state(model: HeteroMimoModel, optimizer: MimoOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    """This rank's shards of model and optimizer: what to save, or what to load into.

    Args:
        model: the model, wrapped or not; the names of its shards are the same.
        optimizer: ``None`` leaves it out.
        is_loading: whether the shards will be loaded into.
    """
    state = {"model": model.sharded_state_dict(metadata=_METADATA)}
    for shard in state["model"].values():
        # Wrappers, whose number depends on the precision, must not show in the names.
        shard.key = re.sub(r"^(language_model|modality_submodules\.\w+)(\.module)+\.", r"\1.", shard.key)
    if optimizer is not None:
        # Of each part only the tensors. MimoOptimizer would add objects that name the parts, of which there are more
        # with expert parallelism than without.
        state["optimizer"] = {
            name: part.sharded_state_dict(state["model"], is_loading, metadata=_METADATA)["param_state"]
            for name, part in distributed_parts(optimizer).items()
        }
    return state


def save(directory: Path, shards: dict[str, Any], lightning_state: dict[str, Any]) -> None:
    """Write a checkpoint directory; collective over the world.

    It appears under its name when it is complete, in place of one that was there.

    Args:
        directory: the checkpoint.
        shards: from :func:`sharded_state`.
        lightning_state: the rest, the same on every rank.
    """
    unfinished = directory.with_name(_UNFINISHED + directory.name)
    is_first = dist.get_rank() == 0
    if is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(shards, str(unfinished))
    if is_first:
        torch.save(lightning_state, unfinished / _LIGHTNING_STATE)
        if directory.exists():
            shutil.rmtree(directory)
        unfinished.rename(directory)
    dist.barrier()


def load_lightning_state(directory: Path) -> dict[str, Any]:
    """What Lightning keeps in a checkpoint: loops, callbacks, schedulers, hyper-parameters.

    Raises:
        FileNotFoundError: if ``directory`` is no checkpoint of this strategy.
    """
    path = directory / _LIGHTNING_STATE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no checkpoint of MimoHeteroStrategy: it has no {_LIGHTNING_STATE}")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_shards(
    directory: Path, model: HeteroMimoModel, optimizer: MimoOptimizer | None, *, num_updates: int = 0
) -> None:
    """Load model and, if given, optimizer from a checkpoint that any layout wrote; collective over the world.

    Args:
        directory: the checkpoint.
        model: the wrapped model.
        optimizer: ``None`` leaves it as it is.
        num_updates: updates that the optimizer had made when it was saved.
    """
    state = dist_checkpointing.load(sharded_state(model, optimizer, is_loading=True), str(directory))
    model.load_state_dict(state["model"])
    for name, part in distributed_parts(optimizer).items() if optimizer is not None else ():
        settings = part.state_dict()
        for group in settings["optimizer"]["param_groups"]:
            group["step"] = num_updates
        part.load_state_dict(
            settings
            | {
                "param_state": state["optimizer"][name],
                "param_state_sharding_type": _METADATA["distrib_optim_sharding_type"],
            }
        )
