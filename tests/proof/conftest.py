"""Proving a cell, and the table of all that were proved."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mimo_strategy.testing import Tolerances
from proof.cells import Cell
from proof.models import BATCH_SIZE, PATTERN
from proof.references import compare
from proof.table import ProofTable


@pytest.fixture(scope="session")
def proof_table(pytestconfig):
    table = ProofTable()
    yield table
    path = pytestconfig.getoption("write_proof")
    if path:
        table.write(Path(path), batch_size=BATCH_SIZE, pattern=PATTERN)


@pytest.fixture
def prove(accelerator, proof_table) -> Callable[[Cell], None]:
    """Train a cell on ranks, compare it with one process and add it to the table."""

    def prove_cell(cell: Cell) -> None:
        comparison = compare(cell, accelerator)
        proof_table.add(cell.columns, comparison)
        comparison.check(Tolerances())

    return prove_cell
