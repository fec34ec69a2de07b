"""Flags of the Trainer, a few in each run; all ranks must see the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from tiny_runs import Recorder, digits, make_trainer, vision_language
from torch.utils.data import DataLoader, Subset

from datamodules import collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.testing import RankError, run_on_ranks

LAYOUTS = {
    "colocated": {"images": P(dp=2), "language": P(tp=2)},
    "non-colocated": {"images": P(dp=1), "language": P(dp=1, rank_offset=1)},
}


@pytest.fixture(params=LAYOUTS)
def modules(request) -> dict[str, P]:
    return LAYOUTS[request.param]


class Events(Callback):
    """Which step batches were trained on, and after which steps validation ran, by its number of batches."""

    def __init__(self) -> None:
        self.trained: list[tuple[int, ...]] = []
        self.validated: list[tuple[int, bool, int]] = []
        self._batches = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.trained.append(tuple(batch["sample_id"].tolist()))

    def on_validation_start(self, trainer, module):
        self._batches = 0

    def on_validation_batch_end(self, trainer, *_):
        self._batches += 1

    def on_validation_end(self, trainer, module):
        self.validated.append((trainer.global_step, trainer.sanity_checking, self._batches))


def loader(number: int = 32, **settings: Any) -> DataLoader:
    return DataLoader(Subset(digits().train_dataset, range(number)), 8, collate_fn=collate, **settings)


def fit(modules: dict[str, P], callbacks: list[Callback] | None = None, **flags: Any) -> tuple[Trainer, Events]:
    """Four step batches an epoch, two of validation."""
    seed_everything(1, verbose=False)
    events = Events()
    trainer = make_trainer(
        MimoHeteroStrategy(modules), callbacks=[events, *(callbacks or [])], **({"limit_val_batches": None} | flags)
    )
    trainer.fit(vision_language("*"), loader(), loader(16))
    return trainer, events


def test_without_any_logging():
    def run():
        quiet = {"barebones": True, "limit_val_batches": 0}
        trainer = Trainer(strategy=MimoHeteroStrategy(), accelerator="cpu", devices=1, max_steps=2, **quiet)
        trainer.fit(vision_language("*"), loader())
        return trainer.global_step

    assert run_on_ranks(run, 1) == [2]


@pytest.mark.parametrize(
    "where",
    [
        {"default_root_dir": "memory://runs"},
        {"callbacks": [ModelCheckpoint("memory://kept")]},
        {"logger": CSVLogger("memory://kept")},
    ],
    ids=["root", "callback", "logger"],
)
def test_checkpoints_on_object_stores_are_refused(where, tmp_path):
    strategy = MimoHeteroStrategy()
    elsewhere = make_trainer(
        MimoHeteroStrategy(),
        enable_checkpointing=True,
        default_root_dir="memory://runs",
        logger=CSVLogger(tmp_path),
    )
    elsewhere.strategy.check(elsewhere, vision_language("*"))
    trainer = make_trainer(strategy, enable_checkpointing=True, **where)
    with pytest.raises(ValueError, match=r"checkpoints cannot be kept at memory://(runs|kept): they"):
        strategy.check(trainer, vision_language("*"))
    with pytest.raises(ValueError, match=r"checkpoints cannot be kept at s3://bucket/by-hand"):
        strategy.save_checkpoint({}, "s3://bucket/by-hand")


def test_a_trainer_on_cpus_is_refused_where_megatron_core_is_ready_for_gpus(monkeypatch):
    strategy = MimoHeteroStrategy()
    trainer = make_trainer(strategy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"this process sees GPUs, .* start it with CUDA_VISIBLE_DEVICES= \(empty\)"):
        strategy.check(trainer, vision_language("*"))


def test_mamba_layers_are_refused_on_gpus_without_their_kernels(monkeypatch):
    model = vision_language("M*")
    model.check_machine(torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    vision_language("*").check_machine(torch.float32)
    with pytest.raises(ValueError, match=r"the Mamba layers \(M\) need mamba-ssm and causal-conv1d, which are"):
        model.check_machine(torch.float32)


def test_how_long_and_how_often(modules):
    def run():
        results = {}
        for name, flags in {
            "max_steps": {"max_steps": 5},
            "max_epochs": {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1},
            "max_time": {"max_time": {"seconds": 0}, "max_epochs": 100},
            "val_check_interval": {"max_epochs": 1, "val_check_interval": 0.5, "num_sanity_val_steps": 1},
            "share": {"max_epochs": 1, "limit_train_batches": 0.5, "limit_val_batches": 0.5, "num_sanity_val_steps": 0},
            "fast_dev_run": {"fast_dev_run": 2},
        }.items():
            trainer, events = fit(modules, **({"num_sanity_val_steps": 0} | flags))
            results[name] = (trainer.global_step, events.validated)
        return results

    first, *others = run_on_ranks(run, 2, timeout=200)
    assert others == [first]
    assert first == {
        "max_steps": (5, [(4, False, 2)]),
        "max_epochs": (6, [(3, False, 1), (6, False, 1)]),
        "max_time": first["max_time"],
        "val_check_interval": (4, [(0, True, 1), (2, False, 2), (4, False, 2)]),
        "share": (2, [(2, False, 1)]),
        "fast_dev_run": (2, [(2, False, 2)]),
    }
    assert first["max_time"][0] <= 1


def test_overfitting_sees_the_same_batches_in_order():
    def run():
        trainer, events = fit(
            LAYOUTS["colocated"], max_epochs=2, overfit_batches=2, num_sanity_val_steps=0, use_distributed_sampler=True
        )
        return events.trained, trainer.global_step

    (trained, steps), _ = run_on_ranks(run, 2)
    assert steps == 4
    assert trained[:2] == trained[2:]


class Clipped(Callback):
    """The norm before clipping, and the largest change of a weight by the step."""

    def on_train_start(self, trainer, module):
        self._before = {name: value.detach().clone() for name, value in module.named_parameters()}

    def on_train_batch_end(self, trainer, module, *_):
        self.norm = trainer.optimizers[0].grad_norm
        self.change = max((value - self._before[name]).abs().max().item() for name, value in module.named_parameters())


def test_clipping_is_by_the_norm_over_all_modules(modules):
    """With an eps far above the gradients, a step of Adam is as large as the gradient."""

    def run():
        found = {}
        for clip in (None, 1e3, 1e-3):
            clipped = Clipped()
            model = vision_language("*")
            model.optimizer_config = type(model.optimizer_config)(lr=1e4, weight_decay=0.0, adam_eps=1e4)
            trainer = make_trainer(
                MimoHeteroStrategy(modules), max_steps=1, gradient_clip_val=clip, callbacks=[clipped]
            )
            seed_everything(1, verbose=False)
            trainer.fit(model, loader(8))
            found[clip] = (clipped.norm, clipped.change)
        return found

    for found in run_on_ranks(run, 2):
        norms, changes = zip(*found.values(), strict=True)
        assert norms[0] == pytest.approx(norms[1]) == pytest.approx(norms[2])
        assert changes[1] == changes[0]
        # weights are float32, so small changes are known to a few digits
        assert changes[2] == pytest.approx(changes[0] * 1e-3 / norms[0], rel=0.05)


def test_loggers_profilers_and_progress_bars(tmp_path, capfd):
    def run():
        trainer, _ = fit(
            LAYOUTS["non-colocated"],
            [TQDMProgressBar(), ModelCheckpoint(tmp_path, monitor="val_loss"), EarlyStopping("val_loss", patience=9)],
            max_steps=4,
            logger=CSVLogger(tmp_path, name="logs", version=""),
            profiler=SimpleProfiler(tmp_path, "profile"),
            enable_progress_bar=True,
            enable_checkpointing=True,
            log_every_n_steps=1,
            deterministic=True,
            detect_anomaly=True,
        )
        return torch.is_anomaly_enabled(), trainer.checkpoint_callback.best_model_path

    results = run_on_ranks(run, 2)
    assert results[0] == results[1]
    assert not results[0][0]
    assert Path(results[0][1]).is_dir()
    header, *rows = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()
    assert {"train_loss", "val_loss", "grad_norm", "grad_norm/images"} <= set(header.split(","))
    assert len(rows) >= 4
    assert "train_loss=" in "".join(capfd.readouterr())
    assert "run_training_batch" in next(tmp_path.glob("fit-profile*.txt")).read_text()


def test_anomalies_are_detected_within_the_schedule():
    class Breaks(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if dist.get_rank() == 1:
                # the derivative of a square root at 0
                module.loss_step = lambda output, microbatch: type(module).loss_step(
                    module, (output * 0).sqrt() * output, microbatch
                )

    def run():
        fit(LAYOUTS["non-colocated"], [Breaks()], max_steps=1, detect_anomaly=True, num_sanity_val_steps=0)

    with pytest.raises(RankError, match="returned nan values"):
        run_on_ranks(run, 2)


def test_deterministic_runs_repeat_to_the_last_bit():
    def run():
        losses = []
        for _ in range(2):
            recorder = Recorder()
            fit(LAYOUTS["colocated"], [recorder], max_steps=3, deterministic=True)
            losses.append((recorder.steps.losses, recorder.steps.grad_norms))
        torch.use_deterministic_algorithms(False)
        return losses

    for first, second in run_on_ranks(run, 2):
        assert first == second
