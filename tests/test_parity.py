"""Whatever the layout, training is the same as in one process under a plain single-device strategy."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from parity import BATCH_SIZE, PATTERN, Steps, distances, read_weights, text_only, train, vision_language

from mimo_strategy import MimoHeteroStrategy, MimoModule
from mimo_strategy import ModuleParallel as P
from mimo_strategy.testing import run_on_ranks

# Single precision, summed in another order, moves loss and norm by about 2e-7 of their size, and each weight
# by about 1e-5 of what training changes in it.
STEP_TOLERANCE = 2e-6
CHANGE_TOLERANCE = 1e-4


@dataclass
class Oracle:
    """A model trained in one process from ``start`` on."""

    start: Path
    steps: Steps
    weights: dict[str, torch.Tensor]
    changes: dict[str, float]


def make_oracle(folder: Path, make_module: Callable[[], MimoModule]) -> Oracle:
    start, end = folder / "start", folder / "end"
    # one step away from the initial weights, where norms and biases are all alike
    run_on_ranks(train, 1, make_module, MimoHeteroStrategy(), None, start, 1)
    (steps,) = run_on_ranks(train, 1, make_module, "auto", start, end)
    weights = read_weights(end)
    return Oracle(start, steps, weights, distances(weights, read_weights(start)))


@pytest.fixture(scope="module")
def vision_language_oracle(tmp_path_factory) -> Oracle:
    return make_oracle(tmp_path_factory.mktemp("vision-language"), vision_language)


@pytest.fixture(scope="module")
def text_oracle(tmp_path_factory) -> Oracle:
    return make_oracle(tmp_path_factory.mktemp("text"), text_only)


def assert_same_training(
    oracle: Oracle,
    make_module: Callable[[], MimoModule],
    end: Path,
    world_size: int,
    modules: dict[str, P] | None,
    num_microbatches: int,
) -> None:
    strategy = MimoHeteroStrategy(modules, num_microbatches)
    every_rank = run_on_ranks(train, world_size, make_module, strategy, oracle.start, end)
    assert every_rank == every_rank[:1] * world_size, "ranks see different losses or norms"
    assert every_rank[0].losses == pytest.approx(oracle.steps.losses, rel=STEP_TOLERANCE)
    assert every_rank[0].grad_norms == pytest.approx(oracle.steps.grad_norms, rel=STEP_TOLERANCE)
    apart = distances(read_weights(end), oracle.weights)
    shares = {name: apart[name] / change for name, change in oracle.changes.items()}
    assert {name: share for name, share in shares.items() if share > CHANGE_TOLERANCE} == {}


def test_the_oracle_changes_every_weight_and_clips(vision_language_oracle):
    assert min(vision_language_oracle.changes.values()) > 1e-3
    assert min(vision_language_oracle.steps.grad_norms) > 1


LAYOUTS = {
    "default": None,
    "fan-in": {"images": P(dp=4), "language": P(tp=2, dp=2, ep=2)},
    "fan-out": {"images": P(tp=2, dp=2), "language": P(dp=4, ep=2)},
    "tp4/tp2-etp2-ep2": {"images": P(tp=4), "language": P(tp=2, etp=2, ep=2)},
    "dp1+dp2": {"images": P(dp=1), "language": P(dp=2, rank_offset=1)},
    "dp2+dp1": {"images": P(dp=2), "language": P(dp=1, rank_offset=2)},
    "dp2+tp2-ep2": {"images": P(dp=2), "language": P(tp=2, dp=1, ep=2, rank_offset=2)},
    "dp2+pp2": {"images": P(dp=2), "language": P(pp=2, dp=1, rank_offset=2)},
    "dp4+tp2-dp2-ep2": {"images": P(dp=4), "language": P(tp=2, dp=2, ep=2, rank_offset=4)},
}


@pytest.mark.parametrize(
    ("layout", "world_size", "num_microbatches"),
    [
        ("default", 1, 1),
        ("default", 1, 2),
        ("default", 2, 1),
        ("default", 3, 2),
        ("default", 4, 1),
        ("default", 8, 1),
        ("fan-in", 4, 2),
        ("fan-out", 4, 1),
        ("tp4/tp2-etp2-ep2", 4, 2),
        ("dp1+dp2", 3, 1),
        ("dp2+dp1", 3, 2),
        ("dp2+tp2-ep2", 4, 2),
        ("dp2+pp2", 4, 2),
        ("dp4+tp2-dp2-ep2", 8, 2),
    ],
    ids=lambda value: str(value),
)
def test_vision_language_model(vision_language_oracle, tmp_path, layout, world_size, num_microbatches):
    assert_same_training(
        vision_language_oracle,
        vision_language,
        tmp_path / "end",
        world_size,
        LAYOUTS[layout],
        num_microbatches,
    )


@pytest.mark.parametrize(
    ("language", "world_size", "num_microbatches"),
    [
        pytest.param(P(dp=2), 2, 1, id="dp2"),
        pytest.param(P(tp=2, ep=2), 2, 2, id="tp2-ep2"),
        pytest.param(P(pp=2), 2, 2, id="pp2"),
        pytest.param(P(pp=2, tp=2, ep=2), 4, 2, id="pp2-tp2-ep2"),
    ],
)
def test_text_only_model(text_oracle, tmp_path, language, world_size, num_microbatches):
    modules = {"language": language}
    assert_same_training(text_oracle, text_only, tmp_path / "end", world_size, modules, num_microbatches)


def test_stages_of_unequal_length(text_oracle, tmp_path):
    uneven = partial(text_only, PATTERN[:2] + "|" + PATTERN[2:])
    assert_same_training(text_oracle, uneven, tmp_path / "end", 2, {"language": P(pp=2)}, 1)


def test_a_lane_without_answers(vision_language_oracle, tmp_path):
    """Lanes weigh by their tokens, also when one of them has none."""
    answered = [sample >= BATCH_SIZE // 2 for sample in range(BATCH_SIZE)]
    run = partial(train, start=vision_language_oracle.start, num_steps=1, answered=answered)
    (plain,) = run_on_ranks(run, 1, vision_language, "auto")
    assert plain.losses != vision_language_oracle.steps.losses[:1]
    for steps in run_on_ranks(run, 2, vision_language, MimoHeteroStrategy()):
        assert steps.losses == pytest.approx(plain.losses, rel=STEP_TOLERANCE)
        assert steps.grad_norms == pytest.approx(plain.grad_norms, rel=STEP_TOLERANCE)
