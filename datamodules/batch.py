"""The batch contract: what a dataset item holds, and what a step batch collated from items holds.

With S = `seq_length`, B = `batch_size` and images of height H and width W:

| key             | dataset item (`Sample`)      | step batch (`Batch`)                             |
|-----------------|------------------------------|--------------------------------------------------|
| `input_ids`     | int64 [S]                    | int64 [B, S]                                     |
| `labels`        | int64 [S]                    | int64 [B, S]                                     |
| `loss_mask`     | float32 [S]                  | float32 [B, S]                                   |
| `images`        | float32 [num_images, 3, H, W]| float32 [sum of num_images, 3, H, W]             |
| `num_images`    | -                            | int64 [B]                                        |
| `prompt_length` | int                          | int64 [B]                                        |
| `sample_id`     | int                          | int64 [B]                                        |

- `input_ids` is prompt, answer, end token, padding. Each image of the sample occupies `tokens_per_image`
  consecutive positions of the prompt, all filled with `image_token_id`, in the order of `images`.
- `labels[t]` is the target after position t, i.e. `input_ids` shifted left by one. Where it is masked it may
  be any valid id.
- `loss_mask[t]` is 1 where `labels[t]` counts: exactly the answer tokens, the end token included.
- `images` of a step batch holds the samples' images one after another, in sample order. Samples without an
  image contribute nothing, so its first dimension may be 0.
- `prompt_length` is the number of leading tokens of `input_ids` that are the prompt; generation starts after
  them. It is 1 where a prompt is not meaningful.
- `sample_id` is the index of the sample in its split's dataset.

B counts the samples of the WHOLE optimizer step, over all ranks and microbatches. Under `MimoHeteroStrategy`
each rank loads its share of them only, in the same form. The last batch of an epoch may be smaller.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor


class Sample(TypedDict):
    """One dataset item; see the module docstring for shapes and meaning."""

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    images: Tensor
    prompt_length: int
    sample_id: int


class Batch(TypedDict):
    """One optimizer step's samples; see the module docstring for shapes and meaning."""

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    images: Tensor
    num_images: Tensor
    prompt_length: Tensor
    sample_id: Tensor


def build_sample(
    *,
    prompt: Sequence[int],
    answer: Sequence[int],
    images: Tensor,
    seq_length: int,
    pad_token_id: int,
    sample_id: int,
) -> Sample:
    """Lay a prompt and its answer out as a dataset item.

    Args:
        prompt: token ids, the images' placeholder tokens included.
        answer: token ids, the end token included.
        images: float [num_images, 3, H, W].
        seq_length: length in tokens that the sequence is padded to.
        pad_token_id: id of the padding after the answer.
        sample_id: index of the sample in its split's dataset.

    Raises:
        ValueError: prompt and answer together are longer than `seq_length`.
    """
    used = len(prompt) + len(answer)
    if used > seq_length:
        raise ValueError(
            f"{len(prompt)} prompt tokens + {len(answer)} answer tokens = {used} > seq_length {seq_length}"
        )
    tokens = torch.tensor([*prompt, *answer, *[pad_token_id] * (seq_length + 1 - used)])
    loss_mask = torch.zeros(seq_length)
    loss_mask[len(prompt) - 1 : used - 1] = 1
    return {
        "input_ids": tokens[:-1],
        "labels": tokens[1:].clone(),
        "loss_mask": loss_mask,
        "images": images,
        "prompt_length": len(prompt),
        "sample_id": sample_id,
    }


def collate(samples: Sequence[Sample]) -> Batch:
    """Collate dataset items, whose image counts may differ, into a step batch."""
    return {
        "input_ids": torch.stack([sample["input_ids"] for sample in samples]),
        "labels": torch.stack([sample["labels"] for sample in samples]),
        "loss_mask": torch.stack([sample["loss_mask"] for sample in samples]),
        "images": torch.cat([sample["images"] for sample in samples]),
        "num_images": torch.tensor([len(sample["images"]) for sample in samples]),
        "prompt_length": torch.tensor([sample["prompt_length"] for sample in samples]),
        "sample_id": torch.tensor([sample["sample_id"] for sample in samples]),
    }


def require_fit(*, tokens_per_image: int, max_images: int, text_tokens: int, seq_length: int) -> None:
    """Check that the longest sample fits.

    Args:
        tokens_per_image: positions that one image occupies.
        max_images: images of the longest sample.
        text_tokens: tokens of the longest sample that are not image placeholders, the end token included.
        seq_length: length of `input_ids` in tokens.

    Raises:
        ValueError: it does not fit, with the arithmetic and what would fit; or `tokens_per_image` is below 1.
    """
    if tokens_per_image < 1:
        raise ValueError(f"tokens_per_image must be at least 1, got {tokens_per_image}")
    needed = tokens_per_image * max_images + text_tokens
    if needed <= seq_length:
        return
    remedy = f"use seq_length >= {needed}"
    if max_images and (affordable := (seq_length - text_tokens) // max_images) >= 1:
        remedy += f", or tokens_per_image <= {affordable}"
    raise ValueError(
        f"tokens_per_image {tokens_per_image} x {max_images} images + {text_tokens} text tokens = {needed} "
        f"> seq_length {seq_length}; {remedy}"
    )
