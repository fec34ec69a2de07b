"""Samples, lanes and microbatches may have any number of images, none included: training is that of one process."""

import re
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from tiny_runs import OPTIMIZER, OVERLAPPED, PLAIN, make_trainer
from torch.utils.data import DataLoader

from datamodules import MockImageDataModule, collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.runtime.pipeline_bridge import PipelineBridge
from mimo_strategy.testing import RankError, Reference, Tolerances, run_on_ranks
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

IMAGE_TOKEN, SKETCH_TOKEN = 2, 63
BATCH_SIZE = 16

# Images of each sample, a row per step. The halves of a row are its microbatches where there are two, and quarters of
# rows and halves are lanes.
NUM_IMAGES = [
    # lanes without an image beside others, and none next to three
    [0, 3, 0, 0, 1, 2, 3, 1, 0, 0, 0, 0, 2, 0, 1, 3],
    # a microbatch without, then the whole batch, then the other microbatch
    [0, 3, 1, 0, 2, 0, 0, 1, *[0] * 8],
    [0] * 16,
    [*[0] * 8, 3, 3, 0, 0, 0, 0, 1, 2],
    [1, 0, 0, 0, 2, 3, 1, 0, 0, 0, 0, 1, 3, 3, 2, 1],
]

TOLERANCES = Tolerances(loss=2e-6, grad_norm=2e-6, update=1e-4)
# where gradients are small, Adam's steps show the other order in which kernels of GPUs add
GPU_TOLERANCES = replace(TOLERANCES, update=3e-4)


def make_module(module_class=NemotronVLM, **radio) -> NemotronVLM:
    return module_class(
        replace(RadioConfig.tiny(), **radio),
        MambaMoEConfig.tiny(pattern="M*E-"),
        image_token_id=IMAGE_TOKEN,
        end_token_id=1,
        optimizer=OPTIMIZER,
    )


def make_samples(num_images=NUM_IMAGES):
    """Samples with these numbers of images, one row after another."""
    dataset = MockImageDataModule(
        image_size=16,
        tokens_per_image=RadioConfig.tiny().tokens_per_image,
        images_per_sample=(0, 3),
        seq_length=24,
        vocab_size=SKETCH_TOKEN,
        image_token_id=IMAGE_TOKEN,
        batch_size=BATCH_SIZE,
        num_samples=400,
    ).train_dataset
    with_images = [[], [], [], []]
    for sample in dataset:
        with_images[len(sample["images"])].append(sample)
    return [with_images[number].pop() for row in num_images for number in row]


def make_data() -> DataLoader:
    return DataLoader(make_samples(), BATCH_SIZE, collate_fn=collate)


@pytest.fixture(scope="module")
def tolerances(accelerator):
    return TOLERANCES if accelerator == "cpu" else GPU_TOLERANCES


@pytest.fixture(scope="module")
def reference(accelerator):
    return Reference(make_module, make_data, num_steps=len(NUM_IMAGES), accelerator=accelerator)


def test_the_reference_trains_the_encoder_where_there_are_images(reference):
    names = [name for name in reference.start if ".images." in name]
    sizes = [[step.gradients[name].norm().item() for name in names] for step in reference.steps]
    assert [min(gradients) > 0 for gradients in sizes] == [True, True, False, True, True]
    assert max(sizes[2]) == 0


LAYOUTS = {
    "equal": ({"images": P(dp=2), "language": P(dp=2)}, 2),
    "fan-in": ({"images": P(dp=4), "language": P(tp=2, dp=2, ep=2)}, 4),
    "fan-out": ({"images": P(tp=2, dp=2), "language": P(dp=4, ep=2)}, 4),
    "dp1+dp1": ({"images": P(dp=1), "language": P(dp=1, rank_offset=1)}, 2),
    "dp2+dp1": ({"images": P(dp=2), "language": P(dp=1, rank_offset=2)}, 3),
    "dp4+dp2": ({"images": P(dp=4), "language": P(dp=2, rank_offset=4)}, 6),
    "dp1+dp2": ({"images": P(dp=1), "language": P(dp=2, rank_offset=1)}, 3),
    "dp2+pp2": ({"images": P(dp=2), "language": P(pp=2, dp=1, rank_offset=2)}, 4),
}


@pytest.mark.parametrize(
    ("layout", "num_microbatches", "ddp", "scheduling"),
    [
        ("equal", 1, OVERLAPPED, {}),
        ("equal", 4, OVERLAPPED, {"encoder_batching": 2}),
        pytest.param("fan-in", 2, OVERLAPPED, {}, marks=pytest.mark.exhaustive),
        ("fan-in", 4, PLAIN, {"encoder_batching": 4}),
        ("fan-out", 2, None, {"encoder_batching": 2}),
        ("dp1+dp1", 8, OVERLAPPED, {"encoder_ahead": 1}),
        ("dp2+dp1", 1, PLAIN, {}),
        ("dp2+dp1", 4, OVERLAPPED, {"encoder_ahead": 1}),
        ("dp1+dp2", 4, None, {"encoder_ahead": 9}),
        pytest.param("dp4+dp2", 2, OVERLAPPED, {}, marks=pytest.mark.exhaustive),
        ("dp2+pp2", 4, None, {}),
        ("dp2+pp2", 8, None, {"encoder_ahead": 2}),
    ],
    ids=lambda value: {id(OVERLAPPED): "overlapped", id(PLAIN): "plain", id(None): "sharded"}.get(id(value)),
)
def test_training_is_that_of_one_process(reference, tolerances, layout, num_microbatches, ddp, scheduling):
    modules, world_size = LAYOUTS[layout]
    strategy = MimoHeteroStrategy(modules, num_microbatches, ddp=ddp, **scheduling)
    reference.assert_alike(strategy, world_size, tolerances=tolerances)


