"""Loaders of every kind: which samples a rank gets, how workers are seeded, and what is refused at once."""

import random
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import Recorder, digits, make_trainer, vision_language
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
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
from mimo_strategy.lightning_private import BatchProgress, IndexBatchSampler
from mimo_strategy.step_batch import StepShare
from mimo_strategy.testing import RankError, run_on_ranks

BATCH = 8
RANKS = range(4)
SIZES = vision_language().module_sizes()
LAYOUT = Layout.resolve(SIZES, 4, {"images": P(tp=2, dp=2), "language": P(tp=2, dp=2)})
APART = Layout.resolve(SIZES, 4, {"images": P(dp=2), "language": P(dp=2, rank_offset=2)})


def share(
    loader: Any, rank: int, train: bool = True, layout: Layout = LAYOUT, progress: BatchProgress | None = None
) -> Any:
    """The loader of one rank of four; ranks of different default generators."""
    torch.manual_seed(rank)
    return share_dataloader(
        loader,
        StepShare(layout, rank, num_microbatches=2),
        train=train,
        seed_workers=True,
        check=partial(layout.check_batch, num_microbatches=2),
        agree=lambda source, num_served, samples: None,
        progress=progress or BatchProgress(),
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


class OwnIteration(DataLoader):
    """Makes its batches in a way of its own, for all that a strategy can tell."""

    def __iter__(self):
        return super().__iter__()


class Batches:
    """No DataLoader: whole step batches, with a state of its own."""

    def __init__(self, number: int, sized: bool = False) -> None:
        self._loader = DataLoader(samples(number), BATCH, collate_fn=collate)
        self.position = 0
        if sized:
            self.__class__ = SizedBatches

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


class SizedBatches(Batches):
    def __len__(self):
        return len(self._loader)


def ids(loader: Any) -> list[list[int]]:
    return [batch["sample_id"].tolist() for batch in loader]


# a loader whose step batches the strategy makes of samples drops what does not fill one
OF_SAMPLES = {
    "map": lambda number: DataLoader(samples(number), BATCH, collate_fn=collate),
    "stream": lambda number: DataLoader(Stream(number), BATCH, collate_fn=collate),
    "sized-stream": lambda number: DataLoader(Stream(number, sized=True), BATCH, collate_fn=collate),
}
OF_BATCHES = {
    "own": Batches,
    "sized-own": lambda number: Batches(number, sized=True),
    "own-iteration": lambda number: OwnIteration(samples(number), BATCH, collate_fn=collate),
    "batch-sampler": lambda number: DataLoader(
        samples(number),
        batch_sampler=[list(range(start, min(start + BATCH, number))) for start in range(0, number, BATCH)],
        collate_fn=collate,
    ),
}
KINDS = OF_SAMPLES | OF_BATCHES
UNSIZED = ("stream", "own")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_loader_gives_each_lane_its_part_of_each_microbatch(kind):
    for rank in RANKS:
        loader = share(KINDS[kind](16), rank)
        # ranks 0 and 1 are tensor parallel, so are 2 and 3
        first = [0, 1, 4, 5] if rank < 2 else [2, 3, 6, 7]
        assert ids(loader) == [first, [BATCH + index for index in first]], rank
        (images, *_) = (batch["images"] for batch in loader)
        assert torch.equal(images, collate([samples(19)[index] for index in first])["images"])


@pytest.mark.parametrize("kind", OF_SAMPLES)
def test_training_drops_samples_that_fill_no_step_batch(kind):
    loader = share(KINDS[kind](19), 0)
    assert len(ids(loader)) == 2
    assert sized_len(loader) == (None if kind in UNSIZED else 2)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_run_no_encoder_load_no_images(kind, train):
    for rank in RANKS:
        for batch in share(KINDS[kind](16), rank, train=train, layout=APART):
            assert ("images" in batch) == (rank < 2)
            assert len(batch["num_images"]) == len(batch["input_ids"]) == 4


@pytest.mark.parametrize(
    ("kind", "train"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in OF_BATCHES)]
)
def test_a_last_step_batch_that_is_not_whole_is_padded(kind, train):
    for rank in RANKS:
        loader = share(KINDS[kind](11), rank, train=train)
        batches = list(loader)
        assert sized_len(loader) == (None if kind in UNSIZED else 2)
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


