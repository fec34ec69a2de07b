"""Checkpoints under a Trainer: written as directories, read by any layout, continued as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from parity import BATCH_SIZE, Recorder, Steps, digits, make_trainer, vision_language
from torch.utils.data import DataLoader, Subset

from datamodules import collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.testing import RankError, run_on_ranks

STEPS = 6
STEPS_PER_EPOCH = 4
PATTERN = "M*E-"
LAYOUTS = {
    "one-rank": (1, None),
    "colocated": (4, {"images": P(dp=4), "language": P(tp=2, dp=2, ep=2)}),
    "tp4/tp2-etp2-ep2": (4, {"images": P(tp=4), "language": P(tp=2, etp=2, ep=2)}),
    "dp2+tp2-ep2": (4, {"images": P(dp=2), "language": P(tp=2, dp=1, ep=2, rank_offset=2)}),
    "dp1+pp2": (3, {"images": P(dp=1), "language": P(pp=2, dp=1, rank_offset=1)}),
}


def data(num_workers: int = 0) -> DataLoader:
    """One epoch of four step batches."""
    samples = Subset(digits().train_dataset, range(STEPS_PER_EPOCH * BATCH_SIZE))
    return DataLoader(samples, BATCH_SIZE, shuffle=True, num_workers=num_workers, collate_fn=collate)


def fit(layout: str, ckpt_path: Path | None = None, num_workers: int = 0, **saving: Any) -> Steps:
    """Train for six steps. ``saving`` goes to ``ModelCheckpoint``; nothing is saved without it."""
    seed_everything(4, verbose=False)
    callbacks = [Recorder()] + ([ModelCheckpoint(**saving)] if saving else [])
    strategy = MimoHeteroStrategy(LAYOUTS[layout][1], num_microbatches=2)
    trainer = make_trainer(
        strategy, max_steps=STEPS, callbacks=callbacks, enable_checkpointing=bool(saving), use_distributed_sampler=True
    )
    trainer.fit(vision_language(PATTERN), data(num_workers), ckpt_path=ckpt_path)
    return callbacks[0].steps


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, Steps]:
    """Checkpoints of every second step, and the steps of the run that wrote them."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def run():
        return fit("colocated", dirpath=folder, every_n_train_steps=2, save_top_k=-1)

    return folder, run_on_ranks(run, LAYOUTS["colocated"][0])[0]


def test_a_checkpoint_is_a_directory(uninterrupted):
    folder, steps = uninterrupted
    assert len(steps.losses) == STEPS
    names = {"epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt", "epoch=1-step=6.ckpt"}
    assert {path.name for path in folder.iterdir()} == names
    assert all((path / ".metadata").is_file() for path in folder.iterdir())


@pytest.mark.parametrize(
    ("step", "layout", "num_workers"),
    [
        *(pytest.param(2, layout, 0, id=f"within-an-epoch-{layout}") for layout in LAYOUTS),
        pytest.param(2, "one-rank", 1, id="within-an-epoch-with-a-worker"),
        pytest.param(4, "one-rank", 0, id="between-epochs"),
    ],
)
def test_training_goes_on_as_if_never_interrupted(uninterrupted, step, layout, num_workers):
    folder, whole = uninterrupted
    saved = folder / f"epoch=0-step={step}.ckpt"
    for resumed in run_on_ranks(fit, LAYOUTS[layout][0], layout, saved, num_workers):
        assert resumed.losses == pytest.approx(whole.losses[step:], rel=1e-5)
        assert resumed.grad_norms == pytest.approx(whole.grad_norms[step:], rel=1e-5)


def validate(saved: Path, precision: str) -> float:
    trainer = make_trainer(MimoHeteroStrategy(), precision=precision, limit_val_batches=2)
    (metrics,) = trainer.validate(vision_language(PATTERN), data(), ckpt_path=saved, verbose=False)
    return metrics["val_loss"]


def test_half_precision_reads_what_single_precision_wrote(uninterrupted):
    saved = uninterrupted[0] / "epoch=1-step=6.ckpt"
    (single,), (half,) = (run_on_ranks(validate, 1, saved, precision) for precision in ("32-true", "bf16-true"))
    assert single < 3.5
    assert half != single
    assert half == pytest.approx(single, rel=0.02)


def test_checkpoints_that_are_no_longer_wanted_are_removed(tmp_path):
    def run():
        fit("one-rank", dirpath=tmp_path, every_n_train_steps=2, save_top_k=1, save_last=True)

    run_on_ranks(run, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch=1-step=6.ckpt", "last.ckpt"}


@pytest.mark.parametrize("exists", [False, True], ids=["missing", "something-else"])
def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path, exists):
    path = tmp_path / "weights.ckpt"
    if exists:
        path.mkdir()
    with pytest.raises(RankError, match=r"CheckpointError: .*weights\.ckpt is no checkpoint of MimoHeteroStrategy"):
        run_on_ranks(validate, 2, path, "32-true")
