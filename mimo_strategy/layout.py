"""Parallel layouts: what a user asks for, what it resolves to, and the arithmetic that both must obey.

Plain Python, so that a wrong layout is refused before any process group exists.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from types import MappingProxyType
from typing import Self

from mimo_strategy.layout_checks import (
    LANGUAGE,
    bridge_failures,
    name_failures,
    number_failures,
    placement_failures,
    size_failures,
    span,
    wrong_numbers,
)

_NO_SIZES: Mapping[str, int] = MappingProxyType({})


class LayoutError(ValueError):
    """A layout that does not fit; the message shows the arithmetic of every check that failed.

    Attributes:
        failures: one sentence for each check that failed.
        suggestion: a layout that would fit, or that there is none near; empty where none was sought.
    """

    def __init__(self, *failures: str, suggestion: str = "") -> None:
        super().__init__("\n".join([*failures, suggestion] if suggestion else failures))
        self.failures = failures
        self.suggestion = suggestion

    def __reduce__(self) -> tuple:
        return partial(type(self), suggestion=self.suggestion), self.failures


class Placement(StrEnum):
    """Whether the modules share all ranks or are pairwise disjoint and together cover the world."""

    COLOCATED = "colocated"
    NON_COLOCATED = "non_colocated"


@dataclass(frozen=True)
class ModuleParallel:
    """The layout that a user asks for one module.

    The ranks of a module are factored twice: ``tp x cp x dp x pp`` (primary) and, over the same ranks with
    the same ``pp``, ``etp x ep x edp`` for the experts (alt).

    Args:
        tp: tensor parallel size.
        cp: context parallel size; 1 is the only one that is supported.
        dp: data parallel size; ``None`` derives it from the number of ranks. A given one is checked.
        pp: pipeline parallel size.
        ep: expert parallel size.
        etp: expert tensor parallel size. The expert data parallel size is always derived.
        rank_offset: first rank of the module.
        num_ranks: number of ranks; ``None`` means ``tp x cp x dp x pp`` when ``dp`` is given, otherwise every
            rank from ``rank_offset`` on.
    """

    tp: int = 1
    cp: int = 1
    dp: int | None = None
    pp: int = 1
    ep: int = 1
    etp: int = 1
    rank_offset: int = 0
    num_ranks: int | None = None

    def __str__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if value != type(self).__dict__[name]}
        return f"ModuleParallel({', '.join(f'{name}={value}' for name, value in shown.items())})"


@dataclass(frozen=True)
class ModuleSizes:
    """The sizes of a module that limit its layout.

    Args:
        tp_divides: sizes by name that ``tp`` must divide (attention heads, query groups, ...).
        etp_divides: sizes by name that ``etp`` must divide.
        num_experts: number of experts that ``ep`` must divide; 0 for a dense module.
        pp_stages: pipeline stages that the module can be cut into.
    """

    tp_divides: Mapping[str, int] = field(default=_NO_SIZES)
    etp_divides: Mapping[str, int] = field(default=_NO_SIZES)
    num_experts: int = 0
    pp_stages: frozenset[int] = frozenset({1})


@dataclass(frozen=True)
class ModuleLayout:
    """The resolved layout of one module: every factor is a number, both factorizations hold."""

    name: str
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int
    edp: int
    rank_offset: int
    num_ranks: int

    @property
    def ranks(self) -> range:
        """The global ranks of the module."""
        return range(self.rank_offset, self.rank_offset + self.num_ranks)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of a global ``rank`` in both factorizations, keyed by tp, cp, dp, pp, etp, ep, edp.

        Raises:
            ValueError: if the module does not run on ``rank``.
        """
        if rank not in self.ranks:
            raise ValueError(f"rank {rank} is not among the ranks {span(self.ranks)} of {self.name}")
        primary = _unravel(
            rank - self.rank_offset, (("tp", self.tp), ("cp", self.cp), ("dp", self.dp), ("pp", self.pp))
        )
        expert = _unravel(rank - self.rank_offset, (("etp", self.etp), ("ep", self.ep), ("edp", self.edp)))
        return primary | expert

    def __str__(self) -> str:
        return (
            f"{self.name}: ranks {span(self.ranks)} = tp {self.tp} x cp {self.cp} x dp {self.dp} x pp {self.pp}"
            f" = etp {self.etp} x ep {self.ep} x edp {self.edp} x pp {self.pp}"
        )


