"""The models and data of the proof: small, but with every kind of layer, and batches as uneven as they come."""

from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any, Literal

import torch
from tiny_runs import BATCH_SIZE, OPTIMIZER, PATTERN
from torch.utils.data import DataLoader

from datamodules import collate
from datamodules.batch import Sample, build_sample
from mimo_strategy import MimoModule
from modules import MambaMoE, MambaMoEConfig, NemotronVLM, RadioConfig

SEQ_LENGTH = 24
VOCAB_SIZE = 64
IMAGE_TOKEN_ID, END_TOKEN_ID, PAD_TOKEN_ID = 1, 2, 0

# Images of the samples of a step batch. Samples 6 to 11 are a microbatch of 4, a lane of 2 x 2 or two lanes of 8.
MIXED_IMAGES = [*[3, 0, 1, 2, 0, 1], *[0] * 6, *[1, 3, 0, 0, 2, 1], *[0, 0, 1, 3, 1, 2]]
# Answer tokens; samples 18 to 23 have none.
ANSWER_LENGTHS = [*islice(cycle([1, 5, 2, 7]), 18), *[0] * 6]

Experts = Literal["nemotron", "plain"]
Frozen = Literal["none", "encoder", "projector", "images", "language"]
Data = Literal["one", "mixed"]

_PLAIN_EXPERTS = {
    "shared_expert_ffn_hidden_size": 0,
    "router_score": "softmax",
    "router_bias": False,
    "router_scaling": 1.0,
    "aux_loss_coeff": 0.0,
}


def language_config(
    *, experts: Experts = "nemotron", recompute: bool = False, pattern: str = PATTERN
) -> MambaMoEConfig:
    """A language model that tensor parallelism of 4 can cut."""
    heads = {"num_attention_heads": 8, "kv_channels": 8, "num_query_groups": 4, "mamba_num_groups": 4}
    # an auxiliary loss large enough to be seen in every gradient
    balance = {"aux_loss_coeff": 0.02} | (_PLAIN_EXPERTS if experts == "plain" else {})
    return MambaMoEConfig.tiny(pattern=pattern, vocab_size=VOCAB_SIZE, recompute_layers=recompute, **heads, **balance)


class PartlyFrozen(NemotronVLM):
    """Trains without some of its parts."""

    def __init__(self, *args: Any, frozen: Frozen, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._frozen = frozen

    def configure_model(self) -> None:
        super().configure_model()
        for name, parameter in self.model.named_parameters():
            is_projector = "input_projections" in name
            part = "language" if name.startswith("language_model") else "projector" if is_projector else "encoder"
            if part == self._frozen or (self._frozen == "images" and part != "language"):
                parameter.requires_grad_(False)


def vision_language(
    *,
    experts: Experts = "nemotron",
    recompute: bool = False,
    frozen: Frozen = "none",
    pattern: str = PATTERN,
) -> MimoModule:
    """Encoder, projector and language model."""
    return PartlyFrozen(
        RadioConfig.tiny(recompute_layers=recompute),
        language_config(experts=experts, recompute=recompute, pattern=pattern),
        image_token_id=IMAGE_TOKEN_ID,
        end_token_id=END_TOKEN_ID,
        optimizer=OPTIMIZER,
        frozen=frozen,
    )


def text_only(*, experts: Experts = "nemotron", recompute: bool = False, pattern: str = PATTERN) -> MimoModule:
    """The language model alone."""
    return MambaMoE(language_config(experts=experts, recompute=recompute, pattern=pattern), optimizer=OPTIMIZER)


def loader(data: Data = "mixed") -> DataLoader:
    """Four step batches of random samples, always the same."""
    return DataLoader(list(_samples(data)), BATCH_SIZE, collate_fn=collate)


def text_loader() -> DataLoader:
    """The same tokens as they are, without images."""

    def collate_text(samples: list[Sample]) -> dict[str, torch.Tensor]:
        return {name: values for name, values in collate(samples).items() if "images" not in name}

    return DataLoader(list(_samples("mixed")), BATCH_SIZE, collate_fn=collate_text)


def _samples(data: Data) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(2)

    def text(length: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()

    for index in range(4 * BATCH_SIZE):
        num_images = MIXED_IMAGES[index % BATCH_SIZE] if data == "mixed" else 1
        answer_length = ANSWER_LENGTHS[index % BATCH_SIZE] if data == "mixed" else 1 + index % 4
        tokens_per_image = RadioConfig.tiny().tokens_per_image
        yield build_sample(
            prompt=[*text(2), *[IMAGE_TOKEN_ID] * (tokens_per_image * num_images), *text(1)],
            answer=text(answer_length),
            images=torch.randn(num_images, 3, 16, 16, generator=generator),
            seq_length=SEQ_LENGTH,
            pad_token_id=PAD_TOKEN_ID,
            sample_id=index,
        )
