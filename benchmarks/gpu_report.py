"""The table and the plot of what ``benchmarks/gpu.py`` measured.

python benchmarks/gpu_report.py gpu.json --plot docs/images/gpu.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

_LABELS = {"megatron": "megatron-core alone", "plain": "strategy, same settings", "strategy": "strategy"}
_COLORS = {"compute": "#3b6ea5", "collectives": "#e0a030", "bridge": "#b04a5a", "idle": "#d8d8d8"}


def heading(report: dict[str, Any]) -> str:
    """Machine and model."""
    rate = report["matmul"] / 1e12
    return (
        f"{report['machine']}, bf16 product of 8192 x 8192 matrices: {rate:.0f} TFLOP/s; "
        f"language model: {report['model']}"
    )


def table(report: dict[str, Any]) -> str:
    """All cases as a Markdown table."""
    header = [
        "case", "encoder / language", "loop", "microbatches", "step", "tokens/s", "TFLOP/s per GPU", "of matmul",
        "peak memory", "communicators", "their memory", "bridge", "collectives", "idle", "host waits",
    ]  # fmt: skip
    rows = [header, ["---"] * len(header), *(_row(case, report) for case in report["cases"])]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(case: dict[str, Any], report: dict[str, Any]) -> list[str]:
    num_gpus = int(report["machine"].split()[0])
    rate = case["flops"] / case["median"] / num_gpus
    shares = case["shares"]
    return [
        case["name"],
        " / ".join(_layout(case[module]) for module in ("images", "language") if case[module]),
        _label(case),
        str(case["microbatches"]),
        f"{case['median']:.3f} s",
        f"{case['batch_size'] * case['sequence'] / case['median']:,.0f}",
        f"{rate / 1e12:.0f}",
        f"{rate / report['matmul']:.1%}",
        f"{case['peak_memory'] / 2**30:.0f} GiB",
        str(case["communicators"]),
        f"{case['other_memory'] / 2**30:.1f} GiB",
        *(f"{shares.get(kind, 0):.1%}" for kind in ("bridge", "collectives", "idle")),
        str(sum(case["waits"].values())),
    ]


def _label(case: dict[str, Any]) -> str:
    size, ahead = case["encoder_batching"], case["encoder_ahead"]
    return (
        _LABELS[case["loop"]]
        + (f", encoder takes {size} at once" if size > 1 else "")
        + (f", encoder {ahead} ahead" if ahead else "")
        + (", fp8" if case["fp8"] else "")
        + (", CUDA graphs" if case["cuda_graphs"] else "")
    )


def _layout(module: dict[str, Any]) -> str:
    sizes = " ".join(f"{name}{module[name]}" for name in ("tp", "dp", "ep") if (module[name] or 1) > 1)
    return sizes or "dp1"


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw every case's step, and what the device of rank 0 did in it."""
    from matplotlib.figure import Figure

    cases = report["cases"][::-1]
    figure = Figure(figsize=(9, 0.5 * len(cases) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [f"{case['name']}, {case['microbatches']} mb: {_label(case)}" for case in cases]
    left = [0.0] * len(cases)
    for kind, color in _COLORS.items():
        widths = [case["shares"].get(kind, 0) * case["median"] for case in cases]
        axes.barh(names, widths, left=left, color=color, label=kind, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlabel("seconds per step (median), shared out as in one profiled step of rank 0")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(_COLORS), frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="image to write")
    options = parser.parse_args()
    report = json.loads(options.report.read_text())
    print(heading(report), end="\n\n")
    print(table(report))
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
