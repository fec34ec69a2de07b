"""All that ``mimo layout`` tells of a layout, as plain data."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mimo_strategy.layout import LANGUAGE, Layout, LayoutError, ModuleLayout, ModuleParallel
from mimo_strategy.planning.cost import CostUnknown
from mimo_strategy.planning.estimate import Estimate, Estimator, Job
from mimo_strategy.planning.groups import feeds, groups, lane_ranks, samples_per_lane
from mimo_strategy.planning.memory import gibibytes


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank; parameters, gradients and optimizer state are exact, activations estimated."""

    parameters: int
    gradients: int
    optimizer: int
    activations: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class LayoutReport:
    """A layout that was asked for.

    Attributes:
        job: model, step batch and machine.
        num_microbatches: microbatches of a step.
        layout: as resolved; if a check failed, ``None``.
        failures: the checks that failed.
        suggestion: what would pass instead.
        estimate: memory and time; ``None`` if the model does not tell its costs, or a check failed.
        unknown: why there is no estimate.
    """

    job: Job
    num_microbatches: int
    layout: Layout | None
    failures: tuple[str, ...]
    suggestion: str
    estimate: Estimate | None
    unknown: str

    @cached_property
    def samples(self) -> Mapping[str, int]:
        """Samples of a lane in a microbatch, by module; empty without a batch size."""
        batch_size = self.job.batch_size
        return samples_per_lane(self.layout, batch_size, self.num_microbatches) if batch_size else {}

    def memory(self, module: ModuleLayout, rank: int) -> RankMemory:
        """What ``rank`` holds of ``module``."""
        stage = module.coordinates(rank)["pp"]
        memory = self.estimate.stages[module.name][stage].memory
        return RankMemory(
            memory.parameters,
            memory.gradients,
            memory.optimizer(module, rank),
            self.estimate.activations[module.name][stage],
        )

    @property
    def overflow(self) -> str:
        """That the fullest rank needs more than there is; empty if it does not, or nothing is estimated."""
        memory = self.job.machine.memory
        if self.estimate is None or self.estimate.peak_bytes <= memory:
            return ""
        return (
            f"a rank needs about {gibibytes(self.estimate.peak_bytes)}, a device has {gibibytes(memory)}: "
            "take more microbatches, recompute_layers, or a layout that `mimo plan` finds"
        )

    def layers(self, module: ModuleLayout, stage: int) -> dict[str, int]:
        """Kinds of layers of a stage and how many of each, in the order of their first."""
        return dict(Counter(layer.name for layer in self.estimate.stages[module.name][stage].cost.stages[stage]))

    def as_json(self) -> dict[str, Any]:
        """What can be told, for scripts."""
        told: dict[str, Any] = {
            "fits": not self.failures,
            "failures": list(self.failures),
            "suggestion": self.suggestion or None,
            "overflow": self.overflow or None,
            "batch_size": self.job.batch_size or None,
            "num_microbatches": self.num_microbatches,
            "encoder_batching": self.job.encoder_batching,
            "encoder_ahead": self.job.encoder_ahead,
        }
        if self.layout is None:
            return told
        told["world_size"] = self.layout.world_size
        told["placement"] = self.layout.placement.value
        told["modules"] = {name: self._module(module) for name, module in self.layout.modules.items()}
        language = self.layout.modules[LANGUAGE]
        told["bridges"] = {
            name: [{"from": list(feed.encoder), "to": list(feed.language)} for feed in feeds(module, language)]
            for name, module in self.layout.modules.items()
            if name != LANGUAGE
        }
        if self.estimate is not None:
            told["seconds"] = {"step": self.estimate.step_seconds} | dict(self.estimate.seconds)
        told["ranks"] = [self._rank(rank) for rank in range(self.layout.world_size)]
        return told

    def _module(self, module: ModuleLayout) -> dict[str, Any]:
        told: dict[str, Any] = {
            factor: getattr(module, factor) for factor in ("tp", "cp", "dp", "pp", "etp", "ep", "edp")
        }
        told["ranks"] = [module.ranks.start, module.ranks.stop - 1]
        told["samples_per_lane_and_microbatch"] = self.samples.get(module.name)
        told["lanes"] = [
            [[ranks.start, ranks.stop - 1] for ranks in (lane_ranks(module, lane, stage) for stage in range(module.pp))]
            for lane in range(module.dp)
        ]
        if self.estimate is not None:
            told["stages"] = [self.layers(module, stage) for stage in range(module.pp)]
        return told

    def _rank(self, rank: int) -> dict[str, Any]:
        told = {}
        for name, module in self.layout.modules.items():
            if rank in module.ranks:
                told[name] = {"coordinates": module.coordinates(rank)}
                # as first, last and distance: a list of every rank would grow with the square of the world
                told[name]["groups"] = {
                    factor: [ranks[0], ranks[-1], ranks.step] for factor, ranks in groups(module, rank).items()
                }
                if self.estimate is not None:
                    memory = self.memory(module, rank)
                    told[name]["bytes"] = vars(memory) | {"total": memory.total}
        return told


def report_layout(
    job: Job, world_size: int, modules: Mapping[str, ModuleParallel] | None, num_microbatches: int
) -> LayoutReport:
    """Resolve and check a layout, and estimate it if it fits.

    Args:
        job: model, step batch and machine; a ``batch_size`` of 0 is unknown.
        world_size: number of ranks.
        modules: the layout asked for; ``None`` is the default.
        num_microbatches: microbatches of a step.
    """
    layout, suggestion, estimate, unknown = None, "", None, ""
    failures: tuple[str, ...] = ()
    try:
        layout = Layout.resolve(job.model.module_sizes(), world_size, modules)
    except LayoutError as error:
        failures, suggestion = error.failures, error.suggestion
    if layout is not None:
        failures = layout.schedule_failures(job.encoder_batching, job.encoder_ahead, cuda_graphs=job.cuda_graphs)
    if layout is not None and job.batch_size:
        try:
            layout.check_batch(job.batch_size, num_microbatches)
        except ValueError as error:
            failures += (str(error),)
    if layout is not None and not failures:
        try:
            if not job.batch_size:
                raise CostUnknown("the data do not tell their batch_size: give --batch-size to estimate memory")
            estimate = Estimator(job).estimate(layout, num_microbatches)
        except CostUnknown as error:
            unknown = str(error)
    return LayoutReport(job, num_microbatches, layout, failures, suggestion, estimate, unknown)
