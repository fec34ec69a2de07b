"""``mimo VERB ...``: finds the verb, and imports nothing else before."""

import difflib
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple

from mimo_strategy.cli.errors import UsageError, report


class Verb(NamedTuple):
    """A function of the arguments after the verb that returns the exit code, as ``module:name``, and what it does."""

    function: str
    summary: str


VERBS = {
    "fit": Verb("mimo_strategy.cli.trainer:fit", "train a model"),
    "validate": Verb("mimo_strategy.cli.trainer:validate", "loss on the held-out samples"),
    "test": Verb("mimo_strategy.cli.trainer:test", "metrics of generated answers"),
    "predict": Verb("mimo_strategy.cli.trainer:predict", "write generated answers and their images"),
    "layout": Verb("mimo_strategy.cli.layout:main", "show and check what runs where; needs no processes and no GPU"),
    "plan": Verb("mimo_strategy.cli.plan:main", "search the layouts that fit and rank them by estimated step time"),
    "profile": Verb("mimo_strategy.cli.profile:main", "measure this machine, for `plan`"),
    "export": Verb("mimo_strategy.cli.weights:export", "a checkpoint's weights as one safetensors file"),
    "import": Verb("mimo_strategy.cli.weights:import_", "a checkpoint from a safetensors file"),
    "completion": Verb("mimo_strategy.cli.completion:main", "a script that completes all this in a shell"),
}

HELP = """usage: mimo VERB [options]

Train vision-language models on megatron-core with a parallel layout per module.

{verbs}

`mimo VERB --help` tells of one. Start with: mimo fit --config examples/configs/cpu-digits.yaml"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; ``arguments`` default to those of the process. Returns the exit code: 2 if the input is wrong."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb == "help" and rest:
        verb, rest = rest[0], ["--help"]
    if verb == "--version":
        print(f"mimo-strategy {version('mimo-strategy')}")
        return 0
    if verb in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {name:<12}{verb.summary}" for name, verb in VERBS.items())))
        return 0
    try:
        if verb not in VERBS:
            close = difflib.get_close_matches(verb, VERBS, 1)
            raise UsageError(f"no verb {verb!r}; " + (f"did you mean {close[0]!r}?" if close else "see mimo --help"))
        # classes of one's own, as with `python -m`; last, so that a folder here hides nothing that is installed
        sys.path.append(os.getcwd())
        return pkgutil.resolve_name(VERBS[verb].function)(rest)
    except Exception as error:
        return report(error, f"mimo {verb}")
