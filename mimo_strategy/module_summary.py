"""A table of all modules, also of those that run on other ranks."""

from typing import override

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_only

from mimo_strategy.module_layout import ModuleLayout, span
from mimo_strategy.runtime.runtime import MimoRuntime

_COLUMNS = ("Module", "Ranks", "tp x cp x dp x pp", "etp x ep x edp", "Parameters", "Per rank", "Trainable")


class ModuleSummary(ModelSummary):
    """Prints, when fitting starts, every module with its layout and its number of parameters.

    The strategy puts it in the place of Lightning's own summary, which sees only what is built on the first rank.
    ``Trainer(enable_model_summary=False)`` leaves it out. Under other strategies it is Lightning's.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.runtime is None:
            super().on_fit_start(trainer, pl_module)
            return
        counts = count_parameters(pl_module.runtime)
        rank_zero_only(print)(_table(pl_module.runtime.topology.layout.modules, counts))


def show_all_modules(callbacks: list[Callback]) -> None:
    """Replace Lightning's summary, if it is among ``callbacks``."""
    for position, callback in enumerate(callbacks):
        if isinstance(callback, ModelSummary) and not isinstance(callback, ModuleSummary):
            callbacks[position] = ModuleSummary()


def count_parameters(runtime: MimoRuntime) -> dict[str, tuple[int, int, int]]:
    """Parameters by module: in total, trainable, and the most on one rank. Collective over the world."""
    layouts = runtime.topology.layout.modules
    modules = runtime.model.own_modules()
    shares, sizes = [], []
    for name, layout in layouts.items():
        parameters = list(modules[name].parameters()) if name in modules else []
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        shares.append([sum(p.numel() / _copies(p, layout) for p in part) for part in (parameters, trainable)])
        sizes.append(sum(parameter.numel() for parameter in parameters))
    totals = torch.tensor(shares, dtype=torch.float64, device=runtime.device)
    most = torch.tensor(sizes, device=runtime.device)
    torch.distributed.all_reduce(totals)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return {
        name: (round(total), round(trainable), per_rank)
        for name, (total, trainable), per_rank in zip(layouts, totals.tolist(), most.tolist(), strict=True)
    }


def _copies(parameter: torch.nn.Parameter, layout: ModuleLayout) -> int:
    """On how many ranks of a pipeline stage the same values lie."""
    is_expert = not getattr(parameter, "allreduce", True)
    shards, replicas = (layout.etp, layout.edp) if is_expert else (layout.tp, layout.cp * layout.dp)
    return replicas if getattr(parameter, "tensor_model_parallel", False) else replicas * shards


def _table(layouts: dict[str, ModuleLayout], counts: dict[str, tuple[int, int, int]]) -> str:
    rows = [_COLUMNS]
    for name, layout in layouts.items():
        total, trainable, per_rank = counts[name]
        rows.append(
            (
                name,
                span(layout.ranks),
                f"{layout.tp} x {layout.cp} x {layout.dp} x {layout.pp}",
                f"{layout.etp} x {layout.ep} x {layout.edp}",
                f"{total:,}",
                f"{per_rank:,}",
                {0: "frozen", total: "all"}.get(trainable, f"{trainable:,}"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:], ""])
