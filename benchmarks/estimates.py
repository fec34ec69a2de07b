"""Compare estimates with what CPU runs show: bytes of every rank, kept activations, and the order of step times.

    python benchmarks/estimates.py [--steps N] [--write docs/planning.md]

Step times mean something on a quiet machine only. ``--steps 0`` leaves them out.
"""

import argparse
import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from mimo_strategy import ModuleParallel
from mimo_strategy.layout import Layout
from mimo_strategy.planning.estimate import Estimate, Job
from mimo_strategy.planning.explain import short
from mimo_strategy.planning.machine import Machine
from mimo_strategy.planning.memory import Training, gibibytes
from mimo_strategy.planning.report import report_layout
from mimo_strategy.testing import run_on_ranks
from mimo_strategy.testing.costs import MeasuredCosts, ModuleBytes, measure_costs
from mimo_strategy.testing.rates import measure_machine
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

BATCH_SIZE, LENGTH, IMAGE_TOKEN = 16, 64, 1
START, END = "<!-- estimates: begin -->", "<!-- estimates: end -->"


@dataclass(frozen=True)
class Row:
    """One layout to measure."""

    modules: dict[str, ModuleParallel]
    num_microbatches: int
    precision: str = "32-true"
    recompute: bool = False
    encoder_batching: int = 1


def _row(images: ModuleParallel, language: ModuleParallel, num_microbatches: int, **settings: object) -> Row:
    return Row({"images": images, "language": language}, num_microbatches, **settings)


ROWS = [
    _row(ModuleParallel(dp=4), ModuleParallel(dp=4, ep=4), 1),
    _row(ModuleParallel(dp=4), ModuleParallel(tp=2, dp=2, ep=2), 1),
    _row(ModuleParallel(dp=4), ModuleParallel(dp=4, ep=2), 4),
    _row(ModuleParallel(tp=2, dp=2), ModuleParallel(tp=2, dp=2, ep=4), 2),
    _row(ModuleParallel(dp=2), ModuleParallel(dp=2, ep=2, rank_offset=2), 2),
    _row(ModuleParallel(dp=2), ModuleParallel(tp=2, dp=1, ep=2, rank_offset=2), 8),
    _row(ModuleParallel(tp=2, dp=1), ModuleParallel(dp=1, pp=2, rank_offset=2), 4),
    _row(ModuleParallel(dp=4), ModuleParallel(dp=4, ep=4), 2, recompute=True),
    _row(ModuleParallel(dp=4), ModuleParallel(tp=2, dp=2, ep=2), 1, precision="bf16-mixed"),
    _row(ModuleParallel(dp=4), ModuleParallel(dp=4, ep=2), 4, encoder_batching=4),
]


def make_model(recompute: bool = False) -> NemotronVLM:
    """Every kind of layer, small."""
    language = MambaMoEConfig.tiny(
        pattern="M*EM-E", max_sequence_length=LENGTH, hidden_size=128, kv_channels=32, recompute_layers=recompute
    )
    radio = RadioConfig.tiny(image_size=32, hidden_size=96, recompute_layers=recompute)
    return NemotronVLM(radio, language, image_token_id=IMAGE_TOKEN, end_token_id=2)


def make_batch(num_samples: int) -> dict[str, torch.Tensor]:
    """One image a sample, and as many tokens as fit."""
    radio = make_model().encoder.config
    tokens = torch.randint(3, 60, (num_samples, LENGTH), generator=torch.Generator().manual_seed(num_samples))
    tokens[:, : radio.tokens_per_image] = IMAGE_TOKEN
    return {
        "input_ids": tokens,
        "labels": tokens,
        "loss_mask": torch.ones(num_samples, LENGTH),
        "images": torch.randn(num_samples, 3, radio.image_height, radio.image_width),
        "num_images": torch.ones(num_samples, dtype=torch.long),
    }


def measure(row: Row, steps: int) -> list[MeasuredCosts]:
    """What the ranks of a layout show."""
    model = make_model(row.recompute)
    layout = Layout.resolve(model.module_sizes(), 4, row.modules)

    def on_rank() -> MeasuredCosts:
        return measure_costs(
            model,
            layout,
            make_batch,
            batch_size=BATCH_SIZE,
            num_microbatches=row.num_microbatches,
            encoder_batching=row.encoder_batching,
            precision=row.precision,
            num_steps=max(1, steps),
        )

    return run_on_ranks(on_rank, layout.world_size, timeout=600)


