"""Train multimodal models on megatron-core with a parallel layout per module, under PyTorch Lightning."""

# first, as it lets torch look for GPUs without initialising CUDA, after which no rank could be forked
import lightning  # noqa: F401

from mimo_strategy import upstream_noise
from mimo_strategy.cpu import import_hook

upstream_noise.silence()
import_hook.install()

from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402

from mimo_strategy.layout import Layout, LayoutError, ModuleParallel  # noqa: E402
from mimo_strategy.module import MimoModule  # noqa: E402
from mimo_strategy.strategy import MimoHeteroStrategy  # noqa: E402

__all__ = [
    "DistributedDataParallelConfig",
    "Layout",
    "LayoutError",
    "MimoHeteroStrategy",
    "MimoModule",
    "ModuleParallel",
    "OptimizerConfig",
]
