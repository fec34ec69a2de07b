"""``self.log`` within a schedule: collected with the loss, logged after the step on every rank alike."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torchmetrics import Metric

from mimo_strategy.runtime.runtime import MimoRuntime
from mimo_strategy.runtime.step_sums import DETAIL, Reported

# Of the settings of ``LightningModule.log``; the others say how ranks agree, which they do already.
_KEPT = ("prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx")
_ATTRIBUTE = "metric_attribute"


class LogCall(NamedTuple):
    """A call of ``LightningModule.log`` that every rank makes with the same value."""

    name: str
    value: Any
    batch_size: torch.Tensor
    settings: dict[str, Any]


def collect(runtime: MimoRuntime, module: torch.nn.Module, name: str, value: Any, settings: dict[str, Any]) -> None:
    """Add a value to the step that the runtime is in, weighted by ``batch_size``.

    A torchmetrics metric keeps what it was updated with on one rank of each lane, and is reduced by itself.

    Args:
        runtime: runs the step.
        module: root module, of which a metric must be an attribute.
        name: of the metric.
        value: a number, scalar tensor or torchmetrics metric.
        settings: of ``LightningModule.log``.

    Raises:
        ValueError: for another reduction than the mean, or a metric that the module does not hold.
    """
    kept = {key: settings[key] for key in _KEPT if settings.get(key) is not None}
    if isinstance(value, Metric):
        attributes = [path for path, part in module.named_modules() if part is value]
        if not attributes:
            raise ValueError(f"the metric {name} must be an attribute of {type(module).__name__}, to be on every rank")
        runtime.sums.add(name, 0, 1, kept | {_ATTRIBUTE: attributes[0]})
        if not runtime.speaks_for_lane:
            value.reset()
        return
    if settings.get("reduce_fx", "mean") != "mean":
        raise ValueError(
            f"self.log({name!r}, reduce_fx={settings['reduce_fx']!r}) in a schedule: values of microbatches and lanes "
            "can only be averaged; return a sum and a count in LossOutput.metrics, or log after the step"
        )
    if runtime.speaks_for_lane:
        weight = settings.get("batch_size") or 1
        runtime.sums.add(name, value * weight, weight, kept)


def calls(module: torch.nn.Module, reported: dict[str, Reported], *, details: bool) -> Iterator[LogCall]:
    """What to log of a step.

    Args:
        module: root module.
        reported: of the step.
        details: whether to log also what only loggers look at.
    """
    for name, quantity in reported.items():
        if quantity.settings is None:
            continue
        settings = dict(quantity.settings)
        if settings.pop(DETAIL, False) and not details:
            continue
        if _ATTRIBUTE in settings:
            yield LogCall(name, attrgetter(settings.pop(_ATTRIBUTE))(module), quantity.count, settings)
        elif quantity.sum.ndim == 0:
            yield LogCall(name, quantity.mean, quantity.count, settings)
        else:
            for position, part in enumerate(quantity.mean):
                yield LogCall(f"{name}/{position}", part, quantity.count, settings)
