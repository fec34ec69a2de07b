"""Ranks that are processes: how they are started, what they say when one fails, and that all of them end."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from mimo_strategy.failures import FailureReport
from mimo_strategy.testing import run_on_ranks

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("launched.py")
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SECONDS_TO_END = 30


class Ended(NamedTuple):
    """Commands that ended, with all processes that they started.

    Attributes:
        codes: exit codes.
        output: of each.
        since_failure: seconds from the failure that the script announced, if it did.
    """

    codes: list[int]
    output: list[str]
    since_failure: float | None


def run(*commands: tuple[list[Any], dict[str, str]], **case: Any) -> Ended:
    """Run commands with additions to the environment, side by side; fails if a process of them lives on."""
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | ENVIRONMENT | environment | {"CASE": json.dumps(case)},
        )
        for command, environment in commands
    ]
    deadline = time.monotonic() + 150
    output = []
    try:
        for process in processes:
            # the pipe closes when the last process that holds it has ended
            output.append(process.communicate(timeout=deadline - time.monotonic())[0])
        ended = time.time()
    except subprocess.TimeoutExpired:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("processes live on:\n" + "\n".join(process.communicate()[0] for process in processes))
    failed = [float(seconds) for text in output for seconds in re.findall(r"fails at ([\d.]+)", text)]
    return Ended([process.returncode for process in processes], output, ended - failed[0] if failed else None)


def side_by_side(*runs: Callable[[], Ended]) -> list[Ended]:
    """Each of them spends most of its time importing, one rank after another."""
    with ThreadPoolExecutor(len(runs)) as pool:
        return [ended.result() for ended in [pool.submit(run) for run in runs]]


@pytest.fixture
def port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ranks(port: str, **environment: str) -> list[tuple[list[Any], dict[str, str]]]:
    """Two ranks, each a command of its own, as a cluster's launcher starts them."""
    return [
        (
            [sys.executable, SCRIPT],
            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            | {name: value.format(rank=rank) for name, value in environment.items()},
        )
        for rank in range(2)
    ]


# ---- Lightning's own launcher


def test_a_layout_that_does_not_fit_is_reported_once():
    ended = run(([sys.executable, SCRIPT], {}), images=2)
    assert ended.codes != [0]
    assert ended.output[0].count("Traceback") == 1, ended.output[0]
    assert "A layout that fits 2 rank(s)" in ended.output[0]


def check_failure(ended: Ended, rank: int, how: str) -> None:
    (output,) = ended.output
    assert "trained" not in output
    assert ended.codes != [0]
    assert ended.since_failure < SECONDS_TO_END
    if how == "raises":
        cause = f"KeyError: 'no such sample on rank {rank}'"
        traced = output.split("Root Cause")[0].split("Traceback (most recent call last)")
        assert [cause in part for part in traced[:2]] == [False, True], output
        # another rank may say that this one failed, but shows no traceback of its own
        assert not re.search("gloo|Connection closed", output), output


@pytest.mark.parametrize(
    "rank", [pytest.param(0, id="first", marks=pytest.mark.exhaustive), pytest.param(1, id="second")]
)
def test_a_rank_that_fails_ends_all(rank):
    ways = ("raises", "killed")
    results = side_by_side(*(partial(run, ([sys.executable, SCRIPT], {}), rank=rank, how=how) for how in ways))
    for how, ended in zip(ways, results, strict=True):
        check_failure(ended, rank, how)
    told = "rank 1 of this node was ended by SIGKILL" if rank == 1 else "rank 0, which keeps the ranks' store, is gone"
    assert told in results[1].output[0]


def test_a_rank_that_waits_in_the_store_for_one_that_failed_names_it():
    def run():
        printed = io.StringIO()
        with redirect_stderr(printed):
            try:
                if dist.get_rank() == 1:
                    raise KeyError("no such sample")
                # the store of ranks that a launcher starts; those of tests have one in a file
                store = dist.TCPStore("127.0.0.1", 0, is_master=True)
                store.wait(["what rank 1 never sets"], timedelta(milliseconds=100))
            except Exception as error:
                FailureReport().report(type(error), error, error.__traceback__)
        return printed.getvalue()

    waiting, failed = run_on_ranks(run, 2)
    assert waiting == "rank 0 ends: rank 1 failed: KeyError: 'no such sample'\n"
    assert "Traceback" in failed


@pytest.mark.exhaustive
def test_a_stuck_run_tells_what_it_waits_for():
    ended = run(([sys.executable, SCRIPT], {}), rank=1, how="sleeps", watchdog=2)
    (output,) = ended.output
    assert ended.codes == [0], output
    assert output.count("no progress for 2 s:") == 1, output
    told = output.split("no progress")[1]
    assert re.search(r"rank\(s\) 0: training step [01], in \w+ of ranks .*[01]", told), told
    assert re.search(r"rank\(s\) 1: training step 0, sleep_for_a_while at .*launched.py:\d+", told), told
    assert "waiting for rank(s) 1" in told


