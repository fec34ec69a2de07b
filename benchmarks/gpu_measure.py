"""What a training loop is measured by on GPUs: time, memory, waits of the host, and what the device does in a step."""

import statistics
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mimo_strategy.layout import Placement

Interval = tuple[int, int]


@dataclass
class Measured:
    """Of one loop, on this rank.

    Attributes:
        seconds: of each measured step, from the end of the one before.
        peak_memory: bytes of tensors at most.
        communicators: process groups that this rank belongs to.
        other_memory: bytes that the device holds beside torch's, more than before: communicators and loaded kernels.
        waits: where the host waited for the device in one step, and how often.
        profiled: seconds of one step, from its first to its last kernel.
        shares: of that time, by what the device did.
        kernels: milliseconds of the longest-running kernels in that step.
        gaps: its longest times with nothing on the device: milliseconds, since the first kernel and for how long, and
            the kernels before and after.
    """

    seconds: list[float] = field(default_factory=list)
    peak_memory: int = 0
    communicators: int = 0
    other_memory: int = 0
    waits: dict[str, int] = field(default_factory=dict)
    profiled: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)
    gaps: list[tuple[float, float, str, str]] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Stopwatch:
    """Told of the end of every step: leaves out the first, times the next, then counts waits and profiles, a step each.

    Args:
        warmup: steps to leave out.
        steps: steps to time.
        placement: of the modules, which tells the bridge's collectives from others.
    """

    def __init__(self, warmup: int, steps: int, placement: Placement) -> None:
        self.total = warmup + steps + 2
        self.measured = Measured()
        self._warmup, self._steps = warmup, steps
        self._placement = placement
        self._done = 0
        self._on_gpu = torch.cuda.is_available()
        self._other_memory = other_memory()
        self._waits: Counter[str] = Counter()

    def step_ended(self) -> None:
        """Take the time; every rank does so together."""
        if self._done == self._warmup + self._steps:
            self._stop_counting()
        if self._on_gpu:
            torch.cuda.synchronize()
        if self._done == self._warmup + self._steps + 1:
            self._stop_profiling()
        dist.barrier()
        now = time.perf_counter()
        if self._warmup <= self._done < self._warmup + self._steps:
            self.measured.seconds.append(now - self._began)
        self._done += 1
        if self._done == self._warmup and self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        if self._done == self._warmup + self._steps:
            self._take_memory()
            self._start_counting()
        elif self._done == self._warmup + self._steps + 1:
            self._profiler = profile(activities=[ProfilerActivity.CUDA] if self._on_gpu else [ProfilerActivity.CPU])
            self._profiler.start()
        self._began = time.perf_counter()

    def _take_memory(self) -> None:
        self.measured.communicators = len(dist.distributed_c10d._world.pg_map)
        if self._on_gpu:
            self.measured.peak_memory = torch.cuda.max_memory_allocated()
            self.measured.other_memory = other_memory() - self._other_memory

    def _start_counting(self) -> None:
        if not self._on_gpu:
            return
        self._catcher = warnings.catch_warnings()
        self._catcher.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._count
        torch.cuda.set_sync_debug_mode("warn")

    def _stop_counting(self) -> None:
        if self._on_gpu:
            torch.cuda.set_sync_debug_mode("default")
            self._catcher.__exit__(None, None, None)
            self.measured.waits = dict(self._waits.most_common())

    def _count(self, message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            frames = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith("warnings.py")]
            last = frames[-1]
            self._waits["/".join(last.filename.split("/")[-3:]) + f":{last.lineno} {last.line}"] += 1

    def _stop_profiling(self) -> None:
        self._profiler.stop()
        if not self._on_gpu:
            return
        events = [
            event
            for event in self._profiler.profiler.kineto_results.events()
            if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
        ]
        start = min(event.start_ns() for event in events)
        self.measured.profiled = (max(event.start_ns() + event.duration_ns() for event in events) - start) / 1e9
        self.measured.shares = _shares(events, self._placement)
        self.measured.gaps = _gaps(events)
        kernels: Counter[str] = Counter()
        for event in events:
            kernels[event.name()[:100]] += event.duration_ns() / 1e6
        self.measured.kernels = dict(kernels.most_common(40))


def _shares(events: list[Any], placement: Placement) -> dict[str, float]:
    """Shares of the step: computation, what collectives and bridge take beside it, and nothing at all.

    The colocated bridge is the only one to broadcast; between disjoint ranks it sends and receives, as all-to-alls of
    experts do, which count as the bridge's there.
    """
    bridge = "Broadcast" if placement is Placement.COLOCATED else "SendRecv"
    kinds: dict[str, list[Interval]] = {"compute": [], "collectives": [], "bridge": []}
    for event in events:
        name = event.name()
        kind = "compute" if "nccl" not in name else "bridge" if bridge in name else "collectives"
        kinds[kind].append((event.start_ns(), event.start_ns() + event.duration_ns()))
    everything = [interval for intervals in kinds.values() for interval in intervals]
    whole = max(end for _, end in everything) - min(start for start, _ in everything)
    compute = _length(kinds["compute"])
    with_collectives = _length(kinds["compute"] + kinds["collectives"])
    with_all = _length(everything)
    return {
        "compute": compute / whole,
        "collectives": (with_collectives - compute) / whole,
        "bridge": (with_all - with_collectives) / whole,
        "idle": 1 - with_all / whole,
    }


def _gaps(events: list[Any], number: int = 40) -> list[tuple[float, float, str, str]]:
    """The longest times between kernels, in order."""
    ordered = sorted(events, key=lambda event: event.start_ns())
    gaps, last = [], ordered[0]
    for event in ordered[1:]:
        end = last.start_ns() + last.duration_ns()
        if event.start_ns() > end:
            since = (end - ordered[0].start_ns()) / 1e6
            gaps.append((since, (event.start_ns() - end) / 1e6, last.name()[:60], event.name()[:60]))
        if event.start_ns() + event.duration_ns() > end:
            last = event
    return sorted(sorted(gaps, key=lambda gap: -gap[1])[:number])


def _length(intervals: list[Interval]) -> int:
    """Time that at least one interval covers."""
    total, covered = 0, 0
    for start, end in sorted(intervals):
        total += max(0, end - max(start, covered))
        covered = max(covered, end)
    return total


def other_memory() -> int:
    """Bytes of the device that are taken, but not by torch's tensors."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def matmul_rate(size: int = 8192, repetitions: int = 20) -> float:
    """Operations per second of a bfloat16 product of random square matrices on this device; the median."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(repetitions + 5):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        left @ right
        ended.record()
        torch.cuda.synchronize()
        seconds.append(began.elapsed_time(ended) / 1e3)
    return 2 * size**3 / statistics.median(seconds[5:])
