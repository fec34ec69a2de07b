"""A vision-language model: RADIO encoder, projector and Mamba-MoE language model."""

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.optim.lr_scheduler import LambdaLR

from mimo_strategy.batch_checks import check_items, check_tokens
from mimo_strategy.generation import Generation, Sampling
from mimo_strategy.layout import LANGUAGE, ModuleLayout, ModuleSizes
from mimo_strategy.module import MimoModule
from mimo_strategy.planning.cost import ModuleCost, Workload
from mimo_strategy.prediction import Prediction
from mimo_strategy.step_batch import Batch
from modules import fp8
from modules.mamba_moe import MambaMoE, MambaMoEConfig
from modules.projector import Projector, ProjectorConfig
from modules.radio import RadioConfig, RadioEncoder
from modules.vision import vision_cost, vision_sizes, vision_spec

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
        stop_token_ids: further tokens that end a prediction.
        max_new_tokens: tokens that prediction generates at most; ``None`` is as many as the longest answer of a step
            batch has.
        sampling: how prediction draws tokens; ``None`` takes the most likely one.

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
        stop_token_ids: Collection[int] = (),
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
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
        self.stop_token_ids = tuple(stop_token_ids)
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling

    def module_sizes(self) -> dict[str, ModuleSizes]:
        return {IMAGES: vision_sizes(self.encoder, self.projector)} | self.language.module_sizes()

    def module_spec(
        self, name: str, layout: ModuleLayout, groups: ProcessGroupCollection | None, dtype: torch.dtype
    ) -> ModuleSpec:
        if name == LANGUAGE:
            return self.language.module_spec(name, layout, groups, dtype)
        return vision_spec(self.encoder, self.projector, layout, groups, dtype)

    def encoder_inputs(self, name: str, items: torch.Tensor) -> dict[str, dict[str, Any]]:
        return {"radio": {"images": items}}

    def forward_flops(self, name: str, batch: Batch) -> float:
        if name == LANGUAGE:
            return self.language.forward_flops(name, batch)
        num_images = len(batch.get(IMAGES, ()))
        tokens = num_images * self.encoder.config.tokens_per_image
        return self.encoder.forward_flops(num_images) + self.projector.forward_flops(tokens)

    def module_cost(self, name: str, layout: ModuleLayout, workload: Workload) -> ModuleCost:
        if name == LANGUAGE:
            return self.language.module_cost(name, layout, workload)
        return vision_cost(self.encoder, self.projector, layout, workload.items[IMAGES], workload)

    def longest_sample(self) -> tuple[int, dict[str, int]]:
        return self.language.config.max_sequence_length, {IMAGES: 1}

    def check_batch(self, batch: Any) -> None:
        super().check_batch(batch)
        radio, language = self.encoder.config, self.language.config
        check_tokens(batch, language.vocab_size, language.max_sequence_length)
        check_items(batch, IMAGES, (3, radio.image_height, radio.image_width))

    def check_machine(self, dtype: torch.dtype) -> None:
        self.language.check_machine(dtype)
        if self.encoder.config.fp8:
            fp8.check_machine(dtype)

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

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Prediction:
        """Answers for this rank's part of the step batch: see :class:`~mimo_strategy.prediction.Prediction`."""
        return self.predict(
            batch,
            end_token_id=self.end_token_id,
            stop_token_ids=self.stop_token_ids,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
        )


def warmup_then_cosine(step: int, *, warmup_steps: int, total_steps: float) -> float:
    """Factor on the learning rate at ``step``: rises to 1, then falls to 0.1; stays 1 if ``total_steps`` is inf."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if math.isinf(total_steps):
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.55 + 0.45 * math.cos(math.pi * progress)
