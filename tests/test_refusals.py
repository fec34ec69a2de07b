"""Wrong configurations, drawn at random: each is refused by this package, by a message that names the wrong value."""

import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import callbacks
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_runs import digits, make_trainer, vision_language
from torch.utils.data import DataLoader, Subset

import mimo_strategy
from datamodules import collate
from mimo_strategy import DistributedDataParallelConfig, MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.launcher import CheckingLauncher

PACKAGE = Path(mimo_strategy.__file__).parent
RANKS = 4
VALID = (
    {"images": P(dp=4), "language": P(tp=2, dp=2, ep=2)},
    {"images": P(tp=2, dp=2), "language": P(dp=4, ep=4)},
    {"images": P(dp=2), "language": P(tp=2, dp=1, ep=2, rank_offset=2)},
    {"images": P(dp=2), "language": P(pp=2, dp=1, rank_offset=2)},
)
drawn = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def no_other_rank_starts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckingLauncher, "_call_children_scripts", lambda self: pytest.fail("another rank starts"))
        yield


def refused(attempt: Callable[[], Any], *named: object) -> None:
    """``attempt`` ends with an error raised by a file of this package, whose message shows all of ``named``."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as refusal:
        attempt()
    raised_in = Path(traceback.extract_tb(refusal.value.__traceback__)[-1].filename)
    assert raised_in.is_relative_to(PACKAGE), f"{raised_in}: {refusal.value!r}"
    for value in named:
        assert str(value) in str(refusal.value)


def fit(
    modules: Any = VALID[0],
    num_microbatches: Any = 1,
    batch_size: int = 8,
    arguments: dict[str, Any] | None = None,
    **flags: Any,
) -> None:
    """Would start four ranks, if nothing were wrong."""
    data = DataLoader(Subset(digits().train_dataset, range(16)), batch_size, collate_fn=collate)
    strategy = MimoHeteroStrategy(modules, num_microbatches, **(arguments or {}))
    make_trainer(strategy, max_steps=1, **({"devices": RANKS} | flags)).fit(vision_language(), data)


# ---- layouts


@st.composite
def wrong_layouts(draw) -> tuple[dict[str, Any], tuple[object, ...]]:
    """A layout that fits but for one number, name or value, and what the message must show."""
    modules = dict(draw(st.sampled_from(VALID)))
    name = draw(st.sampled_from(sorted(modules)))
    kind = draw(st.sampled_from(("factor", "no-number", "cp", "offset", "num_ranks", "no-module", "unknown", "type")))
    if kind == "factor":
        # none of these divides four ranks and the sizes of the tiny model
        factor = draw(st.sampled_from(("tp", "dp", "pp", "ep", "etp")))
        value = draw(st.sampled_from((3, 5, 6, 7, 9, 11, 16, 100)))
    elif kind == "no-number":
        factor = draw(st.sampled_from(("tp", "cp", "dp", "pp", "ep", "etp", "num_ranks")))
        value = draw(st.one_of(st.integers(-9, 0), st.floats(0.5, 8, allow_nan=False), st.booleans(), st.text("ab")))
    elif kind == "cp":
        factor, value = "cp", draw(st.sampled_from((2, 4)))
    elif kind == "offset":
        factor, value = "rank_offset", draw(st.one_of(st.integers(4, 50), st.integers(-5, -1)))
    elif kind == "num_ranks":
        factor, value = "num_ranks", draw(st.integers(5, 64))
    elif kind == "no-module":
        del modules[name]
        return modules, (f"missing: ['{name}']",)
    elif kind == "unknown":
        other = draw(st.sampled_from(("audio", "vision", "Language", "")))
        return modules | {other: P()}, (f"unknown: ['{other}']",)
    else:
        value = draw(st.one_of(st.integers(), st.none(), st.just({"tp": 2})))
        return modules | {name: value}, (repr(name), repr(value))
    changed = replace(modules[name], **{factor: value})
    if kind == "num_ranks":
        changed = replace(changed, dp=None)
    return modules | {name: changed}, (name, value)


@drawn
@given(wrong_layouts())
def test_layouts(wrong):
    modules, named = wrong
    refused(lambda: fit(modules), *named)


@settings(drawn, max_examples=30)
@given(st.sampled_from(VALID), st.integers(1, 4), st.integers(1, 33))
def test_batch_sizes(modules, num_microbatches, batch_size):
    needed = num_microbatches * max(parallel.dp for parallel in modules.values())
    batch_size += batch_size % needed == 0
    refused(lambda: fit(modules, num_microbatches, batch_size), batch_size, needed)


@settings(drawn, max_examples=20)
@given(st.one_of(st.integers(-9, 0), st.floats(allow_nan=False), st.text("12"), st.booleans(), st.none()))
def test_numbers_of_microbatches(number):
    refused(lambda: fit(num_microbatches=number), repr(number))


# ---- arguments and flags


class Finetuning(callbacks.BaseFinetuning):
    """The least that is one."""

    def freeze_before_training(self, pl_module):
        pass

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


CALLBACKS = (
    lambda: callbacks.GradientAccumulationScheduler({0: 1}),
    lambda: callbacks.StochasticWeightAveraging(1e-2),
    callbacks.WeightAveraging,
    callbacks.EMAWeightAveraging,
    callbacks.BatchSizeFinder,
    callbacks.LearningRateFinder,
    Finetuning,
    lambda: callbacks.ModelPruning("l1_unstructured"),
    callbacks.SpikeDetection,
    lambda: callbacks.ThroughputMonitor(batch_size_fn=len),
)
DDP = (
    ("use_megatron_fsdp", True),
    ("num_distributed_optimizer_instances", 2),
    ("average_in_collective", True),
    ("fp8_param_gather", True),
)


@st.composite
def wrong_flags(draw) -> tuple[dict[str, Any], tuple[object, ...]]:
    """Arguments of ``fit`` of which one is wrong, and what the message must show."""
    flag = draw(
        st.sampled_from(
            ("accumulate", "clip", "algorithm", "precision", "norm", "callback", "plugin", "timeout", "modules", "ddp")
        )
    )
    if flag == "accumulate":
        number = draw(st.integers(2, 1000))
        return {"accumulate_grad_batches": number}, (number, "num_microbatches")
    if flag == "clip":
        value = draw(st.one_of(st.floats(max_value=-1e-3), st.just(float("nan")), st.just(float("inf"))))
        return {"gradient_clip_val": value}, ("gradient_clip_val", value)
    if flag == "algorithm":
        return {"gradient_clip_algorithm": "value"}, ("'value'",)
    if flag == "precision":
        precision = draw(st.sampled_from(("64-true", "16-true", 64)))
        return {"precision": precision}, (f"{str(precision)[:2]}-true",)
    if flag == "norm":
        return {"sync_batchnorm": True}, ("sync_batchnorm",)
    if flag == "callback":
        callback = draw(st.sampled_from(CALLBACKS))()
        return {"callbacks": [callback]}, (type(callback).__name__,)
    if flag == "plugin":
        return {"plugins": [AsyncCheckpointIO()]}, ("AsyncCheckpointIO",)
    if flag == "timeout":
        value = draw(st.one_of(st.integers(), st.text("1 s"), st.just(timedelta(0)), st.just(timedelta(seconds=-3))))
        return {"arguments": {"timeout": value}}, ("timeout", value if isinstance(value, timedelta) else repr(value))
    if flag == "modules":
        value = draw(st.one_of(st.text("ab"), st.integers(), st.just(["images"])))
        return {"modules": value}, (repr(value),)
    setting, value = draw(st.sampled_from(DDP))
    config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    setattr(config, setting, value)
    return {"arguments": {"ddp": config}}, (setting, value)


@settings(drawn, max_examples=80)
@given(wrong_flags())
def test_arguments_and_flags(wrong):
    settings, named = wrong
    refused(lambda: fit(**settings), *named)


@pytest.mark.parametrize("method", ["spawn", "fork", "notebook"])
def test_launchers_other_than_by_script(method):
    refused(lambda: make_trainer(f"mimo_hetero_{method}", devices=2), method, "devices=1")


def test_a_strategy_that_lightning_does_not_know_is_lightnings_error():
    with pytest.raises((ValueError, MisconfigurationException), match="mimo_hetero_threads"):
        make_trainer("mimo_hetero_threads", devices=2)


# ---- batches


@st.composite
def wrong_batches(draw) -> tuple[Any, tuple[object, ...]]:
    """A batch of digits with one part spoilt, and what the message must show."""
    num_samples = draw(st.integers(1, 5))
    batch = collate([digits().train_dataset[index] for index in range(num_samples)])
    length = batch["input_ids"].shape[1]
    kind = draw(
        st.sampled_from(
            (
                *("no-dict", "no-tokens", "float-tokens", "flat", "labels", "mask", "entries", "scalar", "id", "label"),
                *("long", "no-counts", "float-counts", "negative", "more-counted"),
                *("pixels", "channels", "byte-images", "listed-images"),
            )
        )
    )
    if kind == "no-dict":
        value = draw(st.sampled_from((list(batch.values()), batch["input_ids"], "text", 7)))
        return value, (type(value).__name__,)
    if kind == "no-tokens":
        del batch["input_ids"]
        return batch, ("no input_ids",)
    if kind == "float-tokens":
        return batch | {"input_ids": batch["input_ids"].float()}, ("input_ids", "float32")
    if kind == "flat":
        return batch | {"input_ids": batch["input_ids"].flatten()}, ([num_samples * length],)
    if kind in ("labels", "mask"):
        name = {"labels": "labels", "mask": "loss_mask"}[kind]
        cut = draw(st.integers(1, length - 1))
        return batch | {name: batch[name][:, cut:]}, (name, [num_samples, length - cut])
    if kind == "entries":
        number = draw(st.integers(1, 9).filter(lambda number: number != num_samples))
        name = draw(st.sampled_from(("prompt_length", "sample_id", "num_images", "note")))
        return batch | {name: torch.ones(number, dtype=torch.long)}, (name, number, num_samples)
    if kind == "scalar":
        value = draw(st.sampled_from((3, torch.tensor(2.0))))
        return batch | {"note": value}, ("note",)
    if kind == "id":
        value = draw(st.one_of(st.integers(64, 10**9), st.integers(-(10**9), -1)))
        batch["input_ids"][-1, -1] = value
        return batch, ("input_ids", value)
    if kind == "label":
        value = draw(st.one_of(st.integers(64, 10**9), st.integers(-(10**9), -1)))
        batch["labels"][batch["loss_mask"] > 0] = value
        return batch, ("labels", value)
    if kind == "long":
        longer = draw(st.integers(65, 200))
        grown = {name: torch.ones(num_samples, longer).long() for name in ("input_ids", "labels", "loss_mask")}
        return batch | grown, (longer, 64)
    if kind == "no-counts":
        del batch["num_images"]
        return batch, ("num_images",)
    if kind == "float-counts":
        return batch | {"num_images": batch["num_images"].float()}, ("num_images", "float32")
    if kind == "negative":
        batch["num_images"][0] = value = draw(st.integers(-9, -1))
        return batch, ("num_images", value)
    if kind == "more-counted":
        batch["num_images"][-1] += draw(st.integers(1, 9))
        return batch, (num_samples, int(batch["num_images"].sum()))
    if kind == "pixels":
        height, width = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)).filter(lambda size: size != (16, 16)))
        return batch | {"images": torch.zeros(num_samples, 3, height, width)}, ([num_samples, 3, height, width],)
    if kind == "channels":
        channels = draw(st.integers(1, 9).filter(lambda number: number != 3))
        return batch | {"images": torch.zeros(num_samples, channels, 16, 16)}, ([num_samples, channels, 16, 16],)
    if kind == "listed-images":
        return batch | {"images": list(batch["images"])}, ("images", "list")
    return batch | {"images": batch["images"].byte()}, ("images", "uint8")


@settings(drawn, max_examples=120)
@given(wrong_batches())
def test_batches(wrong):
    batch, named = wrong
    refused(lambda: vision_language().check_batch(batch), *named)


def test_what_the_wrong_ones_are_made_of_is_right():
    """So that each refusal is for what was spoilt."""
    vision_language().check_batch(collate([digits().train_dataset[index] for index in range(3)]))
    for modules in VALID:
        with pytest.raises(BaseException, match="another rank starts"):
            fit(modules)


@pytest.mark.parametrize(
    ("modules", "scheduling", "named"),
    [
        (VALID[0], {"encoder_batching": 3}, ("encoder_batching 3", "num_microbatches 4")),
        (VALID[0], {"encoder_batching": 0}, ("encoder_batching", 0)),
        (VALID[0], {"encoder_batching": 2.0}, ("encoder_batching", 2.0)),
        (VALID[2], {"encoder_batching": 2}, ("encoder_batching 2", "share the ranks of language")),
        (VALID[2], {"encoder_ahead": -1}, ("encoder_ahead", -1)),
        (VALID[2], {"encoder_ahead": 1.0}, ("encoder_ahead", 1.0)),
        (VALID[0], {"encoder_ahead": 1}, ("encoder_ahead 1", "on other ranks than language")),
    ],
)
def test_schedules_that_encoders_cannot_have(modules, scheduling, named):
    refused(lambda: fit(modules, 4, 16, scheduling), *named)
