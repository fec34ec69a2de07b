"""Generation through the training schedules, without a cache: greedy, or sampled alike in every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from mimo_strategy.layout import LANGUAGE
from mimo_strategy.step_batch import Batch

if TYPE_CHECKING:
    from mimo_strategy.module import MimoModule
    from mimo_strategy.topology import Topology


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Draws depend on the seed and a sample's ``sample_id`` only, not on the layout.

    Args:
        temperature: divides the scores; lower is closer to greedy.
        top_k: draw among the most likely tokens only; ``None`` is all.
        top_p: draw among the most likely tokens that together have this probability (arXiv 1904.09751).
        seed: of the draws.

    Raises:
        ValueError: for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; greedy generation needs no Sampling"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def draws(self, sample_ids: torch.Tensor, number: int) -> torch.Tensor:
        """Uniform draws ``[samples, number]`` in [0, 1)."""
        drawn = []
        for sample_id in sample_ids.tolist():
            digest = hashlib.blake2b(f"{self.seed}/{sample_id}".encode(), digest_size=4).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest))
            drawn.append(torch.rand(number, generator=generator, dtype=torch.float64))
        return torch.stack(drawn).to(sample_ids.device)

    def choose(self, scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """The token that each of the draws ``[rows]`` picks, by ``scores`` ``[rows, vocabulary]``."""
        probabilities, tokens = (scores / self.temperature).double().softmax(dim=-1).sort(descending=True, stable=True)
        if self.top_k is not None:
            probabilities[:, self.top_k :] = 0
        # a token stays if those before it have not reached top_p yet, so the first always does
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities[before >= self.top_p] = 0
        reached = probabilities.cumsum(dim=-1)
        picked = torch.searchsorted(reached, draws[:, None] * reached[:, -1:], right=True)
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
        return tokens.gather(1, picked.minimum(last)).squeeze(1)


class Generation(NamedTuple):
    """What was generated for a step batch: the same on every rank, in the order of the step batch.

    Attributes:
        tokens: ``[samples, new tokens]``; after a sample's stop token, end tokens.
        lengths: ``[samples]``; generated tokens, the stop token included.
        stopped: ``[samples]``; whether the last of them is a stop token.
        answers: ``[samples, sequence]``; the labels where the loss mask is set, elsewhere -1.
        sample_ids: ``[samples]``; the batch's ``sample_id``.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    stopped: torch.Tensor
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
def generate(
    module: MimoModule,
    batch: Batch,
    *,
    end_token_id: int,
    stop_token_ids: Collection[int] = (),
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
) -> Generation:
    """Continue each sample after its ``prompt_length`` tokens; collective over the world under a runtime.

    Each new token costs a forward pass over the whole sequence. Samples that only pad the step batch are left out.

    Args:
        module: built; under a runtime on every rank.
        batch: what the loader yielded on this rank; ``labels`` and ``loss_mask`` may be missing.
        end_token_id: token that ends an answer.
        stop_token_ids: further tokens that do.
        max_new_tokens: tokens at most; ``None`` is as many as the longest answer of the step batch has, or, without
            answers, as there is room for.
        sampling: how to draw tokens; ``None`` takes the most likely one.

    Raises:
        ValueError: if the sequence has no room for ``max_new_tokens`` after the longest prompt, or the batch lacks
            ``prompt_length`` or ``sample_id``.
    """
    missing = {"prompt_length", "sample_id"} - batch.keys()
    if missing:
        raise ValueError(f"generation needs {sorted(missing)} in the batch, which has {sorted(batch)}")
    rows = _Rows(module)
    prompt_length = rows.of_step_batch(batch["prompt_length"])
    sample_ids = rows.of_step_batch(batch["sample_id"])
    positions = torch.arange(batch["input_ids"].shape[1], device=module.device)
    answers = torch.full_like(batch["input_ids"], -1)
    if "labels" in batch and "loss_mask" in batch:
        answers = torch.where(batch["loss_mask"] > 0, batch["labels"], answers)
    answers = rows.of_step_batch(answers)
    room = len(positions) - int(prompt_length.max())
    if max_new_tokens is None:
        max_new_tokens = int((answers >= 0).sum(dim=1).max()) or room
    if not 0 < max_new_tokens <= room:
        raise ValueError(
            f"{max_new_tokens} new tokens do not fit: the sequence has {len(positions)} positions, of which the "
            f"longest prompt takes {int(prompt_length.max())}"
        )
    draws = None if sampling is None else sampling.draws(sample_ids, max_new_tokens)
    stop_tokens = torch.tensor(sorted({end_token_id, *stop_token_ids}), device=module.device)
    text = rows.of_step_batch(batch["input_ids"])
    text = torch.where(positions < prompt_length[:, None], text, end_token_id)
    everyone = torch.arange(len(text), device=module.device)
    stopped = torch.zeros_like(everyone, dtype=torch.bool)
    lengths = torch.zeros_like(everyone)
    tokens = text.new_full((len(text), max_new_tokens), end_token_id)
    for step in range(max_new_tokens):
        last = prompt_length + step - 1
        step_batch = batch | {"input_ids": rows.of_rank(text), "position": rows.of_rank(last)}
        following = rows.following(step_batch, sampling, None if draws is None else draws[:, step])
        tokens[:, step] = torch.where(stopped, end_token_id, following)
        lengths += ~stopped
        text[everyone, last + 1] = tokens[:, step]
        stopped |= torch.isin(following, stop_tokens)
        if stopped.all():
            break
    real = torch.ones_like(stopped)
    if "is_padding" in batch:
        real = ~rows.of_step_batch(batch["is_padding"])
    return Generation(tokens[real], lengths[real], stopped[real], answers[real], sample_ids[real])


