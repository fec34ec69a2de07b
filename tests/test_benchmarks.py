"""The scripts in benchmarks/ can be started; what they measure is not for a test."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = [path for path in (ROOT / "benchmarks").glob("*.py") if "ArgumentParser" in path.read_text()]


def test_scripts_start():
    """Each in a process of its own, where nothing else has been imported."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = {
        script.name: subprocess.Popen(
            [sys.executable, script, "--help"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script in SCRIPTS
    }
    ended = {name: (process.communicate(timeout=300), process.returncode) for name, process in processes.items()}
    assert {"gpu.py", "overhead.py"} <= ended.keys()
    assert {name: errors for name, ((_, errors), code) in ended.items() if code} == {}
    assert all(output.startswith("usage:") for (output, _), _ in ended.values())
