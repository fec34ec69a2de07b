"""``mimo layout``: what runs where, whether it fits, and what it costs; needs no processes, GPU or weights."""

import argparse
from pathlib import Path

from rich.console import Console

from mimo_strategy.cli.errors import UsageError
from mimo_strategy.cli.job import job_parser, print_json, read_job
from mimo_strategy.cli.layout_view import show_layout
from mimo_strategy.pictures import draw_layout
from mimo_strategy.planning.report import LayoutReport, report_layout

_PICTURES = (".png", ".svg", ".pdf")


def make_parser() -> argparse.ArgumentParser:
    """Of the verb's own options."""
    parser = job_parser("layout", "Show and check what runs where.")
    parser.add_argument("--output", metavar="FILE", type=Path, help="a picture: .png, .svg or .pdf")
    parser.add_argument(
        "--rank", metavar="R", type=int, action="append", default=[], help="tell the groups of this rank"
    )
    return parser


def main(arguments: list[str]) -> int:
    """Show a configuration's layout; returns 0 if it fits and 1 if a check failed."""
    options, run, job, world_size = read_job(make_parser(), arguments)
    if options.output is not None and options.output.suffix not in _PICTURES:
        raise UsageError(f"--output {options.output}: must end in {', '.join(_PICTURES)}")
    outside = [rank for rank in options.rank if not 0 <= rank < world_size]
    if outside:
        raise UsageError(f"--rank {outside[0]} is not among the {world_size} ranks, 0 to {world_size - 1}")
    report = report_layout(job, world_size, run.modules, run.num_microbatches)
    if options.json:
        print_json(report.as_json())
    else:
        show_layout(Console(), report, options.rank)
    if options.output is not None and report.layout is not None:
        _draw(report, options.output)
    return 1 if report.failures else 0


def _draw(report: LayoutReport, path: Path) -> None:
    figure = draw_layout(report.layout)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}") from error
