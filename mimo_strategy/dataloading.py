"""Give each rank its share of every step batch of a loader."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from mimo_strategy.lightning_private import BatchProgress, IndexBatchSampler, position_in_epoch
from mimo_strategy.prediction import own_rows
from mimo_strategy.sample_order import draw_alike, generator, sampler_name
from mimo_strategy.step_batch import StepShare, cut_shares, identified, num_step_batches
from mimo_strategy.step_loader import ShareOfStream, StreamLoader, WholeBatches


class ShareSampler(Sampler[list[Any]]):
    """Batch sampler of one rank: its positions in each step batch of one global order.

    Args:
        sampler: the global order, the same on every rank, which is compared for the first step batch.
        batch_size: samples of a step batch over all ranks.
        share: this rank's share.
        agree: collective, see :func:`.agreement.on_next_batch`.
        pad_last: fill the last, incomplete step batch by repeating samples, so that each real sample is yielded by
            some rank; otherwise it is dropped. Yields ``(index, is padding)`` pairs instead of indices.

    Attributes:
        first: step batches to leave out when it is next iterated over.
        positions: those of this rank in a step batch.
        step_batch: the real samples of the step batch that was yielded last, over all ranks.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        batch_size: int,
        share: StepShare,
        agree: Callable[[int, Mapping[int, Any]], None],
        *,
        pad_last: bool,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = not pad_last
        self.first = 0
        self.positions = share.positions(batch_size)
        self.step_batch: list[int] = []
        self._agree = agree

    def __len__(self) -> int:
        return num_step_batches(len(self.sampler), self.batch_size, pad_last=not self.drop_last)

    def __iter__(self) -> Iterator[list[Any]]:
        first, self.first = self.first, 0
        indices = islice(self.sampler, first * self.batch_size, None)
        shares = cut_shares(indices, self.batch_size, self.positions, pad_last=not self.drop_last)
        for number, (step_batch, share) in enumerate(shares, first):
            if number == first:
                self._agree(number, dict(enumerate(step_batch)))
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
    """Loads one rank's share of every step batch; with each iteration ranks agree on the samples that come first.

    Lightning keeps its state, so that a checkpoint within an epoch can be continued. The order must come from the epoch
    alone, as that of the sampler which Lightning sets does.

    Args:
        dataset: map-style.
        batches: this rank's shares of the order.
        agree: collective, see :func:`.agreement.on_next_batch`.
        progress: of the training epoch.
        settings: of the ``DataLoader``.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: ShareSampler | PredictedIndices,
        agree: Callable[[int, Mapping[int, Any]], None],
        progress: BatchProgress,
        **settings: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=batches, **settings)
        self._agree = agree
        self._progress = progress

    def __iter__(self) -> Iterator[Any]:
        first = self.batch_sampler.first
        for number, batch in enumerate(super().__iter__(), first):
            if number == first:
                self._agree(number, identified(batch, self.batch_sampler.positions))
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"num_served": position_in_epoch(self._progress)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.first = state["num_served"]


def share_dataloader(
    dataloader: Iterable[Any],
    share: StepShare,
    *,
    train: bool,
    seed_workers: bool,
    check: Callable[[int], None],
    agree: Callable[[str, int, Mapping[int, Any] | None], None],
    progress: BatchProgress,
    pin_memory: bool = False,
    predicts: tuple[int, int] | None = None,
) -> Iterable[Any]:
    """The loader of this rank's share of what ``dataloader`` would yield in one process.

    Of a map-style data set, a rank loads its samples only. A stream (``IterableDataset``) must be the same on every
    rank, which passes over the samples of others. A loader that has a state of its own, batches in its own way or is
    no ``DataLoader`` serves whole step batches on every rank, which cuts out its share. Items of encoders that a rank
    does not run are left out.

    In training an incomplete last step batch is dropped. Elsewhere it is padded, unless the loader drops it, and
    batches get a key ``is_padding`` ``[samples]``; in training too if the loader serves whole step batches, as how many
    it has would not be known otherwise.

    Args:
        dataloader: yields whole step batches; their order must be the same on every rank.
        share: this rank's share.
        train: whether the loader is for training.
        seed_workers: seed the workers by lane, so that ranks that load the same samples augment them alike.
        check: raises if a number of samples makes no step batch.
        agree: collective; raises if only some ranks have a further batch, or other samples, see
            :func:`.agreement.on_next_batch`.
        progress: of the training epoch.
        pin_memory: load into pinned memory, from which a GPU copies without the host's waiting.
        predicts: rank and world size, if the loader is for prediction.

    Raises:
        ValueError: if the loader has a distributed sampler, or not one step batch for training.
    """
    if not isinstance(dataloader, DataLoader) or _is_custom(dataloader):
        if isinstance(dataloader, DataLoader):
            _seed_alike(dataloader, seed_workers=seed_workers)
        agree_on_batch = partial(agree, f"the loader {type(dataloader).__name__}")
        return WholeBatches(dataloader, share, check, agree_on_batch, progress)
    # a loader that was given a batch sampler has only the defaults itself
    batching = dataloader if dataloader.batch_size is not None else dataloader.batch_sampler
    batch_size, sampler = batching.batch_size, batching.sampler
    pad_last = not train and not batching.drop_last
    draw_alike(sampler)
    check(batch_size)
    collate = dataloader.collate_fn
    if share.elsewhere:
        # here, as workers and pinned memory are spared them then
        collate = partial(_collate_without, collate, share.elsewhere)
    if pad_last:
        collate = partial(_collate_marked, collate)
    settings = _worker_settings(dataloader, share.lane, seed_workers=seed_workers)
    settings |= {"collate_fn": collate, "pin_memory": dataloader.pin_memory or pin_memory}
    agree_on_data = partial(agree, f"the data set {type(dataloader.dataset).__name__}")
    if isinstance(dataloader.dataset, IterableDataset):
        stream = ShareOfStream(dataloader.dataset, batch_size, share.positions(batch_size), pad_last=pad_last)
        return StreamLoader(DataLoader(stream, len(stream.positions), **settings), agree_on_data, progress)
    agree_on_order = partial(agree, f"the sampler {sampler_name(sampler)}")
    batches = ShareSampler(sampler, batch_size, share, agree_on_order, pad_last=pad_last)
    if len(batches) == 0:
        raise ValueError(f"the data set's {len(sampler)} samples do not fill one step batch of {batch_size}")
    if predicts is not None:
        batches = PredictedIndices(batches, *predicts)
    dataset = _MarksPadding(dataloader.dataset) if pad_last else dataloader.dataset
    return ShareDataLoader(dataset, batches, agree_on_data, progress, **settings)


def _is_custom(dataloader: DataLoader) -> bool:
    """Whether samples do not come as ``DataLoader`` itself would fetch them."""
    batch_sampler = dataloader.batch_sampler
    if isinstance(batch_sampler, IndexBatchSampler):
        # Lightning wraps it for prediction
        batch_sampler = batch_sampler._batch_sampler
    return (
        type(dataloader).__iter__ is not DataLoader.__iter__
        or hasattr(dataloader, "state_dict")
        or (dataloader.batch_size is None and type(batch_sampler) is not BatchSampler)
    )


def _worker_settings(dataloader: DataLoader, lane: int, *, seed_workers: bool) -> dict[str, Any]:
    """Arguments of a ``DataLoader`` that loads as ``dataloader`` would, with seeds of this lane."""
    settings = {
        "num_workers": dataloader.num_workers,
        "timeout": dataloader.timeout,
        "generator": dataloader.generator or generator(lane),
    }
    if dataloader.num_workers == 0:
        return settings
    worker_init = dataloader.worker_init_fn
    if worker_init is None and seed_workers:
        worker_init = partial(pl_worker_init_function, rank=lane)
    return settings | {
        "prefetch_factor": dataloader.prefetch_factor,
        "persistent_workers": dataloader.persistent_workers,
        "multiprocessing_context": dataloader.multiprocessing_context,
        "worker_init_fn": worker_init,
    }


def _seed_alike(dataloader: DataLoader, *, seed_workers: bool) -> None:
    """Let every rank draw the same order and the same worker seeds."""
    if dataloader.generator is None:
        dataloader.generator = generator(0)
    draw_alike(dataloader.sampler)
    draw_alike(dataloader.batch_sampler)
    if seed_workers and dataloader.worker_init_fn is None:
        dataloader.worker_init_fn = partial(pl_worker_init_function, rank=0)
