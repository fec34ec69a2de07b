"""Lightning's command line with what it must know of this package: its classes by name, and one verb at a time."""

import ast
import json
import pkgutil
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, override

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mimo_strategy.callbacks import CaptionWriter
from mimo_strategy.checkpoint.directory import located
from mimo_strategy.checkpoint.manifest import MANIFEST
from mimo_strategy.cli.complaints import shorten, suggest
from mimo_strategy.cli.errors import UsageError
from mimo_strategy.module import MimoModule
from mimo_strategy.registration import NAME
from mimo_strategy.strategy import MimoHeteroStrategy

# Models and data that come with the library, which works without them: a class is known by its name once imported.
for package in ("modules", "datamodules"):
    if find_spec(package) is not None:
        import_module(package)

_OPTION, _STRATEGY = "--trainer.strategy", {"class_path": "mimo_strategy.MimoHeteroStrategy"}

# What a datamodule may know that a model must be told.
_OF_THE_DATA = {
    "vocab_size": "language.vocab_size",
    "image_token_id": "image_token_id",
    "end_token_id": "end_token_id",
}


class MimoArgumentParser(LightningArgumentParser):
    """Raises :class:`UsageError` where others print how they are used."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **settings)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            # of a parser within a parser, which tries several types
            super().error(message, ex)
        raise UsageError(shorten(message, self, _class_names())) from ex

    @override
    def parse_args(self, args: list[str] | None = None, *others: Any, **settings: Any) -> Any:
        """As ever, but a class's parser is given values as YAML has them: jsonargparse 4.53 gives ``None`` for null."""
        if args is not None and not self.exit_on_error:
            args = [_as_yaml(argument) for argument in args]
        return super().parse_args(args, *others, **settings)

    @override
    def dump(self, namespace: Namespace, *args: Any, skip_link_targets: bool = True, **settings: Any) -> str:
        """As ever, but values that the model would be told stay where this datamodule does not tell them."""
        if skip_link_targets and "model" in namespace:
            namespace, skip_link_targets = namespace.clone(), False
            data = pkgutil.resolve_name(namespace["data"]["class_path"]) if namespace.get("data") else None
            for attribute, argument in _OF_THE_DATA.items():
                key = f"model.init_args.{argument}"
                if hasattr(data, attribute) or namespace.get(key) is None:
                    namespace.pop(key, None)
        return super().dump(namespace, *args, skip_link_targets=skip_link_targets, **settings)


class MimoCLI(LightningCLI):
    """Parses the arguments of one verb of the Trainer, makes model, data and Trainer, and runs the verb.

    Args:
        verb: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: what follows it.

    Raises:
        UsageError: for arguments or a configuration that cannot work.
    """

    def __init__(self, verb: str, arguments: list[str]) -> None:
        self.verb = verb
        # Lightning takes them from there
        sys.argv[1:] = [verb, *_with_class_path(arguments)]
        super().__init__(
            MimoModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=MimoArgumentParser,
            trainer_defaults={"strategy": _STRATEGY} | ({"callbacks": [CaptionWriter()]} if verb == "predict" else {}),
            save_config_callback=SaveConfigCallback if verb == "fit" else None,
            save_config_kwargs={"overwrite": True},
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:
        return {self.verb: super().subcommands()[self.verb]}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for attribute, argument in _OF_THE_DATA.items():
            parser.link_arguments(f"data.{attribute}", f"model.init_args.{argument}", apply_on="instantiate")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        checkpoint = self.config[self.verb].get("ckpt_path")
        if checkpoint in (None, "best", "last", "hpc"):
            return
        folder = located(Path(checkpoint))
        if not folder.exists():
            raise UsageError(f"ckpt_path: there is no {checkpoint}")
        if not (folder / MANIFEST).is_file():
            raise UsageError(f"ckpt_path: {checkpoint} is no checkpoint, which is a folder with a {MANIFEST}")

    @override
    def before_instantiate_classes(self) -> None:
        strategy = self.config[self.verb]["trainer"]["strategy"]
        known = {"auto", *StrategyRegistry.available_strategies()}
        if isinstance(strategy, str) and strategy not in known:
            raise UsageError(f"trainer.strategy: no strategy {strategy!r}{suggest(strategy, known)}")

    @override
    def instantiate_classes(self) -> None:
        try:
            self.make_objects()
        except (TypeError, ValueError, MisconfigurationException) as error:
            message = shorten(str(error), self.parser, _class_names())
            if "NoneType" in message and (unset := self._unset_ids()):
                message = f"the data do not tell {', '.join(unset)}: give the model --model.{unset[0]}=... and so on"
            raise UsageError(message) from error

    def make_objects(self) -> None:
        """Make model, data and Trainer."""
        super().instantiate_classes()

    def _unset_ids(self) -> list[str]:
        settings = self.config[self.verb]["model"]["init_args"]
        return [key for key in _OF_THE_DATA.values() if key in settings and settings[key] is None]

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        if isinstance(self.trainer.strategy, MimoHeteroStrategy):
            try:
                self.trainer.strategy.check(self.trainer, self.model, self.datamodule)
            except (TypeError, ValueError) as error:
                raise UsageError(str(error)) from error
        if subcommand != "fit" and self.config[self.verb].get("ckpt_path") is None:
            rank_zero_warn("no --ckpt_path is given: the weights are those that the model starts with")
        super()._run_subcommand(subcommand)


def _as_yaml(argument: str) -> str:
    """``--KEY=VALUE`` with the value as YAML has it, if it is Python's ``None`` or may hold one."""
    key, _, value = argument.partition("=")
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return argument
    return f"{key}={json.dumps(read)}" if read is None or isinstance(read, dict | list) else argument


def _with_class_path(arguments: list[str]) -> list[str]:
    """Name the strategy's class after each mention of its registered name, which takes no settings.

    Raises:
        UsageError: for a configuration that holds no settings.
    """
    named = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        named.append(argument)
        option, _, value = argument.partition("=") if "=" in argument else (previous, "", argument)
        if (option in ("-c", "--config") and _names_strategy(_read(value))) or (option == _OPTION and value == NAME):
            named.append(f"{_OPTION}={json.dumps(_STRATEGY)}")
    return named


def _read(file: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(file).read_text())
    except OSError:
        # the parser says what is wrong, or takes it as settings
        return {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UsageError(f"{file}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{file} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{file} holds no settings, such as `trainer:` with others below it")
    return settings


def _names_strategy(config: dict[str, Any]) -> bool:
    trainer = config.get("trainer")
    return isinstance(trainer, dict) and trainer.get("strategy") == NAME


def _class_names() -> set[str]:
    """Names of the classes that a configuration may name."""
    found, known = [LightningDataModule, LightningModule, Callback, Strategy, Logger], set()
    while found:
        subclasses = found.pop().__subclasses__()
        found += subclasses
        known |= {subclass.__name__ for subclass in subclasses}
    return known
