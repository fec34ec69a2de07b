"""The layout of one module: what a user asks for, the sizes that limit it, and what it resolves to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_NO_SIZES: Mapping[str, int] = MappingProxyType({})


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

    def stage_ranks(self, stage: int) -> range:
        """The global ranks of a pipeline stage."""
        size = self.num_ranks // self.pp
        return self.ranks[stage * size : (stage + 1) * size]

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


def span(ranks: range) -> str:
    """Ranks in few words: ``3``, ``0-7``, or ``0,4,...,28`` where others lie between them."""
    if len(ranks) == 1:
        return f"{ranks[0]}"
    if ranks.step == 1:
        return f"{ranks[0]}-{ranks[-1]}"
    if len(ranks) <= 4:
        return ",".join(map(str, ranks))
    return f"{ranks[0]},{ranks[1]},...,{ranks[-1]}"


def _unravel(index: int, dims: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """Coordinates of ``index`` in a grid whose first dim varies fastest; a last, outer dim may be left out."""
    coordinates = {}
    for name, size in dims:
        coordinates[name] = index % size
        index //= size
    return coordinates
