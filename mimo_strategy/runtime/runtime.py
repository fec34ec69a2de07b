"""Run training, evaluation and generation steps of a model of several modules."""

import gc
import math
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.optimizer import OptimizerConfig

from mimo_strategy.layout import LANGUAGE
from mimo_strategy.runtime.data_parallel import wrap_modules
from mimo_strategy.runtime.encoder_batching import EncoderBatching
from mimo_strategy.runtime.expert_load import ExpertLoad
from mimo_strategy.runtime.gradients import finalize_gradients
from mimo_strategy.runtime.layer_graphs import LayerGraphs
from mimo_strategy.runtime.loss import LossOutput
from mimo_strategy.runtime.model import EncoderInputs, HeteroMimoModel
from mimo_strategy.runtime.optimizer import HeteroOptimizer, build_optimizer
from mimo_strategy.runtime.schedule import Schedule
from mimo_strategy.runtime.step_sums import Reported, StepSums
from mimo_strategy.step_batch import Batch, Microbatch, StepShare
from mimo_strategy.topology import Topology

_alive: "weakref.WeakSet[MimoRuntime]" = weakref.WeakSet()
# of models that were collected
_abandoned: list[Topology] = []


def release_abandoned() -> None:
    """Destroy the process groups of models that nobody can reach any more; called where ranks are in step."""
    if _alive or _abandoned:
        gc.collect()
    while _abandoned:
        _abandoned.pop().destroy()


