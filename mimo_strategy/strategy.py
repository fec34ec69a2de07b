"""``MimoHeteroStrategy``: Lightning's verbs for a model whose modules have layouts of their own."""

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, override

import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor
from torch.distributed import ReduceOp

from mimo_strategy import agreement
from mimo_strategy.checkpoint.directory import remove
from mimo_strategy.checkpoint.run import load_run, run_shards
from mimo_strategy.checkpoint.writer import CheckpointWriter, OnFailure
from mimo_strategy.checks import (
    check_arguments,
    check_checkpoint_path,
    check_data,
    check_ddp,
    check_device,
    check_module,
    check_optimizers,
    check_predicts,
    check_replayed_ddp,
    check_schedule,
    check_trainer,
)
from mimo_strategy.dataloading import share_dataloader
from mimo_strategy.launcher import CheckingLauncher, refuse_launcher
from mimo_strategy.layout import LANGUAGE, Layout, LayoutError, ModuleParallel
from mimo_strategy.lightning_private import (
    IS_INTERACTIVE,
    begin_next_epoch,
    init_dist_connection,
    set_up_loaders_anew,
)
from mimo_strategy.module import BuildContext, MimoModule
from mimo_strategy.module_summary import show_all_modules
from mimo_strategy.optimizer import ModuleOptimizer
from mimo_strategy.precision import MegatronPrecision
from mimo_strategy.preemption import Preemption
from mimo_strategy.registration import NAME
from mimo_strategy.runtime.data_parallel import resolve_ddp
from mimo_strategy.runtime.runtime import MimoRuntime, release_abandoned
from mimo_strategy.step_batch import StepShare, count_items
from mimo_strategy.topology import Topology
from mimo_strategy.watchdog import Watchdog

DEFAULT_TIMEOUT = timedelta(minutes=30)
# for all ranks to come to save after an exception, which may be one rank's alone
_MEETING_TIME = timedelta(minutes=1)
_BUILD_ANEW = "Save a checkpoint, make a new model and load it there."


