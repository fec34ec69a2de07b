"""``mimo completion SHELL``: a script that completes verbs, options and names of classes."""

import argparse
import inspect
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import shtab

from mimo_strategy.cli import layout, plan, profile, weights
from mimo_strategy.cli.complaints import parameter_types, parameters
from mimo_strategy.cli.main import VERBS


def main(arguments: list[str]) -> int:
    """Print the script."""
    print(shtab.complete(_command_line(), make_parser().parse_args(arguments).shell))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Of the verb's argument."""
    parser = argparse.ArgumentParser(
        "mimo completion",
        description="Print a script that completes verbs, options and names of classes.",
        epilog="For bash: mimo completion bash > ~/.local/share/bash-completion/completions/mimo",
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return parser


def _trainer_parser() -> argparse.ArgumentParser:
    """What the Trainer's verbs take beside the keys of a configuration."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-c", "--config", type=Path)
    parser.add_argument("--ckpt_path", type=Path)
    parser.add_argument("--print_config", action="store_true")
    parser.add_argument("--seed_everything")
    return parser


PARSERS = dict.fromkeys(("fit", "validate", "test", "predict"), _trainer_parser) | {
    "layout": layout.make_parser,
    "plan": plan.make_parser,
    "profile": profile.make_parser,
    "export": weights.export_parser,
    "import": weights.import_parser,
    "completion": make_parser,
}
"""What each verb takes beside the keys of a configuration."""
_WITHOUT_CONFIGURATION = ("profile", "export", "import", "completion")


def _command_line() -> argparse.ArgumentParser:
    """All verbs with their options, to be looked at by shtab only."""
    parser = argparse.ArgumentParser("mimo")
    verbs = parser.add_subparsers()
    keys = dict(_keys())
    for name, verb in VERBS.items():
        of_verb = verbs.add_parser(name, help=verb.summary, parents=[PARSERS[name]()], add_help=False)
        for action in of_verb._actions:
            if action.type is Path:
                action.complete = shtab.FILE
        if name not in _WITHOUT_CONFIGURATION:
            for key, choices in keys.items():
                of_verb.add_argument(f"--{key}", choices=choices)
    return parser


def _keys() -> Iterator[tuple[str, list[str] | None]]:
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
    hints = parameter_types(of)
    for name in parameters(of):
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
