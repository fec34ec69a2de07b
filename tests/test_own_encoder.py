"""An encoder of one's own, as the documentation shows it, trains in every layout like one process."""

import runpy
import sys
from functools import cache
from pathlib import Path

import pytest
from tiny_runs import make_trainer
from torch.utils.data import DataLoader

from datamodules import DigitsDataModule, collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.testing import Reference, run_on_ranks

EXAMPLE = Path(__file__).parents[1] / "examples/own_encoder.py"
DATA = DigitsDataModule(batch_size=8)


@cache
def reference() -> Reference:
    make_model = runpy.run_path(str(EXAMPLE))["make_model"]
    return Reference(lambda: make_model(DATA), lambda: DataLoader(DATA.train_dataset, 8, collate_fn=collate))


@pytest.mark.parametrize(
    ("world_size", "modules"),
    [
        pytest.param(3, {"images": P(dp=2), "language": P(dp=1, rank_offset=2)}, id="non_colocated, fan-in"),
        pytest.param(4, {"images": P(tp=2, dp=2), "language": P(dp=4, ep=4)}, id="colocated, fan-out"),
    ],
)
def test_siglip_trains_like_one_process(world_size, modules):
    reference().assert_alike(MimoHeteroStrategy(modules, num_microbatches=2), world_size)


def test_images_come_in_the_dtype_of_the_parameters():
    make_model = runpy.run_path(str(EXAMPLE))["make_model"]

    def run():
        trainer = make_trainer(MimoHeteroStrategy(), max_steps=1, precision="bf16-mixed")
        trainer.fit(make_model(DATA), DataLoader(DATA.train_dataset, 8, collate_fn=collate))
        return trainer.callback_metrics["train_loss"].isfinite().item()

    assert run_on_ranks(run, 1) == [True]


def test_the_example_runs_as_a_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["own_encoder.py", "--max-steps", "2"])
    for name, value in {"ACCELERATOR": "cpu", "ENABLE_PROGRESS_BAR": "False"}.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", value)
    run_on_ranks(lambda: bool(runpy.run_path(str(EXAMPLE), run_name="__main__")), 3)
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))
