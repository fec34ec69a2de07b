"""The table of the documentation: every layout that was compared, and the largest deviation of each kind."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from mimo_strategy.testing import Comparison, Tolerances
from mimo_strategy.testing.report import CHECKS

_TITLES = {
    "loss": "loss",
    "grad_norm": "grad norm",
    "gradient": "gradients",
    "weight": "weights",
    "update": "updates",
    "agreement": "between ranks",
}
_TEXT = """\
# Numerical proof

Every row is one training of three optimizer steps with gradient clipping active, on that many ranks, against the
same training on one process under Lightning's plain single-device strategy, in float32, from the same weights and on
the same step batches of {batch_size} samples. A number is the largest deviation of all steps and, for gradients,
weights and updates, of all tensors: the norm of the difference relative to the norm of the tensor's gradient, of its
weight, and of how far training has moved it. What exceeds the tolerance fails the tests.

"Mixed" data has 0 to 3 images per sample, lanes and microbatches without any image, and others without any token that
counts. `{pattern}` are the layers of the language model: Mamba-2 (`M`), attention (`*`), experts (`E`), MLP (`-`).

Written by `make proof` on {date}: {machine}; torch {torch}, megatron-core {megatron}, lightning {lightning}.

"""


class ProofTable:
    """Collects comparisons as the tests make them."""

    def __init__(self) -> None:
        self._rows: list[tuple[tuple[str, ...], Comparison]] = []

    def add(self, columns: tuple[str, ...], comparison: Comparison) -> None:
        """Add a row: placement, ranks, layouts and settings, and what came out."""
        self._rows.append((columns, comparison))

    def write(self, path: Path, *, batch_size: int, pattern: str) -> None:
        """Write all rows as a Markdown page."""
        header = ["placement", "ranks", "layouts", "settings", *(_TITLES[check] for check in CHECKS)]
        lines = [header, ["---"] * len(header)]
        lines += [
            [*columns, *(f"{comparison.largest(check).amount:.0e}" for check in CHECKS)]
            for columns, comparison in self._rows
        ]
        largest = [max(comparison.largest(check).amount for _, comparison in self._rows) for check in CHECKS]
        lines.append([f"**largest of {len(self._rows)}**", "", "", "", *(f"**{amount:.1e}**" for amount in largest)])
        lines.append(["tolerance", "", "", "", *(f"{getattr(Tolerances(), check):.0e}" for check in CHECKS)])
        gpu = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
        text = _TEXT.format(
            batch_size=batch_size,
            pattern=pattern,
            date=date.today(),
            machine=gpu or f"{platform.machine()} CPU with {os.cpu_count()} cores, gloo",
            torch=version("torch"),
            megatron=version("megatron-core"),
            lightning=version("lightning"),
        )
        path.write_text(text + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
