"""A hybrid language model of Mamba-2, attention, MLP and mixture-of-experts layers."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec

from mimo_strategy.batch_checks import check_tokens
from mimo_strategy.layout import LANGUAGE, ModuleLayout, ModuleSizes
from mimo_strategy.module import MimoModule
from mimo_strategy.planning.cost import ModuleCost, Workload
from mimo_strategy.step_batch import Batch
from modules import fp8
from modules.layer_specs import ACTIVATIONS, hybrid_stack_spec
from modules.mamba_moe_cost import language_cost, layer_work, output_work
from modules.transformer import transformer_config

NEMOTRON_20_LAYERS = "MEMEM*EMEMEM*EMEMEM*"
NEMOTRON_54_LAYERS = "MEMEM*EMEM*EMEM*EMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEME"

_LAYER_SYMBOLS = "M*-E"


@dataclass(frozen=True)
class MambaMoEConfig:
    """Sizes of the language model; the defaults are Nemotron's with 20 layers.

    Args:
        pattern: one symbol a layer: ``M`` Mamba-2, ``*`` attention, ``-`` MLP, ``E`` mixture of experts; ``|``
            marks pipeline stages. Without ``|`` stages get equally many layers.
        vocab_size: tokens in the vocabulary.
        max_sequence_length: tokens of the longest sequence.
        hidden_size: width of the model.
        num_attention_heads: query heads of attention layers.
        num_query_groups: key-value heads.
        kv_channels: width of a head; ``None`` is ``hidden_size`` / ``num_attention_heads``.
        ffn_hidden_size: inner width of MLP layers.
        mamba_num_heads: heads of Mamba-2 layers.
        mamba_head_dim: width of a Mamba-2 head.
        mamba_num_groups: groups that share B and C.
        mamba_state_dim: width of a head's state.
        num_experts: experts of a mixture-of-experts layer.
        experts_per_token: experts that a token is routed to.
        expert_ffn_hidden_size: inner width of an expert.
        shared_expert_ffn_hidden_size: inner width of the expert that every token takes; 0 for none.
        router_score: function of the router's logits.
        router_bias: balance experts by a bias that is updated beside the gradients (arXiv 2408.15664).
        router_scaling: factor on the experts' weights.
        aux_loss_coeff: weight of the load-balancing loss; 0 for none.
        init_std: standard deviation of initial weights.
        dropout: probability of dropping, in attention and residual connections.
        recompute_layers: keep each layer's input only, and compute the layer again in the backward pass.
        fp8: multiply in 8 bits in linear layers and experts, with Transformer Engine; not in router and output layer.

    Raises:
        ValueError: if sizes do not fit each other, or fp8 does not take them.
    """

    pattern: str = NEMOTRON_20_LAYERS
    vocab_size: int = 131_072
    max_sequence_length: int = 8192
    hidden_size: int = 2688
    num_attention_heads: int = 32
    num_query_groups: int = 8
    kv_channels: int | None = 128
    ffn_hidden_size: int = 1856
    mamba_num_heads: int = 64
    mamba_head_dim: int = 64
    mamba_num_groups: int = 8
    mamba_state_dim: int = 128
    num_experts: int = 128
    experts_per_token: int = 6
    expert_ffn_hidden_size: int = 1856
    shared_expert_ffn_hidden_size: int = 3712
    router_score: Literal["sigmoid", "softmax"] = "sigmoid"
    router_bias: bool = True
    router_scaling: float = 2.5
    aux_loss_coeff: float = 1e-4
    init_std: float = 0.0173
    dropout: float = 0.0
    recompute_layers: bool = False
    fp8: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.pattern) - set(_LAYER_SYMBOLS + "|")
        if unknown or not self.layers:
            raise ValueError(
                f"pattern {self.pattern!r} must be made of {' '.join(_LAYER_SYMBOLS)} and |"
                + (f"; unknown: {' '.join(sorted(unknown))}" if unknown else "")
            )
        if not all(self.pattern.split("|")):
            raise ValueError(f"pattern {self.pattern!r} marks a stage without layers")
        for size, divisor in (
            ("num_attention_heads", "num_query_groups"),
            ("mamba_num_heads", "mamba_num_groups"),
        ):
            if getattr(self, size) % getattr(self, divisor):
                raise ValueError(f"{divisor} {getattr(self, divisor)} does not divide {size} {getattr(self, size)}")
        if self.has_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} must be between 1 and num_experts {self.num_experts}"
            )
        if self.fp8:
            fp8.check_sizes({"hidden_size": self.hidden_size} | self.widths | self.expert_widths)

    @property
    def widths(self) -> dict[str, int]:
        """The widths of linear layers that tensor parallelism cuts, by name; without those of experts."""
        widths = {}
        if "*" in self.pattern:
            widths["attention width"] = self.attention_width
            widths["width of queries, keys and values"] = self.qkv_width
        if "-" in self.pattern:
            widths["ffn_hidden_size"] = self.ffn_hidden_size
        if "M" in self.pattern:
            widths["Mamba width"] = self.mamba_width
            widths["width of the Mamba projection"] = self.mamba_projection_width
        if self.has_experts and self.shared_expert_ffn_hidden_size:
            widths["shared_expert_ffn_hidden_size"] = self.shared_expert_ffn_hidden_size
        return widths

    @property
    def expert_widths(self) -> dict[str, int]:
        """The widths of linear layers that expert tensor parallelism cuts, by name."""
        return {"expert_ffn_hidden_size": self.expert_ffn_hidden_size} if self.has_experts else {}

    @property
    def head_width(self) -> int:
        """Width of a head of attention layers."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def attention_width(self) -> int:
        """Width of the queries of all heads, and of what attention puts out."""
        return self.num_attention_heads * self.head_width

    @property
    def qkv_width(self) -> int:
        """Width of queries, keys and values together."""
        return self.attention_width + 2 * self.num_query_groups * self.head_width

    @property
    def mamba_width(self) -> int:
        """Inner width of Mamba-2 layers."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_state_width(self) -> int:
        """Width of B, and of C, of all groups."""
        return self.mamba_num_groups * self.mamba_state_dim

    @property
    def mamba_projection_width(self) -> int:
        """Width of a Mamba-2 layer's first projection: gate, input, B, C and time steps."""
        return 2 * self.mamba_width + 2 * self.mamba_state_width + self.mamba_num_heads

    @property
    def layers(self) -> str:
        """The pattern without stage marks: one symbol a layer."""
        return self.pattern.replace("|", "")

    @property
    def has_experts(self) -> bool:
        """Whether a layer is a mixture of experts."""
        return "E" in self.pattern

    def stages(self, pp: int) -> str:
        """The pattern cut by ``|`` into ``pp`` stages."""
        if pp == 1:
            return self.layers
        if "|" in self.pattern:
            return self.pattern
        size = len(self.layers) // pp
        return "|".join(self.layers[start : start + size] for start in range(0, len(self.layers), size))

    @classmethod
    def tiny(cls, **changes: Any) -> "MambaMoEConfig":
        """A model of every layer kind that trains in minutes on a CPU."""
        tiny = {
            "pattern": "M*-ME",
            "vocab_size": 64,
            "max_sequence_length": 64,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 16,
            "ffn_hidden_size": 128,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "mamba_num_groups": 2,
            "mamba_state_dim": 16,
            "num_experts": 4,
            "experts_per_token": 2,
            "expert_ffn_hidden_size": 64,
            "shared_expert_ffn_hidden_size": 64,
            "init_std": 0.05,
        }
        return cls(**(tiny | changes))


