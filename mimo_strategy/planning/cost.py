"""What a model tells of its modules' layers: weights, floating-point operations, what backward needs, traffic."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from mimo_strategy.layout import ModuleLayout

Split = Literal["tp", "etp"]
_NO_ITEMS: Mapping[str, int] = MappingProxyType({})


class CostUnknown(TypeError):
    """A model that does not tell what its modules cost."""


@dataclass(frozen=True)
class Weight:
    """One parameter tensor.

    Args:
        elements: of the whole tensor.
        split: the factor whose ranks hold equal parts of it; ``None`` where each holds all of it.
    """

    elements: int
    split: Split | None = None

    def on_rank(self, layout: ModuleLayout) -> int:
        """Elements that a rank holds."""
        return self.elements // (getattr(layout, self.split) if self.split else 1)


@dataclass(frozen=True)
class Experts:
    """Parameter tensors that each of ``number`` experts has; ep ranks hold equally many experts."""

    number: int
    each: tuple[Weight, ...]


class Work(NamedTuple):
    """Floating-point operations by what limits their speed.

    Attributes:
        matmul: of dense matrix products.
        attention: of products between tokens.
        scan: of state space models and convolutions.
    """

    matmul: float = 0.0
    attention: float = 0.0
    scan: float = 0.0

    @property
    def flops(self) -> float:
        """All of them."""
        return sum(self)

    def times(self, factor: float) -> "Work":
        """So many times this."""
        return Work(*(factor * part for part in self))


_NO_WORK = Work()


class Transfer(NamedTuple):
    """A collective that each rank of a group takes part in.

    Attributes:
        group: factor whose ranks exchange: ``tp``, ``ep`` or ``etp``.
        operation: what they do.
        bytes: of the whole tensor: the gathered, or what one rank reduces, or what one rank sends to all.
    """

    group: str
    operation: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
    bytes: float


@dataclass(frozen=True)
class Layer:
    """Cost of one layer for one microbatch of one lane.

    Args:
        name: kind of layer.
        weights: its parameter tensors in the order in which the layer registers them.
        work: of the forward pass, over all ranks of the lane. They share it equally.
        kept: bytes that one rank keeps for the backward pass.
        kept_input: bytes that one rank keeps of the layer's input if the layer is recomputed; ``None`` if it never is.
        forward: collectives of the forward pass.
        backward: those of the backward pass.
        operations: kernels that the forward pass launches on one rank.
    """

    name: str
    weights: tuple[Weight | Experts, ...] = ()
    work: Work = _NO_WORK
    kept: float = 0.0
    kept_input: float | None = None
    forward: tuple[Transfer, ...] = ()
    backward: tuple[Transfer, ...] = ()
    operations: float = 0.0

    def elements(self, layout: ModuleLayout) -> Iterator[tuple[int, bool]]:
        """Of every tensor on a rank its elements, and whether the experts' groups share its state."""
        # megatron-core's condition, see tensor_parallel.layers
        experts_apart = layout.ep > 1 or layout.etp != layout.tp
        for weight in self.weights:
            if isinstance(weight, Weight):
                yield weight.on_rank(layout), False
            else:
                each = [part.on_rank(layout) for part in weight.each]
                for _ in range(weight.number // layout.ep):
                    for elements in each:
                        yield elements, experts_apart


@dataclass(frozen=True)
class Workload:
    """One microbatch of one lane.

    Args:
        samples: sequences.
        length: tokens of a sequence.
        items: items of each encoder, by name.
        element_size: bytes of an activation.
        fused: whether layers are Transformer Engine's and scans are fused kernels, as on a GPU.
    """

    samples: int
    length: int
    items: Mapping[str, int] = _NO_ITEMS
    element_size: int = 2
    fused: bool = True


@dataclass(frozen=True)
class ModuleCost:
    """Cost of a module in one layout.

    Args:
        stages: layers of each pipeline stage, in order.
        sent: bytes that a lane's last stage, or each but the last of the language model, hands on for a microbatch.
        recompute: whether layers that tell their input keep only that.
    """

    stages: tuple[tuple[Layer, ...], ...]
    sent: float = 0.0
    recompute: bool = False

    def kept(self, stage: int) -> float:
        """Bytes that a rank of ``stage`` keeps of a microbatch between its forward and its backward pass."""
        return sum(self._kept_of(layer) for layer in self.stages[stage])

    def recomputed(self, stage: int) -> float:
        """Bytes beyond :meth:`kept` that are there while the backward pass computes the largest layer again.

        What the layers behind the last recomputed one kept is free by then.
        """
        layers = self.stages[stage]
        if not self.recompute or all(layer.kept_input is None for layer in layers):
            return 0.0
        again = max(layer.kept for layer in layers if layer.kept_input is not None)
        last = max(number for number, layer in enumerate(layers) if layer.kept_input is not None)
        return max(0.0, again - sum(layer.kept for layer in layers[last + 1 :]))

    def _kept_of(self, layer: Layer) -> float:
        return layer.kept if layer.kept_input is None or not self.recompute else layer.kept_input
