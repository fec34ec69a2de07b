"""Whatever the layout and the settings, training is the same as on one process."""

from functools import partial
from pathlib import Path

import pytest

from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from proof.cells import choose, covered, possible_cells
from proof.layouts import LAYOUTS
from proof.models import PATTERN, text_only
from proof.references import reference

POSSIBLE = possible_cells()
CELLS = choose(POSSIBLE, seed=1)
MORE_CELLS = sorted({cell for seed in (2, 3, 4, 5) for cell in choose(POSSIBLE, seed)} - set(CELLS), key=str)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_step_is_that_of_one_process(prove, cell):
    prove(cell)


@pytest.mark.exhaustive
@pytest.mark.parametrize("cell", MORE_CELLS, ids=str)
def test_every_step_is_that_of_one_process_in_more_combinations(prove, cell):
    prove(cell)


def test_the_cells_cover_every_value_and_every_pair_that_interacts():
    met = set().union(*map(covered, CELLS))
    assert met == set().union(*map(covered, POSSIBLE))
    axes = [cell.axes for cell in CELLS if cell.frozen == "none"]
    assert {cell["world"] for cell in axes} == {1, 2, 3, 4, 5, 6, 7, 8}
    assert {cell["pp"] for cell in axes} == {1, 2, 3}
    assert {cell["encoder_tp"] for cell in axes} == {0, 1, 2, 4}
    assert {(cell["tp"], cell["etp"]) for cell in axes} >= {(1, "not tp"), (2, "tp"), (4, "not tp"), (4, "1")}
    assert {cell["placement"] for cell in axes} == {layout.placement for layout in LAYOUTS}
    assert len({cell["placement"] for cell in axes}) == 7


def test_stages_of_unequal_length():
    language = P(dp=1, pp=2)
    uneven = partial(text_only, pattern=f"{PATTERN[:2]}|{PATTERN[2:]}")
    reference(text=True).assert_alike(MimoHeteroStrategy({"language": language}), language.pp, uneven)


def test_the_documentation_shows_every_cell():
    page = (Path(__file__).parents[2] / "docs" / "numerical_proof.md").read_text()
    missing = [str(cell) for cell in CELLS if f"| {' | '.join(cell.columns)} |" not in page]
    assert not missing, "run make proof"


def test_clipping_is_active_and_every_weight_is_trained():
    for settings in ({"text": True}, {"data": "mixed"}, {"data": "one"}):
        trained = reference(**settings)
        assert min(step.grad_norm for step in trained.steps) > 1
        for name, weight in trained.steps[-1].weights.items():
            assert not weight.equal(trained.start[name]), name
