"""A training loop on megatron-core's own classes, as a script would have it: without Lightning and the strategy."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.config.base_configs import MimoModelConfig
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.optimizer import get_mimo_optimizer
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection, ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module

from mimo_strategy.layout import LANGUAGE, Layout, ModuleLayout, Placement
from modules import NemotronVLM

IMAGES = "images"
_PRIMARY = {
    "tp": "tp",
    "cp": "cp",
    "pp": "pp",
    "dp": "dp",
    "dp_cp": ["cp", "dp"],
    "tp_cp": ["tp", "cp"],
    "mp": ["tp", "pp"],
    "tp_dp_cp": ["tp", "cp", "dp"],
    "intra_dist_opt": ["tp", "cp", "dp", "pp"],
}
_EXPERT = {
    "ep": "ep",
    "expt_tp": "expt_tp",
    "expt_dp": "expt_dp",
    "tp_ep": ["expt_tp", "ep"],
    "tp_ep_pp": ["expt_tp", "ep", "pp"],
}


class _HalfPrecisionEncoder(Float16Module):
    def forward(self, *inputs: Any, fp32_output: bool = False, **kwargs: Any) -> Any:
        return super().forward(*inputs, fp32_output=fp32_output, **kwargs)


class MegatronLoop:
    """Trains a ``NemotronVLM`` in a layout on random batches, one image a sample. Text models have no place here.

    Args:
        description: tells of the modules; nothing else of it is used.
        layout: the resolved layout; the language model is one stage.
        num_microbatches: microbatches per step.
        batch_size: samples per step, over all ranks.
        config: settings of the optimizer.
        dtype: dtype of parameters and activations.
        device: of this rank.
    """

    def __init__(
        self,
        description: NemotronVLM,
        layout: Layout,
        num_microbatches: int,
        batch_size: int,
        config: OptimizerConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._description = description
        self._layout = layout
        self._microbatches = num_microbatches
        self._size = batch_size // num_microbatches
        self._device = device
        self._dtype = dtype
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:
            parallel_state._set_global_memory_buffer()
        self._grids = {name: _grid(module) for name, module in layout.modules.items()}
        self._groups = {
            name: _groups(grid) for name, grid in self._grids.items() if dist.get_rank() in layout.modules[name].ranks
        }
        self.model = self._build(description)
        self._wrap()
        self._configure()
        self.optimizer = get_mimo_optimizer(self.model, config)
        self._run = self._schedule()

    def step(self) -> None:
        """Train on one step batch."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run(
            forward_step_func=self._forward,
            data_iterator=(self._microbatch() for _ in range(self._microbatches)),
            model=self.model,
            num_microbatches=self._microbatches,
            seq_length=self._description.language.config.max_sequence_length,
            micro_batch_size=self._size,
        )
        self.optimizer.step()

    def destroy(self) -> None:
        """Let go of the groups of bridges; those of grids go with the world's."""
        self.model.destroy()
        BridgeCommunicator.destroy_broadcast_pgs()
        BridgeCommunicator.destroy_bridge_pgs()

    def _build(self, description: NemotronVLM) -> MimoModel:
        specs = {
            name: description.module_spec(name, module, self._groups.get(name), self._dtype)
            for name, module in self._layout.modules.items()
        }
        own = self._groups.get(LANGUAGE) or self._groups[IMAGES]
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(
            1, tp_rank=own.tp.rank(), ep_rank=own.ep.rank(), etp_rank=own.expt_tp.rank(), force_reset_rng=True
        )
        language = self._groups.get(LANGUAGE)
        model = MimoModel(
            MimoModelConfig(
                language_model_spec=specs[LANGUAGE],
                modality_submodules_spec={IMAGES: specs[IMAGES]},
                special_token_ids=dict(description.special_token_ids),
                module_to_grid_map=self._grids,
            ),
            cp_group=language.cp if language else None,
            tp_group=language.tp if language else None,
        )
        model.model_type = ModelType.encoder_or_decoder
        return model.to(self._device)

    def _wrap(self) -> None:
        def wrap(name: str, module: torch.nn.Module, half: type[Float16Module]) -> DistributedDataParallel:
            config = next(part.config for part in module.modules() if hasattr(part, "config"))
            ddp = DistributedDataParallelConfig(
                use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=True
            )
            module = module if self._dtype is torch.float32 else half(config, module)
            wrapped = DistributedDataParallel(config, ddp, module, pg_collection=self._groups[name])
            wrapped.broadcast_params()
            return wrapped

        for name, module in self.model.modality_submodules.items():
            self.model.modality_submodules[name] = wrap(name, module, _HalfPrecisionEncoder)
        if self.model.language_model is not None:
            self.model.language_model = wrap(LANGUAGE, self.model.language_model, Float16Module)

    def _configure(self) -> None:
        config = self.model.config
        config.finalize_model_grads_func = self._finalize
        config.no_sync_func = self.model.no_sync

    def _schedule(self) -> Any:
        if self._layout.placement is Placement.COLOCATED:
            return partial(forward_backward_no_pipelining, pg_collection=self._groups[LANGUAGE])
        communicator = MultiModulePipelineCommunicator(
            self._grids,
            {IMAGES: [LANGUAGE], LANGUAGE: []},
            self.model.config,
            dim_mapping={"s": 0, "b": 1, "h": 2},
            module_output_ndim={IMAGES: 2},
        )
        groups = MultiModuleProcessGroupCollection(self._groups, LANGUAGE if LANGUAGE in self._groups else None)
        return partial(
            forward_backward_pipelining_without_interleaving, p2p_communicator=communicator, pg_collection=groups
        )

    def _microbatch(self) -> dict[str, Any]:
        """What this rank's lanes take of a microbatch: its image first, then text that counts."""
        lanes = {name: self._layout.modules[name].dp for name in self._groups}
        samples = self._size // min(lanes.values())
        language, radio = self._description.language.config, self._description.encoder.config
        image_token = self._description.special_token_ids[IMAGES]
        tokens = torch.randint(0, language.vocab_size - 1, (samples, language.max_sequence_length), device=self._device)
        tokens += tokens >= image_token
        tokens[:, : radio.tokens_per_image] = image_token
        inputs = {}
        if IMAGES in lanes:
            images = torch.randn(
                (self._size // lanes[IMAGES], 3, radio.image_height, radio.image_width),
                device=self._device,
                dtype=self._dtype,
            )
            inputs[IMAGES] = self._description.encoder_inputs(IMAGES, images)
        return {
            "input_ids": tokens,
            "position_ids": torch.arange(tokens.shape[1], device=self._device).expand_as(tokens),
            "labels": tokens.roll(-1, 1),
            "loss_mask": (tokens != image_token).float(),
            "modality_inputs": inputs,
        }

    def _forward(self, microbatches: Iterator, model: torch.nn.Module) -> tuple[Any, Any]:
        output, mask = model(**next(microbatches))
        return output, partial(_loss, mask)

    def _finalize(self, _models: Any, num_tokens: torch.Tensor, **_: Any) -> None:
        counted = torch.zeros((), device=self._device)
        language = self._groups.get(LANGUAGE)
        if language is not None and language.tp.rank() == 0:
            counted += num_tokens
        dist.all_reduce(counted)
        modules = dict(self.model.modality_submodules.items())
        if self.model.language_model is not None:
            modules[LANGUAGE] = self.model.language_model
        for name, module in modules.items():
            finalize_model_grads([module], num_tokens=None, pg_collection=self._groups[name])
            module.scale_gradients(counted.clamp_min(1).reciprocal())


def _grid(module: ModuleLayout) -> HyperCommGrid:
    grid = HyperCommGrid(
        [module.tp, module.cp, module.dp, module.pp], ["tp", "cp", "dp", "pp"], rank_offset=module.rank_offset
    )
    grid.register_view(
        "expert",
        [module.etp, module.ep, module.edp, module.pp],
        ["expt_tp", "ep", "expt_dp", "pp"],
        shared_dims=["pp"],
    )
    for dims in _PRIMARY.values():
        grid.create_pg(dims)
    for dims in _EXPERT.values():
        grid.create_pg(dims, view="expert")
    return grid


def _groups(grid: HyperCommGrid) -> ProcessGroupCollection:
    groups = ProcessGroupCollection()
    for field, dims in _PRIMARY.items():
        setattr(groups, field, grid.get_pg(dims))
    for field, dims in _EXPERT.items():
        setattr(groups, field, grid.get_pg(dims, view="expert"))
    groups.intra_dp_cp = groups.dp_cp_gtp_remat = groups.dp_cp
    groups.intra_expt_dp = groups.expt_dp
    groups.tp_ep_pp_with_egtp_remat = groups.tp_ep_pp
    groups.expt_dp_gtp_remat = groups.expt_dp
    groups.embd = groups.pos_embd = None
    return groups


def _loss(mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    total = (output.float() * mask).sum()
    return total, mask.sum().int(), {"loss": total.detach()}
