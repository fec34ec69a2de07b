"""What the strategy costs over a bare loop of megatron-core: the same model, layout and data on the same ranks.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py

A step of the Trainer and one of the bare loop take turns, so that whatever else the machine does befalls both. Prints
the median over pairs of the ratio of their times, and ends with 1 if it is above the bar. Beside it stands the same of
the processor seconds of all ranks, which shows the work that is added even where other processes disturb the clock.
"""

import argparse
import statistics
import sys
import time
import warnings
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything

from benchmarks.bare_loop import BareLoop
from datamodules import DigitsDataModule
from mimo_strategy import MimoHeteroStrategy, ModuleParallel, OptimizerConfig
from mimo_strategy.testing import run_on_ranks
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

BAR = 1.02
RANKS = 4
LAYOUTS = {
    "colocated": {"images": ModuleParallel(dp=4), "language": ModuleParallel(tp=2, dp=2, ep=2)},
    "non_colocated": {"images": ModuleParallel(dp=2), "language": ModuleParallel(tp=2, dp=1, ep=2, rank_offset=2)},
}
MICROBATCHES = 2
OPTIMIZER = OptimizerConfig(lr=1e-4, clip_grad=1.0)


def data() -> DigitsDataModule:
    """Step batches of 32 sequences of 64 tokens."""
    return DigitsDataModule(32, seq_length=64)


def make_model() -> NemotronVLM:
    """A model of which a step takes some tenths of a second."""
    words = data().vocabulary
    language = MambaMoEConfig.tiny(pattern="M*E-ME", hidden_size=128, ffn_hidden_size=512)
    return NemotronVLM(RadioConfig.tiny(), language, words.image_token_id, words.end_token_id, optimizer=OPTIMIZER)


class Cost(NamedTuple):
    """Of a rank: seconds by the clock, when all ranks have come, and of its processor."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> "Cost":
        processor = time.process_time()
        dist.barrier()
        return cls(time.perf_counter(), processor)

    def since(self, began: "Cost") -> "Cost":
        return Cost(self.clock - began.clock, self.processor - began.processor)


class Pairs(Callback):
    """After each step of the Trainer, a step of the bare loop from a loader of its own; what both took."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Cost, Cost]] = []
        self._began: Cost | None = None

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._bare = BareLoop(make_model(), trainer.strategy.layout, MICROBATCHES, OPTIMIZER)
        self._batches = iter(trainer.strategy.process_dataloader(data().train_dataloader()))

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        ended = Cost.now()
        self._bare.step(next(self._batches))
        bare_ended = Cost.now()
        if self._began is not None:
            self.pairs.append((ended.since(self._began), bare_ended.since(ended)))
        self._began = bare_ended


def measure(layout: str, num_pairs: int) -> list[tuple[Cost, Cost]]:
    """Cost of each pair: the Trainer's step with its loading of data, and the bare loop's."""
    warnings.filterwarnings("ignore")
    seed_everything(1, verbose=False)
    pairs = Pairs()
    trainer = Trainer(
        accelerator="cpu",
        strategy=MimoHeteroStrategy(LAYOUTS[layout], MICROBATCHES),
        devices=RANKS,
        max_steps=num_pairs + 3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        callbacks=[pairs],
    )
    trainer.fit(make_model(), datamodule=data())
    # the first steps allocate what the others use
    return pairs.pairs[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60, help="steps of each kind")
    num_pairs = parser.parse_args().pairs
    worst = 0.0
    for layout in LAYOUTS:
        ranks = run_on_ranks(measure, RANKS, layout, num_pairs, timeout=1200)
        ratio = statistics.median(strategy.clock / bare.clock for strategy, bare in ranks[0])
        bare = statistics.median(bare.clock for _, bare in ranks[0])
        work = statistics.median(
            sum(strategy.processor for strategy, _ in pair) / sum(bare.processor for _, bare in pair)
            for pair in zip(*ranks, strict=True)
        )
        worst = max(worst, ratio)
        print(f"{layout:14} {ratio:.3f} of {bare * 1e3:.0f} ms; processor {work:.3f}; {num_pairs} pairs", flush=True)
    print(f"bar {BAR}")
    sys.exit(worst > BAR)


if __name__ == "__main__":
    main()
