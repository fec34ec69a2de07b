"""What a step adds up over microbatches and ranks: loss, metrics and counts, reduced over the world at once."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mimo_strategy.agreement import of_every_rank
from mimo_strategy.runtime.loss import LossOutput

DETAIL = "detail"
"""A setting of quantities that are logged only in steps that loggers write, as each call of ``log`` costs time."""

LOSS = ""
"""Of the loss; no name that anybody could log by."""


class Reported(NamedTuple):
    """A quantity of a step over all ranks.

    Attributes:
        sum: a scalar, or ``[parts]``.
        count: what to divide by for the mean; a scalar.
        settings: of ``LightningModule.log``; ``None`` for what is not logged.
    """

    sum: torch.Tensor
    count: torch.Tensor
    settings: Mapping[str, Any] | None

    @property
    def mean(self) -> torch.Tensor:
        """Sum by count, in float32."""
        return (self.sum / self.count).float()


class _Quantity(NamedTuple):
    """What all ranks must know of a quantity to reduce it: its number of parts, 0 for a scalar, and how to log it."""

    parts: int
    settings: Mapping[str, Any] | None


class StepSums:
    """Sums of one step after another. Any rank may add any quantity; ranks that add nothing add zero.

    A step costs one all-reduce over the world. Only when some rank adds a quantity that not all know, all of them
    exchange names and reduce once more.

    Args:
        device: device of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[str, _Quantity] = {LOSS: _Quantity(0, None)}
        self._own: dict[str, _Quantity] = {}
        self._sums: dict[str, torch.Tensor] = {}
        # of the step that was reduced last
        self._added: dict[str, torch.Tensor] = {}
        self._reduced: torch.Tensor | None = None
        self._on_host: torch.Tensor | None = None
        self._arrival = torch.cuda.Event() if device.type == "cuda" else None

    def add(
        self,
        name: str,
        sum: torch.Tensor | float,
        count: torch.Tensor | float,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Add to a quantity of this step.

        Args:
            name: of the quantity.
            sum: a scalar, or ``[parts]``.
            count: a scalar.
            settings: how to log it; the first ones of a name hold.
        """
        parts, count = self._on_device(sum), self._on_device(count)
        values = torch.cat((parts.reshape(-1), count.reshape(1)))
        self._own.setdefault(name, _Quantity(len(parts) if parts.ndim else 0, settings))
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def forget(self) -> None:
        """Drop what was added to a step that was not finished."""
        self._sums = {}

    def add_loss(self, loss: LossOutput) -> None:
        """Add the loss of one microbatch, on one rank of each lane's last stage."""
        self.add(LOSS, loss.sum, loss.count)

    def reduce_loss(self) -> LossOutput:
        """The loss of the step over all ranks; collective over the world. Reduces whatever else was added, too.

        What is added from now on is of the next step.
        """
        self._added, self._sums = self._sums, {}
        return self._reduce()

    def _reduce(self) -> LossOutput:
        own = self._added.keys() - self._known.keys()
        unknown = torch.full((1,), len(own), dtype=torch.float64, device=self._device)
        self._reduced = torch.cat([unknown, *(self._values(name) for name in self._known)])
        dist.all_reduce(self._reduced)
        # on its way as soon as it is there, whatever the device is given to do after it
        self._on_host = self._reduced.to("cpu", non_blocking=True)
        if self._arrival is not None:
            self._arrival.record()
        return LossOutput(self._reduced[1].float(), self._reduced[2].float())

    def reported(self) -> dict[str, Reported]:
        """All quantities that some rank added to the step that was reduced, but the loss; waits for the device.

        Collective over the world where a rank added one that not all know.
        """
        host = self._read()
        if host[0]:
            self._exchange_names()
            self._reduce()
            host = self._read()
        quantities, position = {}, 1
        for name, (parts, settings) in self._known.items():
            end = position + max(parts, 1)
            if host[end] and name != LOSS:
                sums = self._reduced[position:end] if parts else self._reduced[position]
                quantities[name] = Reported(sums, self._reduced[end], settings)
            position = end + 1
        return quantities

    def _read(self) -> list[float]:
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._on_host.tolist()

    def _on_device(self, value: torch.Tensor | float) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.detach().to(self._device, torch.float64, non_blocking=True)
        # the host waits where it copies a number, but not where it lets the device fill it in
        return torch.full((), value, dtype=torch.float64, device=self._device)

    def _values(self, name: str) -> torch.Tensor:
        size = max(self._known[name].parts, 1) + 1
        values = self._added.get(name)
        if values is None:
            return torch.zeros(size, dtype=torch.float64, device=self._device)
        if len(values) != size:
            raise ValueError(f"the metric {name} has {len(values) - 1} parts here, but {size - 1} elsewhere")
        return values

    def _exchange_names(self) -> None:
        for own in of_every_rank(self._own):
            for name, quantity in own.items():
                self._known.setdefault(name, quantity)
