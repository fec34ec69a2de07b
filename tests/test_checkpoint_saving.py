"""Saving under a Trainer: Lightning's callbacks, in the background or not, and what goes wrong meanwhile."""

import os
import random
import resource
import signal
import threading
import time
from concurrent.futures import wait
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import MAX_STEPS, data, every_step, fit, model, strategy
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from tiny_runs import make_trainer

from mimo_strategy import strategy as strategy_module
from mimo_strategy.checkpoint import writer as writer_module
from mimo_strategy.checkpoint.manifest import MANIFEST, is_whole
from mimo_strategy.checkpoint.writer import CheckpointWriter
from mimo_strategy.testing import RankError, run_on_ranks

SAVING = pytest.mark.parametrize("async_save", [False, True], ids=["at-once", "in-the-background"])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def keep_one(folder: Path) -> ModelCheckpoint:
    """Keeps the checkpoint of the last step, named ``step=N.ckpt``."""
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=1)


# ---- Lightning's callbacks


@SAVING
def test_the_best_and_the_last_are_kept_and_the_others_removed(tmp_path, async_save):
    def run():
        best = ModelCheckpoint(
            tmp_path, "{step}", monitor="train_loss", every_n_train_steps=1, save_top_k=2, save_last=True
        )
        fit(strategy(async_save=async_save), 5, callbacks=(best,))
        return Path(best.best_model_path).name

    best = run_on_ranks(run, 2)
    assert best == best[:1] * 2
    assert len(names(tmp_path)) == 3
    assert {best[0], "last.ckpt"} <= names(tmp_path)
    assert all(map(is_whole, tmp_path.iterdir()))


@SAVING
def test_last_may_be_a_link(tmp_path, async_save):
    def run(last, ckpt_path=None):
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=1, save_last="link")
        return fit(strategy(async_save=async_save), last, ckpt_path, callbacks=(keep,))

    run_on_ranks(run, 1, 2)
    assert names(tmp_path) == {"step=2.ckpt", "last.ckpt"}
    assert (tmp_path / "last.ckpt").readlink() == Path("step=2.ckpt")
    (resumed,) = run_on_ranks(run, 1, 3, tmp_path / "last.ckpt")
    assert len(resumed.losses) == 1


def test_what_is_written_in_the_background_is_what_was_there_when_it_was_saved(tmp_path, monkeypatch):
    def run(async_save):
        next_step = threading.Event()
        write_shards = writer_module._write_shards

        def write_late(*args):
            if async_save:
                assert next_step.wait(60)
                next_step.clear()
            return write_shards(*args)

        class Watch(Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                if trainer.global_step > 1:
                    next_step.set()

            def on_train_end(self, trainer, module):
                next_step.set()

        monkeypatch.setattr(writer_module, "_write_shards", write_late)
        folder = tmp_path / str(async_save)
        return fit(strategy(async_save=async_save), 4, callbacks=(Watch(), every_step(folder)))

    at_once, in_background = run_on_ranks(run, 2, False), run_on_ranks(run, 2, True)
    assert at_once == in_background
    for step in range(1, 5):
        for name in ("__0_0.distcp", "__1_0.distcp"):
            one, other = (tmp_path / str(async_save) / f"step={step}.ckpt" / name for async_save in (False, True))
            assert one.read_bytes() == other.read_bytes()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    def run():
        third_step = threading.Event()
        finish = CheckpointWriter._finish

        def finish_late(*args):
            assert third_step.wait(60)
            finish(*args)

        class Watch(Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                if trainer.global_step == 3:
                    self.meanwhile = names(tmp_path)
                    third_step.set()

        monkeypatch.setattr(CheckpointWriter, "_finish", finish_late)
        watch = Watch()
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=1)
        fit(strategy(async_save=True), 5, callbacks=(watch, keep))
        return watch.meanwhile

    assert run_on_ranks(run, 1) == [{".unfinished"}]
    assert names(tmp_path) == {"step=4.ckpt"}


def test_a_checkpoint_stays_until_its_successor_is_written(tmp_path, monkeypatch):
    def run():
        removed = threading.Event()
        finish = CheckpointWriter._finish
        seen = []

        def look_and_finish(writer, directory, *args):
            if directory.name == "step=2.ckpt":
                assert removed.wait(60)
            seen.append(names(tmp_path))
            finish(writer, directory, *args)

        class Watch(Callback):
            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                if trainer.global_step == 2:
                    # ModelCheckpoint has asked for the removal of the first by now
                    removed.set()

        monkeypatch.setattr(CheckpointWriter, "_finish", look_and_finish)
        fit(strategy(async_save=True), 3, callbacks=(Watch(), keep_one(tmp_path)))
        return seen

    assert run_on_ranks(run, 1) == [[{".unfinished"}, {"step=1.ckpt", ".unfinished"}, {"step=2.ckpt", ".unfinished"}]]
    assert names(tmp_path) == {"step=3.ckpt"}


def test_weights_alone_can_be_saved_and_validated_but_not_gone_on_from(tmp_path):
    def run():
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=True)
        fit(strategy(), 1, callbacks=(keep,))

    def validate():
        trainer = make_trainer(strategy(), limit_val_batches=1)
        return trainer.validate(model(), data(), ckpt_path=tmp_path / "step=1.ckpt", verbose=False)[0]["val_loss"]

    run_on_ranks(run, 2)
    index = torch.distributed.checkpoint.FileSystemReader(tmp_path / "step=1.ckpt").read_metadata()
    assert not [name for name in index.state_dict_metadata if name.startswith(("optimizer.", "random."))]
    assert run_on_ranks(validate, 1)[0] < 4.3
    with pytest.raises(RankError, match="checkpoint contains only the model"):
        run_on_ranks(lambda: fit(strategy(), 2, tmp_path / "step=1.ckpt"), 1)