def test_an_encoder_runs_once_for_the_microbatches_that_it_takes_at_once():
    def count():
        module, runs = make_module(), []
        module.encoder_inputs = lambda name, items: (
            runs.append(len(items)) or NemotronVLM.encoder_inputs(module, name, items)
        )
        fit(module, MimoHeteroStrategy(num_microbatches=4, encoder_batching=2), make_data(), max_steps=1)
        return runs

    halves = [sum(NUM_IMAGES[0][:8]), sum(NUM_IMAGES[0][8:])]
    assert run_on_ranks(count, 1) == [halves]


@pytest.mark.parametrize(("encoder_ahead", "warm_up"), [(0, 2), (1, 3), (9, 4)])
def test_an_encoder_on_ranks_of_its_own_runs_ahead(encoder_ahead, warm_up):
    def order():
        events = []
        receive = PipelineBridge._recv_gradient
        PipelineBridge._recv_gradient = lambda bridge, *args: events.append("gradient") or receive(bridge, *args)
        module = make_module()
        module.encoder_inputs = lambda name, items: (
            events.append("forward") or NemotronVLM.encoder_inputs(module, name, items)
        )
        modules, _ = LAYOUTS["dp1+dp1"]
        fit(module, MimoHeteroStrategy(modules, 4, encoder_ahead=encoder_ahead), make_data(), max_steps=1)
        return events

    events = run_on_ranks(order, 2)[0]
    assert events.count("forward") == events.count("gradient") == 4
    assert events.index("gradient") == warm_up


def test_only_tokens_and_gradients_cross_the_bridge_and_how_many_they_are():
    def count():
        sizes = []
        exchange = torch.distributed.batch_isend_irecv

        def listen(operations):
            sizes.extend(len(operation.tensor) for operation in operations)
            return exchange(operations)

        torch.distributed.batch_isend_irecv = listen
        fit(make_module(), MimoHeteroStrategy(LAYOUTS["dp2+dp1"][0], 2), make_data(), max_steps=1)
        return sizes

    tokens = [RadioConfig.tiny().tokens_per_image * sum(NUM_IMAGES[0][start : start + 4]) for start in range(0, 16, 4)]
    # 2 microbatches, and each lane of the encoder takes half of the samples of each; one half has no images
    assert 0 in tokens
    lanes = [tokens[0], tokens[2]], [tokens[1], tokens[3]], tokens
    numbers = [2], [2], [2, 2]
    for sizes, lane, exchanged in zip(run_on_ranks(count, 3), lanes, numbers, strict=True):
        assert sorted(sizes) == sorted([*exchanged, *filter(None, [*lane, *lane])])


def test_an_encoder_that_got_other_samples_than_the_language_model_ends_all_ranks():
    def train():
        samples = make_samples(NUM_IMAGES[:1])
        if torch.distributed.get_rank() == 1:
            samples = samples[::-1]
        fit(
            make_module(),
            MimoHeteroStrategy(LAYOUTS["dp2+dp1"][0], 2),
            # with their ids it would be told before
            DataLoader(samples, BATCH_SIZE, collate_fn=lambda chosen: without_ids(collate(chosen))),
            max_steps=1,
        )

    with pytest.raises(RankError, match=r"rank 1 is to send \[.*\] images tokens .* every rank must get the same"):
        run_on_ranks(train, 3)


def without_ids(batch):
    return {name: value for name, value in batch.items() if name != "sample_id"}


class TwoEncoders(NemotronVLM):
    """Sees sketches beside images, with an encoder like that of images."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.special_token_ids = {"images": IMAGE_TOKEN, "sketches": SKETCH_TOKEN}

    def module_sizes(self):
        sizes = super().module_sizes()
        return {"images": sizes["images"], "sketches": sizes["images"], "language": sizes["language"]}


def with_sketches(batch):
    """Of each sample's images all but the first become sketches."""
    first = batch["num_images"].cumsum(0) - batch["num_images"]
    is_sketch = torch.ones(len(batch["images"]), dtype=torch.bool)
    is_sketch[first[batch["num_images"] > 0]] = False
    tokens_per_image = RadioConfig.tiny().tokens_per_image
    input_ids = batch["input_ids"]
    places = (input_ids == IMAGE_TOKEN).cumsum(1) > tokens_per_image
    return batch | {
        "input_ids": torch.where(places & (input_ids == IMAGE_TOKEN), SKETCH_TOKEN, input_ids),
        "images": batch["images"][~is_sketch],
        "num_images": batch["num_images"].clamp(max=1),
        "sketches": batch["images"][is_sketch],
        "num_sketches": (batch["num_images"] - 1).clamp(min=0),
    }


