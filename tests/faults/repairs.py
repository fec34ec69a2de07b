"""What this project repairs of megatron-core 0.19.2, each to be taken away again."""

from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator
from proof.cells import Cell
from proof.layouts import colocated, disjoint, text
from pytest import MonkeyPatch

from faults.registry import Registry
from mimo_strategy import ModuleParallel as P
from mimo_strategy.runtime.colocated_bridge import ColocatedBridge
from mimo_strategy.runtime.model import HeteroMimoModel
from mimo_strategy.runtime.pipeline_bridge import PipelineCommunicator
from mimo_strategy.runtime.runtime import MimoRuntime

REPAIRS = Registry()
repair = REPAIRS.register


@repair(Cell(colocated(P(dp=2), P(dp=2)), optimizer="replicated"), "step 2, gradient")
def gradients_that_the_optimizer_left_in_parameters_are_dropped(patch: MonkeyPatch) -> None:
    patch.setattr(MimoRuntime, "_drop_gradients", lambda runtime: None)


@repair(Cell(colocated(P(dp=2), P(dp=2)), overlap=True), "step 1, weight")
def parameters_are_gathered_for_whoever_reads_them(patch: MonkeyPatch) -> None:
    patch.setattr(MimoRuntime, "gather_parameters", lambda runtime: None)


@repair(Cell(text(P(dp=1, pp=2))), "IndexError: too many indices")
def a_language_model_alone_can_be_pipelined(patch: MonkeyPatch) -> None:
    patch.setattr(HeteroMimoModel, "_initialize_submodules", MimoModel._initialize_submodules)


@repair(Cell(colocated(P(tp=2, dp=1), P(dp=2))), r"became \d+ tokens, but its input_ids have")
def colocated_lanes_may_differ_in_tokens(patch: MonkeyPatch) -> None:
    def communicate(bridge, tokens, parts):
        return ColocatedBridgeCommunicator.communicate(bridge, tokens)

    patch.setattr(ColocatedBridge, "communicate", communicate)


@repair(Cell(disjoint(P(dp=2), P(dp=1))), "Mismatch in shape")
def piped_encoder_lanes_may_differ_in_tokens(patch: MonkeyPatch) -> None:
    patch.setattr(PipelineCommunicator, "_build_bridge_comms", MultiModulePipelineCommunicator._build_bridge_comms)
    for hook in ("begin_step", "end_step"):
        patch.setattr(PipelineCommunicator, hook, lambda *_: None)
