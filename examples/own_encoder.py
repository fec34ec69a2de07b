"""A vision-language model with an encoder of its own: megatron-core's SigLIP in the place of RADIO.

Trains it on scanned digits, on three ranks: two for the encoder, one for the language model.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from datamodules import DigitsDataModule
from mimo_strategy import MimoHeteroStrategy, MimoModule, ModuleParallel, OptimizerConfig
from mimo_strategy.batch_checks import check_items, check_tokens
from mimo_strategy.layout import LANGUAGE, ModuleLayout, ModuleSizes
from modules import MambaMoE, MambaMoEConfig, Projector, ProjectorConfig
from modules.layer_specs import ACTIVATIONS, vit_layer_spec
from modules.transformer import transformer_config

# isort: split
# after mimo_strategy, without which megatron-core cannot be imported where there is no GPU
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

IMAGES = "images"


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of a SigLIP encoder (arXiv 2303.15343): a vision transformer without class token.

    Args:
        image_size: height and width in pixels; a multiple of ``patch_size``.
        patch_size: side of a square patch in pixels; a patch becomes a token.
        num_layers: transformer layers.
        hidden_size: width of the transformer.
        num_attention_heads: attention heads.
        ffn_hidden_size: inner width of the MLP.
    """

    image_size: int = 16
    patch_size: int = 8
    num_layers: int = 2
    hidden_size: int = 64
    num_attention_heads: int = 4
    ffn_hidden_size: int = 128

    @property
    def tokens_per_image(self) -> int:
        """Tokens that an image becomes."""
        return (self.image_size // self.patch_size) ** 2


class Siglip(CLIPViTModel):
    """Makes ``[images, tokens, hidden_size]`` of images ``[images, 3, height, width]``."""

    def __init__(
        self,
        config: TransformerConfig,
        siglip: SiglipConfig,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(
            config,
            vit_layer_spec(),
            ln_post_impl=WrappedTorchNorm,
            add_class_token=False,
            class_token_len=0,
            patch_dim=siglip.patch_size,
            img_h=siglip.image_size,
            img_w=siglip.image_size,
            model_subtype="siglip",
            pg_collection=groups,
        )
        # checkpoints look here first, and then for a global one, which there is not
        self.tp_group = groups.tp


class SiglipVLM(MimoModule):
    """SigLIP, projector and Mamba-MoE language model. Its modules are ``images`` and ``language``.

    Args:
        siglip: sizes of the encoder.
        language: sizes of the language model.
        image_token_id: token whose positions the image tokens take.
        optimizer: settings for all modules.
    """

    def __init__(
        self, siglip: SiglipConfig, language: MambaMoEConfig, image_token_id: int, optimizer: OptimizerConfig
    ) -> None:
        super().__init__()
        self.siglip = siglip
        self.projector = Projector(ProjectorConfig(siglip.hidden_size, language.hidden_size, kind="mlp"))
        self.language = MambaMoE(language)
        self.special_token_ids = {IMAGES: image_token_id}
        self.optimizer_config = optimizer

    def module_sizes(self) -> dict[str, ModuleSizes]:
        sizes = {
            "num_attention_heads": self.siglip.num_attention_heads,
            "ffn_hidden_size": self.siglip.ffn_hidden_size,
        }
        images = ModuleSizes(tp_divides=sizes | dict(self.projector.sizes().tp_divides))
        return {IMAGES: images} | self.language.module_sizes()

    def module_spec(
        self, name: str, layout: ModuleLayout, groups: ProcessGroupCollection | None, dtype: torch.dtype
    ) -> ModuleSpec:
        if name == LANGUAGE:
            return self.language.module_spec(name, layout, groups, dtype)
        config = transformer_config(
            layout,
            dtype,
            num_layers=self.siglip.num_layers,
            hidden_size=self.siglip.hidden_size,
            num_attention_heads=self.siglip.num_attention_heads,
            ffn_hidden_size=self.siglip.ffn_hidden_size,
            normalization="LayerNorm",
            layernorm_epsilon=1e-6,
            add_bias_linear=True,
            add_qkv_bias=True,
            activation_func=ACTIVATIONS["gelu"],
        )
        encoder = ModuleSpec(module=Siglip, params={"config": config, "siglip": self.siglip, "groups": groups})
        return ModuleSpec(
            module=VisionModalitySubmodules,
            params={"pg_collection": groups},
            submodules={
                "encoders": {"siglip": encoder},
                "input_projections": [self.projector.spec(layout, groups, dtype)],
            },
        )

    def encoder_inputs(self, name: str, items: torch.Tensor) -> dict[str, dict[str, Any]]:
        return {"siglip": {"x": items}}

    def check_batch(self, batch: Any) -> None:
        super().check_batch(batch)
        check_tokens(batch, self.language.config.vocab_size, self.language.config.max_sequence_length)
        check_items(batch, IMAGES, (3, self.siglip.image_size, self.siglip.image_size))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.optimizer_config)


def make_model(data: DigitsDataModule) -> SiglipVLM:
    """A small model for the digits."""
    return SiglipVLM(
        SiglipConfig(),
        MambaMoEConfig.tiny(vocab_size=data.vocab_size),
        image_token_id=data.image_token_id,
        optimizer=OptimizerConfig(lr=3e-3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, default=100, help="optimizer steps")
    args = parser.parse_args()

    seed_everything(1)
    data = DigitsDataModule(batch_size=64, tokens_per_image=SiglipConfig().tokens_per_image)
    strategy = MimoHeteroStrategy(
        modules={
            "images": ModuleParallel(dp=2),  # ranks 0-1
            "language": ModuleParallel(dp=1, rank_offset=2),  # rank 2
        },
        num_microbatches=2,
    )
    trainer = Trainer(strategy=strategy, devices=3, max_steps=args.max_steps, limit_val_batches=1)
    trainer.fit(make_model(data), datamodule=data)


if __name__ == "__main__":
    main()
