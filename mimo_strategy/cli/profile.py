"""``mimo profile``: measure the machine at hand, for ``mimo layout`` and ``mimo plan``."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mimo_strategy.cli.errors import UsageError
from mimo_strategy.planning.machine import Machine, write_machine

_UNITS = {
    "matmul": (1e12, "TFLOP/s"),
    "attention": (1e12, "TFLOP/s"),
    "scan": (1e12, "TFLOP/s"),
    "memory": (1e9, "GB"),
    "memory_bandwidth": (1e9, "GB/s"),
    "bandwidth": (1e9, "GB/s"),
    "node_bandwidth": (1e9, "GB/s"),
    "latency": (1e-6, "us"),
    "dispatch": (1e-6, "us"),
}


def make_parser() -> argparse.ArgumentParser:
    """Of the verb's options."""
    parser = argparse.ArgumentParser(prog="mimo profile", description="Measure this machine, for `mimo plan`.")
    parser.add_argument("--ranks", metavar="N", type=int, help="ranks that exchange; by default one a GPU, or 2")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the profile there")
    parser.add_argument("--json", action="store_true", help="for scripts")
    return parser


def main(arguments: list[str]) -> int:
    """Measure, show, and write what was measured."""
    options = make_parser().parse_args(arguments)
    import torch

    from mimo_strategy.testing.rates import measure_machine

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accelerator = ("gpu" if num_gpus else "cpu") if options.accelerator == "auto" else options.accelerator
    if accelerator == "gpu" and not num_gpus:
        raise UsageError("--accelerator gpu: this machine has no GPU that PyTorch can use")
    ranks = options.ranks if options.ranks is not None else (num_gpus if accelerator == "gpu" else 2)
    if ranks < 1:
        raise UsageError(f"--ranks must be at least 1, got {ranks}")
    if accelerator == "gpu" and ranks > num_gpus:
        raise UsageError(f"--ranks {ranks} needs as many GPUs, this machine has {num_gpus}")
    machine = measure_machine(ranks, accelerator)
    if options.json:
        print(json.dumps(asdict(machine)))
    else:
        _show(machine)
    if options.output is not None:
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_machine(machine, options.output)
        except OSError as error:
            raise UsageError(f"cannot write {options.output}: {error}") from error
    return 0


def _show(machine: Machine) -> None:
    table = Table(title=machine.name, title_justify="left", title_style="bold", box=None)
    table.add_column("rate")
    table.add_column("", justify="right")
    table.add_column("")
    for name, value in asdict(machine).items():
        if name in _UNITS:
            scale, unit = _UNITS[name]
            table.add_row(name, f"{value / scale:.4g}", unit)
        elif name != "name":
            table.add_row(name, f"{value}", "")
    Console().print(table)
