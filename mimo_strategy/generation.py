"""Greedy generation through the training schedules, without a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from mimo_strategy.layout import LANGUAGE
from mimo_strategy.step_batch import Batch

if TYPE_CHECKING:
    from mimo_strategy.module import MimoModule


class Generation(NamedTuple):
    """What was generated for a step batch: the same on every rank, in the order of the step batch.

    Attributes:
        tokens: ``[samples, new tokens]``; after a sample's end token, more of them.
        answers: ``[samples, sequence]``; the labels where the loss mask is set, elsewhere -1.
        sample_ids: ``[samples]``; the batch's ``sample_id``.
    """

    tokens: torch.Tensor
    answers: torch.Tensor
    sample_ids: torch.Tensor

    def is_exact(self) -> torch.Tensor:
        """``[samples]``: whether each generated text is its answer, token by token, the end token included."""
        return torch.tensor(
            [
                torch.equal(answer[answer >= 0], tokens[: int((answer >= 0).sum())])
                for tokens, answer in zip(self.tokens, self.answers, strict=True)
            ],
            device=self.tokens.device,
        )


@torch.no_grad()
def generate_greedily(
    module: MimoModule, batch: Batch, *, end_token_id: int, max_new_tokens: int | None = None
) -> Generation:
    """Continue each sample after its ``prompt_length`` tokens; collective over the world under a runtime.

    Each new token costs a forward pass over the whole sequence. Samples that only pad the step batch are left out.

    Args:
        module: built; under a runtime on every rank.
        batch: what the loader yielded on this rank.
        end_token_id: token that ends an answer.
        max_new_tokens: tokens at most; ``None`` is as many as the longest answer of the step batch has.

    Raises:
        ValueError: if the sequence has no room for ``max_new_tokens`` after the longest prompt.
    """
    rows = _Rows(module, batch)
    prompt_length = rows.of_step_batch(batch["prompt_length"])
    positions = torch.arange(batch["input_ids"].shape[1], device=module.device)
    answers = rows.of_step_batch(torch.where(batch["loss_mask"] > 0, batch["labels"], -1))
    if max_new_tokens is None:
        max_new_tokens = int((answers >= 0).sum(dim=1).max())
    room = len(positions) - int(prompt_length.max())
    if max_new_tokens > room:
        raise ValueError(
            f"{max_new_tokens} new tokens do not fit: the sequence has {len(positions)} positions, of which the "
            f"longest prompt takes {int(prompt_length.max())}"
        )
    text = rows.of_step_batch(batch["input_ids"])
    text = torch.where(positions < prompt_length[:, None], text, end_token_id)
    everyone = torch.arange(len(text), device=module.device)
    finished = torch.zeros_like(everyone, dtype=torch.bool)
    tokens = text.new_full((len(text), max_new_tokens), end_token_id)
    for step in range(max_new_tokens):
        last = prompt_length + step - 1
        following = rows.most_likely(batch | {"input_ids": rows.of_rank(text), "position": rows.of_rank(last)})
        tokens[:, step] = torch.where(finished, end_token_id, following)
        text[everyone, last + 1] = tokens[:, step]
        finished |= following == end_token_id
        if finished.all():
            break
    real = torch.ones_like(finished)
    if "is_padding" in batch:
        real = ~rows.of_step_batch(batch["is_padding"])
    return Generation(tokens[real], answers[real], rows.of_step_batch(batch["sample_id"])[real])


class _Rows:
    """Moves rows between a rank's share and the whole step batch."""

    def __init__(self, module: MimoModule, batch: Batch) -> None:
        self._module = module
        self._runtime = module.runtime

    def of_step_batch(self, share: torch.Tensor) -> torch.Tensor:
        """Rows of the whole step batch, from every rank's share."""
        if self._runtime is None:
            return share
        return self._runtime.gather_lanes(self._runtime.share.language_rows(share))

    def of_rank(self, step_batch: torch.Tensor) -> torch.Tensor:
        """This rank's share of the whole step batch."""
        if self._runtime is None:
            return step_batch
        return step_batch[self._runtime.share.positions(len(step_batch))]

    def most_likely(self, batch: Batch) -> torch.Tensor:
        """The most likely token after ``position``, for every row of the step batch."""

        def pick(logits: torch.Tensor, microbatch: Batch) -> torch.Tensor:
            rows = torch.arange(len(logits), device=logits.device)
            return logits[rows, microbatch["position"]].float()

        if self._runtime is None:
            return self._best(pick(self._module(batch), batch))
        scores = self._runtime.run_outputs(batch, self._module, pick)
        # what ranks before the last stage contribute is not looked at
        lane = self._runtime.share.language_rows(batch["position"])
        if scores:
            tp_group = self._runtime.topology.groups[LANGUAGE].tp
            lane = self._best(gather_from_tensor_model_parallel_region(torch.cat(scores), group=tp_group))
        return self._runtime.gather_lanes(lane)

    def _best(self, scores: torch.Tensor) -> torch.Tensor:
        """The token of the highest score, among those that stand for themselves and not for an encoder's item."""
        scores[:, list(self._module.special_token_ids.values())] = -torch.inf
        return scores.argmax(dim=-1)
