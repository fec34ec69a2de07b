"""The ranks that Lightning's own launcher starts: how they begin, and that they all end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import os
import sys
from torch.utils.data import DataLoader, Subset
from datamodules import collate
from lightning.pytorch import Callback
from mimo_strategy import MimoHeteroStrategy, ModuleParallel
from parity import digits, make_trainer, vision_language


class FailsInSecondStep(Callback):
    def __init__(self, rank, how):
        self.rank, self.how = rank, how

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1 and trainer.global_rank == self.rank:
            print("one step done", flush=True)
            if self.how == "killed":
                os.kill(os.getpid(), 9)
            raise KeyError(f"no such sample on rank {self.rank}")


def main(images="1", failing="-1", how="raises"):
    modules = {"images": ModuleParallel(dp=int(images)), "language": ModuleParallel(dp=1, rank_offset=1)}
    data = DataLoader(Subset(digits().train_dataset, range(24)), 8, collate_fn=collate)
    trainer = make_trainer(
        MimoHeteroStrategy(modules), devices=2, max_steps=3, callbacks=[FailsInSecondStep(int(failing), how)]
    )
    trainer.fit(vision_language("*"), data)
    print("trained", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


class Ended(NamedTuple):
    """A script that ended, with all processes that it started."""

    code: int
    output: str
    seconds: float


@pytest.fixture
def launch(tmp_path):
    """Runs the script with arguments; fails if a process of it lives on."""

    def run(*arguments: str) -> Ended:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        )
        try:
            # the pipe closes when the last process that holds it has ended
            output, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"processes live on after 60 s:\\n{process.communicate()[0]}")
        return Ended(process.returncode, output, time.monotonic() - began)

    return run


def test_a_layout_that_does_not_fit_is_reported_once(launch):
    ended = launch("2")
    assert ended.code != 0
    assert ended.output.count("Traceback") == 1, ended.output
    assert "A layout that fits 2 rank(s)" in ended.output


@pytest.mark.parametrize(
    ("rank", "how"),
    [
        pytest.param("0", "raises", id="first-raises"),
        pytest.param("1", "raises", id="second-raises"),
        pytest.param("1", "killed", id="second-is-killed"),
    ],
)
def test_a_rank_that_fails_ends_all(launch, rank, how):
    ended = launch("1", rank, how)
    assert "one step done" in ended.output
    assert "trained" not in ended.output
    assert ended.code != 0
    if how == "raises":
        assert ended.output.count(f"no such sample on rank {rank}") == 1, ended.output
