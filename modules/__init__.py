"""LightningModules: RADIO encoder, projector, Mamba-MoE language model, and the model that composes them."""

import mimo_strategy  # noqa: F401  megatron-core, which modules import, must find torch redirected where there is no GPU
from modules.mamba_moe import NEMOTRON_20_LAYERS, NEMOTRON_54_LAYERS, MambaMoE, MambaMoEConfig
from modules.nemotron_vlm import NemotronVLM
from modules.projector import Projector, ProjectorConfig
from modules.radio import RadioConfig, RadioEncoder

__all__ = [
    "NEMOTRON_20_LAYERS",
    "NEMOTRON_54_LAYERS",
    "MambaMoE",
    "MambaMoEConfig",
    "NemotronVLM",
    "Projector",
    "ProjectorConfig",
    "RadioConfig",
    "RadioEncoder",
]
