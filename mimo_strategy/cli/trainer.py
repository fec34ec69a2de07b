"""The verbs of Lightning's Trainer."""

from functools import partial

from mimo_strategy.cli.lightning_cli import MimoCLI


def run(verb: str, arguments: list[str]) -> int:
    """Parse ``arguments``, make model, data and Trainer, and call the Trainer's ``verb``."""
    MimoCLI(verb, arguments)
    return 0


fit = partial(run, "fit")
validate = partial(run, "validate")
test = partial(run, "test")
predict = partial(run, "predict")
