"""Send an encoder's tokens to the language model's ranks and their gradients back, between stages of a pipeline."""

from collections import deque

import torch
from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator, CommRole
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator

from mimo_strategy.agreement import of_every_rank
from mimo_strategy.layout import LANGUAGE
from mimo_strategy.runtime.model import HeteroMimoModel
from mimo_strategy.topology import Topology


class PipelineBridge(BridgeCommunicator):
    """``BridgeCommunicator`` that returns to each encoder lane the gradients of what it has sent, or none if frozen.

    megatron-core 0.19.2 cuts the gradient of what a language lane got from several encoder lanes (fan-in) in equal
    parts, though they may have sent different numbers of tokens.

    Attributes:
        returns_gradients: whether the encoder has something to train.
    """

    def __init__(self, *args, returns_gradients: bool, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.returns_gradients = returns_gradients
        self._received: deque[list[int]] = deque()

    def forget_received(self) -> None:
        """Expect no gradient to be sent back for what was received so far."""
        self._received.clear()

    def send_backward(self, gradient: torch.Tensor) -> None:
        if self.returns_gradients:
            super().send_backward(gradient)

    def recv_backward(self) -> torch.Tensor | None:
        return super().recv_backward() if self.returns_gradients else None

    def send_forward_recv_backward(self, tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor | None:
        if self.returns_gradients:
            return super().send_forward_recv_backward(tensor, *args, **kwargs)
        return self.send_forward(tensor)

    def send_backward_recv_forward(self, gradient: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.returns_gradients:
            return super().send_backward_recv_forward(gradient, *args, **kwargs)
        return self.recv_forward()

    def _communicate_shapes(self, *args, **kwargs):
        received, gradients = super()._communicate_shapes(*args, **kwargs)
        if received:
            self._received.append([shape[self._batch_dim] for shape in received])
        return received, gradients

    def _split_tensor_at_batch_dim(self, tensor: torch.Tensor, num_splits: int) -> list[torch.Tensor]:
        if self.comm_map[self.current_rank].role is not CommRole.RECEIVER:
            return super()._split_tensor_at_batch_dim(tensor, num_splits)
        # 1F1B runs backward in the order of forward
        return [part.contiguous() for part in tensor.split(self._received.popleft(), dim=self._batch_dim)]


class PipelineCommunicator(MultiModulePipelineCommunicator):
    """``MultiModulePipelineCommunicator`` from all encoders to the language model; collective over the world.

    Args:
        topology: grids and groups.
        model: whose modules the ranks run, frozen or not.
    """

    def __init__(self, topology: Topology, model: HeteroMimoModel) -> None:
        self._trainable = _trainable_modules(model)
        encoders = [name for name in topology.grids if name != LANGUAGE]
        super().__init__(
            topology.grids,
            {name: [LANGUAGE] for name in encoders} | {LANGUAGE: []},
            model.config,
            dim_mapping={"s": 0, "b": 1, "h": 2},
            module_output_ndim=dict.fromkeys(encoders, 2),
        )

    def _build_bridge_comms(self) -> None:
        for source, destinations in self.topology.items():
            for destination in destinations:
                self.bridge_comms.append(
                    PipelineBridge(
                        self.module_to_grid_map[source],
                        self.module_to_grid_map[destination],
                        dim_mapping=self.dim_mapping,
                        comm_dtype=self.config.pipeline_dtype,
                        src_module_name=source,
                        dest_module_name=destination,
                        tensor_ndim=self.module_output_ndim[source],
                        returns_gradients=source in self._trainable,
                    )
                )

    def begin_step(self) -> None:
        """Forget what an earlier step left, which was forward only or failed."""
        for bridge in self.bridge_comms:
            bridge.forget_received()


def _trainable_modules(model: HeteroMimoModel) -> set[str]:
    """Names of the modules that have a trainable parameter on some rank."""
    own = [name for name, parameters in model.trainable_parameters().items() if parameters]
    return set().union(*of_every_rank(own))
