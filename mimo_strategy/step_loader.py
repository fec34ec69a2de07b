"""Loaders of the user's own, which make whole step batches in their own way, and loaders of streams."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, override

import torch
from lightning.fabric.utilities.data import sized_len
from torch.utils.data import IterableDataset

from mimo_strategy.batch_checks import check_form
from mimo_strategy.lightning_private import BatchProgress, inner_sampler, position_in_epoch
from mimo_strategy.step_batch import StepShare, cut_shares, identified, num_step_batches


class StepLoader(ABC):
    """A rank's share of step batches from a source whose end may not be known.

    Before each of them ranks agree that all of them have one, of the same samples. Its state can be saved within an
    epoch: that of the source if it has one, otherwise as many batches are passed over as were trained on.

    Args:
        source: yields batches.
        agree: collective, see :func:`.agreement.on_next_batch`.
        progress: of the training epoch.

    Attributes:
        sampler: what Lightning tells the epoch, on which the order may depend.
    """

    def __init__(
        self, source: Iterable[Any], agree: Callable[[int, Mapping[int, Any] | None], None], progress: BatchProgress
    ) -> None:
        self.sampler = inner_sampler(getattr(source, "batch_sampler", None)) or getattr(source, "sampler", None)
        self._source = source
        self._agree = agree
        self._progress = progress
        self._first = 0
        # those of the source, by the number of step batches before
        self._states: dict[int, Any] = {}

    @abstractmethod
    def _take(self, batch: Any) -> tuple[Any, list[int]]:
        """This rank's share of what the source yielded, and its positions in the step batch."""

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Any]:
        served, self._first = self._first, 0
        length = sized_len(self)
        batches = iter(self._source)
        if not self._source_has_state:
            batches = islice(batches, served, None)
        self._keep_state(served)
        while True:
            taken = next(map(self._take, batches), None)
            self._agree(served, None if taken is None else identified(*taken))
            if taken is None:
                self._keep_state(served)
                return
            served += 1
            if served == length and self._source_has_state:
                # Lightning asks for no more, but such a source begins anew only after its end
                next(batches, None)
            self._keep_state(served)
            yield taken[0]

    def state_dict(self) -> dict[str, Any]:
        state = {"num_served": position_in_epoch(self._progress)}
        if self._source_has_state:
            kept = self._states.get(self._progress.current.processed)
            state["source"] = self._source.state_dict() if kept is None else kept
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first = state["num_served"]
        if self._source_has_state:
            self._source.load_state_dict(state["source"])

    @property
    def _source_has_state(self) -> bool:
        return hasattr(self._source, "state_dict") and hasattr(self._source, "load_state_dict")

    def _keep_state(self, served: int) -> None:
        """Where the length is not known, Lightning fetches one batch more than it trains on: two states are kept."""
        if self._source_has_state:
            before = self._states.get(served - 1)
            self._states = {served - 1: before, served: self._source.state_dict()}


class WholeBatches(StepLoader):
    """A rank's share of whole step batches, which the same loader makes on every rank.

    The first one tells how many samples a step batch has. One with fewer is filled by repeating its samples; a key
    ``is_padding`` ``[samples]`` tells which these are.

    Args:
        source: yields whole step batches.
        share: this rank's share.
        check: raises if a number of samples makes no step batch.
        agree: as for :class:`StepLoader`.
        progress: as for :class:`StepLoader`.
    """

    def __init__(
        self,
        source: Iterable[Any],
        share: StepShare,
        check: Callable[[int], None],
        agree: Callable[[int, Mapping[int, Any] | None], None],
        progress: BatchProgress,
    ) -> None:
        super().__init__(source, agree, progress)
        self._share = share
        self._check = check
        self._batch_size = 0

    @override
    def _take(self, batch: Any) -> tuple[dict[str, Any], list[int]]:
        check_form(batch, self._share.encoders)
        num_real = len(batch["input_ids"])
        self._batch_size = self._batch_size or num_real
        batch_size = max(num_real, self._batch_size)
        self._check(batch_size)
        positions = self._share.positions(batch_size)
        own = {name: batch[name] for name in batch if name not in self._share.elsewhere}
        taken = _take_samples(own, [position % num_real for position in positions], self._share.encoders)
        taken["is_padding"] = torch.tensor([position >= num_real for position in positions])
        return taken, positions

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"batch_size": self._batch_size}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._batch_size = state["batch_size"]


def _take_samples(batch: Mapping[str, Any], positions: list[int], encoders: Iterable[str]) -> dict[str, Any]:
    taken = {}
    for name, value in batch.items():
        rows = positions
        if name in encoders:
            ends = batch[f"num_{name}"].cumsum(0).tolist()
            starts = [0, *ends]
            rows = [item for position in positions for item in range(starts[position], ends[position])]
        taken[name] = value[rows] if isinstance(value, torch.Tensor) else [value[row] for row in rows]
    return taken


class StreamLoader(StepLoader):
    """A rank's share of a stream, as a ``DataLoader`` collates it.

    Args:
        source: loads a :class:`ShareOfStream`.
        agree: as for :class:`StepLoader`.
        progress: as for :class:`StepLoader`.
    """

    @override
    def __len__(self) -> int:
        if self._source.num_workers > 1:
            raise TypeError("each worker makes step batches of its own part of the stream, however large that is")
        return super().__len__()

    @override
    def _take(self, batch: Any) -> tuple[Any, list[int]]:
        return batch, self._source.dataset.positions


class ShareOfStream(IterableDataset):
    """One rank's samples of every step batch of a stream that is the same on every rank.

    Args:
        stream: yields samples.
        batch_size: samples of a step batch over all ranks.
        positions: those of this rank in a step batch.
        pad_last: as for :func:`.step_batch.cut_shares`.
    """

    def __init__(self, stream: IterableDataset, batch_size: int, positions: list[int], *, pad_last: bool) -> None:
        self.positions = positions
        self._stream = stream
        self._batch_size = batch_size
        self._pad_last = pad_last

    def __len__(self) -> int:
        return num_step_batches(len(self._stream), self._batch_size, pad_last=self._pad_last) * len(self.positions)

    def __iter__(self) -> Iterator[Any]:
        for _, share in cut_shares(self._stream, self._batch_size, self.positions, pad_last=self._pad_last):
            yield from share