@dataclass(frozen=True)
class Comparison:
    """A layout's estimate beside its measurement."""

    row: Row
    estimate: Estimate
    exact: bool
    held: int
    activations: list[tuple[float, int]]
    seconds: float

    @property
    def is_timed(self) -> bool:
        """Whether the machine's rates, measured in float32, are those of the layout's precision."""
        return self.row.precision == "32-true"


def compare(row: Row, machine: Machine, steps: int) -> Comparison:
    """Estimate and measure a layout."""
    job = make_job(row, machine)
    report = report_layout(job, 4, row.modules, row.num_microbatches)
    measured = measure(row, steps)
    exact, held, activations = True, 0, []
    for rank, costs in enumerate(measured):
        memory = {name: report.memory(report.layout.modules[name], rank) for name in costs.modules}
        for name, expected in memory.items():
            exact &= costs.modules[name] == ModuleBytes(expected.parameters, expected.gradients, expected.optimizer)
        held = max(held, sum(sum(vars(bytes_).values()) for bytes_ in costs.modules.values()))
        activations.append((sum(part.activations for part in memory.values()), costs.activations))
    return Comparison(row, report.estimate, exact, held, activations, measured[0].step_seconds)


def make_job(row: Row, machine: Machine) -> Job:
    """The step that is measured."""
    training = Training(row.precision)
    return Job(
        make_model(row.recompute),
        BATCH_SIZE,
        LENGTH,
        {"images": 1},
        training,
        machine,
        encoder_batching=row.encoder_batching,
    )


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's, of lists without ties."""
    places = [sorted(range(len(values)), key=values.__getitem__) for values in (one, other)]
    ranks = [[order.index(item) for item in range(len(order))] for order in places]
    squares = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    return 1 - 6 * squares / (len(one) * (len(one) ** 2 - 1))


def table(comparisons: list[Comparison], steps: int) -> str:
    """What the page on planning shows."""
    lines = [
        f"Measured on CPUs over gloo, 4 ranks on {len(os.sched_getaffinity(0))} cores, {date.today().isoformat()}, by "
        "`benchmarks/estimates.py`.",
        "",
        "| images | language | placement | microbatches | precision | parameters, gradients, optimizer | activations: "
        "estimated / measured, worst rank |" + (" step: estimated / measured |" if steps else ""),
        "| --- | --- | --- | --- | --- | --- | --- |" + (" --- |" if steps else ""),
    ]
    for comparison in comparisons:
        row = comparison.row
        factors = short(comparison.estimate.layout)
        placement = comparison.estimate.layout.placement.value.replace("_", "-")
        estimated, measured = max(comparison.activations, key=lambda pair: abs(pair[0] / pair[1] - 1))
        lines.append(
            f"| {factors['images']} | {factors['language']} | {placement} | {_microbatches(row)} | {row.precision}"
            f"{', recompute' if row.recompute else ''} | {'exact' if comparison.exact else 'WRONG'}, up to "
            f"{gibibytes(comparison.held)} | {gibibytes(estimated)} / {gibibytes(measured)} "
            f"({estimated / measured - 1:+.0%}) |" + (f" {_times(comparison)} |" if steps else "")
        )
    if steps:
        timed = [comparison for comparison in comparisons if comparison.is_timed]
        correlation = rank_correlation(
            [comparison.estimate.step_seconds for comparison in timed], [comparison.seconds for comparison in timed]
        )
        lines += ["", f"Rank correlation of estimated and measured step times: {correlation:.2f}."]
    return "\n".join(lines)


def _microbatches(row: Row) -> str:
    at_once = row.encoder_batching
    return f"{row.num_microbatches}" + (f", encoder takes {at_once} at once" if at_once > 1 else "")


def _times(comparison: Comparison) -> str:
    if not comparison.is_timed:
        return "-"
    return f"{1e3 * comparison.estimate.step_seconds:.0f} / {1e3 * comparison.seconds:.0f} ms"


def write(path: Path, text: str) -> None:
    """Replace what stands between the marks."""
    page = path.read_text()
    before, after = page.split(START)[0], page.split(END)[1]
    path.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps to time in each layout")
    parser.add_argument("--write", type=Path, help="page that holds the table")
    options = parser.parse_args()
    machine = measure_machine(4, "cpu")
    print(machine, flush=True)
    comparisons = []
    for row in ROWS:
        comparisons.append(compare(row, machine, options.steps))
        last = comparisons[-1]
        print(last.exact, last.activations, last.estimate.step_seconds, dict(last.estimate.seconds), last.seconds)
    text = table(comparisons, options.steps)
    print(text)
    if options.write is not None:
        write(options.write, text)


if __name__ == "__main__":
    main()
