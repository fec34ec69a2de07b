"""The loss as one number, and what is told beside it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

_NOTHING: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = MappingProxyType({})


class LossOutput(NamedTuple):
    """Loss of some tokens: the sum of their losses and how many they are, both scalar tensors.

    Attributes:
        sum: sum of the tokens' losses.
        count: number of tokens.
        metrics: further quantities by name, as sum and count of what they are the mean of; logged on every rank.
    """

    sum: torch.Tensor
    count: torch.Tensor
    metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = _NOTHING

    @property
    def mean(self) -> torch.Tensor:
        """Loss per token; 0 where no token counts."""
        return self.sum / self.count.clamp_min(1)
