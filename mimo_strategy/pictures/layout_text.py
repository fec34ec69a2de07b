"""The words on a layout's map: factors, products and lanes."""

from math import prod

from mimo_strategy.layout import LANGUAGE, Layout, ModuleLayout, Placement
from mimo_strategy.module_layout import span

_TIMES, _ARROW = "\N{MULTIPLICATION SIGN}", "\N{RIGHTWARDS ARROW}"


def title(layout: Layout) -> str:
    """Placement and size of the world."""
    if len(layout.modules) == 1:
        placement = "Language model alone"
    else:
        placement = "Colocated" if layout.placement is Placement.COLOCATED else "Non-colocated"
    return f"{placement}, world size {layout.world_size}"


def primary_factors(module: ModuleLayout) -> list[str]:
    """The factors of the primary factorization that are worth showing."""
    return [name for name in ("tp", "cp", "dp", "pp") if name in ("tp", "dp") or getattr(module, name) > 1]


def expert_factors(module: ModuleLayout) -> list[str]:
    """The factors of the expert factorization within a stage; none for a module that is surely dense."""
    has_experts = module.name == LANGUAGE or module.ep > 1 or module.etp > 1
    return ["etp", "ep", "edp"] if has_experts else []


def _product(module: ModuleLayout, factors: list[str]) -> str:
    shown = f" {_TIMES} ".join(f"{name} {getattr(module, name)}" for name in factors)
    return f"{shown} = {prod(getattr(module, name) for name in factors)}"


def heading(module: ModuleLayout) -> str:
    """Ranks of a module and its factor products, those of the experts with the shared pp."""
    parts = [f"{'ranks' if len(module.ranks) > 1 else 'rank'} {span(module.ranks)}"]
    parts.append(_product(module, primary_factors(module)))
    if experts := expert_factors(module):
        parts.append(_product(module, experts + ["pp"] * (module.pp > 1)))
    return "   |   ".join(parts)


def fan(encoder: ModuleLayout, language: ModuleLayout) -> str:
    """How the lanes of an encoder meet those of the language model."""
    difference = encoder.dp - language.dp
    kind = "fan-in" if difference > 0 else "fan-out" if difference < 0 else "equal"
    return f"{kind} {encoder.dp} {_ARROW} {language.dp}"


def lanes_label(module: ModuleLayout, stage: int) -> str:
    """What a row of lanes is; of a pipelined module only one stage has them side by side."""
    return f"{module.name} lanes" + (f", pp {stage}" if module.pp > 1 else "")
