"""Which classes the layers are made of: Transformer Engine's where it can run, otherwise megatron-core's own."""

from copy import deepcopy
from functools import partial

import torch
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from modules.qkv_split import split_into_views
from modules.replayable_layers import ReplayableMambaLayer, with_replayable_shared_expert
from modules.transformer import use_transformer_engine

ACTIVATIONS = {"gelu": torch.nn.functional.gelu, "squared_relu": squared_relu}


def torch_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused) -> torch.nn.Module:
    """torch's norm, its parameters marked for sequence parallelism; upstream's ``WrappedTorchNorm`` refuses that."""
    norm_class = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
    norm = norm_class(hidden_size, eps=eps, dtype=config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


class LocalHybridStack(HybridStack):
    """``HybridStack`` whose final norm is torch's; upstream has Transformer Engine's built in."""

    def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, **kwargs) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = torch_norm(config, config.hidden_size, config.layernorm_epsilon)


def vit_layer_spec() -> ModuleSpec:
    """A layer of a vision transformer: full attention and MLP."""
    if use_transformer_engine():
        from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_transformer_engine_spec

        split_into_views()
        return add_biases_in_products(get_vit_layer_with_transformer_engine_spec())
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=torch_norm,
            self_attention=_attention(AttnMaskType.no_mask),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=torch_norm,
            mlp=partial(MLP.as_mlp_submodule, submodules=mlp_submodules()),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def add_biases_in_products(spec: ModuleSpec) -> ModuleSpec:
    """A layer of Transformer Engine with the linear layers of :mod:`modules.fused_bias`."""
    from modules.fused_bias import ColumnParallelLinear, RowParallelLinear

    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    spec.submodules.mlp = partial(MLP.as_mlp_submodule, submodules=mlp)
    spec.submodules.self_attention.submodules.linear_proj = RowParallelLinear
    return spec


def hybrid_stack_spec(num_experts: int) -> ModuleSpec:
    """The layers that a hybrid pattern may name: Mamba-2, attention, MLP and, with experts, MoE."""
    if use_transformer_engine():
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as upstream_spec

        split_into_views()
        return launch_less(deepcopy(upstream_spec), num_experts)
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(
                module=ReplayableMambaLayer,
                submodules=MambaLayerSubmodules(
                    norm=torch_norm,
                    mixer=ModuleSpec(
                        module=MambaMixer,
                        submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
                    ),
                    mamba_bda=get_bias_dropout_add,
                ),
            ),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=torch_norm,
                    self_attention=_attention(AttnMaskType.causal),
                    self_attn_bda=get_bias_dropout_add,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=torch_norm,
                    mlp=partial(MLP.as_mlp_submodule, submodules=mlp_submodules()),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=torch_norm,
                    mlp=with_replayable_shared_expert(
                        get_moe_module_spec(use_te=False, num_experts=max(num_experts, 1), moe_grouped_gemm=False)
                    ),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
        ),
    )


def launch_less(spec: ModuleSpec, num_experts: int) -> ModuleSpec:
    """Layers of Transformer Engine with the experts of :mod:`modules.experts`, and such as CUDA graphs can replay."""
    from modules.experts import moe_spec

    layers = spec.submodules
    layers.moe_layer.submodules.mlp = with_replayable_shared_expert(moe_spec(max(num_experts, 1)))
    layers.mamba_layer.module = ReplayableMambaLayer
    return spec


def mlp_submodules() -> MLPSubmodules:
    """The linear layers of a dense MLP. The first is megatron-core's own: Transformer Engine's cannot gather."""
    row_parallel = RowParallelLinear
    if use_transformer_engine():
        from megatron.core.extensions.transformer_engine import TERowParallelLinear

        row_parallel = TERowParallelLinear
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=row_parallel)


def _attention(mask: AttnMaskType) -> ModuleSpec:
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear
        ),
    )
