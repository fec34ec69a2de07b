"""What cannot work, refused in one process before any rank starts: arguments, Trainer flags, callbacks and data."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    WeightAveraging,
)
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from megatron.core.distributed import DistributedDataParallelConfig
from torch.optim import Optimizer

from mimo_strategy.checkpoint.writer import OnFailure
from mimo_strategy.layout import LANGUAGE, Layout, LayoutError, ModuleParallel
from mimo_strategy.lightning_private import NoOptimizer
from mimo_strategy.module import MimoModule
from mimo_strategy.optimizer import ModuleOptimizer

_ACCUMULATION = "each batch is a whole optimizer step: use a larger batch_size and num_microbatches"
_CALLBACKS = {
    GradientAccumulationScheduler: _ACCUMULATION,
    StochasticWeightAveraging: "it averages whole weights, of which every rank holds a shard",
    WeightAveraging: "it copies the model before its modules are built, and a rank holds shards only",
    BatchSizeFinder: "a batch_size must be a multiple of lanes x microbatches: try sizes in runs of their own",
    LearningRateFinder: "it saves and restores a checkpoint file: try learning rates in runs of their own",
    BaseFinetuning: "parameters are sorted into megatron-core's buffers once: set requires_grad in configure_model",
    ModelPruning: "it masks whole weights, of which every rank holds a shard",
    SpikeDetection: "it looks at a rank's own loss: monitor train_loss, which all ranks share",
    ThroughputMonitor: "it counts a rank's samples times the world size: use mimo_strategy.callbacks.Throughput",
}
# The value that every setting of data parallelism must have, and why.
_DDP_SETTINGS = {
    "use_megatron_fsdp": (False, "modules are wrapped in DistributedDataParallel"),
    "use_custom_fsdp": (False, "modules are wrapped in DistributedDataParallel"),
    "num_distributed_optimizer_instances": (1, "a module's optimizer is sharded over all of its lanes"),
    "average_in_collective": (False, "gradients are summed and divided by one token count of all modules"),
    "fp8_param_gather": (False, "parameters are in the precision of the Trainer"),
}


def check_arguments(
    modules: Any,
    num_microbatches: Any,
    encoder_batching: Any,
    encoder_ahead: Any,
    ddp: Any,
    timeout: Any,
    watchdog: Any,
    on_save_failure: Any,
    cuda_graphs: Any,
) -> None:
    """Check the arguments of the strategy.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range.
    """
    for name, number, least in (
        ("num_microbatches", num_microbatches, 1),
        ("encoder_batching", encoder_batching, 1),
        ("encoder_ahead", encoder_ahead, 0),
    ):
        if type(number) is not int:
            raise TypeError(f"{name} must be a whole number, got {number!r}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if type(cuda_graphs) is not bool:
        raise TypeError(f"cuda_graphs must be True or False, got {cuda_graphs!r}")
    if num_microbatches % encoder_batching:
        raise ValueError(f"encoder_batching {encoder_batching} does not divide num_microbatches {num_microbatches}")
    if modules is not None and not isinstance(modules, Mapping):
        raise TypeError(f"modules must map names to ModuleParallel, got {modules!r}")
    for name, parallel in (modules or {}).items():
        if not isinstance(parallel, ModuleParallel):
            raise TypeError(f"the layout of {name!r} must be a ModuleParallel, got {parallel!r}")
    _check_time("timeout", timeout)
    if watchdog is not None:
        _check_time("watchdog", watchdog)
    if on_save_failure not in get_args(OnFailure):
        raise ValueError(f"on_save_failure must be one of {get_args(OnFailure)}, got {on_save_failure!r}")
    if isinstance(ddp, Mapping):
        for name, config in ddp.items():
            _check_ddp_config(f"[{name!r}]", config)
    elif ddp is not None:
        _check_ddp_config("", ddp)


def _check_ddp_config(key: str, ddp: Any) -> None:
    if not isinstance(ddp, DistributedDataParallelConfig):
        raise TypeError(f"ddp{key} must be a DistributedDataParallelConfig, got {ddp!r}")
    for setting, (valid, why) in _DDP_SETTINGS.items():
        value = getattr(ddp, setting)
        if value != valid:
            raise ValueError(f"ddp{key}.{setting}={value!r} is not supported, only {valid!r}: {why}")
    for needed in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if ddp.overlap_param_gather and not getattr(ddp, needed):
            raise ValueError(f"ddp{key}.overlap_param_gather=True needs ddp{key}.{needed}=True, got False")


def _check_time(name: str, value: Any) -> None:
    if not isinstance(value, timedelta):
        raise TypeError(f"{name} must be a timedelta, got {value!r}")
    if value <= timedelta(0):
        raise ValueError(f"{name} must be longer than nothing, got {value}")


def check_trainer(trainer: Trainer) -> None:
    """Check flags and callbacks of the Trainer.

    Raises:
        ValueError: for a flag or callback that cannot work with sharded modules.
    """
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"accumulate_grad_batches is {trainer.accumulate_grad_batches}, but each batch is a whole optimizer "
            "step already: use a larger batch_size and MimoHeteroStrategy(num_microbatches=...)"
        )
    if trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
        raise ValueError(
            "gradient_clip_algorithm='value' is not supported: gradients are clipped by their norm over all modules"
        )
    clip = trainer.gradient_clip_val
    if clip is not None and not 0 <= clip < math.inf:
        raise ValueError(f"gradient_clip_val must be a finite norm of at least 0, got {clip}")
    strategy = trainer.strategy
    if strategy._layer_sync is not None:
        raise ValueError("sync_batchnorm=True is not supported: megatron-core's modules have no batch norm")
    if strategy._checkpoint_io is not None:
        raise ValueError(
            f"the plugin {type(strategy._checkpoint_io).__name__} is not supported: the strategy writes checkpoints "
            "itself, every rank its shards"
        )
    for callback in trainer.callbacks:
        for refused, why in _CALLBACKS.items():
            if isinstance(callback, refused):
                raise ValueError(f"the callback {type(callback).__name__} does not work here: {why}")
        if isinstance(callback, ModelCheckpoint):
            # where it keeps them by itself
            logged = trainer.loggers[0].save_dir if trainer.loggers else None
            check_checkpoint_path(callback.dirpath or logged or trainer.default_root_dir)


def check_checkpoint_path(path: str | Path) -> None:
    """Check where a checkpoint is to be kept.

    Raises:
        ValueError: if that is no folder of a file system.
    """
    if "://" in str(path):
        raise ValueError(
            f"checkpoints cannot be kept at {path}: they are folders to which every rank writes its part, on a file "
            "system that all nodes share"
        )


def check_device(device: torch.device) -> None:
    """Check that megatron-core was made ready for the Trainer's device.

    Raises:
        ValueError: for CPUs in a process that sees GPUs.
    """
    if device.type == "cpu" and torch.cuda.is_available():
        raise ValueError(
            "this process sees GPUs, for which megatron-core was made ready as it was imported: to train on CPUs, "
            "start it with CUDA_VISIBLE_DEVICES= (empty)"
        )


def check_module(module: LightningModule) -> None:
    """Check that the root module can be trained.

    Raises:
        TypeError: if it is no :class:`~mimo_strategy.module.MimoModule`.
        ValueError: if it wants to optimize by itself.
    """
    if not isinstance(module, MimoModule):
        raise TypeError(
            f"MimoHeteroStrategy trains a mimo_strategy.MimoModule, got {type(module).__name__}; it must tell "
            "of its modules by module_sizes, module_spec and encoder_inputs"
        )
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__}.automatic_optimization is False, but a step with all of its backward passes runs "
            "in one schedule: leave it True"
        )


def check_predicts(module: MimoModule) -> None:
    """Check that the root module tells what to predict.

    Raises:
        ValueError: if it does not.
    """
    if not is_overridden("predict_step", module):
        raise ValueError(
            f"{type(module).__name__} has no predict_step: write one that returns "
            "self.predict(batch, end_token_id=...), to generate text"
        )


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Check what ``configure_optimizers`` returned.

    Raises:
        TypeError: if it is not what ``MimoModule.make_optimizer`` makes.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, ModuleOptimizer):
            returned = "None" if isinstance(optimizer, NoOptimizer) else type(optimizer).__name__
            raise TypeError(
                f"configure_optimizers returned {returned}, but gradients are in buffers of megatron-core, where only "
                "its own optimizer finds them: return what self.make_optimizer(OptimizerConfig(...)) makes"
            )


def check_schedule(layout: Layout, encoder_batching: int, encoder_ahead: int, *, cuda_graphs: bool) -> None:
    """Check that encoders can take several microbatches at once or run ahead, and that layers can be replayed.

    Raises:
        LayoutError: if they cannot in this layout.
    """
    if failures := layout.schedule_failures(encoder_batching, encoder_ahead, cuda_graphs=cuda_graphs):
        raise LayoutError(*failures)


def check_replayed_ddp(ddp: DistributedDataParallelConfig) -> None:
    """Check that a module whose layers are replayed as CUDA graphs needs nothing but these in its forward pass.

    Raises:
        ValueError: if parameters are gathered layer by layer.
    """
    if ddp.overlap_param_gather:
        raise ValueError(
            f"layers that cuda_graphs=True replays cannot gather their parameters: leave overlap_param_gather False in "
            f"the ddp settings of {LANGUAGE}"
        )


def check_ddp(names: Collection[str], ddp: Any) -> None:
    """Check that settings of data parallelism by module name are of modules that there are.

    Args:
        names: of the model's modules.
        ddp: as the strategy takes it.

    Raises:
        ValueError: if a name is of no module.
    """
    unknown = sorted(ddp.keys() - set(names)) if isinstance(ddp, Mapping) else []
    if unknown:
        raise ValueError(f"ddp has settings for {', '.join(unknown)}, but the modules are {', '.join(names)}")


def check_data(layout: Layout, num_microbatches: int, *sources: Any) -> None:
    """Check the batch sizes that are known before ranks start.

    Args:
        layout: the resolved layout.
        num_microbatches: microbatches per step.
        sources: what ``Trainer.fit`` and the like were given: loaders, nested or not, and LightningDataModules.

    Raises:
        ValueError: if a step batch cannot be cut into microbatches and lanes.
        TypeError: if a ``batch_size`` is no whole number.
    """
    for source in _leaves(sources):
        batch_size = declared_batch_size(source)
        if batch_size is None:
            continue
        if type(batch_size) is not int:
            raise TypeError(f"batch_size of {type(source).__name__} must be a whole number, got {batch_size!r}")
        layout.check_batch(batch_size, num_microbatches)


def _leaves(source: Any) -> Iterator[Any]:
    if isinstance(source, Mapping):
        source = list(source.values())
    if isinstance(source, list | tuple):
        for part in source:
            yield from _leaves(part)
    else:
        yield source


def declared_batch_size(source: Any) -> Any:
    """The ``batch_size`` of a loader or datamodule, also where ``save_hyperparameters`` kept it; ``None`` without."""
    declared = getattr(source, "batch_size", None)
    return getattr(getattr(source, "hparams", None), "batch_size", None) if declared is None else declared
