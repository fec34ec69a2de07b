"""Give each rank its share of every step batch of a loader."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
)

from mimo_strategy.batch_checks import check_form
from mimo_strategy.lightning_private import IndexBatchSampler
from mimo_strategy.prediction import own_rows
from mimo_strategy.sample_order import draw_alike, generator
from mimo_strategy.step_batch import StepShare


def _shares(
    items: Iterable[Any], batch_size: int, positions: list[int], *, pad_last: bool
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Cut items into step batches, each with this rank's share of it.

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


def _num_steps(num_items: int, batch_size: int, *, pad_last: bool) -> int:
    return -(-num_items // batch_size) if pad_last else num_items // batch_size


class ShareSampler(Sampler[list[Any]]):
    """Batch sampler of one rank: its positions in each step batch of one global order.

    Args:
        sampler: the global order, the same on every rank.
        batch_size: samples of a step batch over all ranks.
        share: this rank's share.
        pad_last: fill the last, incomplete step batch by repeating samples, so that each real sample is yielded by
            some rank; otherwise it is dropped. Yields ``(index, is padding)`` pairs instead of indices.

    Attributes:
        first: step batches to leave out when it is next iterated over.
        step_batch: the real samples of the step batch that was yielded last, over all ranks.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, share: StepShare, *, pad_last: bool) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = not pad_last
        self.first = 0
        self.step_batch: list[int] = []
        self._positions = share.positions(batch_size)

    def __len__(self) -> int:
        return _num_steps(len(self.sampler), self.batch_size, pad_last=not self.drop_last)

    def __iter__(self) -> Iterator[list[Any]]:
        first, self.first = self.first, 0
        indices = islice(self.sampler, first * self.batch_size, None)
        for step_batch, share in _shares(indices, self.batch_size, self._positions, pad_last=not self.drop_last):
            self.step_batch = step_batch
            yield share


class PredictedIndices(IndexBatchSampler):
    """Tells Lightning's prediction writers the samples that a rank predicts, which are not those that it loads.

    Args:
        sampler: yields the rank's share.
        rank: global rank.
        world_size: number of ranks.
    """

    def __init__(self, sampler: ShareSampler, rank: int, world_size: int) -> None:
        super().__init__(sampler)
        self._rank, self._world_size = rank, world_size

    def __next__(self) -> list[Any]:
        share = next(self._iterator)
        step_batch = self._batch_sampler.step_batch
        self.seen_batch_indices.append(step_batch[own_rows(len(step_batch), self._rank, self._world_size)])
        return share


class _ShareOfStream(IterableDataset):
    """One rank's samples of every step batch of a stream that is the same on every rank."""

    def __init__(self, stream: IterableDataset, batch_size: int, share: StepShare, *, pad_last: bool) -> None:
        self._stream = stream
        self._batch_size = batch_size
        self._positions = share.positions(batch_size)
        self._pad_last = pad_last

    def __len__(self) -> int:
        return _num_steps(len(self._stream), self._batch_size, pad_last=self._pad_last) * len(self._positions)

    def __iter__(self) -> Iterator[Any]:
        for _, share in _shares(self._stream, self._batch_size, self._positions, pad_last=self._pad_last):
            yield from share


