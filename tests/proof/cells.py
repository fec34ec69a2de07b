"""The cells of the proof: layouts, and everything that is varied on them.

Of several thousand combinations, :func:`choose` picks cells until every layout, every value of an axis and every pair
of values of axes that interact has been met, small worlds first.
"""

import heapq
import random
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

from mimo_strategy import DistributedDataParallelConfig
from proof.layouts import LAYOUTS, ProofLayout
from proof.models import BATCH_SIZE, Data, Experts, Frozen

Axes = dict[str, str | int | bool]

# Axes of which every pair of values must be met, as far as one cell can have both.
INTERACTING = [
    *combinations(("placement", "microbatches", "optimizer", "overlap", "data", "recompute"), 2),
    *combinations(("tp", "ep", "etp", "pp"), 2),
    *product(("tp", "ep", "etp", "pp"), ("experts", "optimizer")),
    *product(("pp",), ("microbatches", "overlap", "data", "recompute")),
    *product(("encoder_tp",), ("placement", "recompute", "data")),
    ("placement", "experts"),
]
# What is frozen cannot show faults, so cells with frozen parts count for these only.
INTERACTING_WITH_FROZEN = [("frozen", axis) for axis in ("same_ranks", "optimizer", "overlap")]


@dataclass(frozen=True)
class Cell:
    """One training to compare with one process.

    Attributes:
        layout: ranks and layouts of the modules.
        microbatches: per step.
        optimizer: whether its state is distributed over lanes.
        overlap: gradients are reduced during the backward and, with the distributed optimizer, parameters gathered
            during the forward.
        recompute: layers are computed again in the backward.
        experts: with everything that Nemotron has, or plain.
        data: one image per sample, or 0 to 3 and lanes and microbatches without any, or without an answer.
        frozen: what is not trained.
    """

    layout: ProofLayout
    microbatches: int = 1
    optimizer: str = "distributed"
    overlap: bool = False
    recompute: bool = False
    experts: Experts = "nemotron"
    data: Data = "mixed"
    frozen: Frozen = "none"

    @property
    def ddp(self) -> DistributedDataParallelConfig:
        """As ``MimoHeteroStrategy`` takes it."""
        distributed = self.optimizer == "distributed"
        return DistributedDataParallelConfig(
            use_distributed_optimizer=distributed,
            overlap_grad_reduce=self.overlap,
            overlap_param_gather=self.overlap and distributed,
            # several for each module, as a large model has
            bucket_size=20_000,
        )

    @property
    def axes(self) -> Axes:
        """What the cell covers, by axis."""
        language, images = self.layout.language, self.layout.images
        return {
            "placement": self.layout.placement,
            "same_ranks": self.layout.placement.startswith("colocated"),
            "world": self.layout.world_size,
            "tp": language.tp,
            "pp": language.pp,
            "ep": language.ep,
            "etp": "1" if language.etp == 1 else "tp" if language.etp == language.tp else "not tp",
            "encoder_tp": images.tp if images else 0,
            "microbatches": self.microbatches,
            "optimizer": self.optimizer,
            "overlap": self.overlap,
            "recompute": self.recompute,
            "experts": self.experts,
            "data": self.data,
            "frozen": self.frozen,
        }

    @property
    def is_possible(self) -> bool:
        """Whether the samples can be cut, and the data and frozen parts exist and fit each other."""
        text_only = self.layout.images is None
        return (
            BATCH_SIZE % (self.microbatches * self.layout.largest_dp) == 0
            and not (text_only and (self.frozen != "none" or self.data == "one"))
            # every combination needs a reference of its own
            and not (self.frozen != "none" and (self.experts == "plain" or self.data == "one"))
            and not (self.experts == "plain" and self.data == "one")
        )

    @property
    def columns(self) -> tuple[str, str, str, str]:
        """Placement, ranks, layouts and settings in words."""
        settings = [
            f"{self.microbatches} microbatch{'es' if self.microbatches > 1 else ''}",
            f"{self.optimizer} optimizer",
            *(["overlap"] if self.overlap else []),
            *(["recompute"] if self.recompute else []),
            *(["plain experts"] if self.experts == "plain" else []),
            "mixed data" if self.data == "mixed" else "one image each",
            *([f"{self.frozen} frozen"] if self.frozen != "none" else []),
        ]
        return self.layout.placement, str(self.layout.world_size), str(self.layout), ", ".join(settings)

    def __str__(self) -> str:
        placement, ranks, layouts, settings = self.columns
        return f"{placement} on {ranks}: {layouts}, {settings}"


def possible_cells() -> list[Cell]:
    """Every combination."""
    cells = (
        Cell(*values)
        for values in product(
            LAYOUTS,
            (1, 2, 4),
            ("distributed", "replicated"),
            (False, True),
            (False, True),
            ("nemotron", "plain"),
            ("mixed", "one"),
            ("none", "encoder", "projector", "images", "language"),
        )
    )
    return [cell for cell in cells if cell.is_possible]


@cache
def covered(cell: Cell) -> frozenset[tuple]:
    """The cell's layout, values of axes, and pairs of values of interacting axes."""
    axes = cell.axes
    if cell.frozen != "none":
        pairs, single = INTERACTING_WITH_FROZEN, ["frozen"]
    else:
        pairs, single = INTERACTING, list(axes)
    met = {(axis, axes[axis]) for axis in single} | {((one, axes[one]), (other, axes[other])) for one, other in pairs}
    return frozenset(met if cell.frozen != "none" else met | {("layout", cell.layout)})


def choose(cells: list[Cell], seed: int) -> list[Cell]:
    """A small selection that covers all that ``cells`` cover, greedily; the same at every call."""
    cells = random.Random(seed).sample(cells, len(cells))
    gains = [covered(cell) for cell in cells]
    missing = set().union(*gains)

    def worth(index: int) -> float:
        return len(gains[index] & missing) / (4 + cells[index].layout.world_size)

    # what a cell adds only shrinks, so an entry that is still the best after a second look is the best of all
    heap = [(-worth(index), index) for index in range(len(cells))]
    heapq.heapify(heap)
    chosen = []
    while missing:
        _, index = heapq.heappop(heap)
        if -worth(index) > heap[0][0]:
            heapq.heappush(heap, (-worth(index), index))
            continue
        chosen.append(cells[index])
        missing -= gains[index]
    return sorted(chosen, key=lambda cell: (LAYOUTS.index(cell.layout), str(cell)))
