"""Train multimodal models on megatron-core with a parallel layout per module, under PyTorch Lightning.

Names are imported when they are first used, so that the command line answers before torch is there.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from mimo_strategy import registration
from mimo_strategy.cpu import import_hook

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from mimo_strategy.layout import Layout, LayoutError, ModuleParallel
    from mimo_strategy.module import MimoModule
    from mimo_strategy.strategy import MimoHeteroStrategy

__all__ = [
    "DistributedDataParallelConfig",
    "Layout",
    "LayoutError",
    "MimoHeteroStrategy",
    "MimoModule",
    "ModuleParallel",
    "OptimizerConfig",
]

_HOMES = {
    "DistributedDataParallelConfig": "megatron.core.distributed",
    "Layout": "mimo_strategy.layout",
    "LayoutError": "mimo_strategy.layout",
    "MimoHeteroStrategy": "mimo_strategy.strategy",
    "MimoModule": "mimo_strategy.module",
    "ModuleParallel": "mimo_strategy.layout",
    "OptimizerConfig": "megatron.core.optimizer",
}

# as Lightning does: torch then looks for GPUs without initialising CUDA, after which no rank could be forked
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
import_hook.install()
registration.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
