"""The built wheel, installed into a bare environment, trains from outside of the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mimo_strategy", "modules", "datamodules")
TRAIN = """
from lightning.pytorch import Trainer

import mimo_strategy
from datamodules import DigitsDataModule
from mimo_strategy import MimoHeteroStrategy, ModuleParallel
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

if __name__ == "__main__":
    data = DigitsDataModule(batch_size=8)
    language = MambaMoEConfig.tiny(vocab_size=data.vocab_size)
    model = NemotronVLM(RadioConfig.tiny(), language, data.image_token_id, data.end_token_id)
    strategy = MimoHeteroStrategy({"images": ModuleParallel(dp=1), "language": ModuleParallel(dp=1, rank_offset=1)})
    trainer = Trainer(strategy=strategy, devices=2, accelerator="cpu", max_steps=1, limit_val_batches=0, logger=False)
    trainer.fit(model, datamodule=data)
    print("trained", trainer.global_step, "step with", mimo_strategy.__file__, flush=True)
"""


def run(*command, folder: Path) -> str:
    kept = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [str(word) for word in command]
    result = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of a copy, as a build leaves files behind."""
    folder = tmp_path_factory.mktemp("build")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, folder)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", "dist"]
    run(*pip, ".", folder=folder)
    (built,) = (folder / "dist").glob("mimo_strategy-*.whl")
    return built


def test_the_wheel_has_every_file_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == files
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A bare virtual environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("installed")
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, folder=folder)
    python = environment / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "-q", "--no-deps", "--no-index", wheel, folder=folder)
    (packages,) = environment.glob("lib/python*/site-packages")
    # what it depends on is a download of gigabytes, so it is taken from here; .pth files of such a path are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def test_the_wheel_trains_outside_of_the_checkout(environment, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    told = run(environment / "bin/python", "train.py", folder=tmp_path)
    assert f"trained 1 step with {environment}" in told


def test_the_wheel_brings_its_command(environment, tmp_path):
    told = run(environment / "bin/mimo", "--help", folder=tmp_path)
    assert told.startswith("usage: mimo VERB")
    assert run(environment / "bin/python", "-m", "mimo_strategy", "--help", folder=tmp_path) == told
