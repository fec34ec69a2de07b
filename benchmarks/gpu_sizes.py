"""The largest of a few models that GPUs of a given memory hold."""

from dataclasses import dataclass

from mimo_strategy import DistributedDataParallelConfig, Layout
from mimo_strategy.planning.estimate import Estimator, Job
from mimo_strategy.planning.machine import MACHINES
from mimo_strategy.planning.memory import Training
from modules import NEMOTRON_20_LAYERS, MambaMoE, NemotronVLM

_GIB = 2**30
# Beside what estimates count: gradients of activations and workspaces. The largest difference that was measured.
_MARGIN = 8 * _GIB
# What communicators and kernels take.
_COMMUNICATORS = {"megatron": 12 * _GIB, "strategy": 2 * _GIB}
# Of the device's memory; fragments take the rest.
_USABLE = 0.95


@dataclass(frozen=True)
class Sizes:
    """What is made smaller where the reference model does not fit.

    Attributes:
        experts: for each GPU; all GPUs together have 8 at least.
        vocabulary: tokens.
        pattern: layers of the language model.
    """

    experts: int = 8
    vocabulary: int = 131_072
    pattern: str = NEMOTRON_20_LAYERS

    def __str__(self) -> str:
        return f"{len(self.pattern)} layers, {self.experts} experts for each GPU, vocabulary {self.vocabulary:,}"


SIZES = (
    Sizes(),
    Sizes(experts=4, vocabulary=65_536),
    Sizes(experts=4, vocabulary=32_768),
    Sizes(experts=4, vocabulary=32_768, pattern="MEMEM*EMEMEM*"),
)


def needed_bytes(
    model: NemotronVLM | MambaMoE,
    layout: Layout,
    *,
    loop: str,
    microbatches: int,
    batch_size: int,
    encoder_batching: int,
    encoder_ahead: int,
) -> float:
    """Of device memory that a loop needs on its fullest rank, rather too much than too little.

    Args:
        model: not built.
        layout: resolved.
        loop: ``megatron`` has more communicators.
        microbatches: per step.
        batch_size: samples per step.
        encoder_batching: microbatches that an encoder takes at once.
        encoder_ahead: microbatches that an encoder runs ahead.
    """
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
    length, items = model.longest_sample()
    job = Job(
        model,
        batch_size,
        length,
        items,
        Training.of(ddp, "bf16-mixed"),
        MACHINES["h200"],
        encoder_batching=encoder_batching,
        encoder_ahead=encoder_ahead,
    )
    estimate = Estimator(job).estimate(layout, microbatches)
    communicators = _COMMUNICATORS["megatron" if loop == "megatron" and layout.world_size > 1 else "strategy"]
    return estimate.peak_bytes + communicators + _MARGIN


def fits(needed: float, memory: float) -> bool:
    """Whether a device of so much memory holds what is needed."""
    return needed <= _USABLE * memory
