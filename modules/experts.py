"""Mixture-of-experts layers of Transformer Engine that keep the device busy, also while the host waits.

Transformer Engine 2.20 multiplies experts one by one, and asks cuBLAS anew which kernel to take for every number of
tokens: some 0.1 ms of the host for each expert and product, while the device needs 0.03 ms.
"""

from functools import partial
from itertools import accumulate
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear, TERowParallelGroupedLinear
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from modules.grouped_product import GroupedProduct

# of devices for which torch has such a kernel; for others it multiplies group by group
_COMPUTE_CAPABILITIES = (9, 10)


class _InOneKernel:
    """A grouped linear layer of Transformer Engine in one kernel a product, where torch has one for it."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # megatron-core lays parameters out from the last to the first: now the first weight comes first
        self._parameters = dict(reversed(self._parameters.items()))

    def forward(self, tokens: torch.Tensor, tokens_per_expert: list[int]) -> tuple[torch.Tensor, None]:
        if not self._has_kernel(tokens):
            return super().forward(tokens, tokens_per_expert)
        ends = torch.tensor(list(accumulate(tokens_per_expert)), dtype=torch.int32, pin_memory=True)
        weights = [getattr(self, f"weight{expert}") for expert in range(self.num_gemms)]
        ends = ends.to(tokens.device, non_blocking=True)
        return GroupedProduct.apply(tokens, ends, self.fuse_wgrad_accumulation, *weights), None

    def _has_kernel(self, tokens: torch.Tensor) -> bool:
        return (
            len(tokens) > 0
            and tokens.dtype is self.weight0.dtype is torch.bfloat16
            and not self.use_bias
            and not FP8GlobalStateManager.is_fp8_enabled()
            and torch.cuda.get_device_capability(tokens.device)[0] in _COMPUTE_CAPABILITIES
        )


class _ColumnParallel(_InOneKernel, TEColumnParallelGroupedLinear):
    pass


class _RowParallel(_InOneKernel, TERowParallelGroupedLinear):
    pass


class _Backend(TESpecProvider):
    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> partial:
        linear = GroupedMLPSubmodules(
            linear_fc1=_ColumnParallel, linear_fc2=_RowParallel, activation_func=self.activation_func()
        )
        return partial(TEGroupedMLP, submodules=linear)


class BusyMoELayer(MoELayer):
    """Starts the shared expert when token counts are on their way to the host, not before they are computed.

    The host waits for these counts before it can send tokens to experts, and then again has to launch what comes next:
    meanwhile the device now has the shared expert to compute.
    """

    def shared_experts_compute(self, hidden_states: torch.Tensor) -> None:
        """Left to :meth:`preprocess`."""

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prepared = super().preprocess(hidden_states, probs, routing_map)
        self._shared_output = super().shared_experts_compute(hidden_states)
        return prepared

    def postprocess(self, output: torch.Tensor, shared_expert_output: None) -> torch.Tensor:
        shared_output, self._shared_output = self._shared_output, None
        return super().postprocess(output, shared_output)


def moe_spec(num_experts: int) -> partial:
    """The mixture of experts of a layer, as megatron-core's specs hold it."""
    spec = get_moe_module_spec_for_backend(_Backend(), num_experts=num_experts, moe_grouped_gemm=True)
    return partial(BusyMoELayer, *spec.args, **spec.keywords)
