"""Why one layout is estimated to be quicker than another, and what limits it, in words."""

from mimo_strategy.layout import Layout, ModuleLayout
from mimo_strategy.planning.estimate import Estimate
from mimo_strategy.planning.search import Plan

CAUSES = {
    "compute": "matrix products, attention, scans and the memory that they move",
    "tp": "exchange between tensor parallel ranks",
    "ep": "tokens on their way to experts and back",
    "etp": "exchange between ranks that share experts",
    "bridge": "tokens from the encoder's lanes to the language model's, and their gradients back",
    "pp": "hidden states and gradients between pipeline stages",
    "bubble": "the busiest stage waits while the pipeline fills and drains",
    "dispatch": "the device waits for its host: more samples a microbatch would hide it",
    "dp": "gradients and parameters between data parallel ranks",
    "update": "clearing gradients and updating parameters",
    "processors": "ranks wait for processors that they share",
}
"""What the parts of a step's time are."""


def short(layout: Layout) -> dict[str, str]:
    """Every module's factors above 1, and its ranks."""
    return {name: _factors(module) for name, module in layout.modules.items()}


def as_yaml(estimate: Estimate) -> str:
    """The layout as a configuration of ``MimoHeteroStrategy``."""
    lines = [f"{name}: {getattr(estimate, name)}" for name in ("num_microbatches", "encoder_batching")]
    if estimate.encoder_ahead:
        lines.append(f"encoder_ahead: {estimate.encoder_ahead}")
    lines.append("modules:")
    for name, module in estimate.layout.modules.items():
        settings = {"tp": module.tp, "dp": module.dp, "pp": module.pp, "ep": module.ep, "etp": module.etp}
        shown = {key: value for key, value in settings.items() if value > 1 or key == "dp"}
        if module.rank_offset:
            shown["rank_offset"] = module.rank_offset
        lines.append(f"  {name}: {{{', '.join(f'{key}: {value}' for key, value in shown.items())}}}")
    return "\n".join(lines)


def limit(estimate: Estimate) -> str:
    """The largest parts of the step's time, and what they are."""
    (first, longest), (second, next_longest), *_ = _by_size(estimate)
    step = estimate.step_seconds
    return (
        f"{longest / step:.0%} of its step is {first} ({CAUSES[first]}), then {next_longest / step:.0%} {second} "
        f"({CAUSES[second]})"
    )


def loss(winner: Estimate, other: Estimate) -> str:
    """By what another layout loses, most of it first."""
    causes = winner.seconds.keys() | other.seconds.keys()
    more = {cause: other.seconds.get(cause, 0.0) - winner.seconds.get(cause, 0.0) for cause in causes}
    total = sum(more.values())
    if total <= 1e-6 * winner.step_seconds:
        return "as quick"
    worst, best = max(more, key=more.__getitem__), min(more, key=more.__getitem__)
    text = f"{total / winner.step_seconds:.1%} slower, by {_milliseconds(more[worst])} more {worst}"
    if more[best] < -0.1 * more[worst]:
        text += f" for {_milliseconds(-more[best])} less {best}"
    return text


def why(plan: Plan) -> list[str]:
    """Why the best layout of a plan wins, in sentences."""
    winner, *others = plan.best
    sentences = [
        f"Quickest of {plan.fitting:,} that fit the memory, of {plan.tried:,} layouts and numbers of microbatches.",
        f"What limits it: {limit(winner)}.",
    ]
    if others:
        sentences.append(f"The next best is {loss(winner, others[0])}.")
    other = next((one for one in others if one.layout.placement is not winner.layout.placement), None)
    if other is not None:
        placement = other.layout.placement.value.replace("_", "-")
        sentences.append(f"The best {placement} layout is {loss(winner, other)}.")
    return sentences


def _by_size(estimate: Estimate) -> list[tuple[str, float]]:
    return sorted(estimate.seconds.items(), key=lambda item: -item[1])


def _factors(module: ModuleLayout) -> str:
    factors = [
        f"{name} {getattr(module, name)}" for name in ("tp", "dp", "pp", "ep", "etp") if getattr(module, name) > 1
    ]
    return " ".join(factors) or "dp 1"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
