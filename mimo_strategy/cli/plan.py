"""``mimo plan``: the layouts that fit a world, the quickest first."""

import argparse
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mimo_strategy.cli.errors import UsageError
from mimo_strategy.cli.job import job_parser, print_json, read_job
from mimo_strategy.pictures.palette import BLUE, GREEN, OLIVE, ORANGE, PALE, PURPLE, SKY, VERMILION
from mimo_strategy.planning.cost import CostUnknown
from mimo_strategy.planning.estimate import Estimate, Job
from mimo_strategy.planning.explain import as_yaml, short, why
from mimo_strategy.planning.memory import gibibytes
from mimo_strategy.planning.search import Plan, search

_COLORS = {
    "compute": BLUE,
    "tp": ORANGE,
    "ep": PURPLE,
    "etp": PURPLE,
    "bridge": SKY,
    "pp": SKY,
    "bubble": PALE,
    "dispatch": VERMILION,
    "dp": GREEN,
    "update": OLIVE,
    "processors": PALE,
}
_BAR = 18
"""Width of a bar of a step's time, in letters."""


def make_parser() -> argparse.ArgumentParser:
    """Of the verb's own options."""
    parser = job_parser("plan", "Search the layouts that fit, and rank them by estimated step time.")
    parser.add_argument("--best", metavar="N", type=int, default=10, help="layouts to show (default: 10)")
    return parser


def main(arguments: list[str]) -> int:
    """Search and print; returns 0 if some layout fits and 1 otherwise."""
    options, _, job, world_size = read_job(make_parser(), arguments)
    if options.best < 1:
        raise UsageError(f"--best must be at least 1, got {options.best}")
    if not job.batch_size:
        raise UsageError("the data do not tell their batch_size: give --batch-size")
    try:
        plan = search(job, world_size, keep=options.best)
    except CostUnknown as error:
        raise UsageError(str(error)) from None
    if options.json:
        print_json(_as_json(job, world_size, plan))
    else:
        _show(Console(), job, world_size, plan)
    return 0 if plan.best else 1


def _show(console: Console, job: Job, world_size: int, plan: Plan) -> None:
    console.print(
        f"[bold]{world_size:,} x {job.machine.name}[/bold], step batch {job.batch_size:,}, sequences of {job.length:,} "
        f"tokens, {job.training.precision}, up to {gibibytes(plan.limit)} a rank"
        + (f", encoders take up to {job.encoder_batching} microbatches at once" if job.encoder_batching > 1 else ""),
        highlight=False,
    )
    if not plan.best:
        console.print(Panel(_nothing_fits(plan), title="no layout fits", border_style="red"))
        return
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for column in ("", "layout", "mb", "step", "of which", "memory"):
        table.add_column(column, header_style="dim", no_wrap=column not in ("layout", "of which"))
    for place, estimate in enumerate(plan.best, start=1):
        table.add_row(
            f"{place}",
            _names(estimate),
            f"{estimate.num_microbatches}",
            f"{estimate.step_seconds:.3f} s",
            _shares(estimate, with_bar=console.color_system is not None and not console.no_color),
            gibibytes(estimate.peak_bytes),
        )
    console.print(table)
    console.print(Text("mb: microbatches of a step; memory: of the fullest rank", "dim"))
    console.print(Panel("\n".join(why(plan)), title="why", border_style="green"))
    console.print(Text(as_yaml(plan.best[0]), "bold"))


def _nothing_fits(plan: Plan) -> str:
    if plan.smallest is None:
        return "no layout of these ranks divides the step batch and the model's sizes"
    layout = ", ".join(f"{name} {factors}" for name, factors in short(plan.smallest.layout).items())
    return (
        f"the smallest of {plan.tried:,} needs {gibibytes(plan.smallest.peak_bytes)} a rank, "
        f"{gibibytes(plan.limit)} may be used: {layout}, "
        f"{plan.smallest.num_microbatches} microbatch(es). More ranks, shorter sequences or recompute_layers need less"
    )


def _names(estimate: Estimate) -> Text:
    placement = estimate.layout.placement.value.replace("_", "-")
    lines = [f"{name}: {factors}" for name, factors in short(estimate.layout).items()]
    return Text("\n".join(lines)).append(f"\n{placement}", "dim")


def _shares(estimate: Estimate, with_bar: bool) -> Text:
    """A bar of the step's time by cause, which colours tell apart, and the larger causes by name."""
    step = estimate.step_seconds
    causes = sorted((item for item in estimate.seconds.items() if item[1] > 0), key=lambda item: -item[1])
    lines = []
    if with_bar:
        bar = [("\N{FULL BLOCK}" * round(_BAR * seconds / step), _COLORS[cause]) for cause, seconds in causes]
        lines.append(Text.assemble(*bar))
    named = [
        Text(f"{cause} {seconds / step:.0%}", _COLORS[cause]) for cause, seconds in causes if seconds > 0.02 * step
    ]
    lines += [Text("  ").join(named[first : first + 2]) for first in range(0, len(named), 2)]
    return Text("\n").join(lines)


def _as_json(job: Job, world_size: int, plan: Plan) -> dict[str, Any]:
    return {
        "world_size": world_size,
        "machine": job.machine.name,
        "batch_size": job.batch_size,
        "limit_bytes": plan.limit,
        "tried": plan.tried,
        "fitting": plan.fitting,
        "why": why(plan) if plan.best else [_nothing_fits(plan)],
        "best": [_estimate_as_json(estimate) for estimate in plan.best],
    }


def _estimate_as_json(estimate: Estimate) -> dict[str, Any]:
    return {
        "placement": estimate.layout.placement.value,
        "num_microbatches": estimate.num_microbatches,
        "encoder_batching": estimate.encoder_batching,
        "encoder_ahead": estimate.encoder_ahead,
        "modules": {
            name: {factor: getattr(module, factor) for factor in ("tp", "cp", "dp", "pp", "ep", "etp", "rank_offset")}
            for name, module in estimate.layout.modules.items()
        },
        "step_seconds": estimate.step_seconds,
        "seconds": dict(estimate.seconds),
        "peak_bytes": estimate.peak_bytes,
    }