@dataclass(frozen=True)
class Layout:
    """The resolved layout of all modules over ``world_size`` ranks; made by :meth:`resolve`."""

    modules: Mapping[str, ModuleLayout]
    world_size: int
    placement: Placement

    @classmethod
    def resolve(
        cls,
        sizes: Mapping[str, ModuleSizes],
        world_size: int,
        modules: Mapping[str, ModuleParallel] | None = None,
    ) -> Self:
        """Resolve and check the layout of the modules named by ``sizes``.

        Args:
            sizes: the sizes of every module of the model, by name.
            world_size: number of ranks.
            modules: the layout asked for, by module name; ``None`` is colocated with tp 1, dp = world and ep
                the largest divisor of the number of experts that fits.

        Raises:
            LayoutError: if the layout does not fit.
        """
        if modules is None:
            modules = default_modules(sizes, world_size)
        try:
            return cls._resolve(sizes, world_size, modules)
        except LayoutError as error:
            raise LayoutError(*error.failures, suggestion=_suggestion(sizes, world_size, modules)) from None

    @property
    def first_of_last_stage(self) -> int:
        """The first rank of the language model's last stage, where what it puts out is known."""
        language = self.modules[LANGUAGE]
        return language.rank_offset + language.tp * language.cp * language.dp * (language.pp - 1)

    @classmethod
    def _resolve(cls, sizes: Mapping[str, ModuleSizes], world_size: int, modules: Mapping[str, ModuleParallel]) -> Self:
        failures = list(name_failures(sizes, modules))
        if failures:
            raise LayoutError(*failures)
        resolved = {}
        # sizes order, so that every rank creates groups in the same order whatever the user's order
        for name, size in sizes.items():
            wrong = list(number_failures(name, modules[name]))
            if not wrong:
                wrong += size_failures(name, modules[name], size)
                resolved[name] = _resolve_module(name, modules[name], world_size, wrong)
            failures += wrong
        placed = {name: module for name, module in resolved.items() if module is not None}
        if len(placed) == len(sizes):
            failures += placement_failures(placed, world_size)
        placement = Placement.COLOCATED if len({module.ranks for module in placed.values()}) == 1 else None
        failures += bridge_failures(placed, share_ranks=placement is Placement.COLOCATED)
        if failures:
            raise LayoutError(*failures)
        return cls(MappingProxyType(placed), world_size, placement or Placement.NON_COLOCATED)

    def __str__(self) -> str:
        return "\n".join(f"  {module}" for module in self.modules.values())

    def check_batch(self, batch_size: int, num_microbatches: int) -> None:
        """Check that a step batch can be cut into microbatches and lanes.

        Raises:
            ValueError: if ``batch_size`` (samples per optimizer step over all ranks) is no multiple of
                ``num_microbatches`` times the largest dp.
        """
        dp = max(module.dp for module in self.modules.values())
        needed = dp * num_microbatches
        if batch_size < 1 or batch_size % needed:
            lanes = ", ".join(f"{module.name} dp {module.dp}" for module in self.modules.values())
            below, above = batch_size // needed * needed, (batch_size // needed + 1) * needed
            raise ValueError(
                f"the step batch of {batch_size} samples must be a multiple of num_microbatches {num_microbatches} x "
                f"the largest dp {dp} ({lanes}) = {needed}; valid: "
                + " or ".join(str(size) for size in (below, above) if size > 0)
            )


def default_modules(sizes: Mapping[str, ModuleSizes], world_size: int) -> dict[str, ModuleParallel]:
    """The layout used when none is asked for: colocated, tp 1, dp = world, ep as large as fits."""
    return {
        name: ModuleParallel(dp=world_size, ep=_largest_common_divisor(size.num_experts, world_size))
        for name, size in sizes.items()
    }


def _resolve_module(name: str, asked: ModuleParallel, world_size: int, failures: list[str]) -> ModuleLayout | None:
    """The layout of one module whose factors are numbers; what does not fit is added to ``failures``."""
    model_ranks = asked.tp * asked.cp * asked.pp
    num_ranks = asked.num_ranks
    if num_ranks is None:
        num_ranks = model_ranks * asked.dp if asked.dp else world_size - asked.rank_offset
    if asked.rank_offset >= world_size:
        failures.append(
            f"{name}: rank_offset {asked.rank_offset} is beyond the world of {world_size} ranks, 0 to {world_size - 1}"
        )
        return None
    if asked.rank_offset + num_ranks > world_size:
        failures.append(
            f"{name}: rank_offset {asked.rank_offset} + {num_ranks} ranks "
            f"(tp {asked.tp} x cp {asked.cp} x dp {asked.dp or '?'} x pp {asked.pp}) exceeds the world of "
            f"{world_size} ranks"
        )
        return None
    dp = asked.dp or num_ranks // model_ranks
    if model_ranks * dp != num_ranks:
        failures.append(
            f"{name}: tp {asked.tp} x cp {asked.cp} x dp {asked.dp or '?'} x pp {asked.pp} = "
            f"{model_ranks * dp if asked.dp else f'{model_ranks} x dp'} does not make its {num_ranks} ranks"
        )
        return None
    stage_ranks = num_ranks // asked.pp
    edp = stage_ranks // (asked.etp * asked.ep)
    if asked.etp * asked.ep * edp != stage_ranks:
        failures.append(
            f"{name}: etp {asked.etp} x ep {asked.ep} x edp must equal tp {asked.tp} x cp {asked.cp} x dp {dp} = "
            f"{stage_ranks}, which {asked.etp * asked.ep} does not divide"
        )
    return ModuleLayout(name, asked.tp, asked.cp, dp, asked.pp, asked.ep, asked.etp, edp, asked.rank_offset, num_ranks)


