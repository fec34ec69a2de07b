"""Callbacks that know of modules and lanes."""

from mimo_strategy.callbacks.captions import CaptionWriter
from mimo_strategy.callbacks.throughput import Throughput
from mimo_strategy.module_summary import ModuleSummary

__all__ = ["CaptionWriter", "ModuleSummary", "Throughput"]
