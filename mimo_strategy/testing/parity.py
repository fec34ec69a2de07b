"""Train a model on one process and on many ranks, and compare every step.

A layout has many ways to be wrong that a falling loss does not show: a shard that misses a reduction, lanes that
weigh wrongly, experts divided by the wrong number. Against one process they all show.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from mimo_strategy.module import MimoModule
from mimo_strategy.optimizer import ModuleOptimizer
from mimo_strategy.strategy import MimoHeteroStrategy
from mimo_strategy.testing.ranks import run_on_ranks, trainer_ranks
from mimo_strategy.testing.report import Comparison, Difference, Quantity, Size, Tolerances
from mimo_strategy.testing.shards import Shard, assemble, gradient_shards, weight_shards

# Every initial weight is moved by noise of this size: equal ones would hide shards that are swapped or left out.
_START_NOISE = 0.02


@dataclass
class Step:
    """What one process saw in an optimizer step.

    Attributes:
        loss: mean per token.
        grad_norm: before clipping.
        gradients: before clipping, by parameter.
        weights: parameters and buffers after the step.
    """

    loss: float = float("nan")
    grad_norm: float = float("nan")
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Reference:
    """A model trained on one process under Lightning's plain single-device strategy, in float32.

    Example::

        reference = Reference(MyModule, make_loader)
        reference.assert_alike(MimoHeteroStrategy({"images": ModuleParallel(dp=4), ...}), world_size=4)

    Args:
        make_module: makes the module; called on every rank.
        make_data: makes the loader of step batches, the same in the same order at every call.
        num_steps: optimizer steps.
        gradient_clip_val: as ``Trainer`` takes it.
        accelerator: where one process and ranks run.
        timeout: seconds that any of the trainings may take; ``None`` is as for :func:`run_on_ranks`.

    Attributes:
        start: weights that every training starts from, by name.
        steps: what the one process saw.
    """

    def __init__(
        self,
        make_module: Callable[[], MimoModule],
        make_data: Callable[[], Iterable],
        *,
        num_steps: int = 3,
        gradient_clip_val: float = 1.0,
        accelerator: Literal["cpu", "gpu"] = "cpu",
        timeout: float | None = None,
    ) -> None:
        self._make_module = make_module
        self._make_data = make_data
        self._num_steps = num_steps
        self._gradient_clip_val = gradient_clip_val
        self._accelerator = accelerator
        self._timeout = timeout
        ((self.start, self.steps),) = run_on_ranks(self._train_alone, 1, accelerator=accelerator, timeout=timeout)

    def compare(
        self,
        strategy: MimoHeteroStrategy,
        world_size: int,
        make_module: Callable[[], MimoModule] | None = None,
    ) -> Comparison:
        """Train on ``world_size`` ranks under ``strategy``, from the same weights, and measure every difference.

        Args:
            strategy: not used by any Trainer before.
            world_size: number of ranks.
            make_module: where the layout needs another module than the reference, with the same tensors.
        """
        every_rank = run_on_ranks(
            self._train_on_rank,
            world_size,
            strategy,
            make_module or self._make_module,
            accelerator=self._accelerator,
            timeout=self._timeout,
        )
        return Comparison.merge(every_rank, self._sizes(), self._update_norms())

    def assert_alike(
        self,
        strategy: MimoHeteroStrategy,
        world_size: int,
        make_module: Callable[[], MimoModule] | None = None,
        tolerances: Tolerances | None = None,
    ) -> Comparison:
        """Compare, see :meth:`compare`, and check.

        Raises:
            AssertionError: if a difference exceeds its tolerance; the message tells parameter, rank, shard, step
                and size of the largest.
        """
        comparison = self.compare(strategy, world_size, make_module)
        comparison.check(tolerances or Tolerances())
        return comparison

    def _train_alone(self) -> tuple[dict[str, Tensor], list[Step]]:
        recorder = _Recorder()
        self._fit("auto", self._make_module, recorder)
        return recorder.start, recorder.steps

    def _train_on_rank(self, strategy: MimoHeteroStrategy, make_module: Callable[[], MimoModule]) -> list[Difference]:
        comparer = _Comparer(self.start, self.steps)
        self._fit(strategy, make_module, comparer)
        return comparer.differences

    def _fit(
        self, strategy: MimoHeteroStrategy | str, make_module: Callable[[], MimoModule], observer: "_Observer"
    ) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning")
        seed_everything(1, verbose=False)
        trainer = Trainer(
            accelerator=self._accelerator,
            **trainer_ranks(),
            strategy=strategy,
            max_steps=self._num_steps,
            gradient_clip_val=self._gradient_clip_val,
            callbacks=[observer],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            # Lightning's would shuffle
            use_distributed_sampler=False,
        )
        trainer.fit(make_module(), self._make_data())

    def _sizes(self) -> dict[Quantity, Size]:
        sizes = {}
        for number, step in enumerate(self.steps, 1):
            sizes[Quantity("loss", number, "")] = Size(abs(step.loss), 1)
            sizes[Quantity("grad_norm", number, "")] = Size(abs(step.grad_norm), 1)
            for check, tensors in (("gradient", step.gradients), ("weight", step.weights)):
                for name, tensor in tensors.items():
                    sizes[Quantity(check, number, name)] = Size(_norm(tensor), tensor.numel())
        return sizes

    def _update_norms(self) -> dict[Quantity, float]:
        return {
            Quantity("weight", number, name): _norm(weight.double() - self.start[name].double())
            for number, step in enumerate(self.steps, 1)
            for name, weight in step.weights.items()
        }


class _Observer(Callback):
    """Is told of every step what an optimizer and a user see of it."""

    def __init__(self) -> None:
        self._grad_norm = math.nan

    def on_train_start(self, trainer: Trainer, module: MimoModule) -> None:
        self.begin(weight_shards(module))

    def on_before_optimizer_step(self, trainer: Trainer, module: MimoModule, optimizer: torch.optim.Optimizer) -> None:
        shards = gradient_shards(module, optimizer)
        if not isinstance(optimizer, ModuleOptimizer):
            self._grad_norm = torch.nn.utils.get_total_norm([shard.data for shard in shards]).item()
        self.see_gradients(shards)

    def on_train_batch_end(
        self, trainer: Trainer, module: MimoModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, ModuleOptimizer):
            self._grad_norm = math.nan if optimizer.grad_norm is None else optimizer.grad_norm
        self.see_step(outputs["loss"].item(), self._grad_norm, weight_shards(module))

    def begin(self, weights: list[Shard]) -> None:
        raise NotImplementedError

    def see_gradients(self, gradients: list[Shard]) -> None:
        raise NotImplementedError

    def see_step(self, loss: float, grad_norm: float, weights: list[Shard]) -> None:
        raise NotImplementedError


class _Recorder(_Observer):
    """Moves the initial weights and keeps all that the one process sees."""

    def __init__(self) -> None:
        super().__init__()
        self.start: dict[str, Tensor] = {}
        self.steps: list[Step] = []
        self._gradients: dict[str, Tensor] = {}

    def begin(self, weights: list[Shard]) -> None:
        generator = torch.Generator().manual_seed(1)
        for shard in weights:
            if shard.data.is_floating_point():
                shard.data.add_(torch.randn(shard.data.shape, generator=generator).to(shard.data), alpha=_START_NOISE)
        self.start = _on_cpu(assemble(weights))

    def see_gradients(self, gradients: list[Shard]) -> None:
        self._gradients = _on_cpu(assemble(gradients))

    def see_step(self, loss: float, grad_norm: float, weights: list[Shard]) -> None:
        self.steps.append(Step(loss, grad_norm, self._gradients, _on_cpu(assemble(weights))))


class _Comparer(_Observer):
    """Starts from given weights and compares all that a rank sees with the reference."""

    def __init__(self, start: dict[str, Tensor], steps: list[Step]) -> None:
        super().__init__()
        self.differences: list[Difference] = []
        self._start = start
        self._steps = steps
        self._step = 1

    def begin(self, weights: list[Shard]) -> None:
        for shard in weights:
            shard.data.copy_(self._start[shard.name][shard.place])

    def see_gradients(self, gradients: list[Shard]) -> None:
        self._compare_tensors("gradient", gradients, self._steps[self._step - 1].gradients)

    def see_step(self, loss: float, grad_norm: float, weights: list[Shard]) -> None:
        step = self._steps[self._step - 1]
        for check, value, expected in (("loss", loss, step.loss), ("grad_norm", grad_norm, step.grad_norm)):
            self.differences.append(Difference(Quantity(check, self._step, ""), "", 1, value - expected))
        self._compare_tensors("weight", weights, step.weights)
        self._step += 1

    def _compare_tensors(self, check: str, shards: list[Shard], expected: dict[str, Tensor]) -> None:
        for shard in shards:
            whole = expected.get(shard.name)
            difference = math.inf
            if whole is not None:
                difference = _norm(shard.data.cpu().double() - whole[shard.place].double())
            self.differences.append(
                Difference(Quantity(check, self._step, shard.name), _describe(shard), shard.data.numel(), difference)
            )


def _describe(shard: Shard) -> str:
    """The shard's place as one would index the whole tensor; nothing if it is all of it."""
    ends = [
        ":"
        if isinstance(at, slice) and (at.start, at.stop) == (0, size)
        else f"{at.start}:{at.stop}"
        if isinstance(at, slice)
        else str(at)
        for at, size in zip(shard.place, shard.whole_shape, strict=True)
    ]
    return "" if set(ends) <= {":"} else f"[{', '.join(ends)}]"


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.double()).item()


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