class MimoRuntime:
    """A wrapped model on its topology, ready to run steps. Every method is collective over the world.

    Args:
        model: this rank's part of the model; wrapped in place.
        topology: grids and groups; the runtime destroys it.
        ddp_configs: how gradients are reduced and optimizer states sharded, by module.
        num_microbatches: microbatches per step.
        dtype: dtype of the parameters.
        device: device of this rank.

    Attributes:
        encoder_batching: microbatches that colocated encoders take at once in training, see
            :class:`.EncoderBatching`; 1 is as they run. May be changed between steps.
        encoder_ahead: microbatches that encoders on ranks of their own run ahead in training, beyond the warm-up of
            1F1B. May be changed between steps.
        sums: what callbacks may add to, to be reduced with the loss of the next step.
        reported: what ranks added to the last step, the same on every rank.
        in_schedule: whether a step's schedule is running.
    """

    def __init__(
        self,
        model: HeteroMimoModel,
        topology: Topology,
        *,
        ddp_configs: Mapping[str, DistributedDataParallelConfig],
        num_microbatches: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model = model
        self.topology = topology
        self.encoder_batching = 1
        self.encoder_ahead = 0
        self.num_microbatches = num_microbatches
        self.ddp_configs = ddp_configs
        self.dtype = dtype
        self.device = device
        self.sums = StepSums(device)
        self.reported: dict[str, Reported] = {}
        self._is_reported = True
        self.in_schedule = False
        self._reduced_loss: LossOutput | None = None
        self._expert_load: ExpertLoad | None = None
        self._encoding: EncoderBatching | None = None
        self._parameters_may_be_stale = False
        wrap_modules(model, topology, ddp_configs, dtype)
        # to walk through all modules takes longer than to look at the parameters
        self._parameters = list(model.parameters())
        if topology.runs(LANGUAGE) and model.config.num_moe_experts:
            self._expert_load = ExpertLoad(
                model.language_model, topology.groups[LANGUAGE], model.config.num_moe_experts, device
            )
        self._layer_graphs: LayerGraphs | None = None
        self._schedule = Schedule(model, topology)
        self._configure_schedule()
        _alive.add(self)
        self._abandon = weakref.finalize(model, _abandoned.append, topology)
        self._abandon.atexit = False

    @property
    def num_microbatches(self) -> int:
        """Microbatches per step; may be changed between steps."""
        return self._num_microbatches

    @num_microbatches.setter
    def num_microbatches(self, num_microbatches: int) -> None:
        self._num_microbatches = num_microbatches
        self.share = StepShare(self.topology.layout, self.topology.rank, num_microbatches)

    @property
    def cuda_graphs(self) -> bool:
        """Whether layers of the language model that can be recorded are replayed in training.

        May be changed between steps.
        """
        return self._layer_graphs is not None

    @cuda_graphs.setter
    def cuda_graphs(self, cuda_graphs: bool) -> None:
        if self._layer_graphs is not None and not cuda_graphs:
            self._layer_graphs.release()
            self._layer_graphs = None
        elif self._layer_graphs is None and cuda_graphs and self.topology.runs(LANGUAGE):
            self._layer_graphs = LayerGraphs(self.model.language_model)

    @property
    def speaks_for_lane(self) -> bool:
        """Whether this rank tells what all tensor parallel ranks of its lane know."""
        groups = self.topology.groups
        return groups.get(LANGUAGE, next(iter(groups.values()))).tp.rank() == 0

    def _configure_schedule(self) -> None:
        config = self.model.config
        config.finalize_model_grads_func = self._finalize
        if any(ddp.overlap_grad_reduce for ddp in self.ddp_configs.values()):
            config.no_sync_func = self.model.no_sync

    def build_optimizer(self, configs: Mapping[str, OptimizerConfig]) -> HeteroOptimizer:
        """megatron-core's optimizer of all modules, from settings by module."""
        optimizer = build_optimizer(self.model, self.topology, configs, self.ddp_configs, self.dtype)
        self.model.config.grad_scale_func = None if optimizer.grad_scaler is None else optimizer.scale_loss
        return optimizer

    def run_step(
        self,
        batch: Batch,
        forward: Callable[[Batch], Any],
        loss: Callable[[Any, Batch], LossOutput],
        *,
        backward: bool,
        encoder_inputs: Callable[[Batch], EncoderInputs],
    ) -> LossOutput:
        """Run all microbatches of a step, with gradients ready for the optimizer if ``backward``.

        Args:
            batch: this rank's share of the step batch.
            forward: output of the model for a microbatch.
            loss: loss of an output and its microbatch; called on the last stage only.
            backward: whether to compute gradients.
            encoder_inputs: inputs of this rank's encoders from their items, where they take several microbatches.

        Returns:
            The loss of the whole step batch, the same on every rank.
        """
        self._reduced_loss = None
        if backward:
            if self._layer_graphs is not None:
                self._layer_graphs.begin_step()
            self.model.zero_grad_buffer()
            if self._expert_load is not None:
                self._expert_load.clear()
            self._drop_gradients()
            self._parameters_may_be_stale = True
        else:
            self.gather_parameters()

        def megatron_loss(microbatch, output):
            result = loss(output, microbatch)
            if self.speaks_for_lane:
                self.sums.add_loss(result)
                for name, (total, count) in result.metrics.items():
                    self.sums.add(name, total, count, {})
            return result.sum, result.count.int(), {}

        def forward_step(microbatches, model):
            microbatch, bridge_parts = next(microbatches)
            model.expect(microbatch, bridge_parts)
            model.encoded = self._encoding.next_tokens() if self._encoding else None
            return forward(microbatch), partial(megatron_loss, microbatch)

        microbatches = self._microbatches(batch)
        if backward and self.encoder_batching > 1:
            self._encoding = EncoderBatching(self.model, microbatches, self.encoder_batching, encoder_inputs)
        self.in_schedule = True
        try:
            self._schedule.run(
                forward_step,
                microbatches,
                forward_only=not backward,
                encoder_ahead=self.encoder_ahead if backward else 0,
            )
        except BaseException:
            # the model may be used again
            self.sums.forget()
            raise
        finally:
            self.in_schedule = False
            self._encoding = self.model.encoded = None
        reduced = self._reduced_loss or self.sums.reduce_loss()
        self._is_reported = False
        return reduced

    def report(self) -> bool:
        """Bring ``reported`` up to date, which waits for the device; collective. Whether there was a step to report."""
        if self._is_reported:
            return False
        self.reported = self.sums.reported()
        self._is_reported = True
        return True

    def _drop_gradients(self) -> None:
        """Of parameters themselves: FP32Optimizer makes main_grad their grad, and the next backward would add twice."""
        for parameter in self._parameters:
            parameter.grad = None

    def run_outputs(self, batch: Batch, forward: Callable[[Batch], Any], pick: Callable[[Any, Batch], Any]) -> list:
        """Run all microbatches forward and return ``pick(output, microbatch)`` of each, on the last stage only."""

        def forward_step(microbatches, model):
            microbatch, bridge_parts = next(microbatches)
            model.expect(microbatch, bridge_parts)
            return forward(microbatch), lambda output, non_loss_data: pick(output, microbatch)

        self.gather_parameters()
        return self._schedule.run(forward_step, self._microbatches(batch), forward_only=True, collect_outputs=True)

    def gather_parameters(self) -> None:
        """Bring this rank's parameters up to date after an optimizer step.

        With ``overlap_param_gather`` only the forward of the next training step gathers what other ranks updated;
        whatever else reads the parameters must ask for it.
        """
        if self._parameters_may_be_stale:
            # of those modules that gather in the forward
            self.model.start_param_sync(force_sync=True)
            self._parameters_may_be_stale = False

    def _microbatches(self, batch: Batch) -> list[Microbatch]:
        language = self.model.config
        length, tp = batch["input_ids"].shape[1], language.tensor_model_parallel_size
        if language.sequence_parallel and length % tp:
            raise ValueError(
                f"sequences of {length} tokens cannot be cut over tp {tp} of {LANGUAGE}; pad them to "
                f"{(length // tp + 1) * tp}"
            )
        self._check_fp8_tokens(len(batch["input_ids"]), length)
        cut = zip(self.share.microbatches(batch), self.share.bridge_parts(batch), strict=True)
        return [Microbatch(*microbatch) for microbatch in cut]

    def _check_fp8_tokens(self, num_samples: int, length: int) -> None:
        """Check that a rank of the language model gets as many tokens of a microbatch as fp8 takes.

        Args:
            num_samples: of this rank's share.
            length: of their sequences.

        Raises:
            ValueError: if it has not; on every rank, also of other modules.
        """
        language = self.model.config
        if not language.fp8:
            return
        multiple = get_fp8_align_size(language.fp8_recipe)
        parts = self.topology.layout.modules[LANGUAGE].dp * self._num_microbatches
        samples = num_samples * self.share.num_lanes // parts
        tp = language.tensor_model_parallel_size if language.sequence_parallel else 1
        unit = tp * multiple // math.gcd(samples, multiple)
        if length % unit:
            raise ValueError(
                f"fp8 takes multiples of {multiple} tokens on a rank, but a microbatch of {LANGUAGE} has {samples} "
                f"sample(s) of {length} tokens, over tp {tp}; pad them to {-(-length // unit) * unit}"
            )

    def _finalize(self, models, num_tokens, pg_collection=None, force_all_reduce=False) -> None:
        if self._encoding is not None:
            self._encoding.finish()
        if self._expert_load is not None:
            self._expert_load.add_to(self.sums, self._num_microbatches)
        self._reduced_loss = self.sums.reduce_loss()
        finalize_gradients(self.model, self.topology, self._reduced_loss.count, force_all_reduce=bool(force_all_reduce))

    def destroy(self) -> None:
        """Destroy every process group; the runtime cannot be used afterwards."""
        self._abandon.detach()
        _alive.discard(self)
        self.cuda_graphs = False
        self.topology.destroy()
