"""Lightning's command line with what it must know of this package: its classes by name, and one verb at a time."""

import sys
from importlib import import_module
from importlib.util import find_spec

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from mimo_strategy.module import MimoModule
from mimo_strategy.strategy import MimoHeteroStrategy  # noqa: F401 - a class is known by its bare name once imported

# models and data that come with the library; it works without them
for name in ("modules", "datamodules"):
    if find_spec(name) is not None:
        import_module(name)


class MimoCLI(LightningCLI):
    """Parses ``arguments`` for one verb of the Trainer, and runs it.

    Args:
        verb: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: what follows it.
    """

    def __init__(self, verb: str, arguments: list[str]) -> None:
        self.verb = verb
        # Lightning warns of arguments that do not come from there
        sys.argv[1:] = [verb, *arguments]
        super().__init__(
            MimoModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
        )

    def subcommands(self) -> dict[str, set[str]]:
        return {self.verb: super().subcommands()[self.verb]}