def test_a_trainer_saves_after_its_fit(tmp_path):
    def run():
        trainer = make_trainer(strategy(async_save=True), max_steps=1)
        trainer.fit(model(), data())
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        assert is_whole(tmp_path / "end.ckpt")
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]

    run_on_ranks(run, 2)


def test_what_would_not_load_without_running_code_is_not_saved(tmp_path):
    class Keeps(Callback):
        def state_dict(self):
            return {"kept": FailAt(1, ())}

    with pytest.raises(RankError, match=r"SaveError: .*step=1\.ckpt could not be saved: TypeError: .*FailAt"):
        run_on_ranks(lambda: fit(strategy(), 1, callbacks=(Keeps(), every_step(tmp_path))), 2)
    assert names(tmp_path) == set()


# ---- "last"


def test_last_is_the_newest_whole_one(tmp_path):
    def run(last):
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
        return len(fit(strategy(), last, "last", callbacks=(keep,)).losses)

    assert run_on_ranks(run, 2, 3) == [3, 3]
    (tmp_path / ".unfinished" / "step=9.ckpt").mkdir(parents=True)
    # what is left of a run that was killed between two renames
    (tmp_path / ".replaced").mkdir()
    (tmp_path / "last.ckpt").rename(tmp_path / ".replaced" / "last.ckpt")
    assert run_on_ranks(run, 2, 4) == [1, 1]
    for name in ("last.ckpt", "step=4.ckpt"):
        (tmp_path / name / MANIFEST).unlink()
    assert run_on_ranks(run, 2, 4) == [1, 1]


def test_last_is_found_in_earlier_versions_of_a_run(tmp_path):
    def run(last):
        logger = CSVLogger(tmp_path, name="run")
        keep = ModelCheckpoint(every_n_train_steps=1, save_last=True)
        losses = fit(strategy(), last, "last", callbacks=(keep,), logger=logger).losses
        return len(losses), logger.version

    assert [run_on_ranks(run, 1, last)[0] for last in (2, 3, 5)] == [(2, 0), (1, 1), (2, 2)]


def test_last_is_what_a_signal_saved_where_slurm_queued_the_job_again(tmp_path, monkeypatch):
    def run(last):
        keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=2, save_top_k=-1)
        on_signal = ModelCheckpoint(tmp_path, "hpc_ckpt_1", every_n_train_steps=3)
        callbacks = (keep, on_signal) if last == 3 else (keep,)
        return len(fit(strategy(), last, "last", callbacks=callbacks, default_root_dir=tmp_path).losses)

    assert run_on_ranks(run, 1, 3) == [3]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert run_on_ranks(run, 1, 5) == [3]
    (tmp_path / "kept" / "step=4.ckpt" / MANIFEST).unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_on_ranks(run, 1, 5) == [2]


