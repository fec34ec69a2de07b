"""megatron-core's TransformerConfig for one module in one layout."""

import importlib.util
from functools import cache
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from mimo_strategy.layout import ModuleLayout

# Kernels of Transformer Engine, and one that torch compiles, which take the place of several each.
FUSED_KERNELS = {
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "use_fused_weighted_squared_relu": True,
    "cross_entropy_fusion_impl": "te",
}


@cache
def use_transformer_engine() -> bool:
    """Whether layers come from Transformer Engine: it is installed and a GPU is there."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def transformer_config(
    layout: ModuleLayout, dtype: torch.dtype, *, recompute_layers: bool = False, **settings: Any
) -> TransformerConfig:
    """The config of a module: its own ``settings``, and what every module of a step must have in common.

    Args:
        layout: the module's layout.
        dtype: dtype of parameters and of what pipelines and bridges send.
        recompute_layers: keep each layer's input only, and compute the layer again in the backward pass.
        settings: further fields of ``TransformerConfig``.
    """
    fused = use_transformer_engine()
    common = {
        "tensor_model_parallel_size": layout.tp,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        # Gradients of all modules are summed, then divided once by the step's token count.
        "calculate_per_token_loss": True,
        # Modules exchange tensors of different shapes. This in turn asks every module, dense ones too, for the
        # alltoall dispatcher.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "moe_grouped_gemm": fused,
        # upstream's rounds the gradient to bfloat16, whatever the model computes in
        "cross_entropy_loss_fusion": fused and dtype is torch.bfloat16,
    }
    if fused:
        common |= FUSED_KERNELS
    if recompute_layers:
        common |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(**(common | settings))
