"""Bring an encoder's tokens from its lanes to the language model's, on ranks that run both."""

from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.models.mimo.comm import colocated_communicator

from mimo_strategy.topology import Grid


class ColocatedBridge(colocated_communicator.ColocatedBridgeCommunicator):
    """``ColocatedBridgeCommunicator`` for lanes that differ in tokens, some of which may have none.

    megatron-core 0.19.2 takes every sample to have as many tokens: it gathers and cuts lanes in equal parts, and hangs
    or mixes up samples where they are not. Here both sides know the parts.

    What is gathered takes the memory of the language lane's tokens (fan-in), or of the gradient of the encoder lane's
    (fan-out), and nothing beside it. megatron-core also makes communicators of its own for ranks that have one.
    """

    def __init__(self, src_grid: Grid, *args, **kwargs) -> None:
        def shared(rank_sets, **_):
            return src_grid.process_groups.containing_me(rank_sets), rank_sets

        with mock.patch.object(colocated_communicator.dist, "new_subgroups_by_enumeration", shared):
            super().__init__(src_grid, *args, **kwargs)

    def communicate(self, tokens: torch.Tensor, parts: list[int]) -> torch.Tensor:
        """Turn the tokens of this rank's encoder lane into those of its language lane.

        Args:
            tokens: ``[tokens, hidden]``.
            parts: numbers of tokens of the lanes that this rank's widest lane, be it the encoder's or the language
                model's, is made of; see :meth:`.StepShare.bridge_parts`.
        """
        if self.is_fan_in():
            return _Gathered.apply(tokens, parts, self.gather_pg)
        if self.is_fan_out():
            return _OwnPart.apply(tokens, parts, self.gather_pg)
        return tokens

    def num_encoder_tokens(self, parts: list[int]) -> int:
        """Of ``parts``, the tokens of this rank's encoder lane."""
        return parts[self.gather_pg.rank()] if self.is_fan_in() else sum(parts)


class _Gathered(torch.autograd.Function):
    """The rows of all ranks of a group, one after another."""

    @staticmethod
    def forward(ctx, rows, parts, group):
        ctx.parts, ctx.rank = parts, group.rank()
        return _gather(rows, parts, group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.split(ctx.parts)[ctx.rank].contiguous(), None, None


class _OwnPart(torch.autograd.Function):
    """This rank's part of rows that all ranks of a group hold; the gradient is made of all their parts."""

    @staticmethod
    def forward(ctx, rows, parts, group):
        ctx.parts, ctx.group = parts, group
        return rows.split(parts)[group.rank()].contiguous()

    @staticmethod
    def backward(ctx, gradient):
        return _gather(gradient, ctx.parts, ctx.group), None, None


def _gather(rows: torch.Tensor, parts: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    # by broadcasts, as gloo gathers equal parts only
    gathered = rows.new_empty((sum(parts), *rows.shape[1:]))
    for source, part in enumerate(gathered.split(parts)):
        if source == group.rank():
            part.copy_(rows)
        if len(part):
            dist.broadcast(part, group_src=source, group=group)
    return gathered
