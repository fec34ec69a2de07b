"""Every lane takes its contiguous part of every microbatch, and all lanes of a module together the whole step batch."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mimo_strategy.dataloading import ShareSampler, share_dataloader
from mimo_strategy.generation import gather_lanes
from mimo_strategy.layout import LANGUAGE, Layout, ModuleParallel, ModuleSizes
from mimo_strategy.lightning_private import BatchProgress
from mimo_strategy.step_batch import StepShare, count_items, identified
from mimo_strategy.testing import run_on_ranks
from mimo_strategy.topology import Topology

P = ModuleParallel

LAYOUTS = {
    "text-only": (4, {LANGUAGE: P(tp=2)}),
    "text-only-pipelined": (8, {LANGUAGE: P(tp=2, pp=2)}),
    "colocated-equal": (4, {"images": P(), LANGUAGE: P(ep=2)}),
    "colocated-equal-tp": (4, {"images": P(tp=2), LANGUAGE: P(tp=2)}),
    "colocated-fan-in": (8, {"images": P(), LANGUAGE: P(tp=4)}),
    "colocated-fan-in-to-one": (4, {"images": P(tp=2), LANGUAGE: P(tp=4)}),
    "colocated-fan-out": (8, {"images": P(tp=4), LANGUAGE: P(tp=2)}),
    "colocated-fan-out-from-one": (4, {"images": P(tp=4), LANGUAGE: P()}),
    "colocated-two-encoders": (4, {"images": P(), "audio": P(tp=4), LANGUAGE: P(tp=2)}),
    "apart-equal": (6, {"images": P(dp=2), LANGUAGE: P(tp=2, rank_offset=2)}),
    "apart-fan-in": (6, {"images": P(dp=4), LANGUAGE: P(rank_offset=4)}),
    "apart-fan-in-pipelined": (8, {"images": P(dp=4), LANGUAGE: P(tp=2, pp=2, rank_offset=4)}),
    "apart-fan-out": (6, {"images": P(tp=2, dp=1), LANGUAGE: P(pp=2, rank_offset=2)}),
    "apart-language-first": (8, {"images": P(tp=2, rank_offset=4), LANGUAGE: P(dp=4)}),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
microbatching = pytest.mark.parametrize("num_microbatches", [1, 3])


@pytest.fixture
def layout(request) -> Layout:
    world_size, modules = LAYOUTS[request.param]
    return make_layout(world_size, modules)


def make_layout(world_size, modules):
    sizes = {name: ModuleSizes(num_experts=2, pp_stages=frozenset({1, 2})) for name in modules}
    return Layout.resolve(sizes, world_size, modules)


def lanes_of(module):
    """Lane of every rank of a module, enumerated on its own: tp varies faster than dp, pp slower."""
    lanes = np.arange(module.dp).reshape(1, -1, 1)
    shape = (module.pp, module.dp, module.tp)
    return dict(zip(module.ranks, np.broadcast_to(lanes, shape).flatten().tolist(), strict=True))


def blocks(batch_size, num_microbatches, dp):
    """Sample ids by microbatch and lane."""
    return np.arange(batch_size).reshape(num_microbatches, dp, -1).tolist()


def make_batch(sample_ids, encoders):
    """Every sample has 0 to 3 items per encoder, and every item tells whose it is."""
    batch = {
        "input_ids": torch.tensor(sample_ids)[:, None].expand(-1, 5),
        "sample_id": torch.tensor(sample_ids),
        "names": [f"sample {sample}" for sample in sample_ids],
    }
    for encoder in encoders:
        counts = [num_items(encoder, sample) for sample in sample_ids]
        batch[f"num_{encoder}"] = torch.tensor(counts)
        batch[encoder] = torch.tensor(items_of(encoder, sample_ids)).reshape(-1, 2)
    return batch


def num_items(encoder, sample):
    return (sample * sample + len(encoder) + sample // 3) % 4


def items_of(encoder, sample_ids):
    return [[sample, item] for sample in sample_ids for item in range(num_items(encoder, sample))]


def test_samples_have_different_numbers_of_items():
    assert {num_items("images", sample) for sample in range(24)} == {0, 1, 2, 3}


@layouts
@microbatching
def test_every_rank_runs_the_block_of_its_lane_in_every_microbatch(layout, num_microbatches):
    batch_size = 2 * num_microbatches * layout.largest_dp
    encoders = [name for name in layout.modules if name != LANGUAGE]
    lanes = {name: lanes_of(module) for name, module in layout.modules.items()}
    for rank in range(layout.world_size):
        share = StepShare(layout, rank, num_microbatches)
        microbatches = share.microbatches(make_batch(share.positions(batch_size), encoders))
        assert len(microbatches) == num_microbatches
        for name, module in layout.modules.items():
            if rank not in module.ranks:
                continue
            lane = lanes[name][rank]
            for microbatch, block in zip(microbatches, blocks(batch_size, num_microbatches, module.dp), strict=True):
                if name == LANGUAGE:
                    assert microbatch["sample_id"].tolist() == block[lane]
                    assert microbatch["input_ids"][:, 0].tolist() == block[lane]
                    assert microbatch["names"] == [f"sample {sample}" for sample in block[lane]]
                    for encoder in encoders:
                        assert microbatch[f"num_{encoder}"].tolist() == [num_items(encoder, s) for s in block[lane]]
                else:
                    assert microbatch[name].tolist() == items_of(name, block[lane])


@layouts
@microbatching
def test_ranks_load_no_more_than_the_blocks_of_their_lanes(layout, num_microbatches):
    batch_size = 2 * num_microbatches * layout.largest_dp
    for rank in range(layout.world_size):
        needed = set()
        for module in layout.modules.values():
            if rank in module.ranks:
                lane = lanes_of(module)[rank]
                needed |= {s for parts in blocks(batch_size, num_microbatches, module.dp) for s in parts[lane]}
        assert StepShare(layout, rank, num_microbatches).positions(batch_size) == sorted(needed)


@layouts
def test_language_rows_are_those_of_the_lane_of_the_language_model(layout):
    batch_size, num_microbatches = 24, 3
    language = layout.modules[LANGUAGE]
    lanes = lanes_of(language)
    for rank in range(layout.world_size):
        share = StepShare(layout, rank, num_microbatches)
        loaded = torch.tensor(share.positions(batch_size))[:, None].expand(-1, 2)
        rows = share.language_rows(loaded)
        if rank in language.ranks:
            expected = [s for parts in blocks(batch_size, num_microbatches, language.dp) for s in parts[lanes[rank]]]
        else:
            expected = [0] * (batch_size // language.dp)
        assert rows.tolist() == [[sample, sample] for sample in expected]


@pytest.mark.parametrize("name", ["colocated-fan-in", "colocated-fan-out", "apart-fan-in-pipelined", "apart-fan-out"])
def test_lanes_are_put_together_in_the_order_of_the_step_batch(name):
    world_size, modules = LAYOUTS[name]
    layout = make_layout(world_size, modules)

    def gather():
        topology = Topology(layout)
        share = StepShare(layout, topology.rank, 2)
        language = layout.modules[LANGUAGE]
        rows = share.language_rows(torch.tensor(share.positions(16)))
        # only what the last stage has may count
        if topology.rank in language.ranks and language.coordinates(topology.rank)["pp"] < language.pp - 1:
            rows = torch.full_like(rows, -1)
        gathered = gather_lanes(torch.stack([rows, -rows], dim=1), topology, 2)
        topology.destroy()
        return gathered.tolist()

    assert run_on_ranks(gather, world_size) == [[[sample, -sample] for sample in range(16)]] * world_size


def test_microbatches_of_text_have_no_items():
    layout = make_layout(4, {"images": P(), LANGUAGE: P(tp=4)})
    first, second = StepShare(layout, 3, 2).microbatches(make_batch(range(8), encoders=[]))
    assert first.keys() == second.keys() == {"input_ids", "sample_id", "names"}
    assert second["sample_id"].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("num_samples", [0, 4, 6, 9])
def test_samples_that_cannot_be_cut_evenly_are_refused(num_samples):
    share = StepShare(make_layout(4, {"images": P(), LANGUAGE: P(tp=4)}), 0, 2)
    said = rf"this rank's {num_samples} samples .* 8 equal parts \(2 microbatches x 4 lanes\)"
    with pytest.raises(ValueError, match=said):
        share.microbatches(make_batch(range(num_samples), ["images"]))


@layouts
@microbatching
def test_bridged_lanes_agree_on_the_tokens_that_they_exchange(layout, num_microbatches):
    batch_size = 2 * num_microbatches * layout.largest_dp
    encoders = [name for name in layout.modules if name != LANGUAGE]
    token_ids = {name: 1000 + position for position, name in enumerate(encoders)}
    lanes = {name: lanes_of(module) for name, module in layout.modules.items()}
    for rank in range(layout.world_size):
        share = StepShare(layout, rank, num_microbatches)
        batch = make_batch(share.positions(batch_size), encoders)
        batch["input_ids"] = places_of_items(batch["sample_id"].tolist(), token_ids)
        counted = share.bridge_parts(batch | count_items(batch, token_ids))
        assert len(counted) == num_microbatches
        for microbatch, parts in enumerate(counted):
            assert parts.keys() == {
                name for name in encoders if rank in (*layout.modules[name].ranks, *layout.modules[LANGUAGE].ranks)
            }
            for name in parts:
                sides = {side: layout.modules[side] for side in (name, LANGUAGE)}
                known = max(
                    (
                        blocks(batch_size, num_microbatches, side.dp)[microbatch][lanes[module][rank]]
                        for module, side in sides.items()
                        if rank in side.ranks
                    ),
                    key=len,
                )
                finest = blocks(batch_size, num_microbatches, max(side.dp for side in sides.values()))[microbatch]
                assert parts[name] == [
                    sum(2 * num_items(name, sample) for sample in block) for block in finest if set(block) <= set(known)
                ]


def places_of_items(sample_ids, token_ids):
    """``input_ids`` in which every item has two places."""
    input_ids = torch.zeros(len(sample_ids), 6 * len(token_ids), dtype=torch.long)
    for row, sample in zip(input_ids, sample_ids, strict=True):
        for name, token_id in token_ids.items():
            row[torch.nonzero(row == 0)[: 2 * num_items(name, sample)]] = token_id
    return input_ids


def check(batch):
    count_items(batch, {"images": 1000})


@pytest.fixture
def batch():
    """Samples with 2, 3 and 2 items, and one without."""
    assert [num_items("images", sample) for sample in range(4)] == [2, 3, 2, 0]
    return make_batch(range(4), ["images"]) | {"input_ids": places_of_items(range(4), {"images": 1000})}


def test_items_must_be_as_many_as_counted(batch):
    check(batch)
    with pytest.raises(ValueError, match="6 images, but num_images adds up to 7"):
        check(batch | {"images": batch["images"][1:]})
    with pytest.raises(ValueError, match=r"num_images has shape \[3\], but the batch has 4 samples"):
        check(batch | {"num_images": batch["num_images"][:3]})


@pytest.mark.parametrize("key", ["images", "num_images"])
def test_items_and_counts_must_be_there_even_if_there_are_none(batch, key):
    text = batch | {"input_ids": torch.zeros(4, 6), "images": batch["images"][:0], "num_images": torch.zeros(4)}
    check(text)
    del text[key]
    with pytest.raises(ValueError, match=rf"the batch has no {key}, only .*'sample_id'.* must hold 0 items"):
        check(text)


def test_samples_have_places_if_and_only_if_they_have_items(batch):
    batch["input_ids"][1] = 0
    with pytest.raises(ValueError, match=r"sample 1 of this rank's 4 has 3 images, .* have 0 places .*\(token 1000\)"):
        check(batch)
    batch["input_ids"][[1, 3], 2] = 1000
    with pytest.raises(ValueError, match=r"sample 3 of this rank's 4 has 0 images, .* have 1 places"):
        check(batch)


def test_samples_are_identified_by_their_position_where_they_can_be():
    assert identified(make_batch([4, 9], []), [1, 3]) == {1: 4, 3: 9}
    for ids in (torch.tensor(4), torch.ones(2, 2), ["four", "nine"]):
        assert identified({"sample_id": ids}, [1, 3]) == {}
    assert identified({}, [1, 3]) == identified([torch.ones(2)], [1, 3]) == {}


class Numbers(Dataset):
    """``size`` samples with their index and what a random augmentation would draw."""

    unit = "sample"

    def __init__(self, size):
        self._size = size

    def __len__(self):
        return self._size

    def __getitem__(self, index):
        return {"sample": index, "torch": torch.randint(2**31, ()).item(), "numpy": np.random.randint(2**31)}


class ByHand:
    """A sampler with an order of its own."""

    def __init__(self, order):
        self._order = order

    def __len__(self):
        return len(self._order)

    def __iter__(self):
        return iter(self._order)


def shared_loaders(layout, num_samples, batch_size, *, train, seed_workers=True, **options):
    """The loader of every rank over one shuffled order, and that order."""
    dataset = Numbers(num_samples)
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0, seed=5)
    loader = DataLoader(dataset, batch_size, sampler=sampler, **options)
    shares = [StepShare(layout, rank, 2) for rank in range(layout.world_size)]
    alone = {"check": lambda batch_size: None, "agree": lambda source, num_served, samples: None}
    alone["progress"] = BatchProgress()
    loaders = [share_dataloader(loader, share, train=train, seed_workers=seed_workers, **alone) for share in shares]
    return loaders, list(sampler)


def load(loader, rank):
    # ranks come here with random states of their own
    torch.manual_seed(rank)
    return list(loader)


@pytest.mark.parametrize("layout", ["colocated-fan-in-to-one", "apart-fan-out"], indirect=True)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_takes_whole_step_batches_of_one_order(layout, num_workers):
    loaders, order = shared_loaders(layout, 21, 8, train=True, num_workers=num_workers)
    assert sorted(order) == list(range(21)) != order
    for rank, loader in enumerate(loaders):
        positions = StepShare(layout, rank, 2).positions(8)
        assert len(loader) == 2
        batches = load(loader, rank)
        assert [batch["sample"].tolist() for batch in batches] == [
            [order[start + position] for position in positions] for start in (0, 8)
        ]
        assert all("is_padding" not in batch for batch in batches)


@pytest.mark.parametrize("layout", ["colocated-fan-in-to-one", "apart-fan-out"], indirect=True)
@pytest.mark.parametrize(("num_samples", "num_workers"), [(16, 0), (17, 0), (21, 0), (21, 2)])
def test_evaluation_sees_every_sample_once_beside_marked_padding(layout, num_workers, num_samples):
    loaders, order = shared_loaders(layout, num_samples, 8, train=False, num_workers=num_workers)
    num_steps = -(-num_samples // 8)
    loaded = [load(loader, rank) for rank, loader in enumerate(loaders)]
    for module in layout.modules.values():
        seen = []
        rank_of_lane = {lane: rank for rank, lane in lanes_of(module).items()}
        for step in range(num_steps):
            at = {}
            for rank in rank_of_lane.values():
                batch = loaded[rank][step]
                marked = zip(batch["sample"].tolist(), batch["is_padding"].tolist(), strict=True)
                at.update(zip(StepShare(layout, rank, 2).positions(8), marked, strict=True))
            assert sorted(at) == list(range(8))
            seen += [at[position] for position in range(8)]
        assert [sample for sample, is_padding in seen if not is_padding] == order
        assert len(seen) == 8 * num_steps
    assert all(len(loader) == len(batches) == num_steps for loader, batches in zip(loaders, loaded, strict=True))


def test_a_set_smaller_than_a_step_batch_is_evaluated_but_not_trained_on():
    layout = make_layout(4, {LANGUAGE: P()})
    loaders, order = shared_loaders(layout, 3, 8, train=False)
    marked = []
    for rank, loader in enumerate(loaders):
        (batch,) = load(loader, rank)
        marked += zip(batch["sample"].tolist(), batch["is_padding"].tolist(), strict=True)
    # lane by lane the two microbatches: positions 0 and 4 of the step batch, 1 and 5, ...
    assert [sample for sample, is_padding in marked if not is_padding] == order
    assert len(marked) == 8
    with pytest.raises(ValueError, match="3 samples do not fill one step batch of 8"):
        shared_loaders(layout, 3, 8, train=True)


def test_the_sampler_keeps_a_given_order_and_repeats_it_as_padding():
    share = StepShare(make_layout(2, {LANGUAGE: P()}), 1, 2)
    agreed = []
    settings = (ByHand([7, 3, 5, 1, 2, 9]), 4, share, lambda *known: agreed.append(known))
    batches = ShareSampler(*settings, pad_last=True)
    assert list(batches) == [[(3, False), (1, False)], [(9, False), (9, True)]]
    assert list(ShareSampler(*settings, pad_last=False)) == [[3, 1]]
    # ranks agree on all that the step batch has, once
    assert agreed == [(0, {0: 7, 1: 3, 2: 5, 3: 1})] * 2


@pytest.mark.parametrize("seed_workers", [True, False])
def test_ranks_that_load_the_same_samples_augment_them_alike(seed_workers):
    layout = make_layout(*LAYOUTS["apart-equal"])
    loaders, _ = shared_loaders(layout, 16, 8, train=True, num_workers=1, seed_workers=seed_workers)
    loaded = [load(loader, rank) for rank, loader in enumerate(loaders)]
    for drawn in ("torch", "numpy"):
        first, second, *language = [[batch[drawn].tolist() for batch in batches] for batches in loaded]
        assert language == [first, first, second, second]
        assert first != second


def test_workers_draw_anew_in_every_epoch():
    (loader,), _ = shared_loaders(make_layout(1, {LANGUAGE: P()}), 8, 8, train=True, num_workers=2)
    (first,), (second,) = load(loader, 0), load(loader, 0)
    assert first["torch"].tolist() != second["torch"].tolist()


def test_the_loader_of_evaluation_shows_the_data_set():
    (loader,), _ = shared_loaders(make_layout(1, {LANGUAGE: P()}), 8, 8, train=False)
    assert (len(loader.dataset), loader.dataset.unit) == (8, "sample")
    assert pickle.loads(pickle.dumps(loader.dataset))[3, True][1] is True
    with pytest.raises(AttributeError):
        loader.dataset.colour  # noqa: B018