class OwnBatchSampler(BatchSampler):
    """Makes its batches in a way of its own."""

    def __iter__(self):
        return reversed(list(super().__iter__()))


@pytest.mark.parametrize("in_prediction", [False, True])
def test_a_batch_sampler_of_ones_own_makes_the_step_batches(in_prediction):
    batch_sampler = OwnBatchSampler(SequentialSampler(range(16)), BATCH, drop_last=False)
    if in_prediction:
        # as Lightning wraps it
        batch_sampler = IndexBatchSampler(batch_sampler)
    loader = share(DataLoader(samples(16), batch_sampler=batch_sampler, collate_fn=collate), 0, train=False)
    assert ids(loader) == [[8, 9, 12, 13], [0, 1, 4, 5]]


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

    def __init__(self) -> None:
        self._samples = samples(40)

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return collate([self._samples[BATCH * index + offset] for offset in range(BATCH)])


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


def train_on(loader: Any, num_batches: int, progress: BatchProgress) -> None:
    """What Lightning does in an epoch: without a known length it has fetched one batch more than it trained on."""
    progress.current.reset()
    length = sized_len(loader)
    batches = iter(loader)
    ahead = next(batches) if length is None else None
    for number in range(1, num_batches + 1):
        ahead = next(batches, None)
        progress.is_last_batch = number == length if length else ahead is None
        progress.increment_ready()
        progress.increment_processed()


