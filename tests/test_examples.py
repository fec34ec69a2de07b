"""The example, started as a user starts it: a script whose ranks Lightning launches."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mimo_strategy.testing import run_on_ranks

ROOT = Path(__file__).parent.parent


def run_script(*command: str, folder: Path) -> str:
    """Run Python in ``folder`` with this checkout importable; return what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


EXAMPLE = ROOT / "examples/train_digits.py"


def check_run(run: Path, layout: str) -> None:
    assert {path.name for path in run.iterdir()} >= {
        "metrics.csv",
        "curves.png",
        "captions.png",
        "layout.png",
        "summary.json",
        "last.ckpt",
    }
    assert (run / "last.ckpt").is_dir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["world_size"] == 4
    assert summary["placement"] == layout and set(summary["layout"]) == {"images", "language"}
    assert 0 <= summary["heldout_accuracy"] <= 1 and summary["train_seconds"] > 0


@pytest.mark.exhaustive
def test_example_as_a_script(tmp_path):
    printed = run_script(str(EXAMPLE), "--max-steps", "3", "--name", "short", folder=tmp_path)
    check_run(tmp_path / "runs/short", "non_colocated")
    assert "held-out accuracy" in printed


@pytest.mark.parametrize("layout", ["non_colocated", "colocated"])
def test_example_writes_what_it_promises(layout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--layout", layout, "--max-steps", "3"])
    run_on_ranks(lambda: bool(runpy.run_path(str(EXAMPLE), run_name="__main__")), 4)
    check_run(tmp_path / f"runs/digits-{layout}", layout)
