"""Train a cell, and once each what it is compared with."""

from functools import cache, partial

from mimo_strategy import MimoHeteroStrategy
from mimo_strategy.testing import Comparison, Reference
from proof.cells import Cell
from proof.models import loader, text_loader, text_only, vision_language


@cache
def reference(
    *,
    text: bool = False,
    experts: str = "nemotron",
    data: str = "mixed",
    frozen: str = "none",
    accelerator: str = "cpu",
) -> Reference:
    """The training of a model on one process."""
    if text:
        return Reference(partial(text_only, experts=experts), text_loader, accelerator=accelerator)
    return Reference(
        partial(vision_language, experts=experts, frozen=frozen), partial(loader, data), accelerator=accelerator
    )


def reference_of(cell: Cell, accelerator: str = "cpu") -> Reference:
    """What a cell is compared with."""
    if cell.layout.images is None:
        return reference(text=True, experts=cell.experts, accelerator=accelerator)
    return reference(experts=cell.experts, data=cell.data, frozen=cell.frozen, accelerator=accelerator)


def compare(cell: Cell, accelerator: str = "cpu") -> Comparison:
    """The training of a cell on its ranks, compared with the one process."""
    variant = {"experts": cell.experts, "recompute": cell.recompute}
    if cell.layout.images is None:
        make_module = partial(text_only, **variant)
    else:
        make_module = partial(vision_language, frozen=cell.frozen, **variant)
    strategy = MimoHeteroStrategy(cell.layout.modules, cell.microbatches, cell.ddp)
    return reference_of(cell, accelerator).compare(strategy, cell.layout.world_size, make_module)
