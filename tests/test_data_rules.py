"""Loaders of every kind: which samples a rank gets, how workers are seeded, and what is refused at once."""

import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import seed_everything
from tiny_runs import Recorder, digits, make_trainer, vision_language
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from datamodules import collate
from mimo_strategy import Layout, MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.dataloading import share_dataloader
from mimo_strategy.step_batch import StepShare
from mimo_strategy.testing import RankError, run_on_ranks

BATCH = 8
RANKS = range(4)
SIZES = vision_language().module_sizes()
LAYOUT = Layout.resolve(SIZES, 4, {"images": P(tp=2, dp=2), "language": P(tp=2, dp=2)})
APART = Layout.resolve(SIZES, 4, {"images": P(dp=2), "language": P(dp=2, rank_offset=2)})


def share(loader: Any, rank: int, train: bool = True, layout: Layout = LAYOUT) -> Any:
    """The loader of one rank of four; ranks of different default generators."""
    torch.manual_seed(rank)
    return share_dataloader(
        loader,
        StepShare(layout, rank, num_microbatches=2),
        train=train,
        seed_workers=True,
        check=partial(layout.check_batch, num_microbatches=2),
        agree=lambda has_batch, num_served: None,
    )


def samples(number: int) -> Subset:
    return Subset(digits().train_dataset, range(number))


class Stream(IterableDataset):
    """Digits one after another; each worker has every so-manieth."""

    def __init__(self, number: int, sized: bool = False) -> None:
        self._samples = samples(number)
        if sized:
            self.__class__ = SizedStream

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return (self._samples[index] for index in range(first, len(self._samples), step))


class SizedStream(Stream):
    def __len__(self):
        return len(self._samples)


class Batches:
    """No DataLoader: whole step batches, with a state of its own."""

    def __init__(self, number: int) -> None:
        self._loader = DataLoader(samples(number), BATCH, collate_fn=collate)
        self.position = 0

    def __iter__(self):
        for number, batch in enumerate(self._loader):
            if number >= self.position:
                self.position = number + 1
                yield batch
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def ids(loader: Any) -> list[list[int]]:
    return [batch["sample_id"].tolist() for batch in loader]


KINDS = {
    "map": lambda number: DataLoader(samples(number), BATCH, collate_fn=collate),
    "stream": lambda number: DataLoader(Stream(number), BATCH, collate_fn=collate),
    "own": Batches,
    "batch-sampler": lambda number: DataLoader(
        samples(number),
        batch_sampler=[list(range(start, min(start + BATCH, number))) for start in range(0, number, BATCH)],
        collate_fn=collate,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_loader_gives_each_lane_its_part_of_each_microbatch(kind):
    for rank in RANKS:
        loader = share(KINDS[kind](19), rank)
        # ranks 0 and 1 are tensor parallel, so are 2 and 3; 16 of 19 samples fill step batches
        first = [0, 1, 4, 5] if rank < 2 else [2, 3, 6, 7]
        assert ids(loader) == [first, [BATCH + index for index in first]], rank
        (images, *_) = (batch["images"] for batch in loader)
        assert torch.equal(images, collate([samples(19)[index] for index in first])["images"])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_run_no_encoder_load_no_images(kind, train):
    for rank in RANKS:
        for batch in share(KINDS[kind](16), rank, train=train, layout=APART):
            assert ("images" in batch) == (rank < 2)
            assert len(batch["num_images"]) == len(batch["input_ids"]) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_outside_of_training_the_last_step_batch_is_padded(kind):
    for rank in RANKS:
        batches = list(share(KINDS[kind](11), rank, train=False))
        assert [len(batch["sample_id"]) for batch in batches] == [4, 4]
        real = [
            sample
            for batch in batches
            for sample, pads in zip(batch["sample_id"].tolist(), batch["is_padding"].tolist(), strict=True)
            if not pads
        ]
        assert real == ([0, 1, 4, 5, 8, 9] if rank < 2 else [2, 3, 6, 7, 10])


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": BATCH, "drop_last": True},
        {"batch_sampler": BatchSampler(SequentialSampler(range(11)), BATCH, drop_last=True)},
    ],
    ids=["loader", "batch-sampler"],
)
def test_a_loader_that_drops_its_last_batch_is_not_padded(settings):
    (batch,) = share(DataLoader(samples(11), collate_fn=collate, **settings), 0, train=False)
    assert "is_padding" not in batch


