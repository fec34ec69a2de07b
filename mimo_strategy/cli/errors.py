"""Wrong input is told in a few lines; everything else keeps its traceback.

With ``JSONARGPARSE_DEBUG=1`` in the environment wrong input keeps it too.
"""

import os
import sys

from mimo_strategy.layout import LayoutError

_RANK = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


class UsageError(ValueError):
    """Input that cannot work; the message says what would."""


def report(error: Exception, program: str) -> int:
    """Print an error of the user's input and return the exit code.

    Raises:
        Exception: ``error`` itself, if it is none.
    """
    if not isinstance(error, UsageError | LayoutError) or os.environ.get("JSONARGPARSE_DEBUG"):
        raise error
    # ranks that torchrun or Slurm started find the same
    if next((os.environ[name] for name in _RANK if name in os.environ), "0") == "0":
        print(f"{program}: {error}", file=sys.stderr)
    return 2
