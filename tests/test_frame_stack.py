"""Calls at any depth of the stack, without new memory for their frames."""

import resource
import sys

import pytest
from lightning.pytorch import Callback
from tiny_runs import digits, make_trainer, vision_language

from mimo_strategy import MimoHeteroStrategy
from mimo_strategy.frame_stack import call_with_room
from mimo_strategy.testing import run_on_ranks

CALLS = 200
DEPTH = 400
"""Frames of 100 bytes and more: several of the pieces in which Python keeps them."""


def callee() -> None:
    """Has a frame of its own."""


def page_faults_of_calls() -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(CALLS):
        callee()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def most_page_faults(depth: int) -> int:
    """Of calls from each of so many depths."""
    return max(page_faults_of_calls(), most_page_faults(depth - 1) if depth else 0)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="later releases of Python keep a piece for the next call")
def test_python_maps_memory_for_each_call_at_some_depths():
    assert most_page_faults(DEPTH) >= CALLS


def test_with_room_no_call_maps_memory():
    assert call_with_room(most_page_faults, DEPTH) < CALLS / 10


class Counting(Callback):
    """Page faults of calls from within a Trainer's step."""

    def on_train_batch_end(self, *_):
        self.most = most_page_faults(DEPTH)


def test_a_trainer_runs_with_room():
    def run():
        counting = Counting()
        make_trainer(MimoHeteroStrategy(), max_steps=1, callbacks=[counting]).fit(vision_language("*"), digits())
        return counting.most

    assert run_on_ranks(run, 1)[0] < CALLS / 10


def test_arguments_and_results_are_passed_on():
    assert call_with_room(divmod, 7, 2) == (3, 1)
    assert call_with_room(dict, a=1) == {"a": 1}
