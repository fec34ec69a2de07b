"""A long run: what it holds in memory."""

import psutil
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny_runs import digits, make_trainer, vision_language
from torch.utils.data import DataLoader, Subset

from datamodules import collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.callbacks import Throughput
from mimo_strategy.testing import run_on_ranks

STEPS, EARLY = 2000, 100


class Memory(Callback):
    """Resident bytes of this rank after an early step and after the last."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == EARLY:
            self.early = psutil.Process().memory_info().rss
        self.last = psutil.Process().memory_info().rss


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_over_two_thousand_steps(tmp_path, capsys):
    def run():
        memory = Memory()
        trainer = make_trainer(
            MimoHeteroStrategy({"images": P(dp=2), "language": P(tp=2, dp=1, ep=2, rank_offset=2)}),
            max_steps=STEPS,
            limit_val_batches=1,
            val_check_interval=200,
            check_val_every_n_epoch=None,
            logger=CSVLogger(tmp_path, name="logs", version=""),
            log_every_n_steps=50,
            enable_checkpointing=True,
            callbacks=[
                memory,
                Throughput(),
                LearningRateMonitor(),
                EarlyStopping("val_loss", patience=STEPS),
                ModelCheckpoint(tmp_path, every_n_train_steps=500),
            ],
        )
        data = DataLoader(Subset(digits().train_dataset, range(800)), batch_size=8, collate_fn=collate)
        trainer.fit(vision_language("M*E"), data, data)
        return trainer.global_step, memory.early, memory.last

    ranks = run_on_ranks(run, 4, timeout=3000)
    with capsys.disabled():
        for rank, (_, early, last) in enumerate(ranks):
            print(f"\nrank {rank}: {early >> 20} MiB after {EARLY} steps, {last >> 20} MiB at the end")
    for steps, early, last in ranks:
        assert steps == STEPS
        assert last <= 1.05 * early
