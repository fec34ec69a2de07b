"""Build the MimoModel of a topology: on every rank, the modules that run there."""

from collections.abc import Mapping
from typing import Protocol

import torch
from megatron.core.enums import ModelType
from megatron.core.models.mimo.config.base_configs import MimoModelConfig
from megatron.core.models.mimo.config.role import RankRole
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from mimo_strategy.layout import LANGUAGE, ModuleLayout
from mimo_strategy.runtime.seeding import ModuleRng
from mimo_strategy.topology import Topology

_SEEDS_PER_MODULE = 10_000


class DescribesModules(Protocol):
    """What a model must tell to be built; :class:`mimo_strategy.module.MimoModule` implements it."""

    special_token_ids: Mapping[str, int]

    def module_spec(
        self, name: str, layout: ModuleLayout, groups: ProcessGroupCollection | None, dtype: torch.dtype
    ) -> ModuleSpec: ...


class HeteroMimoModel(MimoModel):
    """``MimoModel`` whose modules draw from random streams of their own."""

    def __init__(self, config: MimoModelConfig, topology: Topology, seed: int) -> None:
        self._pipelined_alone = not config.modality_submodules_spec and topology.layout.modules[LANGUAGE].pp > 1
        self.rngs = {
            name: ModuleRng(seed + _SEEDS_PER_MODULE * (position + 1), topology.groups[name])
            for position, name in enumerate(topology.layout.modules)
            if topology.runs(name)
        }
        language = topology.groups.get(LANGUAGE)
        super().__init__(config, cp_group=language.cp if language else None, tp_group=language.tp if language else None)
        # megatron-core's schedules ask every model for it
        self.model_type = ModelType.encoder_or_decoder
        self._share_tracker()

    def _initialize_submodules(self) -> None:
        if self._pipelined_alone:
            # Upstream takes grids of equal span, here the only one, for colocated and so for unpipelined.
            self.role = RankRole._from_grid_map(self.mimo_config.module_to_grid_map)
        for name, spec in self.mimo_config.modality_submodules_spec.items():
            if name in self.role.modules:
                stage = self.role.modules[name]
                with self.rngs[name].building():
                    self.modality_submodules[name] = spec.module.from_spec(
                        spec, is_first_stage=stage.is_first_stage, is_last_stage=stage.is_last_stage
                    )

    def _initialize_language_model(self) -> None:
        self.language_model = None
        if self.role.has_language_module:
            with self.rngs[LANGUAGE].building():
                self.language_model = build_module(self.mimo_config.language_model_spec)

    def own_modules(self) -> dict[str, torch.nn.Module]:
        """The modules that run on this rank, by name, wrapped if they are."""
        modules = dict(self.modality_submodules.items())
        return modules if self.language_model is None else modules | {LANGUAGE: self.language_model}

    def _share_tracker(self) -> None:
        """The language model's streams are current, each encoder switches to its own in its forward."""
        for name, submodule in self.modality_submodules.items():
            self.rngs[name].activate_in_forward(submodule)
        if LANGUAGE in self.rngs:
            self.rngs[LANGUAGE].make_current()


def build_model(
    description: DescribesModules, topology: Topology, *, dtype: torch.dtype, device: torch.device, seed: int
) -> HeteroMimoModel:
    """Build this rank's part of the model on ``device``, unwrapped.

    Args:
        description: names and specs of the modules.
        topology: grids and groups; collective where colocated modules differ in dp.
        dtype: dtype of the parameters.
        device: device of the parameters.
        seed: the same on every rank.
    """
    specs = {
        name: description.module_spec(name, layout, topology.groups.get(name), dtype)
        for name, layout in topology.layout.modules.items()
    }
    config = MimoModelConfig(
        language_model_spec=specs.pop(LANGUAGE),
        modality_submodules_spec=specs,
        special_token_ids=dict(description.special_token_ids),
        module_to_grid_map=topology.grids,
    )
    return HeteroMimoModel(config, topology, seed).to(device)