class OwnIteration(DataLoader):
    """Makes its batches in a way of its own, for all that a strategy can tell."""

    def __iter__(self):
        return super().__iter__()


class OwnBatchSampler(BatchSampler):
    """Makes its batches in a way of its own."""

    def __iter__(self):
        return reversed(list(super().__iter__()))


def in_wrapper(sampler):
    """As Lightning wraps a user's sampler."""
    return DistributedSamplerWrapper(sampler, num_replicas=1, rank=0, shuffle=False)


RANDOM = {
    "shuffle": lambda: {"batch_size": BATCH, "shuffle": True},
    "subset": lambda: {"batch_size": BATCH, "sampler": SubsetRandomSampler(range(24))},
    "weights": lambda: {"batch_size": BATCH, "sampler": WeightedRandomSampler([1.0] * 24, 24, replacement=False)},
    "wrapped": lambda: {"batch_size": BATCH, "sampler": in_wrapper(SubsetRandomSampler(range(24)))},
    "batches": lambda: {"batch_sampler": BatchSampler(SubsetRandomSampler(range(24)), BATCH, drop_last=False)},
    "own-batches": lambda: {"batch_sampler": OwnBatchSampler(SubsetRandomSampler(range(24)), BATCH, drop_last=False)},
}


@pytest.mark.parametrize("loader_class", [DataLoader, OwnIteration])
@pytest.mark.parametrize("kind", RANDOM)
def test_random_orders_are_the_same_on_every_rank(kind, loader_class):
    def shuffled(rank):
        return ids(share(loader_class(samples(24), collate_fn=collate, **RANDOM[kind]()), rank))

    orders = [shuffled(rank) for rank in RANKS]
    assert orders[0] == orders[1] != orders[2] == orders[3]
    whole = sorted(sample for order in (orders[0], orders[2]) for batch in order for sample in batch)
    assert whole == list(range(24)) != orders[0][0] + orders[2][0]


