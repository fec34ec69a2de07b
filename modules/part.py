"""A part of an encoder module that is also a LightningModule of its own."""

from abc import abstractmethod

import torch
from lightning.pytorch import LightningModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from mimo_strategy.layout import LANGUAGE, ModuleLayout, ModuleSizes
from mimo_strategy.runtime.seeding import ModuleRng
from mimo_strategy.topology import Topology


class EncoderPart(LightningModule):
    """Tells how megatron-core builds a part; ``configure_model`` builds it alone, on one process.

    Attributes:
        model: the part as built alone, or ``None``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model: torch.nn.Module | None = None

    @abstractmethod
    def sizes(self) -> ModuleSizes:
        """The sizes that limit the part's layout."""

    @abstractmethod
    def spec(self, layout: ModuleLayout, groups: ProcessGroupCollection | None, dtype: torch.dtype) -> ModuleSpec:
        """How megatron-core builds the part."""

    def configure_model(self) -> None:
        if self.model is None:
            # a topology names its language module; alone, the part takes that place
            topology = Topology.single_process({LANGUAGE: self.sizes()})
            groups = topology.groups[LANGUAGE]
            spec = self.spec(topology.layout.modules[LANGUAGE], groups, torch.float32)
            rng = ModuleRng(torch.initial_seed() % 2**31, groups)
            with rng.building():
                self.model = build_module(spec).to(self.device)
            rng.activate_in_forward(self.model)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.model is None:
            raise RuntimeError(f"call configure_model() before running a {type(self).__name__} alone")
        return self.model(inputs)
