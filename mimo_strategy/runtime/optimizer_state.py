"""What the optimizers of this rank hold of each parameter, whatever kind of optimizer they are."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from mimo_strategy.runtime.optimizer import HeteroOptimizer

MASTER_WEIGHTS = "master"


@dataclass(frozen=True)
class ParameterState:
    """State of one parameter, or of the part of it that this rank updates.

    Attributes:
        parameter: the model's.
        start: first element of the flattened parameter that the state is of.
        stop: the element after the last one.
        instance: which of the optimizers that hold the same elements this is; ``None`` if every data-parallel rank
            holds them.
        tensors: live, flat tensors of ``stop - start`` elements, by name; one named ``master`` if the optimizer keeps
            the weights in a higher precision than the model.
    """

    parameter: torch.nn.Parameter
    start: int
    stop: int
    instance: int | None
    tensors: dict[str, torch.Tensor]


def parameter_states(optimizer: HeteroOptimizer) -> Iterator[ParameterState]:
    """The state of all parameters that this rank updates, made where no step has made it yet.

    Raises:
        TypeError: if the state of a kind of optimizer is not known.
    """
    for part in optimizer.parts:
        _allocate(part)
        yield from _states(part)


def set_num_updates(optimizer: HeteroOptimizer, num_updates: int) -> None:
    """Set how many updates the optimizer has made, which Adam corrects its averages by."""
    for part in optimizer.parts:
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(num_updates)
        if not isinstance(part.optimizer, torch.optim.Adam):
            # Apex and Transformer Engine count by group
            for group in part.optimizer.param_groups:
                group["step"] = num_updates


def _allocate(part: MegatronOptimizer) -> None:
    """Make the state that the first step would make, so that it can be saved or loaded into."""
    inner = part.optimizer
    if not isinstance(inner, torch.optim.Adam | torch.optim.SGD):
        part.init_state_fn(inner, part.config)
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            if inner.state[parameter]:
                continue
            if isinstance(inner, torch.optim.Adam):
                # megatron-core's init_state_fn leaves the step out, which torch's Adam then misses
                inner.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            elif group["momentum"]:
                inner.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}


def _states(part: MegatronOptimizer) -> Iterator[ParameterState]:
    if isinstance(part, DistributedOptimizer) and not part.config.use_precision_aware_optimizer:
        for parameter in part.model_param_gbuf_map:
            held = part._get_model_param_range_map(parameter)["param"]
            group, position = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][position]
            yield _state(part, parameter, main, held.start, held.end, part.distributed_optimizer_instance_id)
    elif isinstance(part, FP32Optimizer):
        for parameter in part.get_parameters():
            yield _state(part, parameter, parameter, 0, parameter.numel(), None)
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = [
            *zip(part.float16_groups, part.fp32_from_float16_groups, strict=True),
            *zip(part.fp32_from_fp32_groups, part.fp32_from_fp32_groups, strict=True),
        ]
        for parameters, mains in pairs:
            for parameter, main in zip(parameters, mains, strict=True):
                yield _state(part, parameter, main, 0, parameter.numel(), None)
    else:
        raise TypeError(f"the state of a {type(part).__name__} cannot be saved or loaded in parts")


def _state(
    part: MegatronOptimizer,
    parameter: torch.nn.Parameter,
    main: torch.Tensor,
    start: int,
    stop: int,
    instance: int | None,
) -> ParameterState:
    tensors = {name: tensor for name, tensor in part.optimizer.state[main].items() if name != "step"}
    if main.dtype != parameter.dtype:
        tensors[MASTER_WEIGHTS] = main
    return ParameterState(
        parameter, start, stop, instance, {name: tensor.detach().view(-1) for name, tensor in tensors.items()}
    )