@pytest.fixture(scope="module")
def two_encoders(accelerator):
    def data():
        return DataLoader(make_samples(), BATCH_SIZE, collate_fn=lambda chosen: with_sketches(collate(chosen)))

    return Reference(lambda: make_module(TwoEncoders), data, num_steps=3, accelerator=accelerator)


@pytest.mark.parametrize(
    ("modules", "world_size"),
    [
        pytest.param({"images": P(dp=4), "sketches": P(tp=4), "language": P(tp=2, dp=2)}, 4, id="colocated"),
        pytest.param(
            {"images": P(dp=2), "sketches": P(dp=1, rank_offset=2), "language": P(dp=1, pp=2, rank_offset=3)},
            5,
            id="non-colocated",
        ),
    ],
)
def test_encoders_may_differ_in_layout_and_items(two_encoders, tolerances, modules, world_size):
    two_encoders.assert_alike(MimoHeteroStrategy(modules, 2), world_size, tolerances=tolerances)


class Answers(NemotronVLM):
    """Generates for every batch that it is validated on."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.answers = []

    def validation_step(self, batch, batch_idx):
        self.answers.append(self.generate(batch, end_token_id=1).tokens.tolist())
        return super().validation_step(batch, batch_idx)


class Losses(Callback):
    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.train.append(outputs["loss"].item())

    def on_validation_end(self, trainer, module):
        self.val.append(trainer.callback_metrics["val_loss"].item())


def fit(module, strategy, *data, **settings):
    seed_everything(1, verbose=False)
    trainer = make_trainer(strategy, gradient_clip_val=None, limit_val_batches=None, **settings)
    trainer.fit(module, *data)


def train_and_validate(strategy):
    module, losses = make_module(Answers), Losses()
    val_data = DataLoader(make_samples(NUM_IMAGES[:2]), BATCH_SIZE, collate_fn=collate)
    fit(
        module,
        strategy,
        make_data(),
        val_data,
        max_steps=3,
        val_check_interval=1,
        num_sanity_val_steps=0,
        callbacks=[losses],
    )
    return losses.train, losses.val, module.answers


def test_validation_and_generation_between_steps_are_those_of_one_process():
    # without tensor parallelism weights start alike
    modules, world_size = LAYOUTS["dp2+dp1"]
    ((train, val, answers),) = run_on_ranks(train_and_validate, 1, "auto")
    assert len(train) == len(val) == 3
    assert len({tuple(answer) for answer in answers[-1]}) > 1
    strategy = MimoHeteroStrategy(modules, 2)
    for train_of_rank, val_of_rank, answers_of_rank in run_on_ranks(train_and_validate, world_size, strategy):
        assert train_of_rank == pytest.approx(train, rel=TOLERANCES.loss)
        assert val_of_rank == pytest.approx(val, rel=TOLERANCES.loss)
        assert answers_of_rank == answers


@pytest.mark.parametrize("layout", ["fan-in", "fan-out", "dp2+dp1"])
@pytest.mark.parametrize(
    ("num_images", "said"),
    [
        (
            0,
            r"sample \d of this rank's \d+ has 0 images, but its input_ids have 12 places for their tokens \(token 2\)",
        ),
        (
            2,
            r"the images of a microbatch became \d+ tokens, but its input_ids have \d+ places for them \(token 2\)",
        ),
    ],
)
def test_images_that_do_not_fill_their_places_end_all_ranks(layout, num_images, said):
    modules, world_size = LAYOUTS[layout]

    def train():
        samples = make_samples(NUM_IMAGES[:1])
        samples[7] = samples[1] | {"images": samples[1]["images"][:num_images], "sample_id": 77}
        data = DataLoader(samples, BATCH_SIZE, collate_fn=collate)
        fit(make_module(), MimoHeteroStrategy(modules, 2), data, max_steps=1)

    with pytest.raises(RankError, match=said) as ended:
        run_on_ranks(train, world_size)
    if num_images and layout == "dp2+dp1":
        assert re.search(r"; its samples are \[.*\b77\b.*\]", str(ended.value))


def test_ranks_that_share_a_lane_draw_alike_whatever_the_lanes_of_others_hold():
    """RADIO draws crops for each image; here two of its lanes are the tensor parallel ranks of one language lane."""
    modules, world_size = LAYOUTS["fan-in"]

    def drawn():
        module = make_module(random_position_crops=True)
        fit(module, MimoHeteroStrategy(modules), make_data(), max_steps=1)
        language = torch.rand(4).tolist()
        with module.model.rngs["images"].active():
            return language, torch.rand(4).tolist()

    language, images = zip(*run_on_ranks(drawn, world_size), strict=True)
    assert language[0] == language[1]
    assert language[2] == language[3]
    # the lanes drew for different numbers of images
    assert len({tuple(draws) for draws in images}) > 1
