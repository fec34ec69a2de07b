"""The layout of all modules: resolved from what a user asks for, and checked.

Plain Python, so that a wrong layout is refused before any process group exists.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from types import MappingProxyType
from typing import Self

from mimo_strategy.layout_checks import (
    LANGUAGE,
    bridge_failures,
    cuda_graph_failures,
    encoder_schedule_failures,
    name_failures,
    number_failures,
    placement_failures,
    size_failures,
)
from mimo_strategy.layout_proposals import default_modules, proposals
from mimo_strategy.module_layout import ModuleLayout, ModuleParallel, ModuleSizes


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
    def largest_dp(self) -> int:
        """Lanes of the module with the most of them; the samples of a microbatch are a multiple of it."""
        return max(module.dp for module in self.modules.values())

    @property
    def first_of_last_stage(self) -> int:
        """The first rank of the language model's last stage, where what it puts out is known."""
        language = self.modules[LANGUAGE]
        return language.stage_ranks(language.pp - 1)[0]

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
        spans = {module.ranks for module in placed.values()}
        placement = Placement.COLOCATED if len(spans) == 1 else Placement.NON_COLOCATED
        failures += bridge_failures(placed, share_ranks=placement is Placement.COLOCATED)
        if failures:
            raise LayoutError(*failures)
        return cls(MappingProxyType(placed), world_size, placement)

    def __str__(self) -> str:
        return "\n".join(f"  {module}" for module in self.modules.values())

    def check_batch(self, batch_size: int, num_microbatches: int) -> None:
        """Check that a step batch can be cut into microbatches and lanes.

        Raises:
            ValueError: if ``batch_size`` (samples per optimizer step over all ranks) is no multiple of
                ``num_microbatches`` times the largest dp.
        """
        needed = self.largest_dp * num_microbatches
        if batch_size < 1 or batch_size % needed:
            lanes = ", ".join(f"{module.name} dp {module.dp}" for module in self.modules.values())
            below, above = batch_size // needed * needed, (batch_size // needed + 1) * needed
            raise ValueError(
                f"the step batch of {batch_size} samples must be a multiple of num_microbatches {num_microbatches} x "
                f"the largest dp {self.largest_dp} ({lanes}) = {needed}; valid: "
                + " or ".join(str(size) for size in (below, above) if size > 0)
            )

    def schedule_failures(self, encoder_batching: int, encoder_ahead: int, *, cuda_graphs: bool) -> tuple[str, ...]:
        """What of a schedule does not fit, a sentence each; the arguments are those of ``MimoHeteroStrategy``."""
        share_ranks = self.placement is Placement.COLOCATED
        failures = [
            *encoder_schedule_failures(self.modules, encoder_batching, encoder_ahead, share_ranks=share_ranks),
            *(cuda_graph_failures(self.modules[LANGUAGE]) if cuda_graphs else ()),
        ]
        return tuple(failures)


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
    """A layout that fits, as near to the one asked for as the sizes allow."""
    for proposal in proposals(sizes, world_size, modules):
        try:
            Layout._resolve(sizes, world_size, proposal)
        except LayoutError:
            continue
        shown = ", ".join(f'"{name}": {parallel}' for name, parallel in proposal.items())
        return f"A layout that fits {world_size} rank(s): modules={{{shown}}}"
    return f"No layout near this one fits {world_size} rank(s)"
