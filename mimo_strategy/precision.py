"""``Trainer(precision=...)`` as megatron-core's dtypes."""

from typing import Any, Literal, override

import torch
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor

_DTYPES = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


class MegatronPrecision(Precision):
    """Precision of modules that megatron-core computes, reduces and updates itself.

    ``bf16-mixed`` and ``bf16-true`` both keep parameters and activations in bfloat16 and the optimizer's copy of
    the parameters in float32; with ``bf16-mixed`` gradients are summed in float32 too. ``16-mixed`` is that in
    float16, with a loss scale that all modules share (see megatron-core's ``OptimizerConfig.initial_loss_scale``);
    steps whose gradients overflow are skipped.

    On a CPU Lightning replaces ``Trainer(precision="16-mixed")`` by ``bf16-mixed``; give it
    ``plugins=MegatronPrecision("16-mixed")`` there.

    Args:
        precision: a precision of the Trainer.

    Raises:
        ValueError: for a precision that is not supported.
    """

    def __init__(self, precision: Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"]) -> None:
        if precision in ("transformer-engine", "transformer-engine-float16"):
            raise ValueError(
                f"precision {precision!r} is not supported: modules choose fp8 for themselves, with "
                "RadioConfig(fp8=True) and MambaMoEConfig(fp8=True) under precision 'bf16-mixed' or 'bf16-true'"
            )
        if precision not in _DTYPES:
            raise ValueError(f"precision {precision!r} is not supported; choose one of {sorted(_DTYPES)}")
        self.precision = precision
        self.dtype = _DTYPES[precision]
        self.reduces_gradients_in_fp32 = precision != "bf16-true"

    @override
    def backward(
        self, tensor: Tensor, model: LightningModule, optimizer: Steppable | None, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing is left to do: the schedule ran the backward passes within ``training_step``."""

    @override
    def clip_gradients(
        self,
        optimizer: Steppable,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Let the optimizer clip by the norm over all modules' gradients, which it computes in its step."""
        optimizer.clip_grad = float(clip_val or 0.0)
