"""Give each rank its share of every step batch of a DataLoader."""

import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, Dataset, Sampler

from mimo_strategy.step_batch import StepShare


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
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, share: StepShare, *, pad_last: bool) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = not pad_last
        self.first = 0
        self._positions = share.positions(batch_size)

    def __len__(self) -> int:
        total = len(self.sampler)
        return total // self.batch_size if self.drop_last else -(-total // self.batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        first, self.first = self.first, 0
        step_batch: list[int] = []
        for index in islice(self.sampler, first * self.batch_size, None):
            step_batch.append(index)
            if len(step_batch) == self.batch_size:
                yield self._share(step_batch, num_real=self.batch_size)
                step_batch = []
        if step_batch and not self.drop_last:
            num_real = len(step_batch)
            repeated = [step_batch[position % num_real] for position in range(self.batch_size)]
            yield self._share(repeated, num_real=num_real)

    def _share(self, step_batch: list[int], num_real: int) -> list[Any]:
        if self.drop_last:
            return [step_batch[position] for position in self._positions]
        return [(step_batch[position], position >= num_real) for position in self._positions]


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


def _collate_marked(collate, marked: list[tuple[Any, bool]]) -> dict[str, Any]:
    samples, is_padding = zip(*marked, strict=True)
    return {**collate(list(samples)), "is_padding": torch.tensor(is_padding)}


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


def share_dataloader(dataloader: DataLoader, share: StepShare, *, train: bool, seed_workers: bool) -> DataLoader:
    """The loader of this rank's share of what ``dataloader`` would yield in one process.

    In training an incomplete last step batch is dropped. Elsewhere it is padded, and batches get a key
    ``is_padding`` ``[samples]``.

    Args:
        dataloader: yields whole step batches; its sampler must give the same order on every rank.
        share: this rank's share.
        train: whether the loader is for training.
        seed_workers: seed the workers by lane, so that ranks that load the same samples augment them alike.

    Raises:
        ValueError: if the loader has no batch size, or not one step batch for training.
    """
    if dataloader.batch_size is None:
        raise ValueError("the DataLoader needs a batch_size: the samples of one optimizer step over all ranks")
    sampler = ShareSampler(dataloader.sampler, dataloader.batch_size, share, pad_last=not train)
    if len(sampler) == 0:
        raise ValueError(
            f"the data set's {len(dataloader.sampler)} samples do not fill one step batch of {dataloader.batch_size}"
        )
    worker_init = dataloader.worker_init_fn
    if worker_init is None and seed_workers:
        worker_init = partial(pl_worker_init_function, rank=share.lane)
    workers = {}
    if dataloader.num_workers > 0:
        workers = {
            "prefetch_factor": dataloader.prefetch_factor,
            "persistent_workers": dataloader.persistent_workers,
            "multiprocessing_context": dataloader.multiprocessing_context,
            "worker_init_fn": worker_init,
        }
    return ShareDataLoader(
        dataloader.dataset if train else _MarksPadding(dataloader.dataset),
        batch_sampler=sampler,
        collate_fn=dataloader.collate_fn if train else partial(_collate_marked, dataloader.collate_fn),
        num_workers=dataloader.num_workers,
        pin_memory=dataloader.pin_memory,
        timeout=dataloader.timeout,
        generator=dataloader.generator or _generator_of_lane(share.lane),
        **workers,
    )


def _generator_of_lane(lane: int) -> torch.Generator:
    """Where the workers' seeds come from; ranks of one lane may have default generators in different states."""
    return torch.Generator().manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)) + lane)
