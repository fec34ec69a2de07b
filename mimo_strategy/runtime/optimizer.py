"""Build megatron-core's optimizer of several modules."""

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig

from mimo_strategy.layout import LANGUAGE
from mimo_strategy.overlay import Overlay
from mimo_strategy.topology import Topology


def build_optimizer(
    model: MimoModel,
    topology: Topology,
    configs: Mapping[str, OptimizerConfig],
    ddp_config: DistributedDataParallelConfig,
    dtype: torch.dtype,
) -> MimoOptimizer:
    """Build one optimizer per module of this rank, whose gradient norm is that of all modules of all ranks.

    Args:
        model: the wrapped model.
        topology: groups of the modules; collective over each module's ranks.
        configs: what the user sets, by module; dtypes and sharding are filled in.
        ddp_config: as the modules were wrapped with.
        dtype: dtype of the parameters.
    """
    infos = {}
    for name, grid in topology.grids.items():
        runs = topology.runs(name)
        optimizer = None
        if runs:
            config = replace(
                configs[name],
                params_dtype=dtype,
                bf16=dtype is torch.bfloat16,
                use_distributed_optimizer=ddp_config.use_distributed_optimizer,
                overlap_param_gather=ddp_config.overlap_param_gather,
            )
            module = model.language_model if name == LANGUAGE else model.modality_submodules[name]
            with _param_groups_of(topology.groups[name].intra_dist_opt):
                # The module's own, complete collection; get_mimo_optimizer derives one that leaves expt_tp out.
                optimizer = _without_stubs(
                    megatron_optimizer.get_megatron_optimizer(
                        config, [module], pg_collection=topology.groups[name], use_gloo_process_groups=False
                    )
                )
        infos[name] = ModuleOptimizerInfo(optimizer, grid, topology.groups.get(name), runs)
    return MimoOptimizer(infos, next(iter(configs.values())))


def _without_stubs(optimizer: ChainedOptimizer) -> ChainedOptimizer | None:
    """The optimizers that have parameters on some rank of the module; ``None`` if it is frozen.

    For frozen parameters megatron-core 0.19.2 makes stand-ins, which lack most of an optimizer's attributes.
    """
    parts = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
    return ChainedOptimizer(parts) if parts else None


@contextmanager
def _param_groups_of(group: torch.distributed.ProcessGroup):
    """Align parameter groups over the ranks of one module only.

    megatron-core 0.19.2 aligns them over the world (``_get_param_groups``), which gives a dense encoder an empty
    optimizer for experts as soon as the language model has some.
    """
    torch_there = megatron_optimizer.torch
    distributed = Overlay(
        torch_there.distributed,
        get_world_size=group.size,
        all_gather_object=partial(torch_there.distributed.all_gather_object, group=group),
    )
    with mock.patch.object(megatron_optimizer, "torch", Overlay(torch_there, distributed=distributed)):
        yield
