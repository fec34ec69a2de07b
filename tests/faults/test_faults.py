"""The comparison with one process notices every planted fault, and tells what is wrong."""

import re

import pytest
from proof.references import compare, reference_of
from test_seeding import P
from test_seeding import (
    test_two_ranks_hold_the_same_values_if_and_only_if_they_hold_the_same_shard as check_initial_values,
)

from faults.planted import FAULTS, wrap
from faults.repairs import REPAIRS
from mimo_strategy.runtime import seeding
from mimo_strategy.testing import Tolerances


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_noticed(monkeypatch, name):
    fault = FAULTS[name]
    reference_of(fault.cell)  # trained before, and so without the fault
    fault.make(monkeypatch)
    with pytest.raises(AssertionError, match="training differs from one process") as noticed:
        compare(fault.cell).check(Tolerances())
    assert re.search(fault.report, str(noticed.value)), noticed.value


@pytest.mark.parametrize("name", REPAIRS)
def test_without_the_repair_training_goes_wrong(monkeypatch, name):
    repair = REPAIRS[name]
    reference_of(repair.cell)
    repair.make(monkeypatch)
    with pytest.raises(AssertionError, match=repair.report):
        compare(repair.cell).check(Tolerances())


@pytest.mark.parametrize(
    "cell", dict.fromkeys(planted.cell for planted in [*FAULTS.values(), *REPAIRS.values()]), ids=str
)
def test_with_all_repairs_and_no_fault_nothing_is_noticed(cell):
    compare(cell).check(Tolerances())


def test_a_wrong_seed_of_one_shard_is_noticed(monkeypatch):
    wrap(
        monkeypatch,
        seeding,
        "model_parallel_cuda_manual_seed",
        lambda seed_ranks, *args, tp_rank, **ranks: seed_ranks(*args, tp_rank=0, **ranks),
    )
    with pytest.raises(AssertionError, match="on ranks 0 and 1"):
        check_initial_values(P(tp=4), P(tp=2, ep=2))
