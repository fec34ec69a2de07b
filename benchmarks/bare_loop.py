"""What a script on megatron-core itself would do in a step, without Lightning and without the strategy."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from mimo_strategy import DistributedDataParallelConfig, OptimizerConfig
from mimo_strategy.layout import LANGUAGE, Layout
from mimo_strategy.module import MimoModule
from mimo_strategy.runtime.data_parallel import wrap_modules
from mimo_strategy.runtime.gradients import finalize_gradients
from mimo_strategy.runtime.model import build_model
from mimo_strategy.runtime.optimizer import build_optimizer
from mimo_strategy.runtime.schedule import Schedule
from mimo_strategy.step_batch import Batch, StepShare, count_items
from mimo_strategy.topology import Topology


class BareLoop:
    """A model, its schedule and its optimizer.

    Args:
        description: tells of the modules, their forward and their loss.
        layout: the resolved layout.
        num_microbatches: microbatches per step.
        config: settings of the optimizer.
    """

    def __init__(self, description: MimoModule, layout: Layout, num_microbatches: int, config: OptimizerConfig) -> None:
        self._description = description
        self._topology = Topology(layout)
        self._model = build_model(description, self._topology, dtype=torch.float32, device=torch.device("cpu"), seed=1)
        description.model = self._model
        config_of_all = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        ddp = dict.fromkeys(self._topology.grids, config_of_all)
        wrap_modules(self._model, self._topology, ddp, torch.float32)
        self._schedule = Schedule(self._model, self._topology)
        self._model.config.finalize_model_grads_func = self._finalize
        configs = dict.fromkeys(self._topology.grids, config)
        self._optimizer = build_optimizer(self._model, self._topology, configs, ddp, torch.float32)
        self._share = StepShare(layout, dist.get_rank(), num_microbatches)

    def step(self, batch: Batch, lr: float) -> float:
        """Train on this rank's share of a step batch and return the loss of all ranks."""
        token_ids = self._description.special_token_ids
        batch = {**batch, **count_items(batch, token_ids, self._share.elsewhere)}
        self._loss = torch.zeros(2)
        self._model.zero_grad_buffer()
        parts = self._share.bridge_parts(batch)
        self._schedule.run(self._forward, list(zip(self._share.microbatches(batch), parts, strict=True)))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return (self._loss[0] / self._loss[1]).item()

    def _forward(self, microbatches: Iterator, model: torch.nn.Module) -> tuple[Any, Any]:
        microbatch, bridge_parts = next(microbatches)
        model.expect(microbatch, bridge_parts)
        return self._description.forward_step(microbatch), partial(self._loss_of, microbatch)

    def _loss_of(self, microbatch: Batch, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        loss = self._description.loss_step(output, microbatch)
        if self._topology.groups[LANGUAGE].tp.rank() == 0:
            self._loss += torch.stack((loss.sum.detach(), loss.count))
        return loss.sum, loss.count.int(), {}

    def _finalize(self, *_: Any, **__: Any) -> None:
        dist.all_reduce(self._loss)
        finalize_gradients(self._model, self._topology, self._loss[1])