def _suggestion(sizes: Mapping[str, ModuleSizes], world_size: int, modules: Mapping[str, ModuleParallel]) -> str:
    """A layout that fits, as close to the one asked for as the sizes allow."""
    asked = {name: _with_numbers(modules.get(name, ModuleParallel())) for name in sizes}
    candidates = [_shrunk(sizes, asked, world_size), default_modules(sizes, world_size)]
    for candidate in candidates:
        try:
            Layout._resolve(sizes, world_size, candidate)
        except LayoutError:
            continue
        shown = ", ".join(f'"{name}": {parallel}' for name, parallel in candidate.items())
        return f"A layout that fits {world_size} rank(s): modules={{{shown}}}"
    return f"No layout near this one fits {world_size} rank(s)"


def _with_numbers(asked: ModuleParallel) -> ModuleParallel:
    """What was asked for, with the default in the place of all that is no valid number."""
    return replace(asked, **{factor: getattr(ModuleParallel, factor) for factor in wrong_numbers(asked)})


def _shrunk(
    sizes: Mapping[str, ModuleSizes], asked: Mapping[str, ModuleParallel], world_size: int
) -> dict[str, ModuleParallel]:
    """Keep which module comes first and shrink every factor until it divides what it must."""
    disjoint = len({parallel.rank_offset for parallel in asked.values()}) > 1 and world_size >= len(asked)
    spans = _split(world_size, [asked[name] for name in sizes]) if disjoint else [(0, world_size)] * len(sizes)
    shrunk = {}
    for (name, size), (offset, num_ranks) in zip(sizes.items(), spans, strict=True):
        want = asked[name]
        stages = [number for number in size.pp_stages if num_ranks % number == 0]
        pp = min(stages, key=lambda number, want=want: (number > want.pp, abs(number - want.pp)), default=1)
        stage_ranks = num_ranks // pp
        tp = _largest_common_divisor(stage_ranks, *size.tp_divides.values(), at_most=want.tp)
        etp = 1
        if size.num_experts:
            etp = _largest_common_divisor(stage_ranks, *size.etp_divides.values(), at_most=want.etp)
        ep = _largest_common_divisor(stage_ranks // etp, size.num_experts, at_most=want.ep)
        shrunk[name] = ModuleParallel(tp=tp, dp=stage_ranks // tp, pp=pp, ep=ep, etp=etp, rank_offset=offset)
    return shrunk


def _split(world_size: int, asked: list[ModuleParallel]) -> list[tuple[int, int]]:
    """Cut the world into one span per module, in the order of their offsets, as (offset, number of ranks)."""
    order = sorted(range(len(asked)), key=lambda index: asked[index].rank_offset)
    spans = [(0, 0)] * len(asked)
    offset = 0
    for position, index in enumerate(order):
        following = len(order) - position - 1
        want = asked[index].num_ranks or asked[index].tp * asked[index].cp * asked[index].pp * (asked[index].dp or 1)
        num_ranks = max(1, min(want, world_size - offset - following)) if following else world_size - offset
        spans[index] = (offset, num_ranks)
        offset += num_ranks
    return spans


def _largest_common_divisor(*sizes: int, at_most: int | None = None) -> int:
    """The largest number up to ``at_most`` that divides every size; 1 when a size is 0 (has nothing to cut)."""
    if 0 in sizes:
        return 1
    limit = min(*sizes, at_most) if at_most else min(sizes)
    return max(number for number in range(1, max(limit, 1) + 1) if all(size % number == 0 for size in sizes))


def _unravel(index: int, dims: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """Coordinates of ``index`` in a grid whose first dim varies fastest; a last, outer dim may be left out."""
    coordinates = {}
    for name, size in dims:
        coordinates[name] = index % size
        index //= size
    return coordinates
