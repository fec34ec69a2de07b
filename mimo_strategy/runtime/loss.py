"""The loss as one number: a sum over tokens and their count, equal on every rank."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from mimo_strategy.layout import LANGUAGE
from mimo_strategy.topology import Topology


class LossOutput(NamedTuple):
    """Loss of some tokens: the sum of their losses and how many they are, both scalar tensors."""

    sum: torch.Tensor
    count: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """Loss per token; 0 where no token counts."""
        return self.sum / self.count.clamp_min(1)


class StepLoss:
    """Adds up the losses of a step's microbatches, then reduces them over the world, once."""

    def __init__(self, topology: Topology, device: torch.device) -> None:
        self._topology = topology
        self._total = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, loss: LossOutput) -> None:
        """Add one microbatch; called on the last stage of the language model only."""
        self._total += torch.stack((loss.sum.detach().double(), loss.count.double()))

    def reduce(self) -> LossOutput:
        """Sum over the language model's lanes, and tell every rank; collective over the world."""
        topology = self._topology
        if topology.runs(LANGUAGE):
            groups = topology.groups[LANGUAGE]
            if groups.pp.rank() == groups.pp.size() - 1:
                dist.all_reduce(self._total, group=groups.dp_cp)
        dist.broadcast(self._total, src=topology.layout.loss_rank)
        return LossOutput(self._total[0].float(), self._total[1].float())
