"""Start the ranks as DDP does, after checking in one process what can be checked."""

from collections.abc import Callable
from typing import Any, override

from lightning.pytorch import LightningModule, Trainer

from mimo_strategy.lightning_private import SubprocessScriptLauncher


class CheckingLauncher(SubprocessScriptLauncher):
    """Runs ``check(trainer, model, *data)`` before any other process starts, so that what cannot work is reported once.

    ``data`` are the DataLoaders and the LightningDataModule that the Trainer was given. Where it was given the
    checkpoint path ``last``, ``last_checkpoint(trainer)`` takes its place if there is one.
    """

    def __init__(
        self, check: Callable[..., None], last_checkpoint: Callable[[Trainer], str | None], *args: Any
    ) -> None:
        super().__init__(*args)
        self._check = check
        self._last_checkpoint = last_checkpoint

    @override
    def launch(self, function: Callable, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        if args and isinstance(args[0], LightningModule):
            self._check(trainer, *args)
        args = [
            (self._last_checkpoint(trainer) or arg) if isinstance(arg, str) and arg == "last" else arg for arg in args
        ]
        return super().launch(function, *args, trainer=trainer, **kwargs)
