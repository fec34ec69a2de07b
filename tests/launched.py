"""A small training run for ``test_launch``; the environment's ``CASE`` says what befalls which rank in step 2."""

import json
import os
import signal
import time
from datetime import timedelta

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from tiny_runs import digits, make_trainer, vision_language
from torch.utils.data import DataLoader, Subset

from datamodules import collate
from mimo_strategy import MimoHeteroStrategy, ModuleParallel

DEFAULTS = {
    "images": 1,
    "devices": 2,
    "num_nodes": 1,
    "steps": 3,
    "rank": -1,
    "how": "well",
    "watchdog": None,
    "folder": None,
}


def sleep_for_a_while() -> None:
    time.sleep(8)


class Befalls(Callback):
    """What happens to a rank in its second step."""

    def __init__(self, rank: int, how: str) -> None:
        self.rank, self.how = rank, how

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx != 1 or trainer.global_rank != self.rank or self.how == "well":
            return
        print(f"fails at {time.time()}", flush=True)
        if self.how == "raises":
            raise KeyError(f"no such sample on rank {self.rank}")
        if self.how == "sleeps":
            sleep_for_a_while()
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how.startswith("gets "):
            os.kill(os.getpid(), signal.Signals[self.how.removeprefix("gets ")])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        print(f"step {trainer.global_step} loss {trainer.callback_metrics['train_loss']:.6f}", flush=True)


def main() -> None:
    case = DEFAULTS | json.loads(os.environ["CASE"])
    strategy = MimoHeteroStrategy(
        {"images": ModuleParallel(dp=case["images"]), "language": ModuleParallel(dp=1, rank_offset=1)},
        watchdog=case["watchdog"] and timedelta(seconds=case["watchdog"]),
    )
    callbacks = [Befalls(case["rank"], case["how"])]
    settings = {}
    if case["folder"]:
        callbacks.append(OnExceptionCheckpoint(case["folder"]))
        settings = {"default_root_dir": case["folder"], "enable_checkpointing": True}
    trainer = make_trainer(
        strategy,
        devices=case["devices"],
        num_nodes=case["num_nodes"],
        max_steps=case["steps"],
        callbacks=callbacks,
        **settings,
    )
    data = DataLoader(Subset(digits().train_dataset, range(8 * case["steps"])), 8, collate_fn=collate)
    trainer.fit(vision_language("*"), data)
    place = f"rank {trainer.global_rank} of {trainer.world_size} on node {trainer.node_rank}"
    print(f"trained {trainer.global_step} steps as {place}", flush=True)


if __name__ == "__main__":
    main()
