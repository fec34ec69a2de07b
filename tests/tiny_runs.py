"""A tiny model and a few steps of training it, under any strategy."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils.data import DataLoader

from datamodules import DigitsDataModule, collate
from mimo_strategy import DistributedDataParallelConfig, MimoHeteroStrategy, OptimizerConfig
from mimo_strategy.checkpoint.weights import load_weights, save_weights
from mimo_strategy.module import MimoModule
from mimo_strategy.testing import trainer_ranks
from modules import MambaMoE, MambaMoEConfig, NemotronVLM, RadioConfig

BATCH_SIZE = 24
PATTERN = "M*E-ME"

# With a larger eps than usual, updates show the size of small gradients and not only their sign.
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, adam_eps=1e-6)

PLAIN = DistributedDataParallelConfig(use_distributed_optimizer=False)
# Buckets so small that each module has several.
OVERLAPPED = DistributedDataParallelConfig(
    use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=20_000
)


def digits(batch_size: int = BATCH_SIZE) -> DigitsDataModule:
    """Digits whose answers differ in length, so that lanes count different numbers of tokens."""
    return DigitsDataModule(batch_size, seq_length=24)


def vision_language(
    pattern: str = PATTERN, *, radio: RadioConfig | None = None, projector: str = "affine", **changes: Any
) -> NemotronVLM:
    """A tiny model of encoder and language model; ``changes`` are of the latter."""
    vocabulary = digits().vocabulary
    return NemotronVLM(
        radio or RadioConfig.tiny(),
        MambaMoEConfig.tiny(pattern=pattern, **changes),
        image_token_id=vocabulary.image_token_id,
        end_token_id=vocabulary.end_token_id,
        projector=projector,
        optimizer=OPTIMIZER,
    )


def text_only(pattern: str = PATTERN, **changes: Any) -> MambaMoE:
    """A tiny language model alone."""
    return MambaMoE(MambaMoEConfig.tiny(pattern=pattern, **changes), optimizer=OPTIMIZER)


@dataclass
class Steps:
    """What one rank saw."""

    losses: list[float]
    grad_norms: list[float]


class Recorder(Callback):
    """Starts from given weights, records every step, and writes the weights at the end."""

    def __init__(self, start: Path | None = None, end: Path | None = None) -> None:
        self.steps = Steps([], [])
        self._start, self._end = start, end

    def on_train_start(self, trainer, module):
        if self._start is not None:
            load_weights(module.model, self._start)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if module.runtime is None:
            gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
            self.steps.grad_norms.append(torch.nn.utils.get_total_norm(gradients).item())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.losses.append(trainer.callback_metrics["train_loss"].item())
        if module.runtime is not None:
            self.steps.grad_norms.append(trainer.optimizers[0].grad_norm)

    def on_train_end(self, trainer, module):
        if self._end is not None:
            save_weights(self._end, module.model)


def make_trainer(strategy: MimoHeteroStrategy | str, **settings: Any) -> Trainer:
    """A quiet Trainer over all ranks of the process group, or alone."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    quiet = {
        "accelerator": "cpu",
        **(trainer_ranks() if dist.is_initialized() else {"devices": 1}),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "gradient_clip_val": 1.0,
        # Lightning would shuffle the training data of a distributed strategy
        "use_distributed_sampler": False,
    }
    return Trainer(strategy=strategy, **(quiet | settings))


def train(
    make_module: Callable[[], MimoModule],
    strategy: MimoHeteroStrategy | str,
    start: Path | None = None,
    end: Path | None = None,
    num_steps: int = 3,
) -> Steps:
    """Train on the first digits, in order.

    Args:
        make_module: builds the model.
        strategy: "auto" for one plain device.
        start: weights to start from.
        end: where to write the weights at the end.
        num_steps: optimizer steps.
    """
    seed_everything(1, verbose=False)
    recorder = Recorder(start, end)
    data = DataLoader(digits().train_dataset, BATCH_SIZE, collate_fn=collate)
    make_trainer(strategy, max_steps=num_steps, callbacks=[recorder]).fit(make_module(), data)
    return recorder.steps


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, read by torch alone."""
    reader = checkpoint.FileSystemReader(directory)
    weights = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):
        checkpoint.load(weights, storage_reader=reader, no_dist=True)
    return weights