class OfBatches:
    """A data set whose samples are whole step batches."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return collate([digits().train_dataset[BATCH * index + offset] for offset in range(BATCH)])


def test_a_data_set_of_whole_batches_comes_in_the_same_order_on_every_rank():
    first, _, second, _ = (ids(share(DataLoader(OfBatches(), None, shuffle=True), rank)) for rank in RANKS)
    assert [[index + 2 for index in batch] for batch in first] == second
    assert sorted(first) == [[start, start + 1, start + 4, start + 5] for start in range(0, 40, BATCH)] != first


class Augments:
    """Samples with a random mark, drawn in the worker."""

    def __init__(self, number: int) -> None:
        self._samples = samples(number)

    def __len__(self):
        return len(self._samples)

    def __getitem__(self, index):
        return self._samples[index] | {"mark": torch.rand(()).item()}


class AugmentedStream(Stream):
    def __iter__(self):
        return (sample | {"mark": torch.rand(()).item()} for sample in super().__iter__())


@pytest.mark.parametrize("dataset", [Augments, AugmentedStream], ids=["map", "stream"])
def test_workers_draw_alike_on_the_ranks_of_a_lane(dataset, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")

    def marks(rank):
        def with_marks(items):
            return collate(items) | {"mark": torch.tensor([item["mark"] for item in items])}

        loader = DataLoader(dataset(16), BATCH, collate_fn=with_marks, num_workers=2)
        return [batch["mark"].tolist() for batch in share(loader, rank)]

    drawn = [marks(rank) for rank in RANKS]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
    assert len({mark for rank in (0, 2) for batch in drawn[rank] for mark in batch}) == 16


@pytest.mark.parametrize("kind", ["stream", "own", "map"])
def test_a_loader_goes_on_within_an_epoch(kind):
    loader = share(KINDS[kind](40), 0)
    whole = ids(loader)
    assert len(whole) == 5
    served = iter(loader)
    for _ in range(2 if kind == "map" else 3):
        # without a known length, Lightning has fetched one batch more than it trained on
        next(served)
    state = loader.state_dict()
    served.close()
    resumed = share(KINDS[kind](40), 0)
    resumed.load_state_dict(state)
    assert ids(resumed) == whole[2:]
    assert ids(resumed) == whole


def test_a_sized_stream_knows_its_number_of_step_batches():
    assert len(share(DataLoader(Stream(19, sized=True), BATCH, collate_fn=collate), 0)) == 2
    assert len(share(DataLoader(Stream(19, sized=True), BATCH, collate_fn=collate), 0, train=False)) == 3


# ---- under a Trainer


def losses_of(kind: str) -> list[float]:
    seed_everything(2, verbose=False)
    recorder = Recorder()
    strategy = MimoHeteroStrategy({"images": P(tp=2), "language": P(dp=2)}, num_microbatches=2)
    # the schedule of the learning rate asks for the number of steps
    trainer = make_trainer(strategy, max_steps=3, callbacks=[recorder])
    trainer.fit(vision_language("*"), KINDS[kind](24))
    return recorder.steps.losses


def test_training_is_the_same_from_any_kind_of_loader():
    def run():
        return {kind: losses_of(kind) for kind in KINDS}

    for losses in run_on_ranks(run, 2):
        assert len(losses["map"]) == 3
        assert losses == dict.fromkeys(KINDS, losses["map"])


# ---- what ranks must agree on


def fit_differently(difference: str) -> None:
    rank = dist.get_rank()
    strategy = {"modules": None, "num_microbatches": 1}
    number = 16
    if difference == "microbatches":
        strategy["num_microbatches"] = 1 + rank
    if difference == "layout":
        strategy["modules"] = {"images": P(tp=1 + rank), "language": P()}
    if difference in ("map", "stream", "own", "batch-sampler"):
        number = 16 + 8 * rank
    kind = difference if difference in KINDS else "map"
    trainer = make_trainer(MimoHeteroStrategy(**strategy), max_epochs=1)
    trainer.fit(vision_language("*"), KINDS[kind](number))


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("microbatches", "the number of microbatches must be the same on every rank, but is 1 on rank.* 0, 2 on rank"),
        ("layout", "the layout must be the same on every rank"),
        ("map", "the number of step batches of the train loader .* but is 2 on rank.* 0, 3 on rank.* 1"),
        ("batch-sampler", "number of step batches of the train loader"),
        ("stream", r"the loader of rank\(s\) \[0\] ended after 2 step batches"),
        ("own", r"the loader of rank\(s\) \[0\] ended after 2 step batches"),
    ],
)
def test_ranks_that_differ_are_told_within_seconds(difference, message):
    began = time.monotonic()
    with pytest.raises(RankError, match=message):
        run_on_ranks(fit_differently, 2, difference, timeout=60)
    assert time.monotonic() - began < 45


@pytest.mark.parametrize("loader_class", [DataLoader, OwnIteration])
def test_a_distributed_sampler_is_refused(loader_class):
    data = samples(16)
    loader = loader_class(data, BATCH, sampler=DistributedSampler(data, num_replicas=4, rank=0), collate_fn=collate)
    with pytest.raises(ValueError, match="a DistributedSampler of 4 replicas"):
        share(loader, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": None}, "the batch has images but no num_images"),
        ({"num_images": torch.ones(BATCH)}, "num_images must be .*, got a float32 tensor"),
        ({"num_images": [1] * BATCH}, r"num_images must be .*, got list \[1, 1"),
        ({"num_images": torch.arange(BATCH)}, "8 images, but num_images adds up to 28"),
        ({"images": [torch.zeros(3, 16, 16)] * BATCH}, "images must be one tensor of the items of all samples"),
        ({"labels": torch.zeros(4, 24)}, r"labels must have the shape \[8, 24\] of input_ids"),
        ({"input_ids": None}, "the batch has no input_ids"),
        ({"note": torch.tensor(2.0)}, "note must have an entry per sample"),
        ({"note": 3}, "note must have an entry per sample"),
    ],
)
def test_whole_step_batches_of_another_form_are_refused_before_they_are_cut(change, message):
    batch = collate([samples(BATCH)[index] for index in range(BATCH)]) | change
    batch = {name: value for name, value in batch.items() if value is not None}
    for rank in RANKS:
        with pytest.raises((TypeError, ValueError), match=message):
            ids(share([batch], rank, layout=APART))


def test_what_is_no_batch_is_refused():
    with pytest.raises(TypeError, match="a batch must be a dict of tensors by name, got Tensor"):
        ids(share([torch.ones(3)], 0))
    for train in (True, False):
        (batch,) = share(DataLoader(samples(BATCH), BATCH, collate_fn=list), 0, train=train)
        with pytest.raises(TypeError, match="a batch must be a dict of tensors by name, got list"):
            vision_language().check_batch(batch)


def test_batches_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="the step batch of 6 samples must be a multiple"):
        ids(share([collate([samples(6)[index] for index in range(6)])], 0))
