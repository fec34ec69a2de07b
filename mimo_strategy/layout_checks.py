"""The checks of a layout: each yields one sentence for everything that does not fit, with the numbers."""

from collections.abc import Iterator, Mapping
from itertools import combinations

from mimo_strategy.module_layout import ModuleLayout, ModuleParallel, ModuleSizes, span

LANGUAGE = "language"
"""Name of the language module; megatron-core's ``MIMO_LANGUAGE_MODULE_KEY``."""

_MOST_TOLD = 16
"""Ranks that are told one by one."""


def name_failures(sizes: Mapping[str, ModuleSizes], modules: Mapping[str, ModuleParallel]) -> Iterator[str]:
    """Modules that are missing, or that the model does not have."""
    if LANGUAGE not in sizes:
        yield f"the model's modules are {sorted(sizes)}, but one must be named {LANGUAGE}"
    missing, unknown = sizes.keys() - modules.keys(), modules.keys() - sizes.keys()
    if missing or unknown:
        yield (
            f"the model's modules are {sorted(sizes)}, the layout names {sorted(modules)}"
            + (f"; missing: {sorted(missing)}" if missing else "")
            + (f"; unknown: {sorted(unknown)}" if unknown else "")
        )


def number_failures(name: str, asked: ModuleParallel) -> Iterator[str]:
    """Factors that are no whole numbers, or too small."""
    for factor, value in wrong_numbers(asked).items():
        yield f"{name}: {factor} must be a whole number of at least {_least(factor)}, got {value!r}"


def wrong_numbers(asked: ModuleParallel) -> dict[str, object]:
    """The factors that are no valid number, with what they are."""
    return {
        factor: value
        for factor, value in vars(asked).items()
        if not (value is None and factor in ("dp", "num_ranks")) and (type(value) is not int or value < _least(factor))
    }


def _least(factor: str) -> int:
    return 0 if factor == "rank_offset" else 1


def size_failures(name: str, asked: ModuleParallel, sizes: ModuleSizes) -> Iterator[str]:
    """Factors that do not divide what they must."""
    for factor, divides in (("tp", sizes.tp_divides), ("etp", sizes.etp_divides)):
        for what, size in divides.items():
            if size % getattr(asked, factor):
                yield f"{name}: {factor} {getattr(asked, factor)} does not divide {what} {size}"
    if not sizes.num_experts:
        for factor in ("ep", "etp"):
            if getattr(asked, factor) > 1:
                yield f"{name}: {factor} {getattr(asked, factor)} but the module has no experts"
    elif sizes.num_experts % asked.ep:
        yield f"{name}: ep {asked.ep} does not divide its {sizes.num_experts} experts"
    if asked.pp not in sizes.pp_stages:
        stages = ", ".join(map(str, sorted(sizes.pp_stages)))
        yield f"{name}: pp {asked.pp} is not possible; its layers can be cut into {stages} stage(s)"
    if asked.cp > 1:
        yield f"{name}: cp {asked.cp} is not supported: neither lanes nor bridges cut sequences; leave it 1"


def placement_failures(modules: Mapping[str, ModuleLayout], world_size: int) -> Iterator[str]:
    """Ranks without work, or modules that overlap in part."""
    spans = {name: module.ranks for name, module in modules.items()}
    shown = ", ".join(f"{name} on {span(ranks)}" for name, ranks in spans.items())
    covered = set().union(*spans.values())
    if len(covered) < world_size:
        idle = sorted(set(range(world_size)) - covered)
        told = idle if len(idle) <= _MOST_TOLD else f"{idle[0]} to {idle[-1]}, {len(idle)}"
        yield f"the modules leave a gap: {shown}; ranks {told} of {world_size} would have no work"
    elif len(set(spans.values())) > 1 and sum(map(len, spans.values())) > world_size:
        yield f"modules must share all ranks or none, they overlap in part: {shown}"


def bridge_failures(modules: Mapping[str, ModuleLayout], *, share_ranks: bool) -> Iterator[str]:
    """Lanes that cannot feed one another, and pipelines that cannot share ranks."""
    for module in modules.values():
        if module.pp > 1 and len(modules) > 1 and share_ranks:
            yield (
                f"colocated modules cannot be pipelined: {module.name} has pp {module.pp} on ranks "
                f"{span(module.ranks)}, which all modules share"
            )
    # of any two, as ranks load the samples of one module and give parts of them to the others
    for one, other in combinations(modules.values(), 2):
        if one.dp % other.dp and other.dp % one.dp:
            yield (
                f"one of the dp sizes must be a multiple of the other: {one.name} has dp {one.dp}, "
                f"{other.name} has dp {other.dp}"
            )


def encoder_schedule_failures(
    modules: Mapping[str, ModuleLayout], encoder_batching: int, encoder_ahead: int, *, share_ranks: bool
) -> Iterator[str]:
    """Microbatches taken at once where no encoder shares the language model's ranks, and run ahead where one does."""
    if encoder_batching > 1 and (not share_ranks or len(modules) == 1):
        yield f"encoder_batching {encoder_batching} is for encoders that share the ranks of {LANGUAGE}: leave it 1"
    if encoder_ahead and share_ranks:
        yield f"encoder_ahead {encoder_ahead} is for encoders on other ranks than {LANGUAGE}: leave it 0"


def cuda_graph_failures(language: ModuleLayout) -> Iterator[str]:
    """Layers or stages of the language model that talk to each other, where layers are replayed as CUDA graphs."""
    cut = [f"{name} {size}" for name in ("tp", "pp") if (size := getattr(language, name)) > 1]
    if cut:
        yield (
            f"cuda_graphs=True replays layers of {LANGUAGE} that do not talk to other ranks, but it has "
            f"{', '.join(cut)}; make each 1 or leave cuda_graphs False"
        )
