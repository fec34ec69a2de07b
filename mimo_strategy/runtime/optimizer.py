"""Build megatron-core's optimizer of several modules."""

import math
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, clip_grads
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler, MegatronGradScaler

from mimo_strategy.overlay import Overlay
from mimo_strategy.runtime.distributed_optimizer import DistributedOptimizer
from mimo_strategy.runtime.model import HeteroMimoModel
from mimo_strategy.topology import Topology


def build_optimizer(
    model: HeteroMimoModel,
    topology: Topology,
    configs: Mapping[str, OptimizerConfig],
    ddp_configs: Mapping[str, DistributedDataParallelConfig],
    dtype: torch.dtype,
) -> "HeteroOptimizer":
    """Build one optimizer per module of this rank, whose gradient norm is that of all modules of all ranks.

    Args:
        model: the wrapped model.
        topology: groups of the modules; collective over each module's ranks.
        configs: what the user sets, by module; dtypes and sharding are filled in.
        ddp_configs: as the modules were wrapped with.
        dtype: dtype of the parameters.
    """
    infos, modules = {}, model.own_modules()
    for name, grid in topology.grids.items():
        runs = name in modules
        optimizer = None
        if runs:
            config = replace(
                configs[name],
                params_dtype=dtype,
                bf16=dtype is torch.bfloat16,
                fp16=dtype is torch.float16,
                loss_scale=configs[name].loss_scale if dtype is torch.float16 else None,
                use_distributed_optimizer=ddp_configs[name].use_distributed_optimizer,
                overlap_param_gather=ddp_configs[name].overlap_param_gather,
            )
            with (
                _param_groups_of(topology.groups[name].intra_dist_opt),
                mock.patch.object(megatron_optimizer, "DistributedOptimizer", DistributedOptimizer),
            ):
                # The module's own, complete collection; get_mimo_optimizer derives one that leaves expt_tp out.
                optimizer = _without_stubs(
                    megatron_optimizer.get_megatron_optimizer(
                        config, [modules[name]], pg_collection=topology.groups[name], use_gloo_process_groups=False
                    )
                )
        infos[name] = ModuleOptimizerInfo(optimizer, grid, topology.groups.get(name), runs)
    first = next(iter(configs.values()))
    return HeteroOptimizer(infos, first, _grad_scaler(first) if dtype is torch.float16 else None)


class HeteroOptimizer(MimoOptimizer):
    """``MimoOptimizer`` that keeps the norm of each module's gradients, and one loss scale for all modules.

    megatron-core 0.19.2 updates every module's loss scale by that module's own overflows, before modules tell each
    other of them: their scales drift apart, while one loss is scaled for all of them. It also waits for a GPU three
    times: for overflows, which only a loss scale looks for, for the norm, by which Transformer Engine can clip where
    it is, and for a success that is certain. Here it does so only under a loss scale.

    Args:
        module_infos: optimizers by module.
        config: of the first module.
        grad_scaler: scales the loss under float16, otherwise ``None``.

    Attributes:
        module_norms: norm of each module's gradients at the last step that was not skipped, on the device where that
            clips by it.
    """

    def __init__(
        self,
        module_infos: dict[str, ModuleOptimizerInfo],
        config: OptimizerConfig,
        grad_scaler: MegatronGradScaler | None,
    ) -> None:
        super().__init__(module_infos, config)
        self.module_norms: dict[str, float | torch.Tensor] = {}
        self.grad_scaler = grad_scaler
        if grad_scaler is not None:
            for part in self.parts:
                part.grad_scaler = _FollowingScaler(grad_scaler)

    @property
    def parts(self) -> list[MegatronOptimizer]:
        """The optimizers of this rank: of each module one for its dense parameters, and one for its experts."""
        return [part for optimizer in self._active_optimizers for part in optimizer.chained_optimizers]

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        found_inf = super().prepare_grads()
        if self.grad_scaler is None:
            return found_inf
        anywhere = torch.full_like(self.grad_scaler.scale, found_inf)
        torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
        found_inf = anywhere.item() > 0
        self.grad_scaler.update(found_inf)
        return found_inf

    @torch.no_grad()
    def step(self) -> tuple[bool, float | torch.Tensor | None, None]:
        # the same on every rank
        if self.prepare_grads():
            return False, None, None
        grad_norm = self.get_grad_norm()
        for optimizer in self._active_optimizers:
            parameters = optimizer.get_parameters()
            if parameters and optimizer.config.clip_grad > 0.0:
                clip_grads.clip_grad_by_total_norm_fp32(
                    parameters,
                    max_norm=optimizer.config.clip_grad,
                    total_norm=grad_norm,
                    use_decoupled_grad=optimizer.config.use_precision_aware_optimizer,
                )
        self.step_with_ready_grads()
        return True, grad_norm, None

    @torch.no_grad()
    def get_grad_norm(self) -> float | torch.Tensor:
        names = sorted(self.module_infos)
        norms = torch.zeros(len(names), device=self.get_loss_scale().device)
        for position, name in enumerate(names):
            optimizer = self.module_infos[name].optimizer
            if optimizer is not None:
                norms[position : position + 1] = optimizer.get_grad_norm()
        torch.distributed.all_reduce(norms, op=torch.distributed.ReduceOp.MAX)
        clips_on_device = clip_grads.multi_tensor_scale_tensor_impl is not None
        self.module_norms = dict(zip(names, norms if clips_on_device else norms.tolist(), strict=True))
        return norms.norm().reshape(1) if clips_on_device else math.hypot(*self.module_norms.values())

    def get_loss_scale(self) -> torch.Tensor:
        # the same on ranks whose modules are frozen
        return super().get_loss_scale() if self.grad_scaler is None else self.grad_scaler.scale


class _FollowingScaler:
    """Shows a module's optimizer the loss scale of all; its own overflows do not change it."""

    def __init__(self, scaler: MegatronGradScaler) -> None:
        self._scaler = scaler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_scaler"], name)

    def update(self, found_inf: bool) -> None:
        """Left to :class:`HeteroOptimizer`."""


def _grad_scaler(config: OptimizerConfig) -> MegatronGradScaler:
    """As megatron-core makes one for each module."""
    if config.loss_scale:
        return ConstantGradScaler(config.loss_scale)
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )


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
