"""What ``mimo layout`` and ``mimo plan`` take beside the configuration of a run."""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mimo_strategy.checks import check_ddp, check_replayed_ddp
from mimo_strategy.cli.complaints import suggest
from mimo_strategy.cli.errors import UsageError
from mimo_strategy.cli.run_config import RunConfig, read_run
from mimo_strategy.layout import LANGUAGE
from mimo_strategy.planning.cost import CostUnknown
from mimo_strategy.planning.estimate import Job
from mimo_strategy.planning.machine import MACHINES, Machine, read_machine
from mimo_strategy.planning.memory import Training
from mimo_strategy.runtime.data_parallel import resolve_ddp

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def job_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser of the options that both have; what it does not know is for the configuration."""
    parser = argparse.ArgumentParser(
        prog=f"mimo {verb}",
        description=description,
        epilog="Everything else overrides the configuration, as in `mimo fit`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, action="append", required=True, help="configuration of a run"
    )
    parser.add_argument("--world-size", metavar="N", type=int, help="ranks; by default devices x nodes of the Trainer")
    parser.add_argument("--batch-size", metavar="N", type=int, help="samples of a step; by default the data's")
    parser.add_argument("--sequence-length", metavar="N", type=int, help="tokens; by default the model's most")
    parser.add_argument("--machine", choices=MACHINES, default="h200", help="rates and memory (default: h200)")
    parser.add_argument("--profile", metavar="FILE", type=Path, help="rates that `mimo profile` measured, instead")
    parser.add_argument("--memory", metavar="SIZE", type=memory_size, help="of a device, such as 141GB or 80GiB")
    parser.add_argument("--json", action="store_true", help="for scripts")
    return parser


def read_job(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, RunConfig, Job, int]:
    """The verb's own options, the run as configured, the step to estimate, and the world size.

    Raises:
        UsageError: for a configuration that cannot work; if the world size is not known, a number is out of range, the
            precision is not supported, the profile cannot be read, or settings of data parallelism cannot work.
    """
    options, overrides = parser.parse_known_args(arguments)
    for option in ("world_size", "batch_size", "sequence_length"):
        if getattr(options, option) is not None and getattr(options, option) < 1:
            raise UsageError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(options, option)}")
    try:
        run = read_run([f"--config={file}" for file in options.config] + overrides)
    except UsageError as error:
        unknown = re.fullmatch(r"no option '([^'.]+)'", str(error))
        own = [name.lstrip("-") for action in parser._actions for name in action.option_strings]
        raise UsageError(f"{error}{suggest(unknown[1], own) if unknown else ''}") from error
    world_size = options.world_size or run.world_size
    if world_size is None:
        raise UsageError("the Trainer's devices are not a number: give --world-size")
    try:
        longest, items = run.model.longest_sample()
    except CostUnknown:
        # a model without costs has a layout all the same
        longest, items = options.sequence_length or 1, {}
    length = options.sequence_length or longest
    if length > longest:
        raise UsageError(f"--sequence-length {length} is more than the {longest} tokens that the model takes")
    machine = _machine(options)
    sizes = run.model.module_sizes()
    try:
        check_ddp(sizes, run.ddp)
        ddp = resolve_ddp(sizes, run.ddp, on_gpus=machine.runs_ahead)
        if run.cuda_graphs:
            check_replayed_ddp(ddp[LANGUAGE])
    except ValueError as error:
        raise UsageError(str(error)) from None
    try:
        trainings = {name: Training.of(config, run.precision) for name, config in ddp.items()}
    except ValueError as error:
        raise UsageError(f"trainer.{error}") from None
    job = Job(
        run.model,
        options.batch_size or run.batch_size or 0,
        length,
        items,
        trainings[LANGUAGE],
        machine,
        encoder_batching=run.encoder_batching,
        encoder_ahead=run.encoder_ahead,
        cuda_graphs=run.cuda_graphs,
        trainings=trainings,
    )
    return options, run, job, world_size


def print_json(told: Mapping[str, Any]) -> None:
    """Print for scripts, which may stop to read before the end."""
    try:
        print(json.dumps(told), flush=True)
    except BrokenPipeError:
        # or Python would complain when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def memory_size(text: str) -> float:
    """Bytes of a size with a unit, such as ``141GB`` or ``80GiB``.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT]I?)B?|B)", text.strip().upper())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 141GB or 80GiB")
    return float(match[1]) * _UNITS[match[2] or ""]


def _machine(options: argparse.Namespace) -> Machine:
    machine = MACHINES[options.machine]
    if options.profile is not None:
        try:
            machine = read_machine(options.profile)
        except ValueError as error:
            raise UsageError(str(error)) from None
    return machine if options.memory is None else replace(machine, memory=options.memory)
