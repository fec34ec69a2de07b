"""Tells what a stuck run waits for: the step, the collective, and the ranks that are not in it."""

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_PIPELINE = "megatron/core/pipeline_parallel/"
_STUCK = "mimo_strategy/stuck/"
_SECONDS_TO_REPORT = 2.0


@dataclass
class Where:
    """Where a rank is.

    Attributes:
        step: of training, or number of the batch elsewhere, that it entered last.
        phase: the verb that it runs.
        collective: function that communicates, ``None`` outside of any.
        ranks: global ranks that take part in it.
        line: innermost line that is neither torch's nor Python's own.
    """

    step: int
    phase: str
    collective: str | None
    ranks: list[int]
    line: str


class Watchdog(threading.Thread):
    """A thread of every rank that looks whether steps go on; it costs nothing until they do not.

    When there was no progress for ``patience``, each rank leaves in the store where it is, and the first of them
    prints all of it, once for every time that the run is stuck. The run itself goes on to wait, until the timeout of
    the collective.

    Args:
        patience: time without progress.
    """

    def __init__(self, patience: timedelta) -> None:
        super().__init__(name="mimo-watchdog", daemon=True)
        self._patience = patience.total_seconds()
        self._progress = (0, "setup")
        self._stopped = threading.Event()
        self._watched = threading.main_thread().ident
        # of its own: that of the process group may be waited on
        self._store = _get_default_store().clone()
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def enter(self, step: int, phase: str) -> None:
        """Note progress."""
        self._progress = (step, phase)

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        seen, since, told = self._progress, time.monotonic(), False
        while not self._stopped.wait(min(self._patience / 4, 1.0)):
            if self._progress != seen:
                if told:
                    self._store.delete_key(f"{_STUCK}{self._rank}")
                seen, since, told = self._progress, time.monotonic(), False
            elif not told and time.monotonic() - since > self._patience:
                told = True
                self._tell(*seen)

    def _tell(self, step: int, phase: str) -> None:
        own = locate(sys._current_frames()[self._watched], step, phase)
        self._store.set(f"{_STUCK}{self._rank}", json.dumps(asdict(own)))
        # ranks look at different times
        self._stopped.wait(self._patience + _SECONDS_TO_REPORT)
        ranks = {
            rank: Where(**json.loads(self._store.get(f"{_STUCK}{rank}")))
            for rank in range(self._world_size)
            if self._store.check([f"{_STUCK}{rank}"])
        }
        if ranks and self._rank == min(ranks):
            print(describe(ranks, self._world_size, self._patience), file=sys.stderr, flush=True)


def locate(frame: FrameType | None, step: int, phase: str) -> Where:
    """Where a thread is, by its innermost frame."""
    collective, ranks, line = None, [], ""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.endswith(_COLLECTIVES) and not frame.f_code.co_name.startswith("_"):
            collective, ranks = frame.f_code.co_name, _ranks_of(frame.f_locals)
        elif _PIPELINE in path and collective is None:
            collective = frame.f_code.co_name
        if _PIPELINE in path and not ranks:
            ranks = _peers(frame.f_locals)
        if not line and "/torch/" not in path and "/lib/python" not in path.removesuffix("site-packages"):
            line = f"{frame.f_code.co_name} at {path}:{frame.f_lineno}"
        frame = frame.f_back
    return Where(step, phase, collective, ranks, line)


def describe(ranks: dict[int, Where], world_size: int, patience: float) -> str:
    """Where all ranks are, and whom they wait for.

    Args:
        ranks: those that are stuck.
        world_size: number of ranks.
        patience: seconds without progress.
    """
    places: dict[str, list[int]] = {}
    for rank, where in ranks.items():
        place = f"{where.phase} step {where.step}, "
        if where.collective is not None:
            place += f"in {where.collective} of ranks {_listed(where.ranks)}, "
        place += where.line
        places.setdefault(place, []).append(rank)
    absent = [rank for rank in range(world_size) if rank not in ranks]
    if absent:
        places["going on, or ended"] = absent
    outside = [rank for rank, where in ranks.items() if where.collective is None] + absent
    if not outside:
        # all communicate, but not all in the same collective: most wait for the few
        by_call: dict[str, list[int]] = {}
        for rank, where in ranks.items():
            by_call.setdefault(f"{where.collective} {where.ranks}", []).append(rank)
        outside = min(by_call.values(), key=len) if len(by_call) > 1 else []
    lines = [f"no progress for {patience:g} s:"]
    lines += [f"  rank(s) {_listed(members)}: {place}" for place, members in places.items()]
    lines.append(f"  waiting for rank(s) {_listed(sorted(outside)) or 'unknown'}")
    return "\n".join(lines)


def _ranks_of(names: dict[str, Any]) -> list[int]:
    group = names.get("group") or dist.group.WORLD
    return dist.get_process_group_ranks(group) if isinstance(group, dist.ProcessGroup) else []


def _peers(names: dict[str, Any]) -> list[int]:
    found = [value for held in names.values() for value in (held if isinstance(held, list) else [held])]
    return sorted({operation.peer for operation in found if isinstance(operation, dist.P2POp)})


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
