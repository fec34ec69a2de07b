"""Products of the tokens of many experts with their weights, each of them in one kernel of torch."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.functional import grouped_mm


class GroupedProduct(torch.autograd.Function):
    """Multiply consecutive groups of tokens with a weight each.

    ``GroupedProduct.apply(tokens, ends, adds_to_main_grad, *weights)`` takes tokens ``[tokens, in]``, for every group
    the position at which it ends (int32 ``[groups]``, on the device of the tokens) and weights ``[out, in]``, and
    returns ``[tokens, out]``. Groups may be empty. With ``adds_to_main_grad`` the weights' gradients are added to
    ``main_grad``, as megatron-core's data parallelism knows it of Transformer Engine.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, ends: torch.Tensor, adds_to_main_grad: bool, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens, ends)
        # themselves, as what is saved comes back without its attributes
        ctx.weights = weights
        ctx.adds_to_main_grad = adds_to_main_grad
        return grouped_mm(tokens, _as_one(weights).transpose(1, 2), offs=ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, ends = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_tokens = None
        of_weights: Iterable[torch.Tensor | None] = [None] * len(ctx.weights)
        if ctx.needs_input_grad[0]:
            of_tokens = grouped_mm(gradient, _as_one(ctx.weights), offs=ends)
        if any(ctx.needs_input_grad[3:]):
            of_weights = grouped_mm(gradient.t(), tokens, offs=ends)
            if ctx.adds_to_main_grad:
                _add([weight.main_grad for weight in ctx.weights], of_weights)
                placeholder = torch.empty_like(ctx.weights[0])
                for weight in ctx.weights:
                    weight.grad_added_to_main_grad = True
                # hooks wait for a gradient of every weight
                of_weights = [placeholder.detach() for _ in ctx.weights]
        return of_tokens, None, None, *of_weights


def _as_one(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of one shape, stacked: a view where they follow one another in memory, otherwise a copy."""
    stacked = _view_of(tensors)
    return torch.stack([tensor.detach() for tensor in tensors]) if stacked is None else stacked


def _add(totals: Sequence[torch.Tensor], stacked: torch.Tensor) -> None:
    """Add to each of the tensors its part of the stacked ones."""
    in_place = _view_of(totals)
    if in_place is not None:
        in_place.add_(stacked)
        return
    for total, part in zip(totals, stacked, strict=True):
        total.add_(part)


def _view_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """``[number of tensors, ...]`` in the memory of the tensors, if they follow one another there."""
    first = tensors[0]
    begin, size, storage = first.storage_offset(), first.numel(), first.untyped_storage().data_ptr()
    for position, tensor in enumerate(tensors):
        if tensor.storage_offset() != begin + position * size or tensor.untyped_storage().data_ptr() != storage:
            return None
    return first.detach().as_strided((len(tensors), *first.shape), (size, *first.stride()))
