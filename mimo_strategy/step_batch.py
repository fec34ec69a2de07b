"""Which samples of a step batch a rank takes, and how its share is cut into microbatches.

A step batch is a dict. A tensor under the name of an encoder module, say ``images``, holds that module's items of
all samples one after another, and ``num_images`` how many each sample has; everything else has one entry per
sample. :func:`count_items` adds ``images_counts``, which stays in host memory when the rest is moved: cutting a batch
then waits for no device.

Microbatch ``m`` of ``M`` is the ``m``-th contiguous part of the step batch, and lane ``l`` of a module with
data-parallel size ``dp`` takes the ``l``-th of ``dp`` contiguous parts of a microbatch. Bridges between modules
concatenate and split lanes in that order.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from mimo_strategy.batch_checks import check_number
from mimo_strategy.layout import LANGUAGE, Layout

Batch = dict[str, Any]


class Microbatch(NamedTuple):
    """A microbatch of a rank.

    Attributes:
        batch: its samples.
        bridge_parts: tokens that cross the bridge, see :meth:`StepShare.bridge_parts`.
    """

    batch: Batch
    bridge_parts: Mapping[str, list[int]]


class StepShare:
    """The share of one rank in every step batch.

    A rank that runs several modules loads the samples of the module with the fewest lanes; the others take a part
    of these.

    Args:
        layout: the resolved layout.
        rank: global rank.
        num_microbatches: microbatches per step.

    Attributes:
        lane: which part of a microbatch the rank loads.
        num_lanes: parts of a microbatch.
        encoders: names of the encoder modules.
        elsewhere: those of them that other ranks run, whose items this rank needs not.
    """

    def __init__(self, layout: Layout, rank: int, num_microbatches: int) -> None:
        self._lanes = {
            name: (module.coordinates(rank)["dp"], module.dp)
            for name, module in layout.modules.items()
            if rank in module.ranks
        }
        self.lane, self.num_lanes = min(self._lanes.values(), key=lambda lane: lane[1])
        self._dp = {name: module.dp for name, module in layout.modules.items()}
        self._largest_dp = layout.largest_dp
        self.encoders = [name for name in layout.modules if name != LANGUAGE]
        self.elsewhere = [name for name in self.encoders if name not in self._lanes]
        self._num_microbatches = num_microbatches

    def positions(self, batch_size: int) -> list[int]:
        """Positions within a step batch of ``batch_size`` samples that this rank loads, microbatch by microbatch."""
        microbatch_size = batch_size // self._num_microbatches
        share = microbatch_size // self.num_lanes
        starts = range(self.lane * share, batch_size, microbatch_size)
        return [start + offset for start in starts for offset in range(share)]

    def microbatches(self, batch: Batch) -> list[Batch]:
        """Cut what this rank loaded into microbatches, each with the samples that its modules take.

        Raises:
            ValueError: if the samples cannot be cut evenly.
        """
        num_samples = len(batch["input_ids"])
        parts = self._num_microbatches * self._largest_dp // self.num_lanes
        if num_samples == 0 or num_samples % parts:
            raise ValueError(
                f"this rank's {num_samples} samples of the step batch cannot be cut into {parts} equal parts "
                f"({self._num_microbatches} microbatches x {parts // self._num_microbatches} lanes)"
            )
        size = num_samples // self._num_microbatches
        return [
            self._narrow_modules(narrow_samples(batch, start, size, self.encoders))
            for start in range(0, num_samples, size)
        ]

    def language_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Of a per-sample tensor of this rank's share, the rows of its lane of the language model.

        On ranks that do not run the language model: as many zeros as a lane has rows.
        """
        if LANGUAGE not in self._lanes:
            return values.new_zeros((len(values) * self.num_lanes // self._dp[LANGUAGE], *values.shape[1:]))
        lane, dp = self._lanes[LANGUAGE]
        lanes_loaded = dp // self.num_lanes
        return values.unflatten(0, (self._num_microbatches, lanes_loaded, -1))[:, lane % lanes_loaded].flatten(0, 1)

    def bridge_parts(self, batch: Batch) -> list[dict[str, list[int]]]:
        """How many tokens this rank's encoders and its language model exchange.

        Each lane of the module with fewer lanes is bridged to several of the other's. In parts: the tokens of these.
        A rank that runs only the module with more lanes has one part, its own.

        Args:
            batch: what this rank loaded, with what :func:`count_items` counted of it.

        Returns:
            By microbatch and encoder that this rank runs or feeds on, the number of tokens of each part.
        """
        microbatches: list[dict[str, list[int]]] = [{} for _ in range(self._num_microbatches)]
        for name in self.encoders:
            sides = [self._lanes[side] for side in (name, LANGUAGE) if side in self._lanes]
            if not sides:
                continue
            lane, dp = min(sides, key=lambda side: side[1])
            num_parts = max(self._dp[name], self._dp[LANGUAGE]) // dp
            lanes_loaded = dp // self.num_lanes
            places = batch[counts_key(name)][:, 1]
            cut = places.unflatten(0, (self._num_microbatches, lanes_loaded, num_parts, -1))
            for microbatch, parts in zip(microbatches, cut[:, lane % lanes_loaded].sum(-1).tolist(), strict=True):
                microbatch[name] = parts
        return microbatches

    def _narrow_modules(self, loaded: Batch) -> Batch:
        microbatch = dict(loaded)
        for name, (lane, dp) in self._lanes.items():
            lanes_loaded = dp // self.num_lanes
            size = len(loaded["input_ids"]) // lanes_loaded
            part = narrow_samples(loaded, lane % lanes_loaded * size, size, self.encoders)
            if name == LANGUAGE:
                microbatch.update((key, value) for key, value in part.items() if key not in self.encoders)
            elif name in loaded:
                microbatch[name] = part[name]
        return microbatch


def cut_shares(
    items: Iterable[Any], batch_size: int, positions: Sequence[int], *, pad_last: bool
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Cut items into step batches, each with a rank's share of it.

    An incomplete last one is dropped, or, if ``pad_last``, filled by repeating its items; of the share come
    ``(item, is padding)`` pairs then.
    """
    items = iter(items)
    while step_batch := list(islice(items, batch_size)):
        num_real = len(step_batch)
        if pad_last:
            yield step_batch, [(step_batch[position % num_real], position >= num_real) for position in positions]
        elif num_real == batch_size:
            yield step_batch, [step_batch[position] for position in positions]


def num_step_batches(num_items: int, batch_size: int, *, pad_last: bool) -> int:
    """How many step batches :func:`cut_shares` makes."""
    return -(-num_items // batch_size) if pad_last else num_items // batch_size


def identified(batch: Any, positions: Sequence[int]) -> dict[int, Any]:
    """The ``sample_id`` of each sample of a rank's share, by its position in the step batch; empty without any."""
    ids = batch.get("sample_id") if isinstance(batch, Mapping) else None
    if not isinstance(ids, torch.Tensor) or ids.ndim != 1:
        return {}
    return dict(zip(positions, ids.tolist(), strict=False))


def narrow_samples(batch: Batch, start: int, size: int, encoders: list[str]) -> Batch:
    """Samples ``start`` to ``start + size`` of a batch, the items of its ``encoders`` with them."""
    narrowed = {key: value[start : start + size] for key, value in batch.items() if key not in encoders}
    for name in encoders:
        if name in batch:
            counted = batch.get(counts_key(name))
            counts = batch[f"num_{name}"] if counted is None else counted[:, 0]
            first = int(counts[:start].sum())
            narrowed[name] = batch[name][first : first + int(counts[start : start + size].sum())]
    return narrowed


def counts_key(encoder: str) -> str:
    """Where :func:`count_items` puts what it counted for an encoder."""
    return f"{encoder}_counts"


def count_items(batch: Batch, special_token_ids: Mapping[str, int], elsewhere: Collection[str] = ()) -> Batch:
    """Count each encoder's items and the places for their tokens, and check that they fit.

    Whether the places are as many as the items' tokens, only the encoder can tell.

    Args:
        batch: what a rank loaded; in host memory this waits for no device.
        special_token_ids: by encoder, the token that holds the place of its tokens.
        elsewhere: encoders whose items this rank may be without.

    Returns:
        For an encoder ``images``, under ``images_counts``, the items and the places of each sample, ``[samples, 2]``
        in host memory.

    Raises:
        ValueError: if the items are not as many as counted or are missing, or a sample has items but no places or
            places but no items.
    """
    counted = {}
    for name, special_token_id in special_token_ids.items():
        for key in (name, f"num_{name}"):
            if key not in batch and key not in elsewhere:
                raise ValueError(
                    f"the batch has no {key}, only {sorted(batch)}; also where no sample has any, {name} must hold 0 "
                    f"items and num_{name} a 0 for each sample"
                )
        items = batch[f"num_{name}"]
        places = (batch["input_ids"] == special_token_id).sum(dim=1)
        if items.shape != places.shape:
            raise ValueError(f"num_{name} has shape {list(items.shape)}, but the batch has {len(places)} samples")
        counts = torch.stack([items.to(places), places], dim=1).cpu()
        if name in batch:
            check_number(name, batch[name], counts[:, 0])
        for sample, (count, found) in enumerate(counts.tolist()):
            if bool(count) != bool(found):
                raise ValueError(
                    f"sample {sample} of this rank's {len(counts)} has {count} {name}, but its input_ids have {found} "
                    f"places for their tokens (token {special_token_id})"
                )
        counted[counts_key(name)] = counts
    return counted


def is_counted(batch: Batch, special_token_ids: Mapping[str, int]) -> bool:
    """Whether a batch holds what :func:`count_items` returns."""
    return all(counts_key(name) in batch for name in special_token_ids)
