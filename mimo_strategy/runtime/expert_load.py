"""How evenly a step's tokens are spread over the experts."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import Router

from mimo_strategy.runtime.step_sums import DETAIL, StepSums


class ExpertLoad:
    """Counts the tokens that routers send to each expert, and collects their auxiliary losses, in training.

    No two ranks route the same token: with tp, megatron-core trains experts only where it cuts sequences.

    Args:
        language: the language model as it runs on this rank; this stage of it may have no experts.
        groups: its process groups.
        num_experts: experts of a layer.
        device: device of this rank.
    """

    def __init__(
        self, language: torch.nn.Module, groups: ProcessGroupCollection, num_experts: int, device: torch.device
    ) -> None:
        self._num_ranks = groups.intra_dist_opt.size()
        self._tokens = torch.zeros(num_experts, device=device)
        self._num_routers = 0
        for module in language.modules():
            if isinstance(module, Router):
                self._num_routers += 1
                module.register_forward_hook(self._count)

    def clear(self) -> None:
        """Begin a step."""
        self._tokens.zero_()
        get_moe_metrics_tracker().clear()

    def add_to(self, sums: StepSums, num_microbatches: int) -> None:
        """Add what was counted in this step: ``tokens_per_expert`` over all layers, and the mean of each loss.

        megatron-core sums a loss over the ranks of its ``reduce_group`` and averages it over lanes, microbatches and
        layers; the counts say so.
        """
        sums.add("tokens_per_expert", self._tokens, 1 / self._num_ranks, {DETAIL: True})
        for name, entry in get_moe_metrics_tracker().metrics.items():
            ranks = 1 if entry.reduce_group is None else entry.reduce_group.size()
            sums.add(name, entry.values.sum(), num_microbatches * self._num_routers / ranks, {DETAIL: True})

    def _count(self, router: Router, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        # not in evaluation, and not twice where activations are recomputed
        if router.training and torch.is_grad_enabled():
            self._tokens += output[1].sum(dim=0)
