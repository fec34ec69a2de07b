"""Signals that end a job, acted upon by all ranks at the end of the same step."""

import signal
from types import FrameType
from typing import Any, override

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_warn

from mimo_strategy.lightning_private import take_over_signals

_NAME = "_preempted"


class Preemption(Callback):
    """Delays Lightning's handlers of SIGTERM and of Slurm's requeue signal to the end of a step.

    Lightning runs them wherever a rank happens to be, and both communicate: ranks that a signal interrupts at
    different points, or of which only one gets it, would wait for each other forever. Here a rank notes the signal
    and tells the others with the loss of its next step, after which all of them save and requeue, or stop. So the
    collective by which Lightning asks rank 0 in every step is not needed either.
    """

    def __init__(self) -> None:
        self._received: set[int] = set()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received = {signal.SIGTERM} if take_over_signals(trainer) else set()
        for number in _signals(trainer):
            signal.signal(number, self._note)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # a signal may come at any time
        received, self._received = self._received, set()
        for number in received:
            pl_module.runtime.sums.add(f"{_NAME}/{number}", 1.0, 1)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        connector = trainer._signal_connector
        for number in _signals(trainer):
            if f"{_NAME}/{number}" not in pl_module.runtime.reported:
                continue
            if number == signal.SIGTERM:
                rank_zero_warn(f"SIGTERM ends the run after step {trainer.global_step}")
                # Lightning raises SIGTERMException after the batch
                connector.received_sigterm = True
            else:
                connector._slurm_sigusr_handler_fn(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.add(number)


def _signals(trainer: Trainer) -> list[signal.Signals]:
    environment = trainer.strategy.cluster_environment
    requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
    return [signal.SIGTERM, signal.Signals(environment.requeue_signal)] if requeues else [signal.SIGTERM]
