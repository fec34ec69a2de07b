"""Measure what a layout costs on this rank: memory by kind, and the time of a step."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from torch.autograd.graph import saved_tensors_hooks

from mimo_strategy.layout import Layout
from mimo_strategy.module import BuildContext, MimoModule
from mimo_strategy.precision import MegatronPrecision
from mimo_strategy.runtime.data_parallel import resolve_ddp
from mimo_strategy.runtime.optimizer_state import parameter_states
from mimo_strategy.runtime.runtime import MimoRuntime
from mimo_strategy.step_batch import Batch
from mimo_strategy.topology import Topology


@dataclass(frozen=True)
class ModuleBytes:
    """What a module holds on this rank between steps."""

    parameters: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class MeasuredCosts:
    """What one rank saw.

    Attributes:
        modules: bytes of the tensors that are there, by module of this rank.
        activations: the most bytes that were kept for backward passes at any time of a step, all modules together.
        step_seconds: time of the quickest step; whatever else the machine does only adds to it.
    """

    modules: dict[str, ModuleBytes]
    activations: int
    step_seconds: float


def measure_costs(
    model: MimoModule,
    layout: Layout,
    make_batch: Callable[[int], Batch],
    *,
    batch_size: int,
    num_microbatches: int = 1,
    encoder_batching: int = 1,
    encoder_ahead: int = 0,
    precision: str = "32-true",
    ddp: DistributedDataParallelConfig | Mapping[str, DistributedDataParallelConfig] | None = None,
    num_steps: int = 1,
) -> MeasuredCosts:
    """Build the model in a layout, take steps, and measure; on every rank of :func:`.run_on_ranks`, on CPUs.

    Args:
        model: not built yet.
        layout: of as many ranks as there are.
        make_batch: samples to train on, as many as asked for.
        batch_size: samples of a step, over all ranks.
        num_microbatches: microbatches of a step.
        encoder_batching: as for ``MimoHeteroStrategy``.
        encoder_ahead: as for ``MimoHeteroStrategy``.
        precision: of the Trainer.
        ddp: as for ``MimoHeteroStrategy``, for all modules or by module.
        num_steps: steps to time, after one that warms up.
    """
    plugin, device = MegatronPrecision(precision), torch.device("cpu")
    topology = Topology(layout)
    model.build_context = BuildContext(topology, plugin.dtype, device, seed=0)
    model.configure_model()
    model.runtime = runtime = MimoRuntime(
        model.model,
        topology,
        ddp_configs={
            name: replace(config, grad_reduce_in_fp32=plugin.reduces_gradients_in_fp32)
            for name, config in resolve_ddp(layout.modules, ddp, on_gpus=False).items()
        },
        num_microbatches=num_microbatches,
        dtype=plugin.dtype,
        device=device,
    )
    runtime.encoder_batching = encoder_batching
    runtime.encoder_ahead = encoder_ahead
    optimizer = runtime.build_optimizer({name: OptimizerConfig(lr=1e-6) for name in layout.modules})
    batch = model.count_batch(make_batch(batch_size // runtime.share.num_lanes))

    def step() -> float:
        dist.barrier()
        start = time.perf_counter()
        runtime.run_step(
            batch, model.forward_step, model.loss_step, backward=True, encoder_inputs=model.inputs_of_encoders
        )
        optimizer.step()
        dist.barrier()
        return time.perf_counter() - start

    known = [*runtime.model.parameters(), *(value for value in batch.values() if isinstance(value, torch.Tensor))]
    with KeptActivations(known) as kept:
        step()
    step_seconds = min(step() for _ in range(num_steps))
    states = list(parameter_states(optimizer))
    modules = {}
    for name, module in runtime.model.own_modules().items():
        own = {id(parameter) for parameter in module.parameters()}
        held = [tensor for state in states if id(state.parameter) in own for tensor in state.tensors.values()]
        buffers = [buffer.grad_data for buffer in module.buffers + module.expert_parallel_buffers]
        parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
        modules[name] = ModuleBytes(sum(parameters.values()), _bytes(buffers), _bytes(held))
    return MeasuredCosts(modules, kept.peak, step_seconds)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class KeptActivations:
    """Counts, within its context, the bytes that autograd keeps for backward passes.

    Tensors that share memory count once, and memory that is ``known`` (parameters) not at all. What is saved by
    attributes of a custom autograd function, beside ``save_for_backward``, is not seen.

    Args:
        known: tensors whose memory is there anyway.

    Attributes:
        bytes: kept now.
        peak: the most kept at any time.
    """

    def __init__(self, known: Collection[torch.Tensor] = ()) -> None:
        self.bytes = self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._holders: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(lambda tensor: _Held(self, tensor), lambda held: held.tensor)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def _add(self, storage: torch.UntypedStorage, change: int) -> None:
        key = storage.data_ptr()
        if key in self._known:
            return
        before = self._holders.get(key, 0)
        self._holders[key] = before + change
        if not before or not self._holders[key]:
            self.bytes += change * storage.nbytes()
            self.peak = max(self.peak, self.bytes)


class _Held:
    """One saved tensor, until the graph lets go of it."""

    def __init__(self, counter: KeptActivations, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._counter = counter
        counter._add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self._counter._add(self.tensor.untyped_storage(), -1)
