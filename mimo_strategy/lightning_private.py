"""The private names of Lightning that this package imports, in one place: a new release is checked here first."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.connector import _convert_precision_to_unified_args as unified_precision
from lightning.fabric.utilities.distributed import _DatasetSamplerWrapper as DatasetSampler
from lightning.fabric.utilities.distributed import _init_dist_connection as init_dist_connection
from lightning.fabric.utilities.imports import _IS_INTERACTIVE as IS_INTERACTIVE
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.core.optimizer import _MockOptimizer as NoOptimizer
from lightning.pytorch.loops.progress import _BatchProgress as BatchProgress
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper as IndexBatchSampler
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as SubprocessScriptLauncher

__all__ = [
    "IS_INTERACTIVE",
    "BatchProgress",
    "IndexBatchSampler",
    "NoOptimizer",
    "SubprocessScriptLauncher",
    "begin_next_epoch",
    "checkpoint_patterns",
    "init_dist_connection",
    "inner_sampler",
    "logging_as",
    "position_in_epoch",
    "set_up_loaders_anew",
    "take_over_signals",
    "unified_precision",
]


def begin_next_epoch(trainer: Trainer) -> None:
    """Let a run that goes on from the end of an epoch begin the next one, with its hooks and counts.

    Lightning 2.6 takes a checkpoint of an epoch's last batch for one of its middle, and does not count the epoch that
    it begins: a checkpoint from within that one looks like an epoch's end, and a run that goes on from it would begin
    the epoch again. Under ``max_steps`` a checkpoint of an epoch's end leads to one more batch of that epoch.
    """
    loop = trainer.fit_loop
    if not loop.restarting or loop.epoch_progress.current.processed < loop.epoch_progress.current.ready:
        return
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
    was_saved_after = loop.epoch_loop.restarted_on_last and loop.epoch_loop.batch_progress.is_last_batch
    if loop.restarted_on_epoch_end or was_saved_after:
        loop.epoch_loop.restarting = False
    loop.reset_restart_stage()


def checkpoint_patterns(trainer: Trainer) -> set[Path]:
    """Names of the checkpoints that a run may go on from, ``folder/*.ckpt``.

    The Trainer's callbacks keep them, or kept them for earlier versions of the logger's run. In a job that Slurm has
    queued again there may also be what was saved when it was told to end.
    """
    folders = set()
    for callback in trainer.callbacks:
        if isinstance(callback, OnExceptionCheckpoint):
            folders.add(Path(callback.dirpath))
        elif isinstance(callback, ModelCheckpoint):
            folder = Path(callback._ModelCheckpoint__resolve_ckpt_dir(trainer))
            folders.add(folder)
            if folder.parent.name.startswith("version_"):
                folders |= set(folder.parent.parent.glob(f"version_*/{folder.name}"))
    patterns = {folder / "*.ckpt" for folder in folders}
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        patterns.add(Path(trainer.default_root_dir) / "hpc_ckpt_*.ckpt")
    return patterns


def inner_sampler(sampler: Any) -> Any:
    """What a sampler takes its samples from, ``None`` if it makes them itself."""
    dataset = getattr(sampler, "dataset", None)
    return dataset._sampler if isinstance(dataset, DatasetSampler) else getattr(sampler, "sampler", None)


def position_in_epoch(progress: BatchProgress) -> int:
    """How many step batches of the running epoch have been trained on; 0 where these are all of it."""
    trained = progress.current.processed
    return 0 if progress.is_last_batch and trained == progress.current.ready else trained


@contextmanager
def logging_as(module: LightningModule, hook: str) -> Iterator[None]:
    """Let ``module.log`` take what it is given as logged in ``hook``; not in every hook it may be called."""
    running = module._current_fx_name
    module._current_fx_name = hook
    try:
        yield
    finally:
        module._current_fx_name = running


def set_up_loaders_anew(trainer: Trainer) -> None:
    """Let the fit loop set up its loaders once more, now that a checkpoint has their state.

    Lightning 2.6 reads that state only where it sets them up, and leaves out to do so if a scheduler has asked for the
    number of steps before (``estimated_stepping_batches``): a run would go on with the first batches of its epoch.
    """
    trainer.fit_loop._combined_loader = None


def take_over_signals(trainer: Trainer) -> bool:
    """Keep the loop from asking in every step whether rank 0 got SIGTERM, and return whether this rank already did.

    Lightning 2.6 broadcasts that before each batch and reads the answer, for which a GPU's host waits until the device
    has done all that it was given.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    connector = trainer._signal_connector
    received, connector.received_sigterm = connector.received_sigterm, False
    return received