@pytest.mark.exhaustive
def test_notebooks_are_refused_for_more_than_one_rank():
    code = """
import sys
sys.ps1 = ">>> "
from lightning.pytorch import Trainer
from mimo_strategy import MimoHeteroStrategy
Trainer(accelerator="cpu", strategy=MimoHeteroStrategy(), devices=1, logger=False)
print("one is fine")
Trainer(accelerator="cpu", strategy=MimoHeteroStrategy(), devices=2, logger=False)
"""
    ended = run(([sys.executable, "-c", code], {}))
    (output,) = ended.output
    assert "one is fine" in output
    assert "does not start ranks from a notebook" in output.splitlines()[-1]


# ---- torchrun


def test_torchrun():
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", SCRIPT]
    well, failed = side_by_side(*(partial(run, (command, {}), rank=1, how=how) for how in ("well", "raises")))
    assert well.codes == [0], well.output[0]
    assert well.output[0].count("trained 3 steps as rank") == 2
    check_failure(failed, 1, "raises")


@pytest.mark.exhaustive
def test_torchrun_with_another_number_of_ranks_is_refused():
    ended = run(([*TORCHRUN, "--standalone", "--nproc-per-node=1", SCRIPT], {}))
    assert ended.codes != [0]
    assert "does not match the world size" in ended.output[0], ended.output[0]


@contextmanager
def two_nodes() -> Iterator[list[str]]:
    """Two network namespaces that reach each other."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    names = [f"mimo-{os.getpid()}-{node}" for node in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "node0", "netns", names[0], "type", "veth", "peer", "name", "node1", "netns", names[1])
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"network namespaces are not permitted here: {reason}")
        for node, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{node + 1}/24", "dev", f"node{node}")
            ip("-n", name, "link", "set", f"node{node}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_nodes_by_two_torchruns():
    with two_nodes() as nodes:
        commands = [
            (
                [
                    *["ip", "netns", "exec", name, *TORCHRUN, "--nnodes=2", "--nproc-per-node=1"],
                    *[f"--node-rank={node}", "--master-addr=10.77.0.1", "--master-port=29500", SCRIPT],
                ],
                {"GLOO_SOCKET_IFNAME": f"node{node}"},
            )
            for node, name in enumerate(nodes)
        ]
        ended = run(*commands, devices=1, num_nodes=2)
    assert ended.codes == [0, 0], ended.output
    for node, output in enumerate(ended.output):
        assert f"trained 3 steps as rank {node} of 2 on node {node}" in output


# ---- Slurm


def slurm(port: str, folder: Path) -> list[tuple[list[Any], dict[str, str]]]:
    """Two tasks as ``srun`` starts them, with an ``scontrol`` that writes down what it is asked."""
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol.log\n')
    scontrol.chmod(0o755)
    return ranks(
        port,
        PATH=f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}",
        SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_JOB_NAME="train",
        SLURM_JOB_ID="4711",
        SLURM_JOB_NODELIST="localhost",
        SLURM_NODEID="0",
        SLURM_PROCID="{rank}",
        SLURM_LOCALID="{rank}",
    )


def test_slurm_requeues_a_job_that_one_rank_is_told_to_end(port, tmp_path):
    case = {"folder": str(tmp_path), "steps": 4}
    first = run(*slurm(port, tmp_path), **case, rank=1, how="gets SIGUSR1")
    assert first.codes == [0, 0], "\n".join(first.output)
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n"
    assert (tmp_path / "hpc_ckpt_1.ckpt" / ".metadata").is_file()
    # the signal came in the second step, after which both saved
    again = run(*slurm(port, tmp_path), **case)
    assert again.codes == [0, 0], again.output
    for before, after in zip(first.output, again.output, strict=True):
        losses = [re.findall(r"step (\d+) loss (\S+)", output) for output in (before, after)]
        assert [step for step, _ in losses[0]] == ["1", "2", "3", "4"]
        assert losses[1] == losses[0][2:]


@pytest.mark.exhaustive
def test_a_rank_that_is_told_to_terminate_ends_all_and_all_save(port, tmp_path):
    commands = ranks(port, LOCAL_RANK="{rank}", NODE_RANK="0", WORLD_SIZE="2")
    ended = run(*commands, folder=str(tmp_path), rank=1, how="gets SIGTERM", steps=50)
    for output in ended.output:
        assert "trained" not in output
        assert "step 2 loss" in output
        assert "step 3 loss" not in output
    assert "SIGTERM ends the run after step 2" in ended.output[0]
    assert ended.codes == [143, 143]
    assert ended.since_failure < SECONDS_TO_END
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["on_exception.ckpt"]
    assert (tmp_path / "on_exception.ckpt" / ".metadata").is_file()
