"""Measure what forward passes keep for their backward passes."""

from collections.abc import Collection
from typing import Self

import torch
from torch.autograd.graph import saved_tensors_hooks


class KeptActivations:
    """Counts, within its context, the bytes that autograd keeps for backward passes.

    Tensors that share memory count once, and memory that is ``known`` (parameters) not at all. What is saved by
    attributes of a custom autograd function, beside ``save_for_backward``, is not seen.

    Args:
        known: tensors whose memory is there anyway.

    Attributes:
        bytes: kept now.
        peak: the most kept at any time.
    """

    def __init__(self, known: Collection[torch.Tensor] = ()) -> None:
        self.bytes = self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._holders: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(lambda tensor: _Held(self, tensor), lambda held: held.tensor)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def _add(self, storage: torch.UntypedStorage, change: int) -> None:
        key = storage.data_ptr()
        if key in self._known:
            return
        before = self._holders.get(key, 0)
        self._holders[key] = before + change
        if not before or not self._holders[key]:
            self.bytes += change * storage.nbytes()
            self.peak = max(self.peak, self.bytes)


class _Held:
    """One saved tensor, until the graph lets go of it."""

    def __init__(self, counter: KeptActivations, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._counter = counter
        counter._add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self._counter._add(self.tensor.untyped_storage(), -1)
