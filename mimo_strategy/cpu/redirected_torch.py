"""``torch``, ``torch.cuda`` and ``torch.distributed`` as megatron-core sees them on a machine without CUDA.

Each is the real module with some names replaced; the rest, classes included, is the same object.
"""

import contextlib
import functools
import logging

import torch
import torch.distributed

from mimo_strategy.cpu import collectives
from mimo_strategy.overlay import Overlay

_CPU = torch.device("cpu")


class _NoStream:
    """Stands in for a CUDA stream or event: every method returns at once."""

    def __init__(self, *args, **kwargs):
        self.device = _CPU

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False


class _DefaultGenerators:
    """``torch.cuda.default_generators``: whatever the device, the CPU's generator."""

    def __getitem__(self, device):
        return torch.default_generator


def _on_cpu(factory):
    @functools.wraps(factory)
    def create(*args, device=None, **kwargs):
        if device is not None and str(device).startswith("cuda"):
            device = _CPU
        return factory(*args, device=device, **kwargs)

    return create


def _as_is(function=None, **options):
    """``torch.compile`` without compiling: megatron-core fuses pointwise functions with it."""
    return function if function is not None else lambda function: function


def _nothing(*args, **kwargs):
    return None


_random = Overlay(
    torch.cuda.random,
    get_rng_state=lambda device=None: torch.get_rng_state(),
    set_rng_state=lambda state, device=None: torch.set_rng_state(state),
)

_cuda = Overlay(
    torch.cuda,
    current_device=lambda: _CPU,
    set_device=_nothing,
    synchronize=_nothing,
    empty_cache=_nothing,
    _lazy_init=_nothing,
    _lazy_call=lambda function, **kwargs: function(),
    default_generators=_DefaultGenerators(),
    # not torch.manual_seed, which itself seeds CUDA
    manual_seed=torch.default_generator.manual_seed,
    manual_seed_all=_nothing,
    random=_random,
    get_rng_state=_random.get_rng_state,
    set_rng_state=_random.set_rng_state,
    Stream=_NoStream,
    Event=_NoStream,
    current_stream=_NoStream,
    default_stream=_NoStream,
    stream=lambda stream: contextlib.nullcontext(),
    is_current_stream_capturing=lambda: False,
    memory_allocated=lambda device=None: 0,
)

_distributed = Overlay(
    torch.distributed,
    new_group=collectives.over_gloo(torch.distributed.new_group),
    new_subgroups_by_enumeration=collectives.over_gloo(torch.distributed.new_subgroups_by_enumeration),
    all_to_all_single=collectives.all_to_all_single,
    all_gather=collectives.all_gather,
    reduce_scatter=collectives.reduce_scatter,
)

_torch = Overlay(
    torch,
    cuda=_cuda,
    distributed=_distributed,
    compile=_as_is,
    **{
        name: _on_cpu(getattr(torch, name))
        for name in (
            "arange",
            "as_tensor",
            "empty",
            "empty_like",
            "full",
            "ones",
            "ones_like",
            "rand",
            "randn",
            "tensor",
            "zeros",
            "zeros_like",
        )
    },
)

REDIRECTED = {torch: _torch, torch.cuda: _cuda, torch.cuda.random: _random, torch.distributed: _distributed}
"""Real module to the one that megatron-core gets in its place."""

# One generator serves as "CPU" and as "CUDA" generator, so megatron-core's guard that the CPU state stays
# unchanged while it draws from the CUDA one warns at every draw.
logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
    lambda record: "CPU RNG state changed" not in record.getMessage()
)
