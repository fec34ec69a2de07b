"""``mimo completion SHELL``: a script that completes verbs, options and names of classes."""

import argparse
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import shtab

from mimo_strategy.cli.main import VERBS

_READ_CONFIG = ("fit", "validate", "test", "predict", "layout", "plan")


def main(arguments: list[str]) -> int:
    """Print the script."""
    parser = argparse.ArgumentParser(
        "mimo completion",
        description="Print a script that completes verbs, options and names of classes.",
        epilog="For bash: mimo completion bash > ~/.local/share/bash-completion/completions/mimo",
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    print(shtab.complete(_command_line(), parser.parse_args(arguments).shell))
    return 0


def _command_line() -> argparse.ArgumentParser:
    """All verbs with their options, to be looked at by shtab only."""
    parser = argparse.ArgumentParser("mimo")
    verbs = parser.add_subparsers()
    options = dict(_options())
    for name, verb in VERBS.items():
        of_verb = verbs.add_parser(name, help=verb.summary)
        if name not in _READ_CONFIG:
            of_verb.add_argument("file", nargs="*").complete = shtab.FILE
            continue
        of_verb.add_argument("-c", "--config").complete = shtab.FILE
        of_verb.add_argument("--ckpt_path").complete = shtab.DIRECTORY
        of_verb.add_argument("--print_config", action="store_true")
        for option, choices in options.items():
            of_verb.add_argument(f"--{option}", choices=choices)
    return parser


def _options() -> Iterator[tuple[str, list[str] | None]]:
    """Keys of a configuration, with the values that each may have if these are few."""
    from lightning.pytorch import LightningDataModule, Trainer

    from mimo_strategy.cli import lightning_cli  # noqa: F401 - imports the classes to choose from
    from mimo_strategy.layout import ModuleParallel
    from mimo_strategy.module import MimoModule
    from mimo_strategy.strategy import MimoHeteroStrategy

    yield from _parameters("trainer", Trainer)
    yield from _parameters("trainer.strategy", MimoHeteroStrategy)
    for module in ("images", "language"):
        yield from _parameters(f"trainer.strategy.modules.{module}", ModuleParallel)
    for key, base in (("model", MimoModule), ("data", LightningDataModule)):
        classes = [each for each in _subclasses(base) if not inspect.isabstract(each)]
        yield key, [each.__name__ for each in classes]
        for each in classes:
            yield from _parameters(key, each)


def _parameters(key: str, of: type) -> Iterator[tuple[str, list[str] | None]]:
    hints = get_type_hints(of if is_dataclass(of) else of.__init__)
    names = [field.name for field in fields(of)] if is_dataclass(of) else inspect.signature(of).parameters
    for name in names:
        kinds = {hints.get(name), *get_args(hints.get(name))}
        yield f"{key}.{name}", _choices(kinds)
        for kind in kinds:
            if is_dataclass(kind):
                yield from _parameters(f"{key}.{name}", kind)


def _choices(kinds: set[Any]) -> list[str] | None:
    if bool in kinds:
        return ["true", "false"]
    literals = [str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    return literals or None


def _subclasses(base: type) -> Iterator[type]:
    for subclass in base.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
