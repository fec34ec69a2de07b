"""Start the ranks as DDP does, after checking in one process what can be checked."""

import signal
from collections.abc import Callable
from typing import Any, NoReturn, override

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mimo_strategy.checkpoint.directory import newest_whole
from mimo_strategy.failures import print_causes_once
from mimo_strategy.frame_stack import call_with_room
from mimo_strategy.lightning_private import SubprocessScriptLauncher, checkpoint_patterns


class CheckingLauncher(SubprocessScriptLauncher):
    """Runs ``check(trainer, model, *data)`` before any other process starts, so that what cannot work is reported once.

    ``data`` are the DataLoaders and the LightningDataModule that the Trainer was given. Where it was given the
    checkpoint path ``last``, the newest whole one takes its place; Lightning would take a damaged one too.
    """

    def __init__(self, check: Callable[..., None], *args: Any) -> None:
        super().__init__(*args)
        self._check = check

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return self.num_processes * self.num_nodes == 1

    @override
    def launch(self, function: Callable, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        if args and isinstance(args[0], LightningModule):
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
            self._check(trainer, *args)
            if self.cluster_environment.creates_processes_externally:
                print_causes_once()
        args = [_last_checkpoint(trainer) if isinstance(arg, str) and arg == "last" else arg for arg in args]
        try:
            return super().launch(call_with_room, function, *args, trainer=trainer, **kwargs)
        except SIGTERMException as ended:
            # as a process that the signal ends: a run that is not done must not look like one that is
            ended.code = 128 + signal.SIGTERM
            raise

    @override
    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        print_causes_once(self.procs)


def _last_checkpoint(trainer: Trainer) -> str:
    found = newest_whole(checkpoint_patterns(trainer))
    return str(found) if found else "last"


def refuse_launcher(start_method: str) -> NoReturn:
    """Say why ranks are not started by ``start_method``.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"MimoHeteroStrategy does not start ranks from {start_method}: they would inherit CUDA, threads and random "
        "states of this process, and could not return a model of which each holds another part. Put the Trainer in a "
        "script and run it by `python`, `torchrun` or `srun`; a notebook can train with devices=1"
    )
