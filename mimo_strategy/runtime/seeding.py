"""Random streams: each module draws from its own, whatever runs beside it on the same rank."""

from contextlib import contextmanager

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

_SEEDS_PER_STAGE = 100
# beyond the seeds of all modules and stages
_SEEDS_PER_RESTART = 1_000_003


class ModuleRng:
    """The random streams of one module on this rank.

    megatron-core keeps one process-global tracker, seeded with one tensor-parallel and one expert-parallel rank.
    Colocated modules with different layouts would share it, and tensor-parallel shards of one could then be
    initialised alike. Here every module has its own states, which are the tracker's only while it is built or run.

    Args:
        seed: the same on every rank; the coordinates of the rank are added as megatron-core does.
        groups: process groups of the module.
    """

    def __init__(self, seed: int, groups: ProcessGroupCollection) -> None:
        self._seed = seed + _SEEDS_PER_STAGE * groups.pp.rank()
        self._groups = groups
        self._is_active = False
        torch.manual_seed(self._seed)
        self._states = self._seeded(self._seed)

    @contextmanager
    def building(self):
        """Build the module: its own streams, and a default generator that starts from its seed."""
        torch.manual_seed(self._seed)
        with self.active():
            yield

    @contextmanager
    def active(self):
        """Let the tracker draw from this module's streams."""
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
        """State of every stream, by megatron-core's name."""
        return get_cuda_rng_tracker().get_states() if self._is_active else dict(self._states)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Go on from other states."""
        self._states = states
        if self._is_active:
            get_cuda_rng_tracker().set_states(dict(states))

    def restart(self, number: int) -> None:
        """Start the streams anew; other than when built, and than under any other ``number``."""
        self.set_states(self._seeded(self._seed + _SEEDS_PER_RESTART * (number + 1)))

    def _seeded(self, seed: int) -> dict[str, torch.Tensor]:
        others = get_cuda_rng_tracker().get_states()
        model_parallel_cuda_manual_seed(
            seed,
            tp_rank=self._groups.tp.rank(),
            ep_rank=self._groups.ep.rank(),
            etp_rank=self._groups.expt_tp.rank(),
            force_reset_rng=True,
        )
        states = get_cuda_rng_tracker().get_states()
        get_cuda_rng_tracker().set_states(others)
        return states

    def _enter(self) -> dict[str, torch.Tensor]:
        tracker = get_cuda_rng_tracker()
        others = tracker.get_states()
        tracker.set_states(self._states)
        self._is_active = True
        return others

    def _leave(self, others: dict[str, torch.Tensor]) -> None:
        tracker = get_cuda_rng_tracker()
        self._states = tracker.get_states()
        self._is_active = False
        tracker.set_states(others)
