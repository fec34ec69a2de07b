"""Callbacks that know of modules and lanes."""

from mimo_strategy.callbacks.captions import CaptionWriter
from mimo_strategy.callbacks.summary import ModuleSummary
from mimo_strategy.callbacks.throughput import Throughput

__all__ = ["CaptionWriter", "ModuleSummary", "Throughput"]
