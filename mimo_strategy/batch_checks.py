"""The form of a step batch, checked where it is loaded and still in host memory."""

from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch

_LIKE_INPUT_IDS = ("labels", "loss_mask")


def check_form(batch: Any, encoders: Iterable[str]) -> None:
    """Check that a batch has the form that :mod:`.step_batch` cuts into shares.

    Args:
        batch: what the loader yielded.
        encoders: names under which the batch may hold items of encoders.

    Raises:
        TypeError: if the batch or a part of it is of the wrong type.
        ValueError: if shapes do not fit each other.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be a dict of tensors by name, got {type(batch).__name__}")
    if "input_ids" not in batch:
        raise ValueError(f"the batch has no input_ids, only {sorted(batch)}")
    tokens = batch["input_ids"]
    if not isinstance(tokens, torch.Tensor) or tokens.is_floating_point():
        raise TypeError(f"input_ids must be a tensor of whole numbers, got {_shown(tokens)}")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"input_ids must be [samples, sequence], got shape {list(tokens.shape)}")
    for name in _LIKE_INPUT_IDS:
        if name in batch and getattr(batch[name], "shape", None) != tokens.shape:
            raise ValueError(f"{name} must have the shape {list(tokens.shape)} of input_ids, got {_shown(batch[name])}")
    encoders = set(encoders)
    for name, value in batch.items():
        if not isinstance(value, Sized) or (isinstance(value, torch.Tensor) and value.ndim == 0):
            raise TypeError(f"{name} must have an entry per sample, got {_shown(value)}")
        if name not in encoders and len(value) != len(tokens):
            raise ValueError(f"{name} has {len(value)} entries, but the batch {len(tokens)} samples")
    for name in encoders & batch.keys():
        if not isinstance(batch[name], torch.Tensor):
            raise TypeError(f"{name} must be one tensor of the items of all samples, got {_shown(batch[name])}")
        counts = batch.get(f"num_{name}")
        if counts is None:
            raise ValueError(f"the batch has {name} but no num_{name}, which says how many each sample has")
        if not isinstance(counts, torch.Tensor) or counts.is_floating_point() or counts.ndim != 1:
            raise TypeError(f"num_{name} must be a tensor of one whole number per sample, got {_shown(counts)}")
        if (counts < 0).any():
            raise ValueError(f"num_{name} must not be negative, got {counts.tolist()}")
        check_number(name, batch[name], counts)


def check_number(name: str, items: Sized, counts: torch.Tensor) -> None:
    """Check that an encoder's items are as many as counted.

    Args:
        name: of the encoder.
        items: those of all samples.
        counts: ``[samples]``, how many each sample has.

    Raises:
        ValueError: if they are more or fewer.
    """
    counted = int(counts.sum())
    if counted != len(items):
        raise ValueError(f"the batch has {len(items)} {name}, but num_{name} adds up to {counted}")


def check_tokens(batch: Mapping[str, torch.Tensor], vocab_size: int, max_sequence_length: int) -> None:
    """Check sequences against a language model's sizes.

    Raises:
        ValueError: if sequences are too long, or an id that counts is not in the vocabulary.
    """
    tokens = batch["input_ids"]
    if tokens.shape[1] > max_sequence_length:
        raise ValueError(f"sequences of {tokens.shape[1]} tokens exceed max_sequence_length {max_sequence_length}")
    ids = {"input_ids": tokens}
    if "labels" in batch and "loss_mask" in batch:
        ids["labels"] = batch["labels"][batch["loss_mask"] > 0]
    for name, values in ids.items():
        if values.numel():
            for value in map(int, values.aminmax()):
                if not 0 <= value < vocab_size:
                    raise ValueError(f"{name} holds the id {value}, the vocabulary has the ids 0 to {vocab_size - 1}")


def check_items(batch: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> None:
    """Check an encoder's items, if the batch has any, against the encoder's sizes.

    Args:
        batch: of valid form.
        name: of the encoder.
        shape: of one item.

    Raises:
        TypeError: if items are no tensor of floating-point numbers.
        ValueError: if they have another shape.
    """
    items = batch.get(name)
    if items is None:
        return
    if not isinstance(items, torch.Tensor) or not items.is_floating_point():
        raise TypeError(f"{name} must be a tensor of floating-point numbers, got {_shown(items)}")
    if tuple(items.shape[1:]) != shape:
        raise ValueError(f"{name} must be [{name}, {', '.join(map(str, shape))}], got shape {list(items.shape)}")


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]
