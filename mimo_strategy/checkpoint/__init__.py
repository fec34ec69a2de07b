"""Checkpoints: directories that every rank writes its own shards to, readable by any layout."""

from mimo_strategy.checkpoint.errors import CheckpointError, SaveError
from mimo_strategy.checkpoint.weights import export_weights, import_weights, load_weights, save_weights

__all__ = ["CheckpointError", "SaveError", "export_weights", "import_weights", "load_weights", "save_weights"]
