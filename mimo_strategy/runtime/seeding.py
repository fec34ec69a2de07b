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
# beyond the seeds of all modules and stages
_SEEDS_PER_RESTART = 1_000_003

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
        self._groups = groups
        self._is_active = False
        torch.manual_seed(self._seed)
        self._states = self._seeded(self._seed)
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

    @property
    def states(self) -> dict[str, torch.Tensor]:
        """State of every stream, by name."""
        return _streams() if self._is_active else dict(self._states)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Go on from other states."""
        self._states = states
        if self._is_active:
            _set_streams(states)

    def restart(self, number: int) -> None:
        """Start the streams anew: not as when they were built, and not as with any other ``number``."""
        self.set_states(self._seeded(self._seed + _SEEDS_PER_RESTART * (number + 1)))

    def _seeded(self, seed: int) -> dict[str, torch.Tensor]:
        others = _streams()
        model_parallel_cuda_manual_seed(
            seed,
            tp_rank=self._groups.tp.rank(),
            ep_rank=self._groups.ep.rank(),
            etp_rank=self._groups.expt_tp.rank(),
            force_reset_rng=True,
        )
        states = _streams()
        _set_streams(others)
        return states

    def _enter(self) -> dict[str, torch.Tensor]:
        others = _streams()
        _set_streams(self._states)
        self._is_active = True
        return others

    def _leave(self, others: dict[str, torch.Tensor]) -> None:
        self._states = _streams()
        self._is_active = False
        _set_streams(others)


def _streams() -> dict[str, torch.Tensor]:
    return get_cuda_rng_tracker().get_states() | {_DEFAULT: _get_cuda_rng_state()}


def _set_streams(states: dict[str, torch.Tensor]) -> None:
    get_cuda_rng_tracker().set_states({name: state for name, state in states.items() if name != _DEFAULT})
    _set_cuda_rng_state(states[_DEFAULT])
