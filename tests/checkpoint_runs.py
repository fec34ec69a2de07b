"""Short runs of a tiny model that save, and that go on from what others saved."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from tiny_runs import BATCH_SIZE, Recorder, digits, make_trainer, vision_language
from torch.utils.data import DataLoader, Subset

from datamodules import collate
from mimo_strategy import DistributedDataParallelConfig, MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from modules import NemotronVLM, RadioConfig

STEPS_PER_EPOCH = 4
MAX_STEPS = 8
PATTERN = "M*E-"

COLOCATED = {"images": P(dp=4), "language": P(tp=2, dp=2, ep=2)}
DISJOINT = {"images": P(dp=1), "language": P(dp=2, rank_offset=1)}


@dataclass
class Run:
    """What one rank saw, and a digest of the weights that it ended with."""

    losses: list[float]
    grad_norms: list[float]
    weights: str


def model(pattern: str = PATTERN, *, random: bool = False, **changes: Any) -> NemotronVLM:
    """The tiny model; ``random`` gives it dropout and random crops of position embeddings."""
    if random:
        changes["dropout"] = 0.1
    return vision_language(pattern, radio=RadioConfig.tiny(random_position_crops=random), **changes)


def data(num_workers: int = 0) -> DataLoader:
    """One epoch of four step batches, shuffled."""
    samples = Subset(digits().train_dataset, range(STEPS_PER_EPOCH * BATCH_SIZE))
    return DataLoader(samples, BATCH_SIZE, shuffle=True, num_workers=num_workers, collate_fn=collate)


class StopAfter(Callback):
    """Ends training after a step, in the middle of what the schedule of the learning rate was made for."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= self._step


def fit(
    strategy: MimoHeteroStrategy,
    last: int,
    ckpt_path: Path | str | None = None,
    *,
    module: NemotronVLM | None = None,
    num_workers: int = 0,
    callbacks: tuple[Callback, ...] = (),
    **settings: Any,
) -> Run:
    """Train up to step ``last``; saves only what ``callbacks`` save."""
    seed_everything(4, workers=True, verbose=False)
    recorder = Recorder()
    trainer = make_trainer(
        strategy,
        # asks the loader for its length before a checkpoint is loaded
        max_epochs=MAX_STEPS // STEPS_PER_EPOCH,
        callbacks=[recorder, StopAfter(last), *callbacks],
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        use_distributed_sampler=True,
        **settings,
    )
    module = module or model()
    trainer.fit(module, data(num_workers), ckpt_path=ckpt_path)
    module.runtime.gather_parameters()
    digest = hashlib.sha256()
    for parameter in module.model.parameters():
        digest.update(parameter.detach().float().numpy().tobytes())
    return Run(recorder.steps.losses, recorder.steps.grad_norms, digest.hexdigest())


def strategy(
    modules: dict[str, P] | None = None, *, distributed: bool = True, overlap: bool = False, **settings: Any
) -> MimoHeteroStrategy:
    """Two microbatches a step.

    Args:
        modules: layout.
        distributed: whether data-parallel ranks share the optimizer's state among them.
        overlap: gather updated parameters in the next forward passes.
        settings: others of the strategy.
    """
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    return MimoHeteroStrategy(modules, num_microbatches=2, ddp=ddp, **settings)


def every_step(folder: Path) -> ModelCheckpoint:
    """Keeps a checkpoint of every step, named ``step=N.ckpt``."""
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
