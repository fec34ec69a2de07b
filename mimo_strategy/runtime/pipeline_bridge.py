"""Send an encoder's tokens to the language model's ranks and their gradients back, between stages of a pipeline."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, override

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator, CommRole
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator

from mimo_strategy.agreement import of_every_rank
from mimo_strategy.layout import LANGUAGE
from mimo_strategy.runtime.model import HeteroMimoModel
from mimo_strategy.topology import Topology

Parts = list[int]


class _Arriving(NamedTuple):
    """Tokens that other ranks have been asked for."""

    tokens: torch.Tensor
    works: list[dist.Work]


class PipelineBridge(BridgeCommunicator):
    """``BridgeCommunicator`` between ranks that know beforehand how many tokens cross, of each lane in each microbatch.

    megatron-core 0.19.2 sends the shape of everything before it, and reads it, and reads sums of the tensors for
    messages that are not printed: for each of these the host waits for the device, which then runs dry. It waits until
    what it sends has arrived. And it cuts the gradient of what a language lane got from several encoder lanes (fan-in)
    in equal parts, though they may have sent different numbers of tokens, and returns one to frozen encoders too. Its
    communicators are its own, also for ranks that have one, and stay when the model has gone.

    Here numbers of tokens are exchanged once a step, and sending waits for nobody. Both sides keep one order, as NCCL
    needs it: where an encoder sends tokens and gets a gradient, the language model asks for the tokens first.

    Args:
        hidden_size: width of a token.
        device: of this rank.
        returns_gradients: whether the encoder has something to train.
    """

    def __init__(self, *args, hidden_size: int, device: torch.device, returns_gradients: bool, **kwargs) -> None:
        super().__init__(*args, tensor_ndim=2, **kwargs)
        self.returns_gradients = returns_gradients
        self._hidden_size = hidden_size
        self._device = device
        info = self.comm_map.get(self.current_rank)
        self._role = CommRole.MEMBER if info is None else info.role
        self._peers: list[int] = []
        if self._role is not CommRole.MEMBER:
            self._peers = info.send_to_ranks if self._role is CommRole.SENDER else info.recv_from_ranks
        self._arriving: deque[_Arriving] = deque()
        # they hold what is sent until it has arrived
        self._leaving: deque[list[dist.Work]] = deque()

    def begin_step(self, parts: list[Parts], ahead: int) -> None:
        """Tell what is to cross.

        Args:
            parts: by microbatch, the tokens of each lane that this rank's lane exchanges with, see
                :meth:`.StepShare.bridge_parts`.
            ahead: microbatches that the encoder runs ahead: the language model asks for tokens so much earlier.

        Raises:
            ValueError: on the language model's rank, if the encoder is to send other numbers of tokens.
        """
        self._agree_on(parts)
        self._forward, self._backward = iter(parts), iter(parts)
        if self.is_current_rank_in_grid(self.dest_grid):
            for _ in range(ahead):
                self._ask()

    def end_step(self) -> None:
        """Let go of what was sent."""
        while self._leaving:
            _wait(self._leaving.popleft())

    @override
    def send_forward(self, tensor_to_send: torch.Tensor) -> None:
        self._exchange(self._cut(tensor_to_send, self._forward), ())

    @override
    def recv_forward(self) -> torch.Tensor:
        self._ask()
        return self._take()

    @override
    def send_backward(self, grad_tensor: torch.Tensor) -> None:
        if self.returns_gradients:
            self._exchange(self._cut(grad_tensor, self._backward), ())

    @override
    def recv_backward(self) -> torch.Tensor | None:
        return self._recv_gradient() if self.returns_gradients else None

    @override
    def send_forward_recv_backward(self, input_tensor: torch.Tensor, grad_shape: None = None) -> torch.Tensor | None:
        if not self.returns_gradients:
            return self.send_forward(input_tensor)
        return self._recv_gradient(self._cut(input_tensor, self._forward))

    @override
    def send_backward_recv_forward(self, grad_tensor: torch.Tensor, forward_shape: None = None) -> torch.Tensor:
        self._ask(self._cut(grad_tensor, self._backward) if self.returns_gradients else ())
        return self._take()

    @override
    def _get_or_create_broadcast_pg(self, ranks_list: list[list[int]]) -> dist.ProcessGroup | None:
        return self.src_grid.process_groups.containing_me(ranks_list)

    @override
    def _get_or_create_bridge_pg(self, ranks: list[int]) -> dist.ProcessGroup | None:
        return self.src_grid.process_groups.containing_me([ranks])

    def _agree_on(self, parts: list[Parts]) -> None:
        by_peer = [list(numbers) for numbers in zip(*parts, strict=True)]
        if self._role is CommRole.SENDER:
            self._exchange([torch.tensor(numbers, device=self._device) for numbers in by_peer], ())
        elif self._role is CommRole.RECEIVER:
            sent = [torch.empty(len(parts), dtype=torch.int64, device=self._device) for _ in self._peers]
            _wait(self._exchange((), sent))
            for peer, theirs, expected in zip(self._peers, torch.stack(sent).tolist(), by_peer, strict=True):
                if theirs != expected:
                    raise ValueError(
                        f"rank {peer} is to send {theirs} {self.src_module_name} tokens for the microbatches of this "
                        f"step, but the samples that rank {self.current_rank} loaded have {expected} places for them: "
                        "every rank must get the same samples in the same order"
                    )

    def _cut(self, rows: torch.Tensor, parts: Iterator[Parts]) -> Sequence[torch.Tensor]:
        """What the peers get of a lane's rows; nothing on ranks that send nothing."""
        cut = next(parts)
        return rows.detach().contiguous().split(cut) if self._peers else ()

    def _exchange(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> list[dist.Work]:
        """Start to send a tensor to each peer and to receive one from each, empty ones left out.

        Returns:
            What to wait for, once, before what comes in is read.
        """
        directions = ((dist.isend, outgoing), (dist.irecv, incoming))
        operations = [
            dist.P2POp(start, tensor, peer, self.bridge_pg)
            for start, tensors in directions
            for peer, tensor in zip(self._peers, tensors, strict=False)
            if tensor.numel()
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        if not incoming:
            self._leaving.append(works)
        while self._leaving and all(work.is_completed() for work in self._leaving[0]):
            self._leaving.popleft()
        return works

    def _empty(self, parts: Parts) -> torch.Tensor:
        return torch.empty(sum(parts), self._hidden_size, dtype=self.comm_dtype, device=self._device)

    def _ask(self, outgoing: Sequence[torch.Tensor] = ()) -> None:
        """Ask for the tokens of one more microbatch, if there is one, and send ``outgoing``."""
        parts = next(self._forward, None)
        if parts is None:
            self._exchange(outgoing, ())
            return
        tokens = self._empty(parts)
        works = self._exchange(outgoing, tokens.split(parts))
        self._arriving.append(_Arriving(tokens, works))

    def _take(self) -> torch.Tensor:
        """The tokens that were asked for first, on all ranks of the lane."""
        tokens, works = self._arriving.popleft()
        _wait(works)
        _share(tokens, self.dest_local_leader_rank, self.dest_grid_broadcast_pg)
        return tokens.requires_grad_()

    def _recv_gradient(self, outgoing: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        parts = next(self._backward)
        gradient = self._empty(parts)
        _wait(self._exchange(outgoing, gradient.split(parts)))
        _share(gradient, self.src_local_leader_rank, self.src_grid_broadcast_pg)
        return gradient


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _share(rows: torch.Tensor, leader: int, group: dist.ProcessGroup) -> None:
    if group.size() > 1 and rows.numel():
        dist.broadcast(rows, src=leader, group=group)


class PipelineCommunicator(MultiModulePipelineCommunicator):
    """``MultiModulePipelineCommunicator`` from all encoders to the language model; collective over the world.

    Args:
        topology: grids and groups.
        model: whose modules the ranks run, frozen or not.
    """

    def __init__(self, topology: Topology, model: HeteroMimoModel) -> None:
        self._trainable = _trainable_modules(model)
        self._device = next(model.parameters()).device
        encoders = [name for name in topology.grids if name != LANGUAGE]
        super().__init__(
            topology.grids,
            {name: [LANGUAGE] for name in encoders} | {LANGUAGE: []},
            model.config,
            dim_mapping={"s": 0, "b": 1, "h": 2},
            module_output_ndim=dict.fromkeys(encoders, 2),
        )
        (own,) = self.rank_module_map.values()
        self._runs_encoder = bool(own.bridge_comms_as_src_module)
        self._own_bridges = own.bridge_comms_as_src_module + own.bridge_comms_as_dest_module
        self._encoder_ahead = 0

    @property
    @override
    def current_stage(self) -> int:
        """Of encoders, so many stages before the first as they run microbatches ahead: schedules warm up by this."""
        return super().current_stage - (self._encoder_ahead if self._runs_encoder else 0)

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
                        hidden_size=self.config.hidden_size,
                        device=self._device,
                        returns_gradients=source in self._trainable,
                    )
                )

    def begin_step(self, parts: list[Mapping[str, Parts]], encoder_ahead: int) -> None:
        """Tell the bridges of this rank what is to cross them.

        Args:
            parts: by microbatch and encoder, see :meth:`.StepShare.bridge_parts`.
            encoder_ahead: microbatches that encoders run ahead beyond the warm-up of 1F1B.
        """
        self._encoder_ahead = encoder_ahead
        for bridge in self._own_bridges:
            bridge.begin_step([microbatch[bridge.src_module_name] for microbatch in parts], encoder_ahead)

    def end_step(self) -> None:
        """Let go of what was sent."""
        for bridge in self._own_bridges:
            bridge.end_step()


def _trainable_modules(model: HeteroMimoModel) -> set[str]:
    """Names of the modules that have a trainable parameter on some rank."""
    own = [name for name, parameters in model.trainable_parameters().items() if parameters]
    return set().union(*of_every_rank(own))
