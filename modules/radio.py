"""RADIO: a vision transformer whose position embeddings serve many image sizes (arXiv 2312.06709)."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.vision.radio import RADIOViTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default

from mimo_strategy.layout import ModuleLayout, ModuleSizes
from mimo_strategy.planning.cost import Layer, Workload
from modules import fp8
from modules.layer_specs import ACTIVATIONS, vit_layer_spec
from modules.part import EncoderPart
from modules.radio_cost import embedding_work, encoder_layers, layer_work
from modules.transformer import transformer_config


@dataclass(frozen=True)
class RadioConfig:
    """Sizes of a RADIO encoder; the defaults are ViT-H.

    Args:
        image_height: pixels; a multiple of ``patch_size`` x ``pixel_shuffle``.
        image_width: pixels; likewise.
        patch_size: side of a square patch in pixels.
        pixel_shuffle: side of the square of neighbouring patches that become one token, their channels concatenated.
        num_layers: transformer layers.
        hidden_size: width of the transformer.
        num_attention_heads: attention heads.
        ffn_hidden_size: inner width of the MLP.
        class_tokens: tokens in front of the patches, dropped from the output.
        max_image_size: side, in pixels, of the largest image that the position embeddings cover.
        random_position_crops: in training, take position embeddings from a random crop of their table.
        recompute_layers: keep each layer's input only, and compute the layer again in the backward pass.
        fp8: multiply in 8 bits in the transformer's linear layers, with Transformer Engine.

    Raises:
        ValueError: if the image cannot be cut into patches and shuffled, or fp8 does not take the sizes.
    """

    image_height: int = 512
    image_width: int = 512
    patch_size: int = 16
    pixel_shuffle: int = 2
    num_layers: int = 32
    hidden_size: int = 1280
    num_attention_heads: int = 16
    ffn_hidden_size: int = 5120
    class_tokens: int = 8
    max_image_size: int = 2048
    random_position_crops: bool = False
    recompute_layers: bool = False
    fp8: bool = False

    def __post_init__(self) -> None:
        unit = self.patch_size * self.pixel_shuffle
        for side in ("image_height", "image_width"):
            pixels = getattr(self, side)
            if pixels < unit or pixels % unit:
                valid = [size for size in (pixels // unit * unit, (pixels // unit + 1) * unit) if size > 0]
                raise ValueError(
                    f"{side} {pixels} is no multiple of patch_size {self.patch_size} x pixel_shuffle "
                    f"{self.pixel_shuffle} = {unit}; valid: {' or '.join(map(str, valid))}"
                )
            if pixels > self.max_image_size:
                raise ValueError(f"{side} {pixels} exceeds max_image_size {self.max_image_size}")
        if self.fp8:
            fp8.check_sizes({"hidden_size": self.hidden_size, "ffn_hidden_size": self.ffn_hidden_size})
            if (self.patches + self.class_tokens) % fp8.MULTIPLE:
                fitting = self.class_tokens + -(self.patches + self.class_tokens) % fp8.MULTIPLE
                raise ValueError(
                    f"fp8 takes a multiple of {fp8.MULTIPLE} tokens an image, got {self.patches} patches + "
                    f"{self.class_tokens} class_tokens; class_tokens {fitting} would fit"
                )

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.image_height * self.image_width // self.patch_size**2

    @property
    def tokens_per_image(self) -> int:
        """Tokens that an image becomes."""
        return self.patches // self.pixel_shuffle**2

    @property
    def output_size(self) -> int:
        """Width of the output: the channels of the patches that make a token."""
        return self.hidden_size * self.pixel_shuffle**2

    @classmethod
    def tiny(cls, image_size: int = 16, **changes: Any) -> "RadioConfig":
        """An encoder that trains in minutes on a CPU; square images of ``image_size`` pixels."""
        tiny = {
            "image_height": image_size,
            "image_width": image_size,
            "patch_size": 4,
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 128,
            "class_tokens": 2,
            "max_image_size": 2 * image_size,
        }
        return cls(**(tiny | changes))


class RadioEncoder(EncoderPart):
    """RADIO without its class tokens, pixel-shuffled.

    Called with images ``[images, 3, height, width]``, returns ``[images, tokens_per_image, output_size]``.
    """

    def __init__(self, config: RadioConfig) -> None:
        super().__init__()
        self.config = config

    def sizes(self) -> ModuleSizes:
        config = self.config
        linear = {"hidden_size": config.hidden_size, "ffn_hidden_size": config.ffn_hidden_size}
        in_fp8 = fp8.divides(linear) if config.fp8 else {}
        return ModuleSizes(tp_divides={"num_attention_heads": config.num_attention_heads} | linear | in_fp8)

    def forward_flops(self, num_images: int) -> float:
        """Floating-point operations of matrix products for ``num_images``."""
        layers = self.config.num_layers * layer_work(self.config).flops
        return num_images * (embedding_work(self.config).flops + layers)

    def layers(self, layout: ModuleLayout, num_images: int, workload: Workload) -> tuple[Layer, ...]:
        """Cost of the layers for ``num_images``."""
        return encoder_layers(self.config, layout, num_images, workload)

    def spec(self, layout: ModuleLayout, groups: ProcessGroupCollection | None, dtype: torch.dtype) -> ModuleSpec:
        config = transformer_config(
            layout,
            dtype,
            recompute_layers=self.config.recompute_layers,
            num_layers=self.config.num_layers,
            hidden_size=self.config.hidden_size,
            num_attention_heads=self.config.num_attention_heads,
            ffn_hidden_size=self.config.ffn_hidden_size,
            normalization="LayerNorm",
            layernorm_epsilon=1e-6,
            add_bias_linear=True,
            add_qkv_bias=True,
            activation_func=ACTIVATIONS["gelu"],
            # 0, and not None, for a final layer norm
            mtp_num_layers=0,
            **(fp8.settings(dtype) if self.config.fp8 else {}),
        )
        return ModuleSpec(
            module=_RadioTokens,
            params={"config": config, "radio": self.config, "pg_collection": groups},
        )


class _RadioTokens(MegatronModule):
    def __init__(self, config: TransformerConfig, radio: RadioConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config)
        self._radio = radio
        self.radio_model = RADIOViTModel(
            config,
            vit_layer_spec(),
            patch_dim=radio.patch_size,
            img_h=radio.image_height,
            img_w=radio.image_width,
            class_token_len=radio.class_tokens,
            max_img_h=radio.max_image_size,
            max_img_w=radio.max_image_size,
            force_cpe_eval_mode=not radio.random_position_crops,
            pg_collection=pg_collection,
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.radio_model(images)[:, self._radio.class_tokens :]
        shuffle = self._radio.pixel_shuffle
        rows = self._radio.image_height // self._radio.patch_size // shuffle
        columns = self._radio.image_width // self._radio.patch_size // shuffle
        tokens = patches.unflatten(1, (rows, shuffle, columns, shuffle)).transpose(2, 3)
        return tokens.flatten(3).flatten(1, 2)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        # MegatronModule's looks for global parallel state
        return sharded_state_dict_default(self.radio_model, f"{prefix}radio_model.", sharded_offsets, metadata)
