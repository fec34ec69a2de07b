"""``mimo export`` and ``mimo import``: weights between checkpoints and safetensors files."""

import argparse
from pathlib import Path

from mimo_strategy.cli.errors import UsageError


def export_parser() -> argparse.ArgumentParser:
    """Of what ``mimo export`` takes."""
    parser = argparse.ArgumentParser("mimo export", description="Write a checkpoint's weights into one file.")
    parser.add_argument("checkpoint", type=Path, help="folder NAME.ckpt, of any layout")
    parser.add_argument("file", type=Path, help="FILE.safetensors to write")
    return parser


def import_parser() -> argparse.ArgumentParser:
    """Of what ``mimo import`` takes."""
    parser = argparse.ArgumentParser("mimo import", description="Make a checkpoint of the weights in a file.")
    parser.add_argument("file", type=Path, help="FILE.safetensors")
    parser.add_argument("checkpoint", type=Path, help="folder NAME.ckpt to write, to validate, test or predict with")
    return parser


def export(arguments: list[str]) -> int:
    """Write a checkpoint's weights into one file."""
    return _convert("export_weights", export_parser(), arguments)


def import_(arguments: list[str]) -> int:
    """Make a checkpoint of the weights in a file."""
    return _convert("import_weights", import_parser(), arguments)


def _convert(function: str, parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    source, target = vars(parser.parse_args(arguments)).values()
    if not source.exists():
        raise UsageError(f"there is no {source}")
    from mimo_strategy import checkpoint

    try:
        getattr(checkpoint, function)(source, target)
    except (checkpoint.CheckpointError, checkpoint.SaveError, OSError) as error:
        raise UsageError(str(error)) from error
    print(f"wrote {target}")
    return 0
