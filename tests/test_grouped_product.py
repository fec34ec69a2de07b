"""Products of groups of tokens: against one product a group."""

import pytest
import torch

from modules.grouped_product import GroupedProduct

GROUPS, OUT, IN = 4, 8, 12


def made_weights(adjacent):
    """Parameters, and gradients to add to: in one piece of memory, as of megatron-core, or each in its own."""
    generator = torch.Generator().manual_seed(0)
    pieces = torch.randn(GROUPS, OUT, IN, generator=generator)
    totals = torch.randn(GROUPS, OUT, IN, generator=generator)
    weights = []
    for piece, total in zip(pieces, totals, strict=True):
        weight = torch.nn.Parameter(piece if adjacent else piece.clone())
        weight.main_grad = total if adjacent else total.clone()
        weights.append(weight)
    return weights


def one_by_one(tokens, sizes, weights):
    return torch.cat([part @ weight.t() for part, weight in zip(tokens.split(sizes), weights, strict=True)])


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("adds_to_main_grad", [True, False])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 2], [0, 0, 0, 1], [4, 4, 4, 4]])
def test_groups_are_multiplied_as_one_by_one(sizes, adjacent, adds_to_main_grad):
    weights = made_weights(adjacent)
    before = [weight.main_grad.clone() for weight in weights]
    tokens = torch.randn(sum(sizes), IN, generator=torch.Generator().manual_seed(1), requires_grad=True)
    upstream = torch.randn(sum(sizes), OUT, generator=torch.Generator().manual_seed(2))
    ends = torch.tensor(sizes).cumsum(0).int()

    output = GroupedProduct.apply(tokens, ends, adds_to_main_grad, *weights)
    of_tokens, *of_weights = torch.autograd.grad(output, (tokens, *weights), upstream)
    expected_output = one_by_one(tokens, sizes, weights)
    expected_of_tokens, *expected = torch.autograd.grad(expected_output, (tokens, *weights), upstream)
    if adds_to_main_grad:
        of_weights = [weight.main_grad - start for weight, start in zip(weights, before, strict=True)]
        assert all(weight.grad_added_to_main_grad for weight in weights)

    torch.testing.assert_close(output, expected_output)
    torch.testing.assert_close(of_tokens, expected_of_tokens)
    for gradient, expectation in zip(of_weights, expected, strict=True):
        torch.testing.assert_close(gradient, expectation)


def test_adjacent_weights_are_not_copied(monkeypatch):
    def copied(tensors):
        raise AssertionError("copied")

    tokens, ends = torch.randn(8, IN), torch.tensor([2, 4, 6, 8], dtype=torch.int32)
    monkeypatch.setattr(torch, "stack", copied)
    GroupedProduct.apply(tokens, ends, False, *made_weights(adjacent=True))
    with pytest.raises(AssertionError, match="copied"):
        GroupedProduct.apply(tokens, ends, False, *made_weights(adjacent=False))


def test_frozen_weights_get_no_gradient():
    weights = made_weights(adjacent=True)
    for weight in weights:
        weight.requires_grad_(False)
    tokens = torch.randn(8, IN, requires_grad=True)
    GroupedProduct.apply(tokens, torch.tensor([2, 4, 6, 8], dtype=torch.int32), False, *weights).sum().backward()
    assert tokens.grad is not None
    assert all(weight.grad is None for weight in weights)
