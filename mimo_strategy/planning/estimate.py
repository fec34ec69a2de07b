"""Time of a step and memory of a rank in one layout."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from mimo_strategy.layout import LANGUAGE, Layout, ModuleLayout, ModuleSizes, Placement
from mimo_strategy.planning.cost import Layer, ModuleCost, Transfer, Work, Workload
from mimo_strategy.planning.machine import Machine
from mimo_strategy.planning.memory import StageMemory, Training, stage_memory

_BACKWARD_WORK = 2.0
_BACKWARD_OPERATIONS = 1.5
"""Of the backward pass for each of the forward pass, as counted in megatron-core's layers."""
_TRAFFIC_PER_KEPT_BYTE = 4
"""What is kept is written, read for the backward pass, and has a gradient that is written and read."""
_UPDATE_PASSES = 2
"""How often a step reads and writes gradients and optimizer state: to clear, scale and measure, and to update them."""


class Costs(Protocol):
    """What an estimate asks of a model; :class:`mimo_strategy.module.MimoModule` has it."""

    def module_sizes(self) -> Mapping[str, ModuleSizes]: ...

    def module_cost(self, name: str, layout: ModuleLayout, workload: Workload) -> ModuleCost: ...


@dataclass(frozen=True)
class Job:
    """A step whose layout is sought.

    Args:
        model: tells what its modules cost.
        batch_size: samples of a step batch, over all ranks.
        length: tokens of a sequence.
        items: items of each encoder in a sample.
        training: how parameters are kept and updated.
        machine: rates of the ranks.
        encoder_batching: microbatches that colocated encoders take at once, as far as it divides their number.
        encoder_ahead: microbatches that encoders on ranks of their own run ahead.
        cuda_graphs: whether layers of the language model are replayed, which not every layout allows; what it saves of
            ``dispatch`` is not estimated.
        trainings: of the modules whose parameters are reduced or updated in another way than ``training``.
    """

    model: Costs
    batch_size: int
    length: int
    items: Mapping[str, int]
    training: Training
    machine: Machine
    encoder_batching: int = 1
    encoder_ahead: int = 0
    cuda_graphs: bool = False
    trainings: Mapping[str, Training] = field(default_factory=dict)

    def workload(self, dp: int, num_passes: int) -> Workload:
        """What one of ``dp`` lanes takes in one of its ``num_passes`` of a step."""
        samples = self.batch_size // (dp * num_passes)
        return Workload(
            samples,
            self.length,
            {name: number * samples for name, number in self.items.items()},
            self.training.element_size,
            fused=self.machine.runs_ahead,
        )


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass on a rank of one stage, forward and backward.

    Attributes:
        compute: of the device.
        traffic: of collectives, by the factor whose ranks take part.
        host: of dispatching.
        waits: whether the host's time is added to the device's, and not hidden by it.
    """

    compute: float
    traffic: Mapping[str, float]
    host: float
    waits: bool

    @cached_property
    def dispatch(self) -> float:
        """Seconds in which the device waits for the host."""
        return self.host if self.waits else max(0.0, self.host - self.compute - sum(self.traffic.values()))

    @cached_property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + sum(self.traffic.values()) + self.dispatch


@dataclass(frozen=True)
class StageEstimate:
    """One pipeline stage of a module in a layout, for one size of microbatches."""

    passes: Pass
    memory: StageMemory
    cost: ModuleCost
    reduction: float
    update: float


@dataclass(frozen=True)
class Estimate:
    """What a layout is estimated to cost.

    Attributes:
        layout: the layout.
        num_microbatches: microbatches per step.
        encoder_batching: microbatches that encoders take at once.
        encoder_ahead: microbatches that encoders run ahead.
        seconds: of a step, by cause; see ``docs/planning.md``.
        activations: bytes that a rank of each stage keeps at most, by module.
        stages: all else of each stage, by module.
    """

    layout: Layout
    num_microbatches: int
    encoder_batching: int
    encoder_ahead: int
    seconds: Mapping[str, float]
    activations: Mapping[str, tuple[float, ...]]
    stages: Mapping[str, tuple[StageEstimate, ...]]

    @property
    def step_seconds(self) -> float:
        """Of a step."""
        return sum(self.seconds.values())

    @cached_property
    def peak_bytes(self) -> float:
        """Of the fullest rank: parameters, gradients, optimizer state and activations."""
        stages = [
            stage.memory.parameters + stage.memory.gradients + stage.memory.largest_optimizer + kept
            for name, module in self.stages.items()
            for stage, kept in zip(module, self.activations[name], strict=True)
        ]
        return sum(stages) if self.layout.placement is Placement.COLOCATED else max(stages)


class Estimator:
    """Estimates layouts of one job; equal parts of several are computed once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._modules: dict[tuple[ModuleLayout, int], tuple[StageEstimate, ...]] = {}
        self._memories: dict[tuple[ModuleLayout, int], StageMemory] = {}

    def estimate(self, layout: Layout, num_microbatches: int) -> Estimate:
        """Estimate ``layout``, whose lanes and microbatches must divide the step batch."""
        colocated = layout.placement is Placement.COLOCATED
        encoder_batching = math.gcd(self.job.encoder_batching, num_microbatches) if colocated else 1
        passes = {
            name: num_microbatches if name == LANGUAGE else num_microbatches // encoder_batching
            for name in layout.modules
        }
        stages = {name: self._module(module, passes[name]) for name, module in layout.modules.items()}
        in_order = _pipeline(layout)
        pipelined = not colocated or len(in_order) > 1
        encoder_ahead = 0 if colocated else self.job.encoder_ahead
        ahead = dict.fromkeys(layout.modules, encoder_ahead) | {LANGUAGE: 0}
        in_flight = {
            (name, stage): min(num_microbatches, len(in_order) - depth + ahead[name]) if pipelined else 1
            for depth, places in enumerate(in_order)
            for name, stage in places
        }
        activations = {
            name: [
                in_flight[name, number] * stage.cost.kept(number) + stage.cost.recomputed(number)
                for number, stage in enumerate(module)
            ]
            for name, module in stages.items()
        }
        if colocated:
            self._recompute_in_turn(activations, stages)
        step = _Step(self.job, layout, passes, stages)
        seconds = step.pipelined(in_order) if pipelined else step.one_after_another()
        activations = {name: tuple(kept) for name, kept in activations.items()}
        return Estimate(layout, num_microbatches, encoder_batching, encoder_ahead, seconds, activations, stages)

    def _recompute_in_turn(
        self, activations: dict[str, list[float]], stages: Mapping[str, tuple[StageEstimate, ...]]
    ) -> None:
        """Encoders that share the language model's ranks compute again when what that has kept is free."""
        free = stages[LANGUAGE][0].cost.kept(0)
        most = stages[LANGUAGE][0].cost.recomputed(0)
        for name in stages.keys() - {LANGUAGE}:
            again = stages[name][0].cost.recomputed(0)
            activations[name][0] -= again
            activations[LANGUAGE][0] += max(0.0, again - free - most)

    def _module(self, layout: ModuleLayout, num_passes: int) -> tuple[StageEstimate, ...]:
        key = (layout, num_passes)
        if key not in self._modules:
            workload = self.job.workload(layout.dp, num_passes)
            cost = self.job.model.module_cost(layout.name, layout, workload)
            self._modules[key] = tuple(self._stage(layout, cost, stage) for stage in range(layout.pp))
        return self._modules[key]

    def _stage(self, layout: ModuleLayout, cost: ModuleCost, stage: int) -> StageEstimate:
        machine, layers = self.job.machine, cost.stages[stage]
        training = self.job.trainings.get(layout.name, self.job.training)
        if (layout, stage) not in self._memories:
            self._memories[layout, stage] = stage_memory(layout, cost, stage, training)
        memory = self._memories[layout, stage]
        reduction = 0.0
        for buffer, size, stride in (
            (memory.dense, layout.dp * layout.cp, layout.tp),
            (memory.experts, layout.edp, layout.etp * layout.ep),
        ):
            gradients = buffer.elements * training.gradient_size
            parameters = buffer.elements * training.element_size
            if training.shards_optimizer:
                reduction += machine.seconds(Transfer("dp", "reduce_scatter", gradients), size, stride)
                reduction += machine.seconds(Transfer("dp", "all_gather", parameters), size, stride)
            else:
                reduction += machine.seconds(Transfer("dp", "all_reduce", gradients), size, stride)
        updated = memory.gradients + memory.largest_optimizer
        update = _UPDATE_PASSES * 2 * updated / machine.memory_bandwidth
        return StageEstimate(self._pass(layout, cost, layers), memory, cost, reduction, update)

    def _pass(self, layout: ModuleLayout, cost: ModuleCost, layers: tuple[Layer, ...]) -> Pass:
        machine = self.job.machine
        traffic: dict[str, float] = {}
        compute = 0.0
        # equal layers once
        for layer, times in _counted(layers):
            forwards = _forwards(cost, layer)
            kept = _TRAFFIC_PER_KEPT_BYTE * layer.kept / machine.memory_bandwidth
            work = _seconds(layer.work, machine) / (layout.tp * layout.cp)
            compute += times * (work * (forwards + _BACKWARD_WORK) + kept)
            for transfer in layer.forward * forwards + layer.backward:
                seconds = times * machine.seconds(transfer, *_group(layout, transfer.group))
                traffic[transfer.group] = traffic.get(transfer.group, 0.0) + seconds
        host = forward_and_backward_operations(cost, layers) * machine.dispatch
        return Pass(compute, traffic, host, waits=not machine.runs_ahead)