def test_without_a_whole_one_last_says_what_is_wrong(tmp_path):
    def run():
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=0, save_last=True)
        return fit(strategy(), 1, "last", callbacks=(keep,))

    run_on_ranks(run, 1)
    (tmp_path / "last.ckpt" / ".metadata").unlink()
    with pytest.raises(RankError, match=r"CheckpointError: .*last\.ckpt is damaged:\n  \.metadata: No such file"):
        run_on_ranks(run, 1)


# ---- exceptions


class FailAt(Callback):
    """Raises at a step, on some ranks."""

    def __init__(self, step: int, ranks: tuple[int, ...]) -> None:
        self._step, self._ranks = step, ranks

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self._step and trainer.global_rank in self._ranks:
            raise ZeroDivisionError("planned")


@SAVING
def test_an_exception_on_all_ranks_leaves_a_checkpoint(tmp_path, async_save):
    def run(*callbacks):
        return fit(strategy(async_save=async_save), 4, callbacks=(*callbacks, OnExceptionCheckpoint(tmp_path)))

    with pytest.raises(RankError, match="ZeroDivisionError: planned"):
        run_on_ranks(run, 2, FailAt(3, (0, 1)))
    assert names(tmp_path) == {"on_exception.ckpt"}
    # Lightning takes it by itself, and removes it in the end
    resumed = run_on_ranks(run, 2)
    assert [len(rank.losses) for rank in resumed] == [1, 1]
    assert names(tmp_path) == set()


def test_an_exception_on_one_rank_does_not_wait_for_the_others_forever(tmp_path, monkeypatch):
    monkeypatch.setattr(strategy_module, "_MEETING_TIME", timedelta(seconds=2))
    with pytest.raises(
        RankError,
        match=r"(?s)ZeroDivisionError: planned.*SaveError: rank 1 saves no checkpoint: ranks \[0\] have not come",
    ):
        run_on_ranks(
            lambda: fit(strategy(), 4, callbacks=(FailAt(2, (1,)), OnExceptionCheckpoint(tmp_path))), 2, timeout=60
        )
    assert names(tmp_path) == set()


# ---- no space


class FilesUpTo(Callback):
    """From one step to another, no file may become larger than some bytes; as if the disk were full."""

    def __init__(self, num_bytes: int, first: int, last: int) -> None:
        self._num_bytes, self._first, self._last = num_bytes, first, last

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1:
            if pending := trainer.strategy._writer._pending:
                wait([pending])
            is_full = self._first <= trainer.global_step + 1 <= self._last
            limit = self._num_bytes if is_full else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def teardown(self, trainer, module, stage):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def on_exception(self, trainer, module, exception):
        self.teardown(trainer, module, "fit")


@SAVING
@pytest.mark.parametrize("num_bytes", [0, 100_000], ids=["at-the-start", "within-a-tensor"])
def test_a_full_disk_ends_training_with_the_last_checkpoint_whole(tmp_path, async_save, num_bytes):
    full = FilesUpTo(num_bytes, 3, MAX_STEPS)
    with pytest.raises(
        RankError, match=r"step=3\.ckpt could not be saved: rank 1: .*File too large: '.*__1_0\.distcp'"
    ):
        run_on_ranks(
            lambda: fit(strategy(async_save=async_save), 5, callbacks=(full, keep_one(tmp_path))), 2, timeout=60
        )
    # of the removed one nothing is left, of the failed one neither
    assert names(tmp_path) == {"step=2.ckpt"}
    resumed = run_on_ranks(lambda: fit(strategy(), 3, "last", callbacks=(keep_one(tmp_path),)), 2)
    assert [len(rank.losses) for rank in resumed] == [1, 1]


@SAVING
def test_a_full_disk_need_not_end_training(tmp_path, async_save, caplog):
    def run():
        full = FilesUpTo(100_000, 3, 4)
        trained = fit(strategy(async_save=async_save, on_save_failure="warn"), 5, callbacks=(full, keep_one(tmp_path)))
        return len(trained.losses), caplog.text

    (steps, logged), _ = run_on_ranks(run, 2)
    assert steps == 5
    for step in (3, 4):
        assert f"step={step}.ckpt could not be saved: rank 1: " in logged
    # the checkpoints that could not be removed while there was no other are removed now
    assert names(tmp_path) == {"step=5.ckpt"}


