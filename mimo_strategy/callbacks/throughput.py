"""Tokens per second of the whole step batch."""

import time
from typing import Any, override

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mimo_strategy.step_batch import Batch


class Throughput(Callback):
    """Logs ``tokens/s``: tokens of the step batch, over all lanes, per second of a training step.

    A step lasts from the end of the one before it, so that waiting for data counts, and validation does not. The
    slowest rank's time counts, on every rank.
    """

    def __init__(self) -> None:
        self._step_began: float | None = None

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_began = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_began = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._step_began is not None:
            share = pl_module.runtime.share
            tokens = batch["input_ids"].numel() * share.num_lanes
            seconds = trainer.strategy.reduce(torch.tensor(now - self._step_began), reduce_op="max")
            pl_module.log("tokens/s", round(tokens / seconds.item()), prog_bar=True, batch_size=1)
        self._step_began = time.perf_counter()
