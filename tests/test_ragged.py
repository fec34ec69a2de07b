"""Samples, lanes and microbatches may have any number of images, none included: training is that of one process."""

import re

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch.utils.data import DataLoader

from datamodules import MockImageDataModule, collate
from mimo_strategy import MimoHeteroStrategy, OptimizerConfig
from mimo_strategy import ModuleParallel as P
from mimo_strategy.testing import RankError, Reference, Tolerances, run_on_ranks
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

IMAGE_TOKEN = 2
BATCH_SIZE = 16

# Images of each sample, a row per step, whose halves are the microbatches of two; lanes are quarters of the whole or
# of a half.
NUM_IMAGES = [
    # lanes without an image beside others, next to no image three
    [0, 3, 0, 0, 1, 2, 3, 1] + [0, 0, 0, 0, 2, 0, 1, 3],
    # a microbatch without, then all, then the other microbatch
    [0, 3, 1, 0, 2, 0, 0, 1] + [0] * 8,
    [0] * 16,
    [0] * 8 + [3, 3, 0, 0, 0, 0, 1, 2],
    [1, 0, 0, 0, 2, 3, 1, 0] + [0, 0, 0, 1, 3, 3, 2, 1],
]

TOLERANCES = Tolerances(loss=2e-6, grad_norm=2e-6, update=1e-4)

PLAIN = DistributedDataParallelConfig(use_distributed_optimizer=False)
# buckets so small that each module has several
OVERLAPPED = DistributedDataParallelConfig(
    use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=20_000
)


def make_module() -> NemotronVLM:
    return NemotronVLM(
        RadioConfig.tiny(),
        MambaMoEConfig.tiny(pattern="M*E-"),
        image_token_id=IMAGE_TOKEN,
        end_token_id=1,
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, adam_eps=1e-6),
    )


def make_data(num_images=NUM_IMAGES, batch_size=BATCH_SIZE) -> DataLoader:
    """Step batches whose samples have these numbers of images."""
    dataset = MockImageDataModule(
        image_size=16,
        tokens_per_image=RadioConfig.tiny().tokens_per_image,
        images_per_sample=(0, 3),
        seq_length=24,
        vocab_size=64,
        image_token_id=IMAGE_TOKEN,
        batch_size=batch_size,
        num_samples=400,
    ).train_dataset
    with_images = [[], [], [], []]
    for sample in dataset:
        with_images[len(sample["images"])].append(sample)
    return DataLoader([with_images[n].pop() for row in num_images for n in row], batch_size, collate_fn=collate)


@pytest.fixture(scope="module")
def reference(accelerator, on_ranks):
    return Reference(make_module, make_data, num_steps=len(NUM_IMAGES), accelerator=accelerator)


def test_the_reference_trains_the_encoder_where_there_are_images(reference):
    names = [name for name in reference.start if ".images." in name]
    sizes = [[step.gradients[name].norm().item() for name in names] for step in reference.steps]
    assert [min(gradients) > 0 for gradients in sizes] == [True, True, False, True, True]
    assert max(sizes[2]) == 0


COLOCATED = {
    "equal": ({"images": P(dp=2), "language": P(dp=2)}, 2),
    "fan-in": ({"images": P(dp=4), "language": P(tp=2, dp=2, ep=2)}, 4),
    "fan-out": ({"images": P(tp=2, dp=2), "language": P(dp=4, ep=2)}, 4),
}
NON_COLOCATED = {
    "dp1+dp2": ({"images": P(dp=1), "language": P(dp=2, rank_offset=1)}, 3),
    "tp2+dp2": ({"images": P(tp=2, dp=1), "language": P(dp=2, rank_offset=2)}, 4),
    "dp2+dp1": ({"images": P(dp=2), "language": P(dp=1, rank_offset=2)}, 3),
    "dp2+tp2": ({"images": P(dp=2), "language": P(tp=2, dp=1, rank_offset=2)}, 4),
    "dp4+dp2": ({"images": P(dp=4), "language": P(dp=2, rank_offset=4)}, 6),
    "dp2+pp2": ({"images": P(dp=2), "language": P(pp=2, dp=1, rank_offset=2)}, 4),
}
LAYOUTS = COLOCATED | NON_COLOCATED


@pytest.mark.parametrize(
    ("layout", "num_microbatches", "ddp"),
    [
        ("equal", 2, None),
        ("equal", 1, OVERLAPPED),
        ("fan-in", 1, None),
        ("fan-in", 2, OVERLAPPED),
        ("fan-out", 2, None),
        ("fan-out", 1, OVERLAPPED),
        ("dp1+dp2", 1, OVERLAPPED),
        ("dp1+dp2", 2, None),
        ("tp2+dp2", 2, None),
        ("dp2+dp1", 1, None),
        ("dp2+tp2", 2, PLAIN),
        ("dp4+dp2", 2, OVERLAPPED),
        ("dp2+pp2", 2, OVERLAPPED),
        ("dp2+pp2", 4, None),
    ],
    ids=lambda value: {id(OVERLAPPED): "overlapped", id(PLAIN): "plain", id(None): "sharded"}.get(id(value)),
)
def test_training_is_that_of_one_process(reference, layout, num_microbatches, ddp):
    modules, world_size = LAYOUTS[layout]
    reference.assert_alike(MimoHeteroStrategy(modules, num_microbatches, ddp=ddp), world_size, tolerances=TOLERANCES)
