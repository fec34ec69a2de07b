"""The projector from an encoder's width to the language model's."""

from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec

from mimo_strategy.layout import ModuleLayout, ModuleSizes
from mimo_strategy.planning.cost import Layer, Transfer, Weight, Work, Workload
from modules.layer_specs import ACTIVATIONS, mlp_submodules
from modules.part import EncoderPart
from modules.transformer import transformer_config


@dataclass(frozen=True)
class ProjectorConfig:
    """Sizes of a projector.

    Args:
        input_size: width of the encoder's output.
        output_size: width of the language model.
        kind: ``affine`` is one linear layer, ``mlp`` two with a squared ReLU between.
        ffn_hidden_size: inner width of ``mlp``; ``None`` is four times ``input_size``.

    Raises:
        ValueError: for an unknown kind.
    """

    input_size: int
    output_size: int
    kind: Literal["affine", "mlp"] = "affine"
    ffn_hidden_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("affine", "mlp"):
            raise ValueError(f"kind must be 'affine' or 'mlp', got {self.kind!r}")


class Projector(EncoderPart):
    """Projects ``[..., input_size]`` to ``[..., output_size]``."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config

    def sizes(self) -> ModuleSizes:
        if self.config.kind == "affine":
            return ModuleSizes(tp_divides={"projector output_size": self.config.output_size})
        return ModuleSizes(tp_divides={"projector ffn_hidden_size": self._ffn_hidden_size})

    def forward_flops(self, num_tokens: int) -> float:
        """Floating-point operations of matrix products for ``num_tokens``."""
        return self._work(num_tokens).flops

    def layers(self, layout: ModuleLayout, num_tokens: int, workload: Workload) -> tuple[Layer, ...]:
        """Cost of the linear layers for ``num_tokens``."""
        config, size, tp = self.config, workload.element_size, layout.tp
        output = num_tokens * config.output_size * size
        if config.kind == "affine":
            weights = (Weight(config.input_size * config.output_size, "tp"),)
            collective, inner = "all_gather", 0
        else:
            inner = self._ffn_hidden_size
            weights = (Weight(config.input_size * inner, "tp"), Weight(inner * config.output_size, "tp"))
            collective = "all_reduce"
        return (
            Layer(
                "projector",
                weights,
                work=self._work(num_tokens),
                kept=num_tokens * (config.input_size + 2 * inner / tp) * size,
                forward=(Transfer("tp", collective, output),) if tp > 1 else (),
                backward=(Transfer("tp", "all_reduce", num_tokens * config.input_size * size),) if tp > 1 else (),
                operations=3 if not inner else 5,
            ),
        )

    def _work(self, num_tokens: int) -> Work:
        config = self.config
        if config.kind == "affine":
            return Work(matmul=2.0 * num_tokens * config.input_size * config.output_size)
        return Work(matmul=2.0 * num_tokens * self._ffn_hidden_size * (config.input_size + config.output_size))

    def spec(self, layout: ModuleLayout, groups: ProcessGroupCollection | None, dtype: torch.dtype) -> ModuleSpec:
        config = transformer_config(
            layout,
            dtype,
            num_layers=1,
            hidden_size=self.config.output_size,
            # unused, but checked against tp
            num_attention_heads=layout.tp,
            ffn_hidden_size=self._ffn_hidden_size,
            add_bias_linear=False,
            activation_func=ACTIVATIONS["squared_relu"],
        )
        return ModuleSpec(
            module=MultimodalProjector,
            params={
                "config": config,
                "submodules": mlp_submodules(),
                "projector_type": self.config.kind,
                "input_size": self.config.input_size,
                "tp_group": groups.tp if groups is not None else None,
            },
        )

    @property
    def _ffn_hidden_size(self) -> int:
        return self.config.ffn_hidden_size or 4 * self.config.input_size
