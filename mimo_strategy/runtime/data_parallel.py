"""Wrap each module in megatron-core's data parallelism."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from mimo_strategy.layout import LANGUAGE
from mimo_strategy.topology import Topology


def default_ddp_config(*, on_gpus: bool) -> DistributedDataParallelConfig:
    """The distributed optimizer, on GPUs with gradients that are reduced during the backward."""
    return DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=on_gpus)


def resolve_ddp(
    names: Iterable[str],
    ddp: DistributedDataParallelConfig | Mapping[str, DistributedDataParallelConfig] | None,
    *,
    on_gpus: bool,
) -> dict[str, DistributedDataParallelConfig]:
    """The settings of every module: its own where ``ddp`` names it, those for all, or the default."""
    default = default_ddp_config(on_gpus=on_gpus)
    if isinstance(ddp, Mapping):
        return {name: ddp.get(name, default) for name in names}
    return dict.fromkeys(names, ddp or default)


class _Float16Encoder(Float16Module):
    """``Float16Module`` whose output stays in half precision, as the bridge to the language model expects."""

    def forward(self, *inputs, fp32_output=False, **kwargs):
        return super().forward(*inputs, fp32_output=fp32_output, **kwargs)


class _CollectableDataParallel(DistributedDataParallel):
    """A wrapped module that its own hooks do not keep alive.

    megatron-core 0.19.2 hangs hooks that hold the whole module into the graph. A layer of experts keeps a tensor of
    the last step with its graph, through which Python's garbage collector does not see, and so no model with experts
    ever gives up its parameters and gradients.
    """

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        return DistributedDataParallel._make_backward_post_hook(weakref.proxy(self), param)


def wrap_modules(
    model: MimoModel,
    topology: Topology,
    ddp_configs: Mapping[str, DistributedDataParallelConfig],
    dtype: torch.dtype,
) -> None:
    """Wrap every module of this rank in place and broadcast its parameters over its own data-parallel groups.

    Args:
        model: the model as built.
        topology: groups of the modules.
        ddp_configs: by module.
        dtype: dtype of the parameters; half precision computes in it and reduces gradients as ``ddp_configs`` say.
    """

    def wrap(name: str, module: torch.nn.Module, float16_module: type[Float16Module]) -> DistributedDataParallel:
        config = module_config(module)
        if dtype is not torch.float32:
            module = float16_module(config, module)
        wrapped = _CollectableDataParallel(
            # megatron-core writes the bucket size into the config it is given
            config,
            replace(ddp_configs[name]),
            module,
            pg_collection=topology.groups[name],
        )
        wrapped.broadcast_params()
        accumulate_in_kernels(wrapped)
        return wrapped

    for name, submodule in model.modality_submodules.items():
        model.modality_submodules[name] = wrap(name, submodule, _Float16Encoder)
    if model.language_model is not None:
        model.language_model = wrap(LANGUAGE, model.language_model, Float16Module)


def accumulate_in_kernels(module: DistributedDataParallel) -> None:
    """Let Transformer Engine's layers add weight gradients to the buffers themselves, in the buffers' precision.

    megatron-core 0.19.2 can ask for it for a whole module only, which for its own layers needs a kernel of Apex.
    """
    for layer in module.modules():
        if hasattr(layer, "fuse_wgrad_accumulation"):
            weights = layer.parameters(recurse=False)
            layer.fuse_wgrad_accumulation = all(weight.requires_grad for weight in weights)


def module_config(module: torch.nn.Module) -> TransformerConfig:
    """The config of a module; a modality's own container has none, its first encoder does."""
    return next(
        part.config for part in module.modules() if isinstance(getattr(part, "config", None), TransformerConfig)
    )
