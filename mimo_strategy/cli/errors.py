"""Wrong input is told in a few lines; everything else keeps its traceback."""

import sys

from mimo_strategy.layout import LayoutError


class UsageError(ValueError):
    """Input that cannot work; the message says what would."""


def report(error: Exception, program: str) -> int:
    """Print an error of the user's input and return the exit code.

    Raises:
        Exception: ``error`` itself, if it is none.
    """
    if not isinstance(error, UsageError | LayoutError):
        raise error
    print(f"{program}: {error}", file=sys.stderr)
    return 2
