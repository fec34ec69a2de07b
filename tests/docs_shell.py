"""What shell blocks of the documentation name must exist: targets, files, options; what needs no processes runs."""

import inspect
import re
import shlex
import tomllib
from collections.abc import Callable
from functools import cache
from itertools import pairwise

from docs_code import ROOT, Block
from lightning.pytorch import Trainer
from torch.distributed.run import get_args_parser

from mimo_strategy.cli.completion import PARSERS
from mimo_strategy.cli.main import VERBS, main

# what readers write themselves, and what a set-up or a run makes
_READERS_FILES = re.compile(r"train\.py|\.venv/bin/activate|runs/.*")
_PYTEST_OPTIONS = {"-q", "-m", "--accelerator", "--write-proof"}


def check(block: Block) -> None:
    """Check every command of a block.

    Raises:
        AssertionError: for a command that is not known here, or that names what does not exist.
    """
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if not words:
            continue
        command = words[0].rsplit("/", 1)[-1]
        assert command in _COMMANDS, f"{block}: no check knows the command {words[0]}"
        _COMMANDS[command](words[1:], f"{block}: {line}")


def _make(words: list[str], where: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for word in words:
        assert word in targets or re.match(r"(LAYOUT|NAME|VENV|PYTHON)=", word), where


def _python(words: list[str], where: str) -> None:
    if words[:2] == ["-m", "pip"]:
        return _pip(words[2:], where)
    if words[:2] == ["-m", "pytest"]:
        for word in words[2:]:
            name = word.split("=")[0]
            assert name in _PYTEST_OPTIONS or name in ("gpu", "cpu") or (ROOT / name).exists(), where
        return None
    return _script(words, where)


def _script(words: list[str], where: str) -> None:
    script, *options = words
    _file([script], where)
    if not _READERS_FILES.fullmatch(script):
        source = (ROOT / script).read_text()
        for option in options:
            assert not option.startswith("--") or f'"{option.split("=")[0]}"' in source, where


def _pip(words: list[str], where: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if asked := re.search(r"\[(.*)\]", word):
            assert set(asked[1].split(",")) <= extras.keys(), where
        if word.endswith(".txt"):
            _file([word], where)


def _torchrun(words: list[str], where: str) -> None:
    known = _torchrun_options()
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            return _script([word, *rest], where)
        assert word in known, where
        next(rest)
    raise AssertionError(f"{where}: runs no script")


@cache
def _torchrun_options() -> set[str]:
    return {option for action in get_args_parser()._actions for option in action.option_strings}


def _mimo(words: list[str], where: str) -> None:
    verb, *options = words
    assert verb in VERBS or verb == "--help", where
    known = {name for action in PARSERS[verb]()._actions for name in action.option_strings} if options else set()
    if verb in ("fit", "layout", "plan"):
        looked_at = [option for option in options if option != "--print_config"]
        assert main(["layout" if verb == "fit" else verb, *looked_at]) == 0, where
    for option, value in pairwise([*options, ""]):
        name = option.split("=")[0]
        assert not name.startswith("-") or name in known or "." in name or name in ("--model", "--data"), where
        if option == "--config":
            _file([value], where)
        if option.startswith("--trainer."):
            assert option.split("=")[0].split(".")[1] in inspect.signature(Trainer).parameters, where


def _file(words: list[str], where: str) -> None:
    assert _READERS_FILES.fullmatch(words[0]) or (ROOT / words[0]).is_file(), where


_COMMANDS: dict[str, Callable[[list[str], str], None]] = {
    "make": _make,
    "mimo": _mimo,
    "python": _python,
    "pip": _pip,
    "torchrun": _torchrun,
    "sbatch": _file,
    "source": _file,
}
