"""Random streams: each module draws from its own, whatever runs beside it on the same rank."""

from contextlib import contextmanager

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import (
    _get_cuda_rng_state,
    _set_cuda_rng_state,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)

_SEEDS_PER_STAGE = 100

# Name of the device's default generator among the streams; the others are megatron-core's names.
_DEFAULT = "default"


class ModuleRng:
    """The random streams of one module on this rank.

    megatron-core keeps one process-global tracker, seeded with one tensor-parallel and one expert-parallel rank.
    Colocated modules with different layouts would share it, and tensor-parallel shards of one could then be
    initialised alike. Here every module has its own states, which are the tracker's only while it is built or run.
    So is the state of the device's default generator: an encoder's lanes may draw for different numbers of items, and
    ranks of different encoder lanes may be tensor-parallel ones of one language lane, which must draw alike.

    Args:
        seed: the same on every rank; the coordinates of the rank are added as megatron-core does.
        groups: process groups of the module.
    """

    def __init__(self, seed: int, groups: ProcessGroupCollection) -> None:
        others = _streams()
        self._seed = seed + _SEEDS_PER_STAGE * groups.pp.rank()
        torch.manual_seed(self._seed)
        model_parallel_cuda_manual_seed(
            self._seed,
            tp_rank=groups.tp.rank(),
            ep_rank=groups.ep.rank(),
            etp_rank=groups.expt_tp.rank(),
            force_reset_rng=True,
        )
        self._states = _streams()
        _set_streams(others)

    @contextmanager
    def building(self):
        """Build the module: its own streams, and a default generator that starts from its seed."""
        torch.manual_seed(self._seed)
        with self.active():
            yield

    @contextmanager
    def active(self):
        """Let the tracker and the default generator draw from this module's streams."""
        others = self._enter()
        try:
            yield
        finally:
            self._leave(others)

    def activate_in_forward(self, module: torch.nn.Module) -> None:
        """Make the streams active whenever ``module`` is called."""
        outer = []
        module.register_forward_pre_hook(lambda module, args: outer.append(self._enter()))
        module.register_forward_hook(lambda module, args, output: self._leave(outer.pop()), always_call=True)

    def make_current(self) -> None:
        """Leave the streams in the tracker, for whatever draws outside a module's own forward."""
        self._enter()

    def _enter(self) -> dict[str, torch.Tensor]:
        others = _streams()
        _set_streams(self._states)
        return others

    def _leave(self, others: dict[str, torch.Tensor]) -> None:
        self._states = _streams()
        _set_streams(others)


def _streams() -> dict[str, torch.Tensor]:
    return get_cuda_rng_tracker().get_states() | {_DEFAULT: _get_cuda_rng_state()}


def _set_streams(states: dict[str, torch.Tensor]) -> None:
    get_cuda_rng_tracker().set_states({name: state for name, state in states.items() if name != _DEFAULT})
    _set_cuda_rng_state(states[_DEFAULT])
