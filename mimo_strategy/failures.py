"""When a rank fails, its cause is printed once: others that end for want of it say so in a line."""

import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_FAILED = "mimo_strategy/failed"
_SECONDS_FOR_A_CAUSE = 2.0
_LOST_CONNECTION = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|remote process exited", re.IGNORECASE
)
_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], None]


class FailureReport:
    """Replaces ``sys.excepthook`` on a rank.

    The first rank with a cause of its own leaves it in the store of the process group before it ends and closes its
    connections. Ranks that then lose theirs, or end by the same error, print one line instead of a traceback.

    Args:
        processes: ranks that this process started, to tell which was killed.
    """

    def __init__(self, processes: Sequence[subprocess.Popen] = ()) -> None:
        self._processes = processes
        self._printed: _Hook = sys.excepthook

    def report(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Print why this rank ends."""
        elsewhere = None
        if isinstance(error, Exception) and dist.is_initialized():
            elsewhere = self._cause_elsewhere(error)
        if elsewhere is None:
            self._printed(kind, error, trace)
        else:
            print(f"rank {dist.get_rank()} ends: {elsewhere}", file=sys.stderr, flush=True)

    def _cause_elsewhere(self, error: Exception) -> str | None:
        lost_connection = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and _LOST_CONNECTION.search(str(error)) is not None
        )
        killed = self._killed() if lost_connection else []
        if killed:
            error.add_note("\n".join(killed))
        cause = f"{traceback.format_exception_only(error)[0].strip()}"
        try:
            store = _get_default_store()
            if lost_connection and not killed:
                _wait_for(store)
            claimed = store.compare_set(_FAILED, "", f"{dist.get_rank()} {cause}").decode()
        except RuntimeError:
            return "rank 0, which keeps the ranks' store, is gone" if lost_connection else None
        rank, first_cause = claimed.split(" ", 1)
        if int(rank) != dist.get_rank() and (lost_connection or first_cause == cause):
            return f"rank {rank} failed: {first_cause}"
        return None

    def _killed(self) -> list[str]:
        # a connection closes before the process can be waited for
        processes = self._processes
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline and processes and all(process.poll() is None for process in processes):
            time.sleep(0.01)
        return [
            f"rank {local_rank} of this node was ended by {signal.Signals(-process.returncode).name}"
            for local_rank, process in enumerate(processes, start=1)
            if process.poll() is not None and process.returncode < 0
        ]


def print_causes_once(processes: Sequence[subprocess.Popen] = ()) -> None:
    """Install a :class:`FailureReport` in this process, if none is; ``processes`` are the ranks that it started."""
    if not isinstance(getattr(sys.excepthook, "__self__", None), FailureReport):
        sys.excepthook = FailureReport(processes).report


def _wait_for(store: dist.Store) -> None:
    """Give a rank that failed the time to say why."""
    deadline = time.monotonic() + _SECONDS_FOR_A_CAUSE
    while time.monotonic() < deadline and not store.check([_FAILED]):
        time.sleep(0.05)
