"""fp8: layers that multiply in 8 bits, and what they ask of sizes, machine and precision."""

from collections.abc import Mapping
from typing import Any

import torch

from modules.transformer import use_transformer_engine

MULTIPLE = 16
"""What divides every size of a matrix product in fp8, on every rank."""


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Check the sizes of layers in fp8.

    Raises:
        ValueError: if one is no multiple of :data:`MULTIPLE`.
    """
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % MULTIPLE]
    if wrong:
        raise ValueError(f"fp8 takes sizes that are multiples of {MULTIPLE}, got {', '.join(wrong)}")


def divides(sizes: Mapping[str, int]) -> dict[str, int]:
    """What tensor parallelism must divide so that its ranks have multiples of :data:`MULTIPLE` too, by name."""
    return {f"{name} / {MULTIPLE} (fp8)": size // MULTIPLE for name, size in sizes.items()}


def settings(dtype: torch.dtype) -> dict[str, Any]:
    """Fields of megatron-core's ``TransformerConfig`` for layers in fp8.

    Of Transformer Engine's recipes the one that keeps no history of scales: none to reduce over ranks, for which
    megatron-core has global groups only, and none to be saved. Tensors are scaled as wholes, by their largest
    element: to E4M3 forward and to E5M2 as gradients.

    Raises:
        ValueError: if this machine or precision has no fp8.
    """
    check_machine(dtype)
    return {"fp8": "hybrid", "fp8_recipe": "tensorwise"}


def check_machine(dtype: torch.dtype) -> None:
    """Check that this machine has fp8, for parameters of ``dtype``.

    Raises:
        ValueError: if it has not.
    """
    if dtype is not torch.bfloat16:
        raise ValueError(f"fp8=True is for the precisions bf16-mixed and bf16-true, the parameters here are {dtype}")
    if not use_transformer_engine():
        raise ValueError("fp8=True needs a GPU and Transformer Engine, which are not both here")
    from transformer_engine.pytorch import is_fp8_available

    available, reason = is_fp8_available(return_reason=True)
    if not available:
        raise ValueError(f"fp8=True does not work on this {torch.cuda.get_device_name()}: {reason}")