class MimoHeteroStrategy(ParallelStrategy):
    """Trains a :class:`~mimo_strategy.module.MimoModule` on megatron-core with a parallel layout per module.

    One Lightning batch is one optimizer step: a DataLoader's ``batch_size`` counts the samples of the whole step,
    of which every rank loads its share and cuts it into microbatches.

    Args:
        modules: layout by module name; ``None`` is colocated with tp 1, dp = world and ep the largest divisor of
            the number of experts that fits.
        num_microbatches: microbatches per step.
        ddp: megatron-core's settings for gradient reduction and the distributed optimizer, for every module or by
            module name. The default, also of modules without a name there, is the distributed optimizer, on GPUs with
            gradients that are reduced during the backward.
        encoder_batching: microbatches that encoders which share the ranks of the language model take at once in
            training: fewer and larger kernels, and gradients are returned once. Their activations are kept for as
            many microbatches. It divides ``num_microbatches``; 1 is one by one.
        encoder_ahead: microbatches that encoders on ranks of their own run ahead of the language model in training,
            beyond the warm-up of 1F1B, so that they wait less for gradients. Their activations are kept for as many
            microbatches more.
        cuda_graphs: replay Mamba layers and shared experts of the language model in training, which launches each of
            their passes at once. On GPUs, for a language model with tp 1 and pp 1.
        timeout: for collectives; a rank that waits longer raises.
        watchdog: after this time without progress, print which step, collective and ranks the run waits for;
            ``None`` never does.
        async_save: write checkpoints while training goes on. One that fails then does so at the next save, or at the
            end.
        on_save_failure: whether to ``raise`` or ``warn`` when a checkpoint cannot be written. Earlier ones are kept.

    Raises:
        LayoutError: from ``Trainer.fit`` and the like, before any process group exists, if the layout does not fit.
    """

    strategy_name = NAME

    def __init__(
        self,
        modules: Mapping[str, ModuleParallel] | None = None,
        num_microbatches: int = 1,
        ddp: Mapping[str, DistributedDataParallelConfig] | DistributedDataParallelConfig | None = None,
        encoder_batching: int = 1,
        encoder_ahead: int = 0,
        cuda_graphs: bool = False,
        timeout: timedelta = DEFAULT_TIMEOUT,
        watchdog: timedelta | None = None,
        async_save: bool = False,
        on_save_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        check_arguments(
            modules,
            num_microbatches,
            encoder_batching,
            encoder_ahead,
            ddp,
            timeout,
            watchdog,
            on_save_failure,
            cuda_graphs,
        )
        self._modules = modules
        self._num_microbatches = num_microbatches
        self._encoder_batching = encoder_batching
        self._encoder_ahead = encoder_ahead
        self._cuda_graphs = cuda_graphs
        self._ddp = ddp
        self._timeout = timeout
        self._patience = watchdog
        self._watchdog: Watchdog | None = None
        self._async_save = async_save
        self._on_save_failure = on_save_failure
        self._writer: CheckpointWriter | None = None
        # Lightning sets it
        self.num_nodes = 1
        self._layer_sync = None
        self._hides_from_collector = False
        self.layout: Layout | None = None
        self.topology: Topology | None = None
        self.runtime: MimoRuntime | None = None

    # ---- processes and devices

    @property
    def is_distributed(self) -> bool:
        """Lightning injects samplers and reduces metrics for strategies that say so."""
        return True

    @property
    @override
    def root_device(self) -> torch.device:
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Ranks on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    def set_world_ranks(self) -> None:
        """Tell the cluster environment and rank-zero helpers this process's rank."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = fabric_rank_zero_only.rank = self.global_rank

    @override
    def _configure_launcher(self) -> None:
        if IS_INTERACTIVE and self.num_processes * self.num_nodes > 1:
            refuse_launcher("a notebook or interactive session")
        self._launcher = CheckingLauncher(self.check, self.cluster_environment, self.num_processes, self.num_nodes)

    def check(self, trainer: Trainer, model: LightningModule, *data: Any) -> None:
        """Refuse what cannot work, and set the layout; the Trainer's verbs do so before any other process is started.

        Args:
            trainer: whose strategy this is.
            model: to be trained.
            data: loaders, nested or not, and LightningDataModules.

        Raises:
            LayoutError: if the layout does not fit.
            TypeError: for a model, data or settings of the wrong type.
            ValueError: for flags, callbacks or batch sizes that cannot work.
        """
        check_device(self.root_device)
        check_trainer(trainer)
        check_module(model)
        if trainer.state.fn == TrainerFn.PREDICTING:
            check_predicts(model)
        model.check_machine(self.precision_plugin.dtype)
        self.layout = Layout.resolve(model.module_sizes(), self.world_size, self._modules)
        check_schedule(self.layout, self._encoder_batching, self._encoder_ahead, cuda_graphs=self._cuda_graphs)
        check_ddp(self.layout.modules, self._ddp)
        if self._cuda_graphs:
            check_replayed_ddp(self._ddp_configs()[LANGUAGE])
        check_data(self.layout, self._num_microbatches, *data)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        on_cpu = self.root_device.type == "cpu"
        init_dist_connection(
            self.cluster_environment,
            "gloo" if on_cpu else "nccl",
            timeout=self._timeout,
            device_id=None if on_cpu else self.root_device,
        )
        agreement.on_equal("layout", f"\n{self.layout}")
        agreement.on_equal("number of microbatches", self._num_microbatches)
        agreement.on_equal("precision", self.precision_plugin.precision)
        agreement.on_equal("seed of seed_everything", os.environ.get("PL_GLOBAL_SEED"))
        if self._patience is not None:
            self._watchdog = Watchdog(self._patience)
            self._watchdog.start()
        self._take_over(self.lightning_module)
        if self.topology is None:
            self.topology = Topology(self.layout, self._timeout)
            self.lightning_module.build_context = BuildContext(
                self.topology,
                self.precision_plugin.dtype,
                self.root_device,
                seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
            )

    def _take_over(self, module: MimoModule) -> None:
        """Go on with a model that was built before, here or under another Trainer; let go of any other model.

        Raises:
            LayoutError: if it was built for another layout.
            ValueError: if it was built without this strategy or for another precision, or is to be trained on with
                other settings of ``ddp``.
        """
        runtime = module.runtime
        if runtime is not None:
            self._check_settings(runtime, trains=module.trainer.state.fn == TrainerFn.FITTING)
        elif module.model is not None:
            raise ValueError(f"the model was built without this strategy and cannot be used under it. {_BUILD_ANEW}")
        self.runtime = runtime
        self.topology = None
        release_abandoned()
        if runtime is not None:
            self.topology = runtime.topology

    def _check_settings(self, runtime: MimoRuntime, *, trains: bool) -> None:
        built_for = runtime.topology.layout
        if built_for != self.layout:
            raise LayoutError(
                f"the model was built for\n{built_for}\nand cannot be used with\n{self.layout}\n{_BUILD_ANEW}"
            )
        dtype = self.precision_plugin.dtype
        if runtime.dtype is not dtype:
            raise ValueError(f"the model was built in {runtime.dtype} and cannot be used in {dtype}. {_BUILD_ANEW}")
        if not trains:
            return
        for name, config in self._ddp_configs().items():
            built_with = runtime.ddp_configs[name]
            if config != built_with:
                raise ValueError(
                    f"{name} was wrapped with\n{built_with}\nand cannot be trained with\n{config}\n{_BUILD_ANEW}"
                )

    # ---- model and optimizer

    @property
    @override
    def precision_plugin(self) -> MegatronPrecision:
        return self._precision_plugin or MegatronPrecision("32-true")

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and not isinstance(plugin, MegatronPrecision):
            plugin = MegatronPrecision(plugin.precision)
        self._precision_plugin = plugin

    @override
    def setup(self, trainer: Trainer) -> None:
        self.accelerator.setup(trainer)
        self.model_to_device()
        module = self.lightning_module
        if self.runtime is None:
            self.runtime = MimoRuntime(
                module.model,
                self.topology,
                ddp_configs=self._ddp_configs(),
                num_microbatches=self._num_microbatches,
                dtype=self.precision_plugin.dtype,
                device=self.root_device,
            )
            module.runtime = self.runtime
        self.runtime.num_microbatches = self._num_microbatches
        self.runtime.encoder_batching = self._encoder_batching
        self.runtime.encoder_ahead = self._encoder_ahead
        self.runtime.cuda_graphs = self._cuda_graphs
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            check_optimizers(self.optimizers)
            show_all_modules(trainer.callbacks)
            if not any(isinstance(callback, Preemption) for callback in trainer.callbacks):
                trainer.callbacks.append(Preemption())
            # while no rank can have failed yet
            self._checkpoint_writer()
            self._hide_from_collector()
        self.setup_precision_plugin()

    def _ddp_configs(self) -> dict[str, DistributedDataParallelConfig]:
        ddp = resolve_ddp(self.layout.modules, self._ddp, on_gpus=self.root_device.type == "cuda")
        in_fp32 = self.precision_plugin.reduces_gradients_in_fp32
        return {name: replace(config, grad_reduce_in_fp32=in_fp32) for name, config in ddp.items()}

    def _hide_from_collector(self) -> None:
        """What was built lives as long as the run; to look through it again and again would hold up the device."""
        # what others have hidden cannot be told from it afterwards
        if not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
            self._hides_from_collector = True

    @override
    def model_to_device(self) -> None:
        """Modules are built on their device; this tells the LightningModule."""
        self.lightning_module.to(self.root_device)

    # ---- data

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """One global order for all ranks; :meth:`process_dataloader` gives each its share."""
        return {"num_replicas": 1, "rank": 0}

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        trainer = self.lightning_module.trainer
        stage = trainer.state.stage
        shared = share_dataloader(
            dataloader,
            StepShare(self.layout, self.global_rank, self._num_microbatches),
            train=stage is RunningStage.TRAINING,
            seed_workers=bool(int(os.environ.get("PL_SEED_WORKERS", 0))),
            check=partial(self.layout.check_batch, num_microbatches=self._num_microbatches),
            agree=agreement.on_next_batch,
            progress=trainer.fit_loop.epoch_loop.batch_progress,
            pin_memory=self.root_device.type == "cuda",
            predicts=(self.global_rank, self.world_size) if stage is RunningStage.PREDICTING else None,
        )
        agreement.on_equal(f"number of step batches of the {stage.value} loader", sized_len(shared))
        return shared

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        module = self.lightning_module
        module.check_batch(batch)
        # left in host memory, where to read them waits for no device
        counts = count_items(batch, module.special_token_ids, self.runtime.share.elsewhere)
        return {**super().batch_to_device(batch, device, dataloader_idx), **counts}

    # ---- checkpoints

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """Shards are loaded into the wrapped model and its optimizer."""
        return True

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are restored by :meth:`load_checkpoint`."""
        return False

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: :meth:`save_checkpoint` takes the shards from the model itself."""
        return {}

    @override
    def optimizer_state(self, optimizer: ModuleOptimizer) -> dict[str, Any]:
        """Settings and counts; :meth:`save_checkpoint` takes the shards itself."""
        return optimizer.settings()

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError("MimoHeteroStrategy writes checkpoints itself and takes no storage_options")
        check_checkpoint_path(filepath)
        trainer = self.lightning_module.trainer
        writer = self._checkpoint_writer()
        if trainer.interrupted:
            writer.meet(_MEETING_TIME)
        optimizer = self.optimizers[0] if self.optimizers and "optimizer_states" in checkpoint else None
        writer.save(Path(filepath), run_shards(self.runtime, optimizer), checkpoint)
        if trainer.state.finished:
            # no teardown follows
            self._close_writer()

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        module = self.lightning_module
        fits = module.trainer.state.fn == TrainerFn.FITTING
        optimizer = self.optimizers[0] if fits else None
        state, mismatch = load_run(Path(checkpoint_path), self.runtime, optimizer, strict=module.strict_loading)
        mismatch.warn(checkpoint_path)
        if fits:
            set_up_loaders_anew(module.trainer)
        return state

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Done by :meth:`load_checkpoint`."""

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Done by :meth:`load_checkpoint`."""

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self._writer is not None:
            self._writer.remove(Path(filepath))
        elif self.is_global_zero:
            remove(Path(filepath))

    def _checkpoint_writer(self) -> CheckpointWriter:
        if self._writer is None:
            self._writer = CheckpointWriter(
                in_background=self._async_save, on_failure=self._on_save_failure, timeout=self._timeout
            )
        return self._writer

    def _close_writer(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close(interrupted=self.lightning_module.trainer.interrupted)

    # ---- steps

    @override
    def on_train_start(self) -> None:
        begin_next_epoch(self.lightning_module.trainer)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        self._enter("training", module.trainer.global_step)
        output = super().training_step(*args, **kwargs)
        if output is None:
            raise TypeError(
                f"{type(module).__name__}.training_step returned None, but no rank can skip a batch that others train "
                "on: return the mean of step_loss(batch, backward=True)"
            )
        return output

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating("validation", *args):
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating("test", *args):
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating("prediction", *args):
            return super().predict_step(*args, **kwargs)

    @contextmanager
    def _evaluating(self, phase: str, batch: Any, batch_idx: int = 0, *_: Any) -> Iterator[None]:
        self._enter(phase, batch_idx)
        # tensors that modules keep would be useless to a later fit
        with torch.inference_mode(False), torch.no_grad():
            yield

    def _enter(self, phase: str, step: int) -> None:
        if self._watchdog is not None:
            self._watchdog.enter(step, phase)

    # ---- collectives

    @override
    def barrier(self, name: str | None = None) -> None:
        if dist.is_initialized():
            dist.barrier(device_ids=[self.root_device.index] if self.root_device.type == "cuda" else None)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not dist.is_initialized():
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    @override
    def reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
        if not isinstance(tensor, Tensor) or not dist.is_initialized():
            return tensor
        reduced = tensor.to(self.root_device, copy=True)
        mean = isinstance(reduce_op, str) and reduce_op.lower() in ("mean", "avg")
        operation = ReduceOp.SUM if mean else reduce_op
        if isinstance(operation, str):
            operation = getattr(ReduceOp, operation.upper())
        dist.all_reduce(reduced, op=operation, group=group)
        return (reduced / dist.get_world_size(group) if mean else reduced).to(tensor.device)

    @override
    def teardown(self) -> None:
        """Keeps model and groups for the Trainer's next call; moving the model would break its flat buffers."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        self._close_writer()
        if self._hides_from_collector:
            gc.unfreeze()
            self._hides_from_collector = False
        self.precision_plugin.teardown()
        self.accelerator.teardown()