class _MarksPadding(Dataset):
    """Takes ``(index, is padding)`` and passes the mark on beside the sample."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_dataset"], name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, marked: tuple[int, bool]) -> tuple[Any, bool]:
        index, is_padding = marked
        return self._dataset[index], is_padding


def _collate_marked(collate, marked: list[tuple[Any, bool]]) -> Any:
    samples, is_padding = zip(*marked, strict=True)
    batch = collate(list(samples))
    return {**batch, "is_padding": torch.tensor(is_padding)} if isinstance(batch, Mapping) else batch


def _collate_without(collate, names: Sequence[str], samples: list[Any]) -> Any:
    batch = collate(samples)
    return {key: batch[key] for key in batch if key not in names} if isinstance(batch, Mapping) else batch


class ShareDataLoader(DataLoader):
    """Knows how many step batches of an epoch it has served, so that a checkpoint within the epoch can be continued.

    Lightning keeps the state of such a loader. The order must come from the epoch alone, as that of the sampler which
    Lightning sets does.
    """

    _num_served = 0

    def __iter__(self) -> Iterator[Any]:
        self._num_served = self.batch_sampler.first
        for batch in super().__iter__():
            self._num_served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"num_served": self._num_served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.first = state["num_served"] % len(self)


class StepLoader:
    """Step batches from a source whose end is not known, or that makes batches in its own way.

    Before each of them ranks agree that all of them have one. Its state can be saved within an epoch: that of the
    source if it has one, otherwise as many batches are passed over as were served.

    Args:
        source: yields batches.
        take: this rank's share of a batch, ``None`` for one to leave out.
        agree: collective; raises if only some ranks have a batch.
    """

    def __init__(self, source: Iterable[Any], take: Callable[[Any], Any], agree: Callable[[bool, int], None]) -> None:
        self._source = source
        self._take = take
        self._agree = agree
        self._first = 0
        self._saved: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Any]:
        first, self._first = self._first, 0
        batches = iter(self._source)
        if not self._source_has_state:
            batches = islice(batches, first, None)
        served = first
        while True:
            # Lightning fetches one batch ahead, so what is saved is from before the fetch
            self._saved = self._state(served)
            share = next((share for share in map(self._take, batches) if share is not None), None)
            self._agree(share is not None, served)
            if share is None:
                self._saved = self._state(0)
                return
            served += 1
            yield share

    def state_dict(self) -> dict[str, Any]:
        return self._saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first = state["num_served"]
        if self._source_has_state:
            self._source.load_state_dict(state["source"])

    @property
    def _source_has_state(self) -> bool:
        return hasattr(self._source, "state_dict") and hasattr(self._source, "load_state_dict")

    def _state(self, num_served: int) -> dict[str, Any]:
        state = {"num_served": num_served}
        return state | {"source": self._source.state_dict()} if self._source_has_state else state


class _ShareOfBatch:
    """Takes this rank's samples of a batch that holds those of all ranks.

    The first batch tells how many samples a step batch has. One with fewer is left out, or filled by repeating its
    samples if ``pad_last``.
    """

    def __init__(self, share: StepShare, check: Callable[[int], None], *, pad_last: bool) -> None:
        self._share = share
        self._check = check
        self._pad_last = pad_last
        self._batch_size = 0

    def __call__(self, batch: Any) -> dict[str, Any] | None:
        check_form(batch, self._share.encoders)
        num_real = len(batch["input_ids"])
        self._batch_size = self._batch_size or num_real
        if num_real < self._batch_size and not self._pad_last:
            return None
        batch_size = max(num_real, self._batch_size)
        self._check(batch_size)
        positions = self._share.positions(batch_size)
        own = {name: batch[name] for name in batch if name not in self._share.elsewhere}
        taken = _take_samples(own, [position % num_real for position in positions], self._share.encoders)
        if self._pad_last:
            taken["is_padding"] = torch.tensor([position >= num_real for position in positions])
        return taken


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


def share_dataloader(
    dataloader: Iterable[Any],
    share: StepShare,
    *,
    train: bool,
    seed_workers: bool,
    check: Callable[[int], None],
    agree: Callable[[bool, int], None],
    pin_memory: bool = False,
    predicts: tuple[int, int] | None = None,
) -> Iterable[Any]:
    """The loader of this rank's share of what ``dataloader`` would yield in one process.

    Of a map-style data set, a rank loads its samples only. A stream (``IterableDataset``) must be the same on every
    rank, which passes over the samples of others. A loader that has a state of its own, batches in its own way or is
    no ``DataLoader`` serves whole step batches on every rank, which cuts out its share. Items of encoders that a rank
    does not run are left out.

    In training an incomplete last step batch is dropped. Elsewhere it is padded, unless the loader drops it, and
    batches get a key ``is_padding`` ``[samples]``.

    Args:
        dataloader: yields whole step batches; their order must be the same on every rank.
        share: this rank's share.
        train: whether the loader is for training.
        seed_workers: seed the workers by lane, so that ranks that load the same samples augment them alike.
        check: raises if a number of samples makes no step batch.
        agree: collective; raises if only some ranks have a further batch.
        pin_memory: load into pinned memory, from which a GPU copies without the host's waiting.
        predicts: rank and world size, if the loader is for prediction.

    Raises:
        ValueError: if the loader has a distributed sampler, or not one step batch for training.
    """
    pad_last = not train
    if not isinstance(dataloader, DataLoader) or _is_custom(dataloader):
        if isinstance(dataloader, DataLoader):
            _seed_alike(dataloader, seed_workers=seed_workers)
        return StepLoader(dataloader, _ShareOfBatch(share, check, pad_last=pad_last), agree)
    # a loader that was given a batch sampler has only the defaults itself
    batching = dataloader if dataloader.batch_size is not None else dataloader.batch_sampler
    batch_size, sampler = batching.batch_size, batching.sampler
    pad_last &= not batching.drop_last
    draw_alike(sampler)
    check(batch_size)
    collate = dataloader.collate_fn
    if share.elsewhere:
        # here, as workers and pinned memory are spared them then
        collate = partial(_collate_without, collate, share.elsewhere)
    if pad_last:
        collate = partial(_collate_marked, collate)
    settings = {
        "collate_fn": collate,
        "num_workers": dataloader.num_workers,
        "pin_memory": dataloader.pin_memory or pin_memory,
        "timeout": dataloader.timeout,
        "generator": dataloader.generator or generator(share.lane),
    }
    if dataloader.num_workers > 0:
        worker_init = dataloader.worker_init_fn
        if worker_init is None and seed_workers:
            worker_init = partial(pl_worker_init_function, rank=share.lane)
        settings |= {
            "prefetch_factor": dataloader.prefetch_factor,
            "persistent_workers": dataloader.persistent_workers,
            "multiprocessing_context": dataloader.multiprocessing_context,
            "worker_init_fn": worker_init,
        }
    if isinstance(dataloader.dataset, IterableDataset):
        stream = _ShareOfStream(dataloader.dataset, batch_size, share, pad_last=pad_last)
        return StepLoader(DataLoader(stream, len(share.positions(batch_size)), **settings), _whole, agree)
    batches = ShareSampler(sampler, batch_size, share, pad_last=pad_last)
    if len(batches) == 0:
        raise ValueError(f"the data set's {len(sampler)} samples do not fill one step batch of {batch_size}")
    if predicts is not None:
        batches = PredictedIndices(batches, *predicts)
    dataset = _MarksPadding(dataloader.dataset) if pad_last else dataloader.dataset
    return ShareDataLoader(dataset, batch_sampler=batches, **settings)


def _is_custom(dataloader: DataLoader) -> bool:
    """Whether samples do not come as ``DataLoader`` itself would fetch them."""
    return (
        type(dataloader).__iter__ is not DataLoader.__iter__
        or hasattr(dataloader, "state_dict")
        or (
            dataloader.batch_size is None
            and not isinstance(dataloader.batch_sampler, IndexBatchSampler)
            and type(dataloader.batch_sampler) is not BatchSampler
        )
    )


def _seed_alike(dataloader: DataLoader, *, seed_workers: bool) -> None:
    """Let every rank draw the same order and the same worker seeds."""
    if dataloader.generator is None:
        dataloader.generator = generator(0)
    draw_alike(dataloader.sampler)
    draw_alike(dataloader.batch_sampler)
    if seed_workers and dataloader.worker_init_fn is None:
        dataloader.worker_init_fn = partial(pl_worker_init_function, rank=0)


def _whole(batch: Any) -> Any:
    return batch
