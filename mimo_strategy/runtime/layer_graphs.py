"""Replay layers as CUDA graphs: the host launches a pass of a layer at once, not kernel by kernel.

A layer is recorded for one shape of input; any other runs as before, and so do layers that a second microbatch enters
before the first has come back.
"""

import gc
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.func import functional_call

_STEPS_BEFORE = 2
"""Steps after which layers are recorded: kernels have been compiled and tuned."""


class Input(NamedTuple):
    """What a recorded layer takes."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class ReplayableLayer(torch.nn.Module):
    """Goes in front of the class of a layer whose training passes may be recorded.

    The layer has megatron-core's ``config``, takes ``hidden_states`` and nothing else that matters, and returns a
    tensor. Its kernels must be the same for every input of one shape: no random numbers, no waiting for the device, no
    collectives, nothing copied from the host. Attention of Transformer Engine 2.20 is no such layer: with short
    sequences its backward pass ends with an illegal memory access when it is replayed.
    """

    _recorded: "RecordedLayer | None" = None
    _seen: Input | None = None

    @property
    def is_replayable(self) -> bool:
        """Whether it neither draws random numbers, nor quantizes weights in the first microbatch of a step only."""
        config = self.config
        return not (config.hidden_dropout or config.attention_dropout or config.fp8 or config.recompute_granularity)

    def forward(self, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        trains = self.training and torch.is_grad_enabled() and hidden_states.requires_grad
        if not trains or any(other is not None for other in others.values()):
            return super().forward(hidden_states=hidden_states, **others)
        self._seen = Input(hidden_states.shape, hidden_states.dtype, hidden_states.device)
        if self._recorded is None or not self._recorded.takes(self._seen):
            return super().forward(hidden_states=hidden_states, **others)
        return self._recorded.replay(hidden_states)

    def run_with(self, parameters: Mapping[str, torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
        """Run with ``parameters``, by name, in place of the layer's own.

        A layer that holds parameters elsewhere than under their names replaces them there too.
        """
        return functional_call(self, dict(parameters), kwargs={"hidden_states": hidden_states})


class LayerGraphs:
    """The layers of a module that are recorded.

    Args:
        module: where to look for them, in the order in which they run.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._layers = [
            layer for layer in module.modules() if isinstance(layer, ReplayableLayer) and layer.is_replayable
        ]
        self._steps = 0

    def begin_step(self) -> None:
        """Before gradients are cleared, as recording adds to them: record the layers once they have run."""
        self._steps += 1
        for layer in self._layers:
            if layer._recorded is not None:
                # a step that failed may have left it so
                layer._recorded.is_waiting = False
        if self._steps == _STEPS_BEFORE + 1:
            self._record()

    def release(self) -> None:
        """Give up the graphs with their memory."""
        for layer in self._layers:
            layer._recorded = None

    def _record(self) -> None:
        layers = [layer for layer in self._layers if layer._seen is not None and layer._seen.device.type == "cuda"]
        if not layers:
            return
        stream = torch.cuda.Stream()
        pool = torch.cuda.graph_pool_handle()
        recorded = [RecordedLayer(layer, layer._seen) for layer in layers]
        with _without_garbage_collection():
            # memory of the pool is used again as if passes were always replayed in this order, as they are
            for layer in recorded:
                layer.warm_up(stream)
                layer.record_forward(stream, pool)
            for layer in reversed(recorded):
                layer.record_backward(stream, pool)
        for layer, graphs in zip(layers, recorded, strict=True):
            layer._recorded = graphs


class RecordedLayer:
    """Forward and backward pass of a layer for inputs of one shape.

    Args:
        layer: to be recorded, with gradients that the caller clears afterwards.
        input: what it takes.

    Attributes:
        is_waiting: whether a forward pass has been replayed, but its backward pass has not.
    """

    def __init__(self, layer: ReplayableLayer, input: Input) -> None:
        self.is_waiting = False
        self._kind = input
        self._layer = layer
        trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
        self._parameters = list(trained.values())
        self._aliases = {name: _alias(parameter) for name, parameter in trained.items()}
        self._input = torch.zeros(input.shape, dtype=input.dtype, device=input.device, requires_grad=True)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

    def takes(self, input: Input) -> bool:
        """Whether it can be replayed for such an input now."""
        return input == self._kind and not self.is_waiting

    def replay(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The output of the layer, whose backward pass is replayed too."""
        return _Replay.apply(self, hidden_states, *self._parameters)

    def warm_up(self, stream: torch.cuda.Stream) -> None:
        """Both passes once, so that whatever is made on first use is not recorded."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self._run()
            self._gradients(output, torch.zeros_like(output))
        torch.cuda.current_stream().wait_stream(stream)

    def _run(self) -> torch.Tensor:
        return self._layer.run_with(self._aliases, self._input)

    def record_forward(self, stream: torch.cuda.Stream, pool: Any) -> None:
        with torch.cuda.graph(self._forward, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._output = self._run()

    def record_backward(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self._output_gradient = torch.zeros_like(self._output)
        with torch.cuda.graph(self._backward, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._input_gradients = self._gradients(self._output, self._output_gradient)
        used = zip(self._aliases, self._input_gradients[1:], strict=True)
        if unused := [name for name, gradient in used if gradient is None]:
            raise RuntimeError(
                f"a recorded {type(self._layer).__name__} does not use its own {', '.join(unused)}: "
                "run_with must replace them wherever the layer holds them"
            )
        self._output = self._output.detach()
        # of these the kernels add to the gradients of megatron-core's data parallelism themselves
        self._added = [
            parameter
            for parameter, alias in zip(self._parameters, self._aliases.values(), strict=True)
            if getattr(alias, "grad_added_to_main_grad", False)
        ]
        del self._aliases, self._layer

    def _gradients(self, output: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(output, (self._input, *self._aliases.values()), gradient, allow_unused=True)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: RecordedLayer, hidden_states: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.layer = layer
        layer._input.copy_(hidden_states)
        layer._forward.replay()
        layer.is_waiting = True
        return layer._output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer = ctx.layer
        layer._output_gradient.copy_(gradient)
        layer._backward.replay()
        layer.is_waiting = False
        for parameter in layer._added:
            parameter.grad_added_to_main_grad = True
        return None, *(each.detach() for each in layer._input_gradients)


def _alias(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """The same memory, but nothing in the graph of autograd that belongs to another stream than the one recorded."""
    alias = torch.nn.Parameter(parameter.detach())
    alias.__dict__.update(parameter.__dict__)
    alias.grad_added_to_main_grad = False
    return alias


@contextmanager
def _without_garbage_collection():
    """A graph that is collected while another one is recorded spoils that one."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