class MambaMoE(MimoModule):
    """The language model: trains on text alone, or as part of a larger model.

    Args:
        config: its sizes.
        optimizer: settings of the optimizer when it is trained alone.
    """

    special_token_ids: ClassVar[dict[str, int]] = {}

    def __init__(self, config: MambaMoEConfig, optimizer: OptimizerConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.optimizer_config = optimizer or OptimizerConfig(lr=2e-4, adam_beta2=0.95)

    def module_sizes(self) -> dict[str, ModuleSizes]:
        config = self.config
        tp_divides = {"vocab_size": config.vocab_size, "max_sequence_length": config.max_sequence_length}
        if "*" in config.pattern:
            tp_divides["num_attention_heads"] = config.num_attention_heads
            tp_divides["num_query_groups"] = config.num_query_groups
        if "-" in config.pattern:
            tp_divides["ffn_hidden_size"] = config.ffn_hidden_size
        if "M" in config.pattern:
            tp_divides["mamba_num_heads"] = config.mamba_num_heads
            tp_divides["mamba_num_groups"] = config.mamba_num_groups
        if config.has_experts and config.shared_expert_ffn_hidden_size:
            tp_divides["shared_expert_ffn_hidden_size"] = config.shared_expert_ffn_hidden_size
        etp_divides = dict(config.expert_widths)
        if config.fp8:
            tp_divides |= fp8.divides(config.widths)
            etp_divides |= fp8.divides(config.expert_widths)
        num_layers = len(config.layers)
        stages = {config.pattern.count("|") + 1}
        if stages == {1}:
            stages = {number for number in range(1, num_layers + 1) if num_layers % number == 0}
        return {
            LANGUAGE: ModuleSizes(
                tp_divides=tp_divides,
                etp_divides=etp_divides,
                num_experts=config.num_experts if config.has_experts else 0,
                pp_stages=frozenset(stages | {1}),
            )
        }

    def module_spec(
        self, name: str, layout: ModuleLayout, groups: ProcessGroupCollection | None, dtype: torch.dtype
    ) -> ModuleSpec:
        config = self.config
        experts = {}
        if config.has_experts:
            experts = {
                "num_moe_experts": config.num_experts,
                "moe_router_topk": config.experts_per_token,
                "moe_ffn_hidden_size": config.expert_ffn_hidden_size,
                "moe_shared_expert_intermediate_size": config.shared_expert_ffn_hidden_size or None,
                "moe_router_score_function": config.router_score,
                "moe_router_enable_expert_bias": config.router_bias,
                "moe_router_topk_scaling_factor": config.router_scaling,
                "moe_router_dtype": "fp32",
                "moe_router_load_balancing_type": "seq_aux_loss" if config.aux_loss_coeff else "none",
                "moe_aux_loss_coeff": config.aux_loss_coeff,
            }
        transformer = transformer_config(
            layout,
            dtype,
            recompute_layers=config.recompute_layers,
            num_layers=len(config.layers),
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups,
            kv_channels=config.kv_channels,
            ffn_hidden_size=config.ffn_hidden_size,
            normalization="RMSNorm",
            add_bias_linear=False,
            activation_func=ACTIVATIONS["squared_relu"],
            attention_dropout=config.dropout,
            hidden_dropout=config.dropout,
            init_method_std=config.init_std,
            mamba_num_heads=config.mamba_num_heads,
            mamba_head_dim=config.mamba_head_dim,
            mamba_num_groups=config.mamba_num_groups,
            mamba_state_dim=config.mamba_state_dim,
            is_hybrid_model=True,
            # experts under tensor parallelism need it
            sequence_parallel=layout.tp > 1,
            **experts,
            **(fp8.settings(dtype) if config.fp8 else {}),
        )
        stage, num_stages = (groups.pp.rank(), groups.pp.size()) if groups is not None else (0, layout.pp)
        return ModuleSpec(
            module=HybridModel,
            params={
                "config": transformer,
                "hybrid_stack_spec": hybrid_stack_spec(config.num_experts),
                "vocab_size": config.vocab_size,
                "max_sequence_length": config.max_sequence_length,
                "hybrid_layer_pattern": config.stages(layout.pp),
                "pre_process": stage == 0,
                "post_process": stage == num_stages - 1,
                "position_embedding_type": "none",
                "share_embeddings_and_output_weights": False,
                # MimoModel scatters the merged embeddings of all modules
                "scatter_embedding_sequence_parallel": False,
                "pg_collection": groups,
            },
        )

    def forward_flops(self, name: str, batch: Batch) -> float:
        """Operations of all layers and of the logits; see :func:`.mamba_moe_cost.layer_work`."""
        samples, length = batch["input_ids"].shape
        token = sum(layer_work(self.config, symbol, length).flops for symbol in self.config.layers)
        return float(samples * length * (token + output_work(self.config).flops))

    def module_cost(self, name: str, layout: ModuleLayout, workload: Workload) -> ModuleCost:
        return language_cost(self.config, layout, workload)

    def longest_sample(self) -> tuple[int, dict[str, int]]:
        return self.config.max_sequence_length, {}

    def encoder_inputs(self, name: str, items: torch.Tensor) -> dict[str, dict[str, Any]]:
        raise ValueError(f"a text-only model has no encoder {name}")

    def check_batch(self, batch: Any) -> None:
        super().check_batch(batch)
        check_tokens(batch, self.config.vocab_size, self.config.max_sequence_length)

    def check_machine(self, dtype: torch.dtype) -> None:
        if "M" in self.config.layers and torch.cuda.is_available() and find_spec("mamba_ssm") is None:
            raise ValueError(
                "on GPUs the Mamba layers (M) need mamba-ssm and causal-conv1d, which are not installed: see "
                "docs/clusters.md, or start with CUDA_VISIBLE_DEVICES= (empty) to train on CPUs"
            )
        if self.config.fp8:
            fp8.check_machine(dtype)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.optimizer_config)
