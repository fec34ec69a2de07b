"""What the strategy costs over a bare loop of megatron-core: the same model, layout and data on the same ranks.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py

Both have the same weights and take the same samples. The learning rate is 0: weights that are trained come to differ in
the last digit, then routers choose other experts for some tokens, and from then on one loop has more work. Two steps of
the Trainer and two of the bare loop take turns, so that whatever else the machine does befalls both; the second of each
counts, as the first finds the memory of the other loop in the caches. The heap keeps what it has and asks for large
pages; otherwise an operation on temporary tensors took up to four times as long in one loop as in the other, for a
whole run, by where in memory they came to lie. What is left of such luck was up to 5 % of a run on two cores, and 1 %
where each rank had a core: so there are four runs, in which either loop is made first in turn.
Prints the ratio of their times, the geometric mean of the runs' medians over pairs, and ends with 1 if it is above the
bar. Beside it stands the same of the processor seconds of all ranks, which shows the work that is added even where
other processes disturb the clock.
"""

import argparse
import math
import os
import statistics
import sys
import time
import warnings
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from benchmarks.bare_loop import BareLoop
from datamodules import DigitsDataModule, collate
from mimo_strategy import Layout, MimoHeteroStrategy, ModuleParallel, OptimizerConfig
from mimo_strategy.testing import run_on_ranks
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

BAR = 1.02
RANKS = 4
LAYOUTS = {
    "colocated": {"images": ModuleParallel(dp=4), "language": ModuleParallel(tp=2, dp=2, ep=2)},
    "non_colocated": {"images": ModuleParallel(dp=2), "language": ModuleParallel(tp=2, dp=1, ep=2, rank_offset=2)},
}
MICROBATCHES = 2
RUNS = 4
EARLY_PAIRS = 4
"""Pairs of a run that do not count, as their steps allocate what the others use."""
HEAP = {"hugetlb": 1, "mmap_threshold": 2**30, "trim_threshold": 2**32, "top_pad": 2**26}
"""Tunables of glibc's malloc."""
OPTIMIZER = OptimizerConfig(lr=0.0, clip_grad=1.0)


DIGITS = DigitsDataModule(64, seq_length=128)
"""Step batches of 64 sequences of 128 tokens."""


def loader() -> DataLoader:
    """Samples in an order that does not depend on who iterates."""
    return DataLoader(DIGITS.train_dataset, DIGITS.batch_size, collate_fn=collate)


def make_model() -> NemotronVLM:
    """A model of which a step takes about a second, as of a large one on GPUs: what is added does not grow with it."""
    words = DIGITS.vocabulary
    language = MambaMoEConfig.tiny(pattern="M*E-ME", hidden_size=128, max_sequence_length=128)
    return NemotronVLM(RadioConfig.tiny(), language, words.image_token_id, words.end_token_id, optimizer=OPTIMIZER)


def make_bare(layout: Layout) -> BareLoop:
    return BareLoop(make_model(), layout, MICROBATCHES, OPTIMIZER)


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
    """After every second step of the Trainer, two of the bare loop from a loader of its own; what the second ones took.

    Args:
        bare: the bare loop, if it is made before the Trainer's model.
    """

    def __init__(self, bare: BareLoop | None) -> None:
        self.pairs: list[tuple[Cost, Cost]] = []
        self._bare = bare

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._bare = self._bare or make_bare(trainer.strategy.layout)
        self._batches = iter(trainer.strategy.process_dataloader(loader()))

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = Cost.now()
        if batch_idx % 2 == 0:
            self._began = now
            return
        strategy = now.since(self._began)
        for _ in range(2):
            began = Cost.now()
            loss = self._bare.step(next(self._batches), OPTIMIZER.lr)
            bare = Cost.now().since(began)
        if not math.isclose(loss, outputs["loss"], rel_tol=1e-5):
            raise RuntimeError(f"the loops do not compute the same: losses {outputs['loss']} and {loss}")
        self.pairs.append((strategy, bare))


def measure(layout: str, num_pairs: int, bare_first: bool) -> list[tuple[Cost, Cost]]:
    """Cost of each pair: the Trainer's step with its loading of data, and the bare loop's."""
    warnings.filterwarnings("ignore")
    seed_everything(1, verbose=False)
    resolved = Layout.resolve(make_model().module_sizes(), RANKS, LAYOUTS[layout])
    bare = make_bare(resolved) if bare_first else None
    pairs = Pairs(bare)
    trainer = Trainer(
        accelerator="cpu",
        strategy=MimoHeteroStrategy(LAYOUTS[layout], MICROBATCHES),
        devices=RANKS,
        max_steps=2 * (num_pairs + EARLY_PAIRS),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        # the loader's own order, which Lightning would shuffle
        use_distributed_sampler=False,
        callbacks=[pairs],
    )
    trainer.fit(make_model(), loader())
    return pairs.pairs[EARLY_PAIRS:]


def clock_ratio(pairs: list[tuple[Cost, Cost]]) -> float:
    """Of the Trainer's step to the bare one, the median of a rank's pairs."""
    return statistics.median(strategy.clock / bare.clock for strategy, bare in pairs)


def processor_ratio(ranks: list[list[tuple[Cost, Cost]]]) -> float:
    """The same of the processor seconds of all ranks together."""
    return statistics.median(
        sum(strategy.processor for strategy, _ in pair) / sum(bare.processor for _, bare in pair)
        for pair in zip(*ranks, strict=True)
    )


def settle_heap() -> None:
    """Start this script again with ``HEAP``, which malloc reads when a process starts."""
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in HEAP.items())
        os.execv(sys.executable, sys.orig_argv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="steps of each kind that count in a run")
    num_pairs = parser.parse_args().pairs
    worst = 0.0
    for layout in LAYOUTS:
        runs = [run_on_ranks(measure, RANKS, layout, num_pairs, bool(run % 2), timeout=3600) for run in range(RUNS)]
        ratio = statistics.geometric_mean(clock_ratio(ranks[0]) for ranks in runs)
        work = statistics.geometric_mean(processor_ratio(ranks) for ranks in runs)
        bare = statistics.median(bare.clock for ranks in runs for _, bare in ranks[0])
        worst = max(worst, ratio)
        print(
            f"{layout:14} {ratio:.3f} of {bare * 1e3:.0f} ms "
            f"({', '.join(f'{clock_ratio(ranks[0]):.3f}' for ranks in runs)}); processor {work:.3f}; "
            f"{RUNS} x {num_pairs} pairs",
            flush=True,
        )
    print(f"bar {BAR}")
    sys.exit(worst > BAR)


if __name__ == "__main__":
    settle_heap()
    main()
