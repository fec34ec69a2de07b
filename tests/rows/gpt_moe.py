"""A language model of one's own: megatron-core's GPT with mixture-of-experts layers, alone and under an encoder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from mimo_strategy import MimoModule
from mimo_strategy.layout import LANGUAGE, ModuleLayout, ModuleSizes
from modules import Projector, ProjectorConfig, RadioConfig, RadioEncoder
from modules.layer_specs import ACTIVATIONS, torch_norm
from modules.transformer import transformer_config
from modules.vision import vision_sizes, vision_spec

IMAGES = "images"
NUM_LAYERS, HIDDEN_SIZE, NUM_HEADS, NUM_EXPERTS, FFN_SIZE = 2, 64, 4, 4, 64


@dataclass(frozen=True)
class GptMoE:
    """How the layers of the language model work; the defaults are those of the first GPTs with experts."""

    vocab_size: int = 64
    max_sequence_length: int = 32
    num_query_groups: int = NUM_HEADS
    activation: Literal["gelu", "squared_relu"] = "gelu"
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False
    shared_expert_ffn_size: int | None = None

    def sizes(self) -> ModuleSizes:
        return ModuleSizes(
            tp_divides={"vocab_size": self.vocab_size, "num_query_groups": self.num_query_groups},
            etp_divides={"ffn_size": FFN_SIZE},
            num_experts=NUM_EXPERTS,
        )

    def spec(
        self,
        layout: ModuleLayout,
        groups: ProcessGroupCollection | None,
        dtype: torch.dtype,
        *,
        under_encoder: bool,
    ) -> ModuleSpec:
        """How megatron-core builds it; under an encoder, ``MimoModel`` scatters the merged embeddings."""
        config = transformer_config(
            layout,
            dtype,
            num_layers=NUM_LAYERS,
            hidden_size=HIDDEN_SIZE,
            num_attention_heads=NUM_HEADS,
            num_query_groups=self.num_query_groups,
            normalization=self.normalization,
            add_bias_linear=False,
            activation_func=ACTIVATIONS[self.activation],
            init_method_std=0.05,
            sequence_parallel=layout.tp > 1,
            num_moe_experts=NUM_EXPERTS,
            moe_router_topk=2,
            moe_ffn_hidden_size=FFN_SIZE,
            moe_shared_expert_intermediate_size=self.shared_expert_ffn_size,
            moe_router_score_function=self.router_score,
            moe_router_enable_expert_bias=self.router_bias,
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="seq_aux_loss",
            moe_aux_loss_coeff=1e-2,
            # the layers are megatron-core's own also where Transformer Engine could run
            moe_grouped_gemm=False,
            moe_permute_fusion=False,
        )
        # upstream's norm refuses sequence parallelism
        submodules = replace(
            get_gpt_layer_local_submodules(num_experts=NUM_EXPERTS),
            input_layernorm=torch_norm,
            pre_mlp_layernorm=torch_norm,
        )
        layer = ModuleSpec(module=TransformerLayer, submodules=submodules)
        return ModuleSpec(
            module=GPTModel,
            params={
                "config": config,
                "transformer_layer_spec": TransformerBlockSubmodules([layer] * NUM_LAYERS, torch_norm),
                "vocab_size": self.vocab_size,
                "max_sequence_length": self.max_sequence_length,
                "position_embedding_type": "rope",
                "scatter_embedding_sequence_parallel": not under_encoder,
                "pg_collection": groups,
            },
        )


NEMOTRON = GptMoE(
    num_query_groups=2,
    activation="squared_relu",
    normalization="RMSNorm",
    router_score="sigmoid",
    router_bias=True,
    shared_expert_ffn_size=64,
)


class GptVLM(MimoModule):
    """RADIO encoder and projector in front of a :class:`GptMoE`."""

    def __init__(self, language: GptMoE, radio: RadioConfig, image_token_id: int, optimizer: OptimizerConfig) -> None:
        super().__init__()
        self.language = language
        self.encoder = RadioEncoder(radio)
        self.projector = Projector(ProjectorConfig(radio.output_size, HIDDEN_SIZE))
        self.special_token_ids = {IMAGES: image_token_id}
        self.optimizer_config = optimizer

    def module_sizes(self) -> Mapping[str, ModuleSizes]:
        return {IMAGES: vision_sizes(self.encoder, self.projector), LANGUAGE: self.language.sizes()}

    def module_spec(
        self, name: str, layout: ModuleLayout, groups: ProcessGroupCollection | None, dtype: torch.dtype
    ) -> ModuleSpec:
        if name == LANGUAGE:
            return self.language.spec(layout, groups, dtype, under_encoder=True)
        return vision_spec(self.encoder, self.projector, layout, groups, dtype)

    def encoder_inputs(self, name: str, items: torch.Tensor) -> dict[str, dict[str, Any]]:
        return {"radio": {"images": items}}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.optimizer_config)
