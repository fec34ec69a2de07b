"""Layouts that the project exists for, each of them training like one process. The rows are numbered through."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import no_pipelining
import pytest
import torch
import torch.distributed as dist
from gpt_moe import NEMOTRON, GptMoE, GptVLM
from no_global_groups import NoGlobalGroups, assert_no_global_groups
from parity import OPTIMIZER, PATTERN, Steps, digits, distances, read_weights, train

from mimo_strategy import MimoHeteroStrategy, MimoModule
from mimo_strategy import ModuleParallel as P
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

STEP_TOLERANCE, GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 2e-5, 2e-5


def layouts(*cases: tuple[int, dict[str, P], int]):
    """Cases of a row: world size, layout by module, number of microbatches."""
    return pytest.mark.parametrize(
        ("world_size", "modules", "num_microbatches"), [pytest.param(*case, id=f"{case[0]}-ranks") for case in cases]
    )


# ---- the models


def gpt_moe() -> GptVLM:
    return gpt_vlm(GptMoE())


def gpt_nemotron() -> GptVLM:
    return gpt_vlm(NEMOTRON)


def gpt_vlm(language: GptMoE) -> GptVLM:
    return GptVLM(language, RadioConfig.tiny(), digits().vocabulary.image_token_id, OPTIMIZER)


def mamba_moe(projector: str = "affine") -> NemotronVLM:
    vocabulary = digits().vocabulary
    return NemotronVLM(
        RadioConfig.tiny(),
        MambaMoEConfig.tiny(pattern=PATTERN),
        image_token_id=vocabulary.image_token_id,
        end_token_id=vocabulary.end_token_id,
        projector=projector,
        optimizer=OPTIMIZER,
    )


def radio_projector_mamba_moe() -> NemotronVLM:
    return mamba_moe(projector="mlp")


# ---- one process


@dataclass
class Training:
    """What every rank saw, and the weights at the end."""

    every_rank: list[Steps]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def assert_trains_like_one_process(on_ranks, accelerator, tmp_path_factory):
    """Train a model on a layout and compare losses, gradient norms and weights with those of one process."""

    def run(make_module, world_size: int, strategy: MimoHeteroStrategy | str, **arguments) -> Training:
        end = tmp_path_factory.mktemp("end") / "weights"

        def on_rank():
            steps = train(checked(make_module), strategy, end=end, accelerator=accelerator, **arguments)
            return steps, read_weights(end) if dist.get_rank() == 0 else None

        results = on_ranks(on_rank, world_size)
        return Training([steps for steps, _ in results], results[0][1])

    @cache
    def one_process(make_module) -> tuple[Path, Training]:
        # one step away from the initial weights, where norms and biases are all alike
        start = tmp_path_factory.mktemp("start") / "weights"
        on_ranks(train, 1, make_module, MimoHeteroStrategy(), None, start, 1, None, accelerator)
        return start, run(make_module, 1, "auto", start=start)

    def assert_same(
        make_module: Callable[[], MimoModule], world_size: int, modules: Mapping[str, P], num_microbatches: int
    ) -> None:
        start, expected = one_process(make_module)
        (steps,) = expected.every_rank
        assert min(steps.grad_norms) > 1, "clipping is not active"
        found = run(make_module, world_size, MimoHeteroStrategy(modules, num_microbatches), start=start)
        for rank_steps in found.every_rank:
            assert rank_steps.losses == pytest.approx(steps.losses, rel=STEP_TOLERANCE)
            assert rank_steps.grad_norms == pytest.approx(steps.grad_norms, rel=STEP_TOLERANCE)
        apart = {
            name: distance / expected.weights[name].norm().item()
            for name, distance in distances(found.weights, expected.weights).items()
        }
        assert {name: share for name, share in apart.items() if share > WEIGHT_TOLERANCE} == {}

    return assert_same


def checked(make_module: Callable[[], MimoModule]) -> Callable[[], MimoModule]:
    """The module with :class:`NoGlobalGroups` among its callbacks."""

    def make() -> MimoModule:
        assert_no_global_groups()
        module = make_module()
        module.configure_callbacks = lambda: [NoGlobalGroups()]
        return module

    return make


def test_a_global_group_is_noticed(on_ranks):
    def make_global_groups():
        from megatron.core import parallel_state

        assert_no_global_groups()
        parallel_state.initialize_model_parallel()
        with pytest.raises(AssertionError, match="_TENSOR_MODEL_PARALLEL_GROUP"):
            assert_no_global_groups()

    on_ranks(make_global_groups, 1)


# ---- the rows


@pytest.fixture(scope="module")
def one_step_of_one_process(on_ranks) -> no_pipelining.Reference:
    return on_ranks(no_pipelining.one_process, 1)[0]


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        pytest.param(2, P(dp=2, ep=2), id="2-ranks-dp2-ep2"),
        pytest.param(2, P(tp=2, ep=2), id="2-ranks-tp2-ep2"),
        pytest.param(4, P(tp=2, dp=2, ep=2), id="4-ranks-tp2-dp2-ep2"),
        pytest.param(4, P(tp=2, dp=2, ep=2, etp=2), id="4-ranks-tp2-dp2-etp2-ep2"),
    ],
)
def test_row_05_gpt_moe_through_forward_backward_no_pipelining_with_groups_of_the_grid_only(
    on_ranks, one_step_of_one_process, world_size, parallel
):
    reference = one_step_of_one_process
    every_rank = on_ranks(no_pipelining.on_layout, world_size, parallel, reference.weights)
    losses, gradients = zip(*every_rank, strict=True)
    assert losses == pytest.approx([reference.loss] * world_size, rel=STEP_TOLERANCE)
    no_pipelining.assert_same_gradients(reference.gradients, gradients, GRADIENT_TOLERANCE)


@layouts(
    (2, {"images": P(dp=2), "language": P(tp=2, ep=2)}, 2),
    (4, {"images": P(dp=4), "language": P(tp=2, dp=2, ep=2)}, 1),
)
def test_row_06_colocated_gpt_moe(assert_trains_like_one_process, world_size, modules, num_microbatches):
    assert_trains_like_one_process(gpt_moe, world_size, modules, num_microbatches)


@layouts(
    (2, {"images": P(dp=2), "language": P(tp=2, ep=2)}, 1),
    (4, {"images": P(dp=4), "language": P(tp=2, dp=2, ep=2, etp=2)}, 2),
)
def test_row_07_colocated_gpt_moe_in_nemotron_flavour(
    assert_trains_like_one_process, world_size, modules, num_microbatches
):
    assert_trains_like_one_process(gpt_nemotron, world_size, modules, num_microbatches)


@layouts(
    (2, {"images": P(tp=2), "language": P(dp=2, ep=2)}, 1),
    (4, {"images": P(tp=2, dp=2), "language": P(dp=4, ep=4)}, 2),
)
def test_row_08_colocated_mamba_moe(assert_trains_like_one_process, world_size, modules, num_microbatches):
    assert_trains_like_one_process(mamba_moe, world_size, modules, num_microbatches)


@layouts((8, {"images": P(tp=2, dp=4), "language": P(tp=2, dp=4, etp=2, ep=2)}, 1))
def test_row_09_colocated_radio_projector_mamba_moe(
    assert_trains_like_one_process, world_size, modules, num_microbatches
):
    assert_trains_like_one_process(radio_projector_mamba_moe, world_size, modules, num_microbatches)


@layouts(
    (2, {"images": P(dp=1), "language": P(rank_offset=1)}, 2),
    (4, {"images": P(dp=2), "language": P(tp=2, ep=2, rank_offset=2)}, 2),
)
def test_row_10_non_colocated_mamba_moe(assert_trains_like_one_process, world_size, modules, num_microbatches):
    assert_trains_like_one_process(mamba_moe, world_size, modules, num_microbatches)


@layouts(
    (2, {"images": P(dp=1), "language": P(rank_offset=1)}, 1),
    (8, {"images": P(tp=2, dp=2), "language": P(tp=2, pp=2, ep=2, rank_offset=4)}, 3),
)
def test_row_11_non_colocated_radio_projector_mamba_moe(
    assert_trains_like_one_process, world_size, modules, num_microbatches
):
    assert_trains_like_one_process(radio_projector_mamba_moe, world_size, modules, num_microbatches)
