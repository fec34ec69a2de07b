"""How fast training is: tokens, time and floating-point operations of whole steps, over all ranks."""

import time
from typing import Any, override

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from mimo_strategy.layout import LANGUAGE
from mimo_strategy.module import MimoModule
from mimo_strategy.runtime.step_sums import Reported
from mimo_strategy.step_batch import Batch

_NAME = "_throughput"


class Throughput(Callback):
    """Logs speed of the step before, the same on every rank; its numbers are reduced with the step's loss.

    - ``tokens/s``: tokens of the step batch, over all lanes, per second;
    - ``step_time``: seconds from the end of one step to that of the next, so that waiting for data counts and
      validation does not; the mean over ranks;
    - ``TFLOP/s``: floating-point operations of the model, per second and device, if the model tells them;
    - ``mfu/MODULE``: of those that the module's devices could do in that time, the share that its model needed
      (model-FLOP utilisation, arXiv 2204.02311), if their peak is known. It counts the time of the whole step, also
      that in which a module's devices do nothing or, if colocated, run the others.

    Operations of a module are 3 x its forward pass: the backward pass costs twice as much. A frozen encoder has none,
    a frozen language model half of it.

    Args:
        peak_flops: operations per second of a device; ``None`` looks it up by the name of the GPU.

    Raises:
        ValueError: when fitting starts under another strategy.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        self._peak_flops = peak_flops
        self._step_began: float | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.runtime is None:
            raise ValueError(
                "Throughput counts by the layout of MimoHeteroStrategy, there is none under "
                f"{type(trainer.strategy).__name__}"
            )
        self._step_began = None
        if self._peak_flops is None and trainer.strategy.root_device.type == "cuda":
            self._peak_flops = get_available_flops(trainer.strategy.root_device, pl_module.build_context.dtype)

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
        runtime = pl_module.runtime
        if _NAME in runtime.reported:
            self._log(pl_module, runtime.reported[_NAME])
        now = time.perf_counter()
        if self._step_began is not None:
            modules = runtime.topology.layout.modules
            counted = [now - self._step_began, _part(pl_module, LANGUAGE) * batch["input_ids"].numel()]
            counted += [_part(pl_module, name) * _step_flops(pl_module, name, batch) for name in modules]
            runtime.sums.add(_NAME, torch.tensor(counted, dtype=torch.float64), 1)
        self._step_began = now

    def _log(self, module: MimoModule, reported: Reported) -> None:
        layouts = module.runtime.topology.layout.modules
        world_size = module.runtime.topology.layout.world_size
        seconds, tokens, *flops = reported.sum
        seconds = seconds / reported.count
        module.log("tokens/s", (tokens / seconds).float(), prog_bar=True, batch_size=1)
        module.log("step_time", seconds.float(), batch_size=1)
        if not is_overridden("forward_flops", module, MimoModule):
            return
        module.log("TFLOP/s", (sum(flops) / seconds / world_size / 1e12).float(), batch_size=1)
        if self._peak_flops is not None:
            for layout, own in zip(layouts.values(), flops, strict=True):
                share = own / seconds / (self._peak_flops * layout.num_ranks)
                module.log(f"mfu/{layout.name}", share.float(), batch_size=1)


def _part(module: MimoModule, name: str) -> float:
    """What this rank counts of the samples that it loaded, so that all ranks of a module count each sample once."""
    topology, share = module.runtime.topology, module.runtime.share
    return share.num_lanes / topology.layout.modules[name].num_ranks if topology.runs(name) else 0.0


def _step_flops(module: MimoModule, name: str, batch: Batch) -> float:
    own = module.runtime.model.own_modules()
    if name not in own:
        return 0.0
    trains = any(parameter.requires_grad for parameter in own[name].parameters())
    # gradients pass through a frozen language model on their way to an encoder
    return module.forward_flops(name, batch) * (3 if trains else 2 if name == LANGUAGE else 1)
