"""Run a step's microbatches forward and backward, in the schedule that the layout needs."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)

from mimo_strategy.layout import LANGUAGE, Placement
from mimo_strategy.runtime.model import HeteroMimoModel
from mimo_strategy.runtime.pipeline_bridge import PipelineCommunicator
from mimo_strategy.topology import Topology

ForwardStep = Callable[[Iterator, torch.nn.Module], tuple[Any, Callable]]


class Schedule:
    """megatron-core's schedule of a topology.

    Colocated modules run one after another within each microbatch, without a pipeline. Otherwise the modules and
    the language model's stages form one pipeline in 1F1B order (Narayanan et al., 2021, arXiv 2104.04473).

    Args:
        model: the wrapped model; its config must hold what megatron-core's schedules call.
        topology: grids and groups. Creating a pipeline is collective over the world.
    """

    def __init__(self, model: HeteroMimoModel, topology: Topology) -> None:
        self.is_pipelined = (
            topology.layout.placement is Placement.NON_COLOCATED or topology.layout.modules[LANGUAGE].pp > 1
        )
        if self.is_pipelined:
            self._communicator = PipelineCommunicator(topology, model)
            self._forward_backward = partial(
                forward_backward_pipelining_without_interleaving,
                p2p_communicator=self._communicator,
                pg_collection=topology.schedule_groups,
            )
        else:
            self._forward_backward = partial(forward_backward_no_pipelining, pg_collection=topology.groups[LANGUAGE])
        self._model = model

    def run(
        self,
        forward_step: ForwardStep,
        microbatches: list,
        *,
        forward_only: bool = False,
        collect_outputs: bool = False,
        encoder_ahead: int = 0,
    ) -> list:
        """Run all microbatches; collective over the world.

        Args:
            forward_step: takes an iterator over microbatches and the model; returns an output and a function of
                it, as megatron-core's schedules define.
            microbatches: this rank's, each with its tokens to cross the bridge; the same number on every rank.
            forward_only: no backward passes.
            collect_outputs: call the function of an output with ``non_loss_data=True`` and collect what it returns.
            encoder_ahead: microbatches that encoders on ranks of their own run ahead beyond the warm-up of 1F1B.

        Returns:
            What the function returned for each microbatch, on the last stage; elsewhere an empty list.
        """
        if self.is_pipelined:
            self._communicator.begin_step([bridge_parts for _, bridge_parts in microbatches], encoder_ahead)
        results = self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(microbatches),
            model=self._model,
            num_microbatches=len(microbatches),
            # Unused: stages exchange shapes with the tensors, and bridges know them.
            seq_length=0,
            micro_batch_size=0,
            forward_only=forward_only,
            collect_non_loss_data=collect_outputs,
        )
        if self.is_pipelined:
            self._communicator.end_step()
        return results
