"""A vision-language model: RADIO encoder, projector and Mamba-MoE language model."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.optim.lr_scheduler import LambdaLR

from mimo_strategy.generation import Generation
from mimo_strategy.layout import LANGUAGE, ModuleLayout, ModuleSizes
from mimo_strategy.module import MimoModule
from mimo_strategy.step_batch import Batch
from modules.mamba_moe import MambaMoE, MambaMoEConfig
from modules.projector import Projector, ProjectorConfig
from modules.radio import RadioConfig, RadioEncoder

IMAGES = "images"


class NemotronVLM(MimoModule):
    """Answers a prompt about images. Its modules are ``images`` (encoder and projector) and ``language``.

    Args:
        radio: sizes of the encoder.
        language: sizes of the language model.
        image_token_id: token whose positions the image tokens take.
        projector: ``affine`` or ``mlp``.
        end_token_id: token that ends an answer.
        optimizer: settings for all modules, or by module name.
        warmup_steps: steps over which the learning rate rises from 0. It then falls to a tenth, along a cosine over
            all steps of the Trainer.

    Raises:
        ValueError: if one image does not fit in a sequence, or ``image_token_id`` is not in the vocabulary.
    """

    def __init__(
        self,
        radio: RadioConfig,
        language: MambaMoEConfig,
        image_token_id: int,
        end_token_id: int,
        projector: str = "affine",
        optimizer: OptimizerConfig | Mapping[str, OptimizerConfig] | None = None,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if radio.tokens_per_image >= language.max_sequence_length:
            raise ValueError(
                f"an image of {radio.image_height} x {radio.image_width} pixels becomes {radio.tokens_per_image} "
                f"tokens, which leaves no room for text in a sequence of {language.max_sequence_length}"
            )
        if not 0 <= image_token_id < language.vocab_size:
            raise ValueError(f"image_token_id {image_token_id} is not in the vocabulary of {language.vocab_size}")
        self.encoder = RadioEncoder(radio)
        self.projector = Projector(ProjectorConfig(radio.output_size, language.hidden_size, kind=projector))
        self.language = MambaMoE(language)
        self.special_token_ids = {IMAGES: image_token_id}
        self.end_token_id = end_token_id
        self.optimizer_config = optimizer or self.language.optimizer_config
        self.warmup_steps = warmup_steps

    def module_sizes(self) -> dict[str, ModuleSizes]:
        encoder, projector = self.encoder.sizes(), self.projector.sizes()
        images = ModuleSizes(tp_divides={**encoder.tp_divides, **projector.tp_divides})
        return {IMAGES: images} | self.language.module_sizes()

    def module_spec(
        self, name: str, layout: ModuleLayout, groups: ProcessGroupCollection | None, dtype: torch.dtype
    ) -> ModuleSpec:
        if name == LANGUAGE:
            return self.language.module_spec(name, layout, groups, dtype)
        return ModuleSpec(
            module=VisionModalitySubmodules,
            params={"pg_collection": groups},
            submodules={
                "encoders": {"radio": self.encoder.spec(layout, groups, dtype)},
                "input_projections": [self.projector.spec(layout, groups, dtype)],
            },
        )

    def encoder_inputs(self, name: str, items: torch.Tensor) -> dict[str, dict[str, Any]]:
        return {"radio": {"images": items}}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.make_optimizer(self.optimizer_config)
        schedule = partial(
            warmup_then_cosine, warmup_steps=self.warmup_steps, total_steps=self.trainer.estimated_stepping_batches
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, schedule), "interval": "step"},
        }

    def test_step(self, batch: Batch, batch_idx: int) -> Generation:
        """Generates answers and logs ``heldout_accuracy``: the share of samples whose answer is exact."""
        generation = self.generate(batch, end_token_id=self.end_token_id)
        exact = generation.is_exact().float()
        self.log("heldout_accuracy", exact.mean(), prog_bar=True, batch_size=len(exact), sync_dist=True)
        return generation


def warmup_then_cosine(step: int, *, warmup_steps: int, total_steps: float) -> float:
    """Factor on the learning rate at ``step``: rises to 1, then falls to 0.1; stays 1 if ``total_steps`` is inf."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if math.isinf(total_steps):
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.55 + 0.45 * math.cos(math.pi * progress)
