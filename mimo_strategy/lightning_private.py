"""What this package takes of Lightning's private names, in one place, so that a new release is checked here first."""

from lightning.fabric.utilities.distributed import _init_dist_connection as init_dist_connection
from lightning.fabric.utilities.imports import _IS_INTERACTIVE as IS_INTERACTIVE
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper as IndexBatchSampler
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as SubprocessScriptLauncher

__all__ = ["IS_INTERACTIVE", "IndexBatchSampler", "SubprocessScriptLauncher", "init_dist_connection"]