@pytest.mark.parametrize("num_batches", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_goes_on_within_an_epoch(kind, num_batches):
    # the last of four is not whole in one that makes step batches itself
    number = 32 if kind in OF_SAMPLES else 29
    progress = BatchProgress()
    loader = share(KINDS[kind](number), 0, progress=progress)
    whole = ids(loader)
    assert len(whole) == 4
    train_on(loader, num_batches, progress)
    state = loader.state_dict()
    for _ in range(2):
        resumed = share(KINDS[kind](number), 0, progress=progress)
        resumed.load_state_dict(state)
        # also of one that has not begun yet
        state = resumed.state_dict()
    assert ids(resumed) == whole[num_batches % 4 :]
    assert ids(resumed) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_failed_is_made_again(kind):
    progress = BatchProgress()
    loader = share(KINDS[kind](32), 0, progress=progress)
    *_, last = whole = ids(loader)
    train_on(loader, len(whole), progress)
    # the last one began, as did those before, but its end was not seen
    progress.current.processed -= 1
    resumed = share(KINDS[kind](32), 0)
    resumed.load_state_dict(loader.state_dict())
    assert ids(resumed) == [last]


def test_how_many_step_batches_a_stream_has_is_not_known_with_workers_that_share_it():
    def length(num_workers):
        loader = share(DataLoader(Stream(20, sized=True), BATCH, collate_fn=collate, num_workers=num_workers), 0)
        return sized_len(loader), len(list(loader))

    # each of three has 7 or 6 samples, which fill no step batch
    assert [length(num_workers) for num_workers in (0, 1, 3)] == [(2, 2), (2, 2), (None, 0)]


def test_workers_have_the_settings_of_the_loader():
    def settings(loader):
        names = ("num_workers", "timeout", "prefetch_factor", "persistent_workers", "worker_init_fn", "pin_memory")
        return [getattr(loader, name) for name in names]

    loader = DataLoader(
        samples(BATCH),
        BATCH,
        collate_fn=collate,
        num_workers=3,
        timeout=7,
        prefetch_factor=5,
        persistent_workers=True,
        worker_init_fn=print,
    )
    assert settings(share(loader, 0)) == settings(loader) == [3, 7, 5, True, print, False]


# ---- under a Trainer


class Seen(Callback):
    """What training sees, and how often it is validated."""

    def __init__(self) -> None:
        self.ids: list[list[int]] = []
        self.num_validations = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.ids.append(batch["sample_id"].tolist())

    def on_validation_end(self, trainer, module):
        self.num_validations += 1


def see(
    loader: Any, *val_loaders: Any, ckpt_path: Any = None, callbacks: Any = (), **flags: Any
) -> tuple[Trainer, Seen]:
    seed_everything(2, verbose=False)
    seen = Seen()
    trainer = make_trainer(MimoHeteroStrategy(), callbacks=[seen, *callbacks], num_sanity_val_steps=0, **flags)
    trainer.fit(vision_language("*"), loader, *val_loaders, ckpt_path=ckpt_path)
    return trainer, seen


def losses_of(kind: str, number: int, modules: dict[str, P] | None) -> list[float]:
    """Those of three steps; without ``modules``, in one process."""
    seed_everything(2, verbose=False)
    recorder = Recorder()
    strategy = "auto" if modules is None else MimoHeteroStrategy(modules, num_microbatches=2)
    # the schedule of the learning rate asks for the number of steps
    trainer = make_trainer(strategy, max_steps=3, callbacks=[recorder])
    trainer.fit(vision_language("*"), KINDS[kind](number))
    return recorder.steps.losses


def test_training_is_the_same_from_any_kind_of_loader():
    def run():
        return {kind: losses_of(kind, 24, {"images": P(tp=2), "language": P(dp=2)}) for kind in KINDS}

    for losses in run_on_ranks(run, 2):
        assert len(losses["map"]) == 3
        assert losses == dict.fromkeys(KINDS, losses["map"])


def test_a_last_whole_batch_that_is_not_full_trains_as_in_one_process():
    (alone,) = run_on_ranks(losses_of, 1, "own-iteration", 19, None)
    assert len(alone) == 3

    def run():
        return {kind: losses_of(kind, 19, {"images": P(dp=2), "language": P(dp=2)}) for kind in OF_BATCHES}

    for losses in run_on_ranks(run, 2):
        assert losses == {kind: pytest.approx(alone, rel=2e-6) for kind in OF_BATCHES}


@pytest.mark.parametrize(
    ("kind", "limit"),
    # with a limit Lightning knows the length and fetches none ahead, also from a loader without one
    [*((kind, None) for kind in KINDS), *((kind, 3) for kind in ("map", "stream", "own", "batch-sampler"))],
)
def test_a_resumed_run_trains_on_the_batches_that_were_left(kind, limit, tmp_path):
    def run():
        flags = {"max_steps": 5, "limit_train_batches": limit, "enable_checkpointing": True}
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        _, uninterrupted = see(KINDS[kind](32), callbacks=[keep], **flags)
        assert len(uninterrupted.ids) == 5
        for step in (2, limit or 4):
            _, resumed = see(KINDS[kind](32), ckpt_path=tmp_path / f"step={step}.ckpt", **flags)
            assert resumed.ids == uninterrupted.ids[step:], step

    run_on_ranks(run, 1)


def test_every_epoch_is_validated_and_its_length_known():
    def run():
        found = {}
        for kind in KINDS:
            trainer, seen = see(KINDS[kind](19), KINDS["map"](8), max_epochs=2, limit_val_batches=1)
            found[kind] = len(seen.ids), seen.num_validations, trainer.estimated_stepping_batches
        return found

    (found,) = run_on_ranks(run, 1)
    for kind, (num_steps, num_validations, estimated) in found.items():
        assert (num_steps, num_validations) == (4 if kind in OF_SAMPLES else 6, 2), kind
        assert estimated == (-1 if kind in UNSIZED else num_steps), kind


def test_a_loader_that_makes_its_batches_itself_is_told_the_epoch():
    """So that Lightning's sampler draws another order in each."""

    def run(loader_class, settings):
        loader = loader_class(samples(24), collate_fn=collate, **RANDOM[settings]())
        return see(loader, max_epochs=2, use_distributed_sampler=True)[1].ids

    for settings in ("shuffle", "subset"):
        (orders,) = run_on_ranks(run, 1, DataLoader, settings)
        assert orders[:3] != orders[3:]
        assert run_on_ranks(run, 1, OwnIteration, settings) == [orders]


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


class OwnOrder(Sampler):
    """Draws from a generator that no strategy knows of."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __len__(self):
        return 24

    def __iter__(self):
        return iter(self._random.sample(range(24), 24))


def later(dataset: Any, rank: int) -> Any:
    """The part of a data set that is a rank's; it has as many tokens as any other."""
    return Subset(dataset, range(24 * rank, 24 * (rank + 1)))


class LaterStream(IterableDataset):
    def __init__(self, rank: int) -> None:
        self._samples = later(digits().train_dataset, rank)

    def __iter__(self):
        return (self._samples[index] for index in range(24))


OF_OTHERS = {
    "sampler": lambda rank: DataLoader(samples(24), BATCH, sampler=OwnOrder(rank), collate_fn=collate),
    "data set": lambda rank: DataLoader(later(digits().train_dataset, rank), BATCH, collate_fn=collate),
    "stream": lambda rank: DataLoader(LaterStream(rank), BATCH, collate_fn=collate),
    "loader": lambda rank: OwnIteration(later(digits().train_dataset, rank), BATCH, collate_fn=collate),
}


@pytest.mark.parametrize(
    ("kind", "placement", "message"),
    [
        # lanes have no sample in common, but the order of all of them is known
        ("sampler", "lanes", "the sampler OwnOrder must give every rank the same .*, but sample 0 of step batch 0 is"),
        ("sampler", "wrapped", "the sampler OwnOrder must give every rank the same samples"),
        ("sampler", "evaluation", "the sampler OwnOrder must give every rank the same samples"),
        ("data set", "apart", r"the data set Subset .* is 0 on rank\(s\) 0, 24 on rank\(s\) 1"),
        ("data set", "evaluation", r"the data set Subset .* is 0 on rank\(s\) 0, 24 on rank\(s\) 1"),
        ("stream", "apart", r"the data set LaterStream .* is 0 on rank\(s\) 0, 24 on rank\(s\) 1"),
        ("loader", "apart", r"the loader OwnIteration .* is 0 on rank\(s\) 0, 24 on rank\(s\) 1"),
    ],
)
def test_ranks_that_got_other_samples_are_told_within_seconds(kind, placement, message):
    def run():
        modules = {"images": P(dp=2), "language": P(dp=2)}
        if placement == "apart":
            modules = {"images": P(dp=1), "language": P(dp=1, rank_offset=1)}
        elif placement == "evaluation":
            modules = {"images": P(tp=2), "language": P(tp=2)}
        loader = OF_OTHERS[kind](dist.get_rank())
        wrapped = placement == "wrapped"
        trainer = make_trainer(
            MimoHeteroStrategy(modules), max_steps=1, limit_val_batches=1, use_distributed_sampler=wrapped
        )
        if placement == "evaluation":
            trainer.validate(vision_language("*"), loader, verbose=False)
        else:
            trainer.fit(vision_language("*"), loader)

    began = time.monotonic()
    with pytest.raises(RankError, match=message):
        run_on_ranks(run, 2, timeout=60)
    assert time.monotonic() - began < 45


def test_every_epoch_begins_with_the_same_samples_on_every_rank():
    """Once an epoch, and not with every step, which would take time."""
    asked = []

    def agree(source, num_served, known):
        asked.append((source, num_served, known))

    loader = share_dataloader(
        DataLoader(samples(24), BATCH, collate_fn=collate),
        StepShare(LAYOUT, 3, num_microbatches=2),
        train=True,
        seed_workers=False,
        check=lambda batch_size: None,
        agree=agree,
        progress=BatchProgress(),
    )
    in_order = ("the sampler SequentialSampler", 0, {index: index for index in range(BATCH)})
    loaded = ("the data set Subset", 0, {index: index for index in (2, 3, 6, 7)})
    assert len(list(loader)) == len(list(loader)) == 3
    assert asked == [in_order, loaded] * 2


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
