"""What saving and loading costs, as ratios to what must be written: memory, standing still, time, bytes on disk.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py

Runs ranks over gloo on this machine, without a GPU.
"""

import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from lightning.pytorch import Callback, Trainer, seed_everything

from datamodules import DigitsDataModule
from mimo_strategy import MimoHeteroStrategy, ModuleParallel, OptimizerConfig
from mimo_strategy.checkpoint.run import run_shards
from mimo_strategy.testing import run_on_ranks  # isort: split

from megatron.core.dist_checkpointing.mapping import is_main_replica  # isort: split

from modules import MambaMoEConfig, NemotronVLM, RadioConfig

COLOCATED = {"images": ModuleParallel(dp=4), "language": ModuleParallel(tp=2, dp=2, ep=2)}
EIGHT_RANKS = {"images": ModuleParallel(dp=4), "language": ModuleParallel(tp=2, dp=2, ep=2, rank_offset=4)}
SAVES = 9
MIB = 2**20


@dataclass
class Saves:
    """What one rank saw; seconds and bytes."""

    own_shards: int
    memory: list[int]
    seconds: list[float]
    seconds_to_load: float
    on_disk: int


class MeasureSaves(Callback):
    """Saves after the first training step, several times over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.saves = Saves(0, [], [], 0.0, 0)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        shards = run_shards(module.runtime, trainer.optimizers[0])
        self.saves.own_shards = sum(shard.data.nbytes for shard in shards if is_main_replica(shard.replica_id))
        del shards
        for number in range(SAVES):
            trainer.strategy.barrier()
            # to sample takes time itself, so that a save is either timed or sampled
            with peak_memory() if number % 2 == 0 else nullcontext() as memory:
                begin = time.perf_counter()
                trainer.save_checkpoint(self._folder / f"{number}.ckpt")
                seconds = time.perf_counter() - begin
                # in the background, memory is taken until all is written
                trainer.strategy._checkpoint_writer().drain()
            if number % 2 == 0:
                self.saves.memory.append(memory[0])
            else:
                self.saves.seconds.append(seconds)
        self.saves.on_disk = sum(path.stat().st_size for path in (self._folder / "0.ckpt").iterdir())


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most memory that the process has of its own, above what it has at the beginning; bytes."""
    begin, peak, done = private_memory(), [0], threading.Event()

    def sample():
        while not done.wait(0.01):
            peak[0] = max(peak[0], private_memory() - begin)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()
        peak[0] = max(peak[0], private_memory() - begin)


def private_memory() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def model(data: DigitsDataModule, **changes: int) -> NemotronVLM:
    return NemotronVLM(
        RadioConfig.tiny(),
        MambaMoEConfig.tiny(pattern="M*E-", vocab_size=data.vocab_size, **changes),
        image_token_id=data.image_token_id,
        end_token_id=data.end_token_id,
        optimizer=OptimizerConfig(lr=1e-3),
    )


def save(layout: dict[str, ModuleParallel], ranks: int, folder: Path, async_save: bool, **changes: int) -> Saves:
    """Train one step, save, and load the last checkpoint in another run."""
    warnings.filterwarnings("ignore")
    results = []
    for resumed in (None, folder / f"{SAVES - 1}.ckpt"):
        seed_everything(1, verbose=False)
        data = DigitsDataModule(batch_size=8, seq_length=24)
        measure = MeasureSaves(folder)
        trainer = Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy=MimoHeteroStrategy(layout, async_save=async_save),
            max_steps=1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[measure, LoadTime()],
        )
        trainer.fit(model(data, **changes), data, ckpt_path=resumed)
        results.append((measure, trainer.callbacks[1]))
    return replace(results[0][0].saves, seconds_to_load=results[1][1].seconds)


class LoadTime(Callback):
    """The time from the model being set up to its checkpoint being restored."""

    seconds = 0.0

    def on_fit_start(self, trainer, module):
        self._begin = time.perf_counter()

    def on_load_checkpoint(self, trainer, module, checkpoint):
        self.seconds = time.perf_counter() - self._begin


def measure(layout, ranks, async_save=False, **changes) -> list[Saves]:
    with TemporaryDirectory(prefix="benchmark-") as folder:
        return run_on_ranks(lambda: save(layout, ranks, Path(folder), async_save, **changes), ranks, timeout=600)


def main() -> None:
    large = {"hidden_size": 768, "ffn_hidden_size": 6144, "expert_ffn_hidden_size": 3072}
    at_once = measure(COLOCATED, 4, **large)
    in_background = measure(COLOCATED, 4, async_save=True, **large)
    tiny = measure(EIGHT_RANKS, 8)
    own = [rank.own_shards for rank in at_once]
    print(f"model of {sum(own) / MIB:.0f} MiB with its optimizer on 4 ranks, {min(own) / MIB:.0f} MiB or more each")
    for name, ranks in (("at once", at_once), ("in the background", in_background)):
        ratio = max(max(rank.memory) / rank.own_shards for rank in ranks)
        print(f"peak memory of a save {name}, any rank: {ratio:.2f} x its own shards (bar 1.1)")
    whole, still = (
        median(max(times) for times in zip(*(rank.seconds for rank in ranks), strict=True))
        for ranks in (at_once, in_background)
    )
    print(f"a save at once: {whole:.2f} s")
    print(f"training stands still for a save in the background: {still / whole:.1%} of that (bar 10 %)")
    print(f"bytes on disk: {at_once[0].on_disk / sum(own):.3f} x weights and optimizer state (bar 1.05)")
    print(f"tiny model on 8 ranks, save: {max(max(rank.seconds) for rank in tiny):.2f} s (bar 3 s)")
    print(f"tiny model on 8 ranks, load: {max(rank.seconds_to_load for rank in tiny):.2f} s (bar 3 s)")


if __name__ == "__main__":
    main()
