"""The root LightningModule: what a model tells of its modules, its forward and its loss."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec

from mimo_strategy import metrics
from mimo_strategy.batch_checks import check_form
from mimo_strategy.checkpoint.directory import located
from mimo_strategy.checkpoint.loading import LIGHTNING_STATE
from mimo_strategy.checkpoint.safe_reading import read_object
from mimo_strategy.checkpoint.weights import load_weights
from mimo_strategy.generation import Generation, generate
from mimo_strategy.layout import ModuleLayout, ModuleSizes
from mimo_strategy.lightning_private import logging_as
from mimo_strategy.optimizer import ModuleOptimizer, check_optimizer_config, plain_adamw
from mimo_strategy.planning.cost import CostUnknown, ModuleCost, Workload
from mimo_strategy.prediction import Prediction, find_decoder, predict_own
from mimo_strategy.runtime.gradients import balance_experts, hold_frozen_routers
from mimo_strategy.runtime.loss import LossOutput
from mimo_strategy.runtime.model import EncoderInputs, HeteroMimoModel, build_model
from mimo_strategy.runtime.runtime import MimoRuntime
from mimo_strategy.step_batch import Batch, count_items, is_counted
from mimo_strategy.topology import Topology


@dataclass(frozen=True)
class BuildContext:
    """Where and how the model is built on this rank."""

    topology: Topology
    dtype: torch.dtype
    device: torch.device
    seed: int


class MimoModule(LightningModule):
    """A model of an optional set of encoders and a language model, each with a layout of its own.

    Under :class:`~mimo_strategy.strategy.MimoHeteroStrategy` every rank builds the modules that run on it, and a
    step runs them in megatron-core's schedules. Under a plain single-device strategy the same class trains all of
    it in one process, which is what every layout must agree with.

    A batch holds ``input_ids``, ``labels`` and ``loss_mask`` ``[samples, sequence]`` and, for an encoder named
    ``images``, ``images`` with the items of all samples and ``num_images`` ``[samples]``. Samples may have any number
    of items, and a batch none: ``images`` then has length 0. Ranks that do not run an encoder get batches without its
    items.

    To freeze parameters, do so when they are built. Names tell the encoder (``.encoders.``) from its projector
    (``.input_projections.``) and from the language model (``language_model.``), whichever of them a rank runs::

        def configure_model(self):
            super().configure_model()
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(".encoders." not in name)

    Attributes:
        special_token_ids: by encoder, the token that holds the place of an item's embeddings in ``input_ids``, once for
            each embedding.
        model: the model as built on this rank, or ``None``.
        runtime: runs the steps under ``MimoHeteroStrategy``, otherwise ``None``.
    """

    special_token_ids: Mapping[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.model: HeteroMimoModel | None = None
        self.runtime: MimoRuntime | None = None
        self.build_context: BuildContext | None = None
        self._to_load: list[Callable[[], None]] = []

    @abstractmethod
    def module_sizes(self) -> Mapping[str, ModuleSizes]:
        """The sizes that limit the layout, of every module by name; one is named ``language``."""

    @abstractmethod
    def module_spec(
        self, name: str, layout: ModuleLayout, groups: ProcessGroupCollection | None, dtype: torch.dtype
    ) -> ModuleSpec:
        """How megatron-core builds a module.

        Args:
            name: one of :meth:`module_sizes`.
            layout: the module's resolved layout.
            groups: its process groups; ``None`` on ranks that do not run it, where only the spec's config is read.
            dtype: dtype of the parameters.
        """

    @abstractmethod
    def encoder_inputs(self, name: str, items: torch.Tensor) -> dict[str, dict[str, Any]]:
        """The keyword arguments of an encoder's forward, by the encoder's name in its spec."""

    def blank_items(self, name: str, items: torch.Tensor) -> torch.Tensor:
        """One item to run an encoder on in a microbatch that has none, where others wait for its lane.

        What it becomes is dropped, and its gradient is zero. By default it is all zeros.

        Args:
            name: the encoder's name.
            items: the microbatch's, of which there are 0.
        """
        return items.new_zeros((1, *items.shape[1:]))

    def configure_model(self) -> None:
        """Build the modules of this rank, once.

        Raises:
            ValueError: if they were built for another strategy.
        """
        if self.model is not None:
            strategy = None if self._trainer is None else self._trainer.strategy
            if strategy is not None and getattr(strategy, "runtime", None) is not self.runtime:
                raise ValueError(
                    f"the model was built for another strategy and cannot be used under {type(strategy).__name__}: "
                    "save a checkpoint, make a new model and load it there"
                )
            return
        if self.build_context is None:
            self.build_context = BuildContext(
                Topology.single_process(self.module_sizes()), torch.float32, self.device, torch.initial_seed()
            )
        context = self.build_context
        self.model = build_model(self, context.topology, dtype=context.dtype, device=context.device, seed=context.seed)
        while self._to_load:
            self._to_load.pop(0)()

    def load_weights(self, path: str | Path, *, modules: Collection[str] | None = None, strict: bool = True) -> None:
        """Start from given weights: at once if the model is built, otherwise as soon as a Trainer has built it.

        To go on with a run instead, with its optimizer and data, give its checkpoint to ``Trainer.fit``. Not for
        calls during a fit, whose optimizer may keep weights of its own.

        Args:
            path: a checkpoint that any layout wrote, or a ``.safetensors`` file.
            modules: names of the modules to load; ``None`` is all.
            strict: whether each of their weights must be in ``path``, and no other of theirs. Otherwise a warning
                lists what was missing or unexpected.

        Raises:
            ValueError: if the model has no such module.
            CheckpointError: if ``path`` is not whole or does not fit the model, before anything is loaded.
        """
        if self.model is None:
            self._to_load.append(partial(self.load_weights, path, modules=modules, strict=strict))
            return
        load_weights(self.model, path, modules=modules, strict=strict).warn(path)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, strict: bool = True, **settings: Any) -> Self:
        """As Lightning's: a model made as the one that was saved, with its weights as soon as a Trainer has built it.

        Args:
            checkpoint_path: a checkpoint that any layout wrote, or a file that Lightning wrote on one device.
            args: of Lightning's own, for its file.
            strict: as for :meth:`load_weights`.
            settings: arguments of ``__init__``, before those that ``save_hyperparameters`` kept.

        Raises:
            CheckpointError: if it has not what the strategy kept in it.
        """
        directory = located(Path(checkpoint_path))
        if not directory.is_dir():
            return super().load_from_checkpoint(checkpoint_path, *args, strict=strict, **settings)
        kept = read_object(directory / LIGHTNING_STATE).get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
        module = cls(**{**kept, **settings})
        module.load_weights(checkpoint_path, strict=strict)
        return module

    def check_machine(self, dtype: torch.dtype) -> None:
        """Check, before other ranks start, that this machine can run the modules in ``dtype``; optional.

        Raises:
            ValueError: if it cannot.
        """

    def check_batch(self, batch: Any) -> None:
        """Check what a loader yielded, before it is moved to the device; extend it by what the modules expect.

        Raises:
            TypeError: for a part of the wrong type.
            ValueError: for shapes or values that do not fit.
        """
        check_form(batch, self.special_token_ids)

    def forward_flops(self, name: str, batch: Batch) -> float:
        """Floating-point operations of a module's forward pass over a batch, on one device; optional.

        Args:
            name: one of :meth:`module_sizes`.
            batch: of any number of samples; only its shapes may be read, its values may be on a busy device.
        """
        return 0.0

    def module_cost(self, name: str, layout: ModuleLayout, workload: Workload) -> ModuleCost:
        """What a module's layers cost for one microbatch of one lane, for ``mimo layout`` and ``mimo plan``; optional.

        Args:
            name: one of :meth:`module_sizes`.
            layout: the module's layout; may be any that fits its sizes.
            workload: the microbatch.

        Raises:
            CostUnknown: if the model does not tell.
        """
        raise CostUnknown(
            f"{type(self).__name__} does not tell what its modules cost: memory and time cannot be estimated before it "
            "implements module_cost (and longest_sample)"
        )

    def longest_sample(self) -> tuple[int, Mapping[str, int]]:
        """Tokens of the longest sample and its items of each encoder, which estimates assume of every sample; optional.

        Raises:
            CostUnknown: if the model does not tell.
        """
        raise CostUnknown(f"{type(self).__name__} does not tell its longest_sample: give its length")

    def forward(self, batch: Batch, *, labels: torch.Tensor | None = None) -> Any:
        """Run the modules of this rank on one microbatch.

        Returns:
            Per-token losses ``[samples, sequence]`` if ``labels`` are given, otherwise logits; on ranks of other
            stages what the next stage takes.
        """
        output, _ = self.model(
            batch["input_ids"],
            position_ids=torch.arange(batch["input_ids"].shape[1], device=self.device).expand_as(batch["input_ids"]),
            labels=labels,
            modality_inputs=self.inputs_of_encoders(batch) if self.model.encoded is None else None,
        )
        return output

    def inputs_of_encoders(self, items: Batch) -> EncoderInputs:
        """What this rank's encoders are called with for their ``items``, blank where there are none.

        Items of floating-point numbers come in the dtype of the parameters.
        """
        own = {}
        for name, encoder in self.model.modality_submodules.items():
            own[name] = items[name]
            if own[name].is_floating_point():
                own[name] = own[name].to(next(encoder.parameters()).dtype)
        blank = {name: self.blank_items(name, empty) for name, empty in own.items() if len(empty) == 0}
        return EncoderInputs({name: self.encoder_inputs(name, part) for name, part in (own | blank).items()}, blank)

    def forward_step(self, microbatch: Batch) -> Any:
        """Output of the model for one microbatch in training and validation; per-token losses by default."""
        return self(microbatch, labels=microbatch["labels"])

    def loss_step(self, output: torch.Tensor, microbatch: Batch) -> LossOutput:
        """Loss of one microbatch from the output of the last stage; the masked sum of per-token losses by default."""
        mask = microbatch["loss_mask"].float()
        if "is_padding" in microbatch:
            mask = mask * ~microbatch["is_padding"][:, None]
        return LossOutput((output.float() * mask).sum(), mask.sum())

    def step_loss(self, batch: Batch, *, backward: bool) -> LossOutput:
        """The loss of a whole step batch, the same on every rank.

        Args:
            batch: what the loader yielded on this rank.
            backward: under ``MimoHeteroStrategy``, compute the gradients too. On one device Lightning does.

        Raises:
            ValueError: if the batch lacks what the loss is computed from, or its items do not fit the samples.
        """
        for name, reader in (("labels", "forward_step"), ("loss_mask", "loss_step")):
            if name not in batch and not is_overridden(reader, self, MimoModule):
                raise ValueError(f"the batch has no {name} to compute the loss from, only {sorted(batch)}")
        batch = self.count_batch(batch)
        if self.runtime is not None:
            loss = self.runtime.run_step(
                batch, self.forward_step, self.loss_step, backward=backward, encoder_inputs=self.inputs_of_encoders
            )
            # to read what was reduced waits for the device: in training when the optimizer's step has been launched
            if not backward:
                self._log_reported(training=False)
            return loss
        loss = self.loss_step(self.forward_step(batch), batch)
        for name, (total, count) in loss.metrics.items():
            self.log(name, total / count, batch_size=max(1, int(count)))
        if backward:
            balance_experts(self.model, self.build_context.topology, loss.count)
        return loss

    def count_batch(self, batch: Batch) -> Batch:
        """The batch with what :func:`.step_batch.count_items` counts of it, unless it is there; checks it.

        Raises:
            ValueError: if the items do not fit the samples.
        """
        if is_counted(batch, self.special_token_ids):
            return batch
        elsewhere = () if self.runtime is None else self.runtime.share.elsewhere
        return {**batch, **count_items(batch, self.special_token_ids, elsewhere)}

    def log(self, name: str, value: Any, *args: Any, **settings: Any) -> None:
        """As Lightning's; within :meth:`forward_step` and :meth:`loss_step` the mean over microbatches and lanes.

        Values are weighted by ``batch_size`` there, and every rank logs the same mean when the step is done. Of
        :meth:`forward_step` the ranks of all modules and stages call it, each for its own lane's samples.
        """
        if self.runtime is not None and self.runtime.in_schedule:
            if args:
                raise TypeError(f"self.log({name!r}, ...) in a schedule takes its settings by keyword")
            metrics.collect(self.runtime, self, name, value, settings)
        else:
            super().log(name, value, *args, **settings)

    def _log_step(self) -> None:
        # the step is counted later; 0 is never
        every = self.trainer.log_every_n_steps
        is_logged = every > 0 and (self.trainer.global_step + 1) % every == 0
        with logging_as(self, "on_train_batch_end"):
            self._log_reported(training=True, details=is_logged)
            if is_logged:
                for name, value in self.optimizers(use_pl_optimizer=False).last_step().items():
                    self.log(name, value, batch_size=1)

    def _log_reported(self, *, training: bool, details: bool = False) -> None:
        if not self.runtime.report():
            return
        for call in metrics.calls(self, self.runtime.reported, details=details):
            # weights matter to the mean of an epoch only; to read one waits for the device
            weighted = not training or call.settings.get("on_epoch")
            self.log(call.name, call.value, batch_size=max(1, int(call.batch_size)) if weighted else 1, **call.settings)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = self.step_loss(batch, backward=True).mean
        self.log("train_loss", loss, prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = self.step_loss(batch, backward=False)
        # the epoch's mean is weighted by tokens
        self.log("val_loss", loss.mean, prog_bar=True, batch_size=int(loss.count), sync_dist=True)
        return loss.mean

    def generate(self, batch: Batch, *, end_token_id: int, **settings: Any) -> Generation:
        """Continue every sample's prompt; see :func:`.generation.generate` for ``settings``."""
        batch = self.count_batch(batch)
        return generate(self, batch, end_token_id=end_token_id, **settings)

    def predict(self, batch: Batch, *, end_token_id: int, **settings: Any) -> Prediction:
        """Continue every sample's prompt and return this rank's part, for ``predict_step``.

        It is decoded by the ``vocabulary`` or ``tokenizer`` of the Trainer's datamodule, if that has one.
        """
        generation = self.generate(batch, end_token_id=end_token_id, **settings)
        decoder = find_decoder(self.trainer.datamodule)
        return predict_own(generation, self.trainer.global_rank, self.trainer.world_size, decoder)

    def make_optimizer(self, config: OptimizerConfig | Mapping[str, OptimizerConfig]) -> torch.optim.Optimizer:
        """Make the optimizer for ``configure_optimizers``, one parameter group per module, named after it.

        Args:
            config: settings for all modules, or by module name.

        Raises:
            TypeError: if settings are no ``OptimizerConfig``.
            ValueError: if settings of a module are missing, name no module or would not be heeded.
        """
        names = list(self.module_sizes())
        configs = dict(config) if isinstance(config, Mapping) else dict.fromkeys(names, config)
        if configs.keys() != set(names):
            raise ValueError(f"optimizer settings are for {sorted(configs)}, the modules are {sorted(names)}")
        configs = {name: configs[name] for name in names}
        for name, own in configs.items():
            check_optimizer_config(name, own)
        hold_frozen_routers(self.model)
        if self.runtime is not None:
            return ModuleOptimizer(
                self.runtime.build_optimizer(configs), configs, self.model.trainable_parameters(), self._log_step
            )
        modules = self.model.own_modules()
        trainable = {
            name: [pair for pair in modules[name].named_parameters() if pair[1].requires_grad] for name in names
        }
        return plain_adamw(trainable, configs)