def test_what_is_saved_again_is_not_removed_for_having_been_unwanted(tmp_path):
    def run():
        writer = CheckpointWriter(in_background=False, on_failure="warn", timeout=timedelta(minutes=1))
        shards = [ShardedTensor.from_rank_offsets("weight", torch.ones(2))]
        writer.save(tmp_path / "best.ckpt", shards, {})
        writer.save(tmp_path / "next.ckpt", shards, {"does not load": FailAt(1, ())})
        writer.remove(tmp_path / "best.ckpt")
        writer.save(tmp_path / "best.ckpt", shards, {})
        writer.close()

    run_on_ranks(run, 1)
    assert names(tmp_path) == {"best.ckpt"}
    assert is_whole(tmp_path / "best.ckpt")


def test_without_space_the_last_whole_one_is_kept(tmp_path):
    def run():
        fit(strategy(on_save_failure="warn"), 5, callbacks=(FilesUpTo(0, 3, MAX_STEPS), keep_one(tmp_path)))

    run_on_ranks(run, 2)
    assert names(tmp_path) == {"step=2.ckpt"}


# ---- killed


class KillWhileSaving(Callback):
    """Kills this process some time after a checkpoint has begun to be saved."""

    def __init__(self, step: int, seconds: float, ranks: tuple[int, ...]) -> None:
        self._step, self._seconds, self._ranks = step, seconds, ranks

    def on_save_checkpoint(self, trainer, module, checkpoint):
        if trainer.global_step == self._step and trainer.global_rank in self._ranks:
            threading.Timer(self._seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def survive_kills(folder: Path, whole: list[float], instants: list[float], async_save: bool) -> None:
    for number, seconds in enumerate(instants):
        ranks = (0, 1) if number % 2 else (number // 2 % 2,)
        path = folder / str(number)
        keep = {"every_n_train_steps": 1, "save_top_k": 1, "save_last": True}

        def run(last, *callbacks, path=path, keep=keep):
            return fit(
                strategy(async_save=async_save), last, "last", callbacks=(*callbacks, ModelCheckpoint(path, **keep))
            )

        with pytest.raises(RankError, match=r"SIGKILL|closed by peer|lost the others"):
            run_on_ranks(run, 2, 4, KillWhileSaving(2, seconds, ranks), HoldOn(2))
        for rank in run_on_ranks(run, 2, 4):
            assert rank.losses == whole[4 - len(rank.losses) :], (number, seconds)
            assert len(rank.losses) in (1, 2, 3)
        assert "last.ckpt" in names(path)
        assert all(map(is_whole, path.iterdir())), (number, seconds)


class HoldOn(Callback):
    """Waits to be killed in the step after."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step > self._step:
            trainer.strategy.barrier()
            time.sleep(0.5)
            trainer.strategy.barrier()


@pytest.fixture(scope="module")
def whole() -> list[float]:
    return run_on_ranks(lambda: fit(strategy(), 4), 2)[0].losses


@SAVING
def test_killed_while_saving_the_next_run_goes_on(tmp_path, whole, async_save):
    survive_kills(tmp_path, whole, [0.02, 0.06], async_save)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@SAVING
def test_killed_at_any_instant_of_saving_the_next_run_goes_on(tmp_path, whole, async_save):
    # 100 in all, half of them in each way of saving
    instants = random.Random(async_save).sample(range(400), 50)
    survive_kills(tmp_path, whole, [instant / 1000 for instant in instants], async_save)


# ---- nothing left behind


@SAVING
def test_two_trainers_in_one_process_leave_nothing_behind(tmp_path, monkeypatch, async_save):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()

    def run():
        modules = []
        for number in range(2):
            modules.append(model())
            fit(
                strategy(async_save=async_save),
                2,
                module=modules[-1],
                callbacks=(every_step(tmp_path / str(number)),),
            )
        groups = set(dist.distributed_c10d._world.pg_map) - {dist.group.WORLD}
        for module in modules:
            groups -= set(module.runtime.topology._process_groups._by_ranks.values())
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        files = [str(link.readlink()) for link in links if link.is_symlink()]
        return (
            len(groups),
            [file for file in files if str(tmp_path) in file],
            [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")],
        )

    assert run_on_ranks(run, 2) == [(0, [], [])] * 2
    assert names(tmp_path / "tmp") == set()
    assert all(names(tmp_path / str(number)) == {"step=1.ckpt", "step=2.ckpt"} for number in range(2))