def forward_and_backward_operations(cost: ModuleCost, layers: tuple[Layer, ...]) -> float:
    """Operations that the host dispatches for one pass."""
    operations = 0.0
    for layer, times in _counted(layers):
        forwards = _forwards(cost, layer)
        collectives = forwards * len(layer.forward) + len(layer.backward)
        operations += times * (layer.operations * (forwards + _BACKWARD_OPERATIONS) + collectives)
    return operations


def _forwards(cost: ModuleCost, layer: Layer) -> int:
    """How often a layer is computed: twice if it keeps its input only."""
    return 2 if cost.recompute and layer.kept_input is not None else 1


class _Step:
    """The time of a step from that of its stages, and how many passes of each module it has."""

    def __init__(
        self,
        job: Job,
        layout: Layout,
        passes: Mapping[str, int],
        stages: Mapping[str, tuple[StageEstimate, ...]],
    ) -> None:
        self._job, self._layout, self._passes, self._stages = job, layout, passes, stages
        self._microbatches = passes[LANGUAGE]

    def one_after_another(self) -> dict[str, float]:
        """Modules that share all ranks."""
        stages = [stage for module in self._stages.values() for stage in module]
        seconds = _sum((stage.passes, self._passes[name]) for name, module in self._stages.items() for stage in module)
        seconds["bridge"] = self._microbatches * sum(
            self._fan_seconds(name) for name in self._stages if name != LANGUAGE
        )
        seconds["dp"] = sum(stage.reduction for stage in stages)
        seconds["update"] = sum(stage.update for stage in stages)
        return self._with_shared_processors(seconds, 1.0)

    def pipelined(self, in_order: list[list[tuple[str, int]]]) -> dict[str, float]:
        """Stages that run at the same time, in 1F1B order: the busiest, and the others while it has nothing to do."""
        links = [self._link_seconds(name, stage) for name, stage in (places[0] for places in in_order)]
        # of the stages side by side at one depth, the slowest
        slowest = [max((self._stages[name][stage] for name, stage in places), key=_length) for places in in_order]
        lengths = [stage.passes.seconds + link for stage, link in zip(slowest, links, strict=True)]
        busiest = max(range(len(lengths)), key=lengths.__getitem__)
        seconds = _sum([(slowest[busiest].passes, self._microbatches)])
        kind = "bridge" if in_order[busiest][0][0] != LANGUAGE else "pp"
        seconds[kind] = seconds.get(kind, 0.0) + self._microbatches * links[busiest]
        seconds["bubble"] = sum(lengths) - lengths[busiest]
        seconds["dp"] = max(stage.reduction for stage in slowest)
        seconds["update"] = max(stage.update for stage in slowest)
        busy = sum(
            self._stages[name][stage].passes.seconds * len(self._layout.modules[name].stage_ranks(stage))
            for places in in_order
            for name, stage in places
        )
        share = busy * self._microbatches / (self._layout.world_size * sum(seconds.values()))
        return self._with_shared_processors(seconds, share)

    def _with_shared_processors(self, seconds: dict[str, float], busy: float) -> dict[str, float]:
        """Add what ranks wait for one another if there are more than processors; ``busy`` is the share they compute."""
        machine = self._job.machine
        ranks = min(machine.ranks_per_node, self._layout.world_size)
        if machine.processors is not None and ranks > machine.processors:
            step = sum(seconds.values())
            seconds["processors"] = max(0.0, step * busy * ranks / machine.processors - step)
        return seconds

    def _fan_seconds(self, name: str) -> float:
        """Colocated: for a microbatch lanes gather or cut what encoder lanes made, and their gradients."""
        encoder, language = self._layout.modules[name], self._layout.modules[LANGUAGE]
        coarse, fine = sorted((encoder.dp, language.dp))
        sent = self._stages[name][-1].cost.sent * self._passes[name] / self._microbatches * encoder.dp / coarse
        return self._job.machine.seconds(Transfer("bridge", "all_gather", sent), fine // coarse, encoder.tp)

    def _link_seconds(self, name: str, stage: int) -> float:
        """Non-colocated: what a stage sends on, and the gradient that comes back."""
        module = self._layout.modules[name]
        if name == LANGUAGE and stage == module.pp - 1:
            return 0.0
        distance = len(module.stage_ranks(stage))
        return 2 * self._job.machine.send_seconds(self._stages[name][stage].cost.sent, distance)


def _pipeline(layout: Layout) -> list[list[tuple[str, int]]]:
    """Modules and their stages by depth; encoders are side by side, before the language model."""
    encoders = [(name, 0) for name in layout.modules if name != LANGUAGE]
    language = [[(LANGUAGE, stage)] for stage in range(layout.modules[LANGUAGE].pp)]
    if not encoders:
        return language
    return [encoders, *language] if layout.placement is Placement.NON_COLOCATED else [[*encoders, (LANGUAGE, 0)]]


def _group(layout: ModuleLayout, factor: str) -> tuple[int, int]:
    """Number of ranks in a group of ``factor``, and how many ranks its neighbours are apart."""
    strides = {"tp": 1, "etp": 1, "ep": layout.etp}
    return getattr(layout, factor), strides[factor]


def _counted(layers: tuple[Layer, ...]) -> list[tuple[Layer, int]]:
    counts: dict[int, int] = {}
    for layer in layers:
        counts[id(layer)] = counts.get(id(layer), 0) + 1
    return [(layer, counts.pop(id(layer))) for layer in layers if id(layer) in counts]


def _seconds(work: Work, machine: Machine) -> float:
    return work.matmul / machine.matmul + work.attention / machine.attention + work.scan / machine.scan


def _length(stage: StageEstimate) -> float:
    return stage.passes.seconds


def _sum(passes: Iterable[tuple[Pass, int]]) -> dict[str, float]:
    """Seconds by cause of passes, each so many times."""
    seconds: dict[str, float] = {}
    for one, times in passes:
        for kind, duration in (("compute", one.compute), *one.traffic.items(), ("dispatch", one.dispatch)):
            seconds[kind] = seconds.get(kind, 0.0) + times * duration
    return seconds
