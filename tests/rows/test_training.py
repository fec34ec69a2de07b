"""Layouts that the project exists for, each of them training like one process. The rows are numbered through."""

from collections.abc import Callable, Mapping
from functools import cache

import no_pipelining
import pytest
from gpt_moe import NEMOTRON, GptMoE, GptVLM
from no_global_groups import NoGlobalGroups, assert_no_global_groups
from tiny_runs import OPTIMIZER, digits, vision_language
from torch.utils.data import DataLoader

from datamodules import collate
from mimo_strategy import MimoHeteroStrategy, MimoModule
from mimo_strategy import ModuleParallel as P
from mimo_strategy.testing import Reference
from modules import NemotronVLM, RadioConfig

STEP_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 2e-5

DIGITS = digits()


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
    return GptVLM(language, RadioConfig.tiny(), DIGITS.vocabulary.image_token_id, OPTIMIZER)


def radio_projector_mamba_moe() -> NemotronVLM:
    return vision_language(projector="mlp")


# ---- one process


@pytest.fixture(scope="module")
def assert_trains_like_one_process(accelerator):
    """Train a model on a layout and compare every step with one process."""

    @cache
    def one_process(make_module) -> Reference:
        return Reference(checked(make_module), loader, accelerator=accelerator)

    def assert_same(
        make_module: Callable[[], MimoModule], world_size: int, modules: Mapping[str, P], num_microbatches: int
    ) -> None:
        reference = one_process(make_module)
        assert min(step.grad_norm for step in reference.steps) > 1, "clipping is not active"
        reference.assert_alike(MimoHeteroStrategy(modules, num_microbatches), world_size)

    return assert_same


def loader() -> DataLoader:
    """Digits in their order, whose answers differ in length."""
    return DataLoader(DIGITS.train_dataset, DIGITS.batch_size, collate_fn=collate)


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
    assert_trains_like_one_process(vision_language, world_size, modules, num_microbatches)


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
    assert_trains_like_one_process(vision_language, world_size, modules, num_microbatches)


@layouts(
    (2, {"images": P(dp=1), "language": P(rank_offset=1)}, 1),
    (8, {"images": P(tp=2, dp=2), "language": P(tp=2, pp=2, ep=2, rank_offset=4)}, 3),
)
def test_row_11_non_colocated_radio_projector_mamba_moe(
    assert_trains_like_one_process, world_size, modules, num_microbatches
):
    assert_trains_like_one_process(radio_projector_mamba_moe, world_size, modules, num_microbatches)
