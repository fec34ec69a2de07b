"""Run a function on many ranks from a test, and prove that a model trains alike on them and on one process."""

from mimo_strategy.testing.parity import Reference, Step
from mimo_strategy.testing.ranks import RankError, run_on_ranks, trainer_ranks
from mimo_strategy.testing.report import Comparison, Deviation, Tolerances

__all__ = ["Comparison", "Deviation", "RankError", "Reference", "Step", "Tolerances", "run_on_ranks", "trainer_ranks"]
