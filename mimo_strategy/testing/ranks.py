"""Run a function on several ranks from a test."""

import ctypes
import gc
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

Accelerator = Literal["cpu", "gpu"]

_PR_SET_PDEATHSIG = 1

# Seconds. On a GPU every process compiles and tunes the kernels that it uses for the first time.
DEFAULT_TIMEOUT = {"cpu": 120.0, "gpu": 600.0}


class RankError(AssertionError):
    """A rank failed, or did not finish in time; the message holds the first failing rank's traceback."""


def run_on_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float | None = None,
    accelerator: Accelerator = "cpu",
) -> list[Any]:
    """Run ``function(*args)`` on ``world_size`` ranks and return what each returned, in rank order.

    The ranks are forked from this process, and so need not import anything again; this process must not have used
    threads of its own. Within ``function``, ``torch.distributed`` is initialised and Lightning takes its ranks from
    the environment.

    Args:
        function: may be a closure; what it returns must pickle. Tensors come back on the CPU.
        world_size: number of ranks.
        args: passed to every rank.
        timeout: seconds after which all ranks are killed; ``None`` is 120 on CPUs and 600 on GPUs.
        accelerator: ``cpu`` connects the ranks over gloo, ``gpu`` over NCCL, rank ``r`` on ``cuda:r``. Where there are
            fewer GPUs than ranks they share them: numbers are right then, speeds are not, as ranks take turns and talk
            through the host. This process must not have used CUDA. It may ask
            ``torch.cuda.is_available()``, which before ``import mimo_strategy`` would have initialised CUDA.

    Raises:
        RankError: if a rank raises or dies, or the time is up. All ranks have ended then.
        RuntimeError: if this process cannot fork ranks any more, or has no GPU for them.
    """
    if dist.is_initialized():
        raise RuntimeError("run_on_ranks forks ranks, so this process must not have torch.distributed initialised")
    if accelerator == "gpu":
        if torch.cuda.is_initialized():
            raise RuntimeError("run_on_ranks forks ranks, so this process must not have CUDA initialised")
        if not torch.cuda.device_count():
            raise RuntimeError('ranks with accelerator="gpu" need a GPU, this machine has none')
    if timeout is None:
        timeout = DEFAULT_TIMEOUT[accelerator]
    torch.set_num_threads(1)
    fork = get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes = [
            fork.Process(
                target=_run_rank,
                args=(function, args, rank, world_size, Path(folder), timeout, accelerator, os.getpid()),
            )
            for rank in range(world_size)
        ]
        sys.stdout.flush()
        sys.stderr.flush()
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [
            # another process's tensors would initialise CUDA here
            torch.load(Path(folder) / f"result-{rank}", map_location="cpu", weights_only=False)
            for rank in range(world_size)
        ]


def trainer_ranks() -> dict[str, int]:
    """``devices`` and ``num_nodes`` for a Trainer over all ranks of this job, as :func:`run_on_ranks` started them."""
    num_devices = int(os.environ["LOCAL_WORLD_SIZE"])
    return {"devices": num_devices, "num_nodes": dist.get_world_size() // num_devices}


def _wait(processes: list, folder: Path, deadline: float, timeout: float) -> None:
    """Return when all ranks have ended well; raise as soon as one has not."""
    while any(process.exitcode is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if failed:
            break
        if time.monotonic() > deadline:
            running = [rank for rank in range(len(processes)) if not (folder / f"result-{rank}").exists()]
            raise RankError(f"ranks {running} of {len(processes)} did not finish within {timeout:g} s")
        time.sleep(0.01)
    died = {
        rank: process.exitcode
        for rank, process in enumerate(processes)
        if process.exitcode and not (folder / f"error-{rank}").exists()
    }
    if died:  # before any traceback, as the others then fail for want of this rank
        causes = ", ".join(
            f"rank {rank} by {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
            for rank, code in died.items()
        )
        raise RankError(f"ended without a traceback: {causes}")
    errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise RankError(f"rank {errors[0].name.removeprefix('error-')} failed first:\n{errors[0].read_text()}")


def _run_rank(
    function: Callable[..., Any],
    args: tuple,
    rank: int,
    world_size: int,
    folder: Path,
    timeout: float,
    accelerator: Accelerator,
    parent: int,
) -> None:
    # a test that is killed, or interrupted once more while it ends its ranks, leaves none behind
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # what was imported is never garbage, and to look through it would copy its pages
    gc.freeze()
    # Lightning would take the ranks of a job that this process is part of
    for outer in ("SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(outer, None)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    num_gpus = torch.cuda.device_count() if accelerator == "gpu" else world_size
    if num_gpus < world_size:
        _pass_for_a_machine(rank, rank % num_gpus)
    else:
        os.environ.update(NODE_RANK="0", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    # torch renews a thread pool after a fork when it is first asked for, and gives none to whoever asks meanwhile: the
    # first backward pass asks in one thread per GPU
    torch.set_num_threads(1)
    try:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if accelerator == "gpu" else None
        if device is not None:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "gloo" if device is None else "nccl",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
            device_id=device,
        )
        torch.save(function(*args), folder / f"result-{rank}")
        if dist.is_initialized():
            # gloo connects ranks pair by pair: one that leaves early breaks those that still connect
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _pass_for_a_machine(rank: int, gpu: int) -> None:
    """NCCL takes no two ranks of one machine on one GPU; ranks of different machines talk over sockets."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ.update(
        NODE_RANK=str(rank),
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="1",
        CUDA_VISIBLE_DEVICES=visible.split(",")[gpu] if visible else str(gpu),
        NCCL_HOSTID=f"rank-{rank}",
        NCCL_NET="Socket",
        NCCL_SOCKET_IFNAME="lo",
    )
