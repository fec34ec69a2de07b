"""Layers of the language model that CUDA graphs can replay."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from mimo_strategy.runtime.layer_graphs import ReplayableLayer


class ReplayableMambaLayer(ReplayableLayer, MambaLayer):
    """A Mamba-2 layer."""

    def run_with(self, parameters: Mapping[str, torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
        # the mixer's part for context parallelism holds these a second time
        shared = {
            f"{name}_cp1": parameters.get(f"mixer.{name}", getattr(self.mixer, name))
            for name in ("conv1d_weight", "conv1d_bias", "dt_bias", "A_log", "D")
        }
        with mock.patch.multiple(self.mixer.cp, **shared):
            return super().run_with(parameters, hidden_states)


class ReplayableSharedExpert(ReplayableLayer, SharedExpertMLP):
    """The expert of a layer that takes every token."""


def with_replayable_shared_expert(spec: partial) -> partial:
    """A mixture of experts, as megatron-core's specs hold it."""
    submodules = spec.keywords["submodules"]
    linear = submodules.shared_experts.keywords["submodules"]
    shared_experts = partial(ReplayableSharedExpert, submodules=linear)
    return partial(spec, submodules=replace(submodules, shared_experts=shared_experts))
