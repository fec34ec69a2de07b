"""For tests on many ranks: run a function on each of them."""

from mimo_strategy.testing.ranks import Accelerator, RankError, run_on_ranks

__all__ = ["Accelerator", "RankError", "run_on_ranks"]
