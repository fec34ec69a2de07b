"""Linear layers of Transformer Engine that add their biases, and sum their biases' gradients, in the matrix products.

megatron-core's layers hand the bias back to whoever called them, who adds it in a kernel of its own. Its fused kernels
do not fit here: the one of bias and GELU approximates GELU by tanh, as Transformer Engine's does.
"""

from typing import Any

import torch.distributed as dist
from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear


class ColumnParallelLinear(TELayerNormColumnParallelLinear):
    """Its bias is added, where the caller would do so."""

    def __init__(self, *args: Any, skip_bias_add: bool, **settings: Any) -> None:
        super().__init__(*args, skip_bias_add=False, **settings)


class RowParallelLinear(TERowParallelLinear):
    """Its bias is added unless a reduction over ranks comes first."""

    def __init__(self, *args: Any, skip_bias_add: bool, tp_group: dist.ProcessGroup, **settings: Any) -> None:
        is_alone = tp_group.size() == 1
        super().__init__(*args, skip_bias_add=skip_bias_add and not is_alone, tp_group=tp_group, **settings)
        if is_alone:
            # Transformer Engine adds it afterwards, also where there is nothing to reduce
            self.gemm_bias_unfused_add = False
