"""What ``Trainer.predict`` returns on a rank: generated text for that rank's part of every step batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from mimo_strategy.generation import Generation


class Decodes(Protocol):
    """Turns token ids into text: a tokenizer or vocabulary."""

    def decode(self, ids: Sequence[int]) -> str: ...


def find_decoder(datamodule: Any) -> Decodes | None:
    """The ``vocabulary`` or ``tokenizer`` of a datamodule, if it has one."""
    return getattr(datamodule, "vocabulary", getattr(datamodule, "tokenizer", None))


class Prediction(NamedTuple):
    """What was generated for the samples of one rank, in the order of the data.

    Attributes:
        sample_ids: ``sample_id`` of each sample.
        tokens: generated ids of each sample, the stop token included.
        texts: the tokens without the stop token, as text; empty if there is nothing to decode with.
    """

    sample_ids: list[int]
    tokens: list[list[int]]
    texts: list[str]


def own_rows(num_rows: int, rank: int, world_size: int) -> slice:
    """Rows of a step batch that ``rank`` returns: the contiguous parts of all ranks cover each row once."""
    return slice(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)


def predict_own(generation: Generation, rank: int, world_size: int, decoder: Decodes | None) -> Prediction:
    """This rank's part of what was generated for a step batch.

    Args:
        generation: the same on every rank.
        rank: global rank.
        world_size: number of ranks.
        decoder: makes text of tokens; ``None`` leaves ``texts`` empty.
    """
    rows = own_rows(len(generation.tokens), rank, world_size)
    tokens = [
        generated[:length].tolist()
        for generated, length in zip(generation.tokens[rows], generation.lengths[rows].tolist(), strict=True)
    ]
    stopped = generation.stopped[rows].tolist()
    texts = []
    if decoder is not None:
        texts = [decoder.decode(ids[:-1] if ends else ids) for ids, ends in zip(tokens, stopped, strict=True)]
    return Prediction(generation.sample_ids[rows].tolist(), tokens, texts)
