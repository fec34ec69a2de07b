"""Signals that come before the first step, when Lightning's own handlers are still there."""

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tiny_runs import digits, make_trainer, vision_language

from mimo_strategy import MimoHeteroStrategy
from mimo_strategy.testing import run_on_ranks


class TerminatedEarly(Callback):
    """As Lightning's handler leaves it, on one rank only."""

    def on_train_start(self, trainer, module):
        trainer._signal_connector.received_sigterm = trainer.global_rank == 1


def test_a_rank_told_to_terminate_before_training_stops_all_after_one_step():
    def run():
        trainer = make_trainer(MimoHeteroStrategy(), max_steps=3, callbacks=[TerminatedEarly()])
        with pytest.raises(SIGTERMException):
            trainer.fit(vision_language("M*"), digits())
        return trainer.global_step

    assert run_on_ranks(run, 2, timeout=120) == [1, 1]
