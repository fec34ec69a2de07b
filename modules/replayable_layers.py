"""Layers of the language model that CUDA graphs can replay."""

from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from mimo_strategy.runtime.layer_graphs import ReplayableLayer


class ReplayableMambaLayer(ReplayableLayer, MambaLayer):
    """A Mamba-2 layer."""

    def run_with(self, parameters: Mapping[str, torch.Tensor], hidden_states: torch.Tensor) -> Any:
        # the mixer's part for context parallelism holds these a second time
        shared = {
            f"{name}_cp1": parameters.get(f"mixer.{name}", getattr(self.mixer, name))
            for name in ("conv1d_weight", "conv1d_bias", "dt_bias", "A_log", "D")
        }
        with mock.patch.multiple(self.mixer.cp, **shared):
            return super().run_with(parameters, hidden_states)


class ReplayableAttentionLayer(ReplayableLayer, TransformerLayer):
    """A layer of attention alone."""