class _Rows:
    """Moves rows between a rank's share and the whole step batch."""

    def __init__(self, module: MimoModule) -> None:
        self._module = module
        self._runtime = module.runtime

    def of_step_batch(self, share: torch.Tensor) -> torch.Tensor:
        """Rows of the whole step batch, from every rank's share."""
        if self._runtime is None:
            return share
        return self._gather(self._runtime.share.language_rows(share))

    def of_rank(self, step_batch: torch.Tensor) -> torch.Tensor:
        """This rank's share of the whole step batch."""
        if self._runtime is None:
            return step_batch
        return step_batch[self._runtime.share.positions(len(step_batch))]

    def following(self, batch: Batch, sampling: Sampling | None, draws: torch.Tensor | None) -> torch.Tensor:
        """The token after ``position``, for every row of the step batch, as ``draws`` of all rows pick it."""

        def pick(logits: torch.Tensor, microbatch: Batch) -> torch.Tensor:
            rows = torch.arange(len(logits), device=logits.device)
            return logits[rows, microbatch["position"]].float()

        if self._runtime is None:
            return self._choose(pick(self._module(batch), batch), sampling, draws)
        scores = self._runtime.run_outputs(batch, self._module, pick)
        # what ranks before the last stage contribute is not looked at
        lane = self._runtime.share.language_rows(batch["position"])
        if scores:
            tp_group = self._runtime.topology.groups[LANGUAGE].tp
            whole = gather_from_tensor_model_parallel_region(torch.cat(scores), group=tp_group)
            if draws is not None:
                draws = self._runtime.share.language_rows(self.of_rank(draws))
            lane = self._choose(whole, sampling, draws)
        return self._gather(lane)

    def _gather(self, lane: torch.Tensor) -> torch.Tensor:
        return gather_lanes(lane, self._runtime.topology, self._runtime.num_microbatches)

    def _choose(self, scores: torch.Tensor, sampling: Sampling | None, draws: torch.Tensor | None) -> torch.Tensor:
        """A token of each row, among those that stand for themselves and not for an encoder's item."""
        scores[:, list(self._module.special_token_ids.values())] = -torch.inf
        return scores.argmax(dim=-1) if sampling is None else sampling.choose(scores, draws)


def gather_lanes(values: torch.Tensor, topology: Topology, num_microbatches: int) -> torch.Tensor:
    """Put together what the language model's lanes hold, on every rank; collective over the world.

    Args:
        values: ``[samples of one lane, ...]``, microbatch by microbatch. Only those of the language model's last
            stage count, but shape and dtype must be the same on all ranks.
        topology: groups of the modules.
        num_microbatches: microbatches per step.

    Returns:
        ``[samples of the step batch, ...]`` in the order of the step batch.
    """
    lanes = values.new_empty((topology.layout.modules[LANGUAGE].dp, *values.shape))
    if topology.runs(LANGUAGE):
        dist.all_gather(list(lanes.unbind(0)), values.contiguous(), group=topology.groups[LANGUAGE].dp)
    dist.broadcast(lanes, src=topology.layout.first_of_last_stage)
    return lanes.unflatten(1, (num_microbatches, -1)).transpose(0, 1).flatten(0, 2)
