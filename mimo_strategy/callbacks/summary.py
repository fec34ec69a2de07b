"""A table of all modules, also of those that run on other ranks."""

from typing import override

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from mimo_strategy.layout import ModuleLayout
from mimo_strategy.runtime.runtime import MimoRuntime

_COLUMNS = ("Module", "Ranks", "tp x cp x dp x pp", "etp x ep x edp", "Parameters", "Per rank", "Trainable")


class ModuleSummary(Callback):
    """Prints, when fitting starts, every module with its layout and its number of parameters.

    Lightning's own summary sees only what is built on the first rank; disable it with
    ``Trainer(enable_model_summary=False)``.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = count_parameters(pl_module.runtime)
        rank_zero_only(print)(_table(pl_module.runtime.topology.layout.modules, counts))


def count_parameters(runtime: MimoRuntime) -> dict[str, tuple[int, int, int]]:
    """Parameters by module: in total, trainable, and the most on one rank. Collective over the world."""
    layouts = runtime.topology.layout.modules
    sums = torch.zeros(len(layouts), 2, dtype=torch.float64, device=runtime.device)
    most = torch.zeros(len(layouts), dtype=torch.float64, device=runtime.device)
    modules = runtime.modules()
    for position, (name, layout) in enumerate(layouts.items()):
        for parameter in modules[name].parameters() if name in modules else ():
            share = parameter.numel() / _copies(parameter, layout)
            sums[position] += torch.tensor([share, share * parameter.requires_grad])
            most[position] += parameter.numel()
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return {
        name: (round(sums[position, 0].item()), round(sums[position, 1].item()), int(most[position]))
        for position, name in enumerate(layouts)
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
                f"{layout.ranks.start}-{layout.ranks.stop - 1}",
                f"{layout.tp} x {layout.cp} x {layout.dp} x {layout.pp}",
                f"{layout.etp} x {layout.ep} x {layout.edp}",
                f"{total:,}",
                f"{per_rank:,}",
                "all" if trainable == total else f"{trainable:,}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:], ""])
