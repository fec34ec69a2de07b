"""What a run's configuration says of model and layout, for verbs that start no Trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, override

from jsonargparse import Namespace
from megatron.core.distributed import DistributedDataParallelConfig

from mimo_strategy.checks import declared_batch_size
from mimo_strategy.cli.errors import UsageError
from mimo_strategy.cli.lightning_cli import MimoCLI
from mimo_strategy.layout import ModuleParallel
from mimo_strategy.lightning_private import unified_precision
from mimo_strategy.module import MimoModule
from mimo_strategy.strategy import MimoHeteroStrategy


@dataclass(frozen=True)
class RunConfig:
    """The part of a configuration that decides what runs where.

    Attributes:
        model: instantiated; nothing of it is built.
        modules: layout asked for, by module name; ``None`` is the strategy's default.
        num_microbatches: microbatches per step.
        encoder_batching: microbatches that colocated encoders take at once.
        encoder_ahead: microbatches that encoders on ranks of their own run ahead.
        cuda_graphs: whether layers of the language model are replayed.
        ddp: settings of gradient reduction and the distributed optimizer, for all modules or by module name; ``None``
            is the strategy's default.
        batch_size: samples of a step batch, if the data say so.
        precision: the Trainer's.
        world_size: devices x nodes, if both are numbers.
    """

    model: MimoModule
    modules: Mapping[str, ModuleParallel] | None
    num_microbatches: int
    encoder_batching: int
    encoder_ahead: int
    cuda_graphs: bool
    ddp: DistributedDataParallelConfig | Mapping[str, DistributedDataParallelConfig] | None
    batch_size: int | None
    precision: str
    world_size: int | None


def read_run(arguments: list[str]) -> RunConfig:
    """Read ``--config FILE`` and overrides as ``mimo fit`` takes them.

    The datamodule is instantiated, as the model may take values of it, but asked for no data; and so is the strategy,
    which checks its settings. The Trainer is not.

    Raises:
        UsageError: for a configuration that cannot work.
    """
    reader = _Reader("fit", arguments)
    trainer = reader.config["fit"]["trainer"]
    settings = trainer["strategy"]["init_args"]
    modules, ddp = settings.get("modules"), settings.get("ddp")
    return RunConfig(
        model=reader.model,
        modules=modules and {name: ModuleParallel(**vars(parallel)) for name, parallel in modules.items()},
        num_microbatches=settings["num_microbatches"],
        encoder_batching=settings["encoder_batching"],
        encoder_ahead=settings["encoder_ahead"],
        cuda_graphs=settings["cuda_graphs"],
        ddp=ddp and _ddp(ddp),
        batch_size=declared_batch_size(reader.datamodule),
        precision=unified_precision(trainer["precision"]) or "32-true",
        world_size=_world_size(trainer["devices"], trainer["num_nodes"]),
    )


def _ddp(settings: Namespace | dict[str, Namespace]) -> DistributedDataParallelConfig | dict[str, Any]:
    if isinstance(settings, dict):
        return {name: _ddp(of_module) for name, of_module in settings.items()}
    return DistributedDataParallelConfig(**vars(settings))


def _world_size(devices: list[int] | str | int, num_nodes: int) -> int | None:
    if isinstance(devices, list):
        return len(devices) * num_nodes
    return int(devices) * num_nodes if str(devices).isdecimal() else None


class _Reader(MimoCLI):
    """Instantiates model, data and strategy, and runs nothing."""

    @override
    def _set_seed(self) -> None:
        pass

    @override
    def make_objects(self) -> None:
        config = self.config["fit"]
        needed = Namespace({key: config[key] for key in ("model", "data", "trainer.strategy")})
        instantiated = self.parser.instantiate_classes(Namespace(subcommand="fit", fit=needed))["fit"]
        if not isinstance(instantiated["trainer.strategy"], MimoHeteroStrategy):
            raise UsageError("trainer.strategy is not MimoHeteroStrategy, which the layouts are of: leave it out")
        self.model, self.datamodule = instantiated["model"], instantiated["data"]

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        pass
