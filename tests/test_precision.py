"""Precisions of the Trainer, as megatron-core's configs, parameters and loss scale have them."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from tiny_runs import OPTIMIZER, digits, make_trainer, vision_language
from torch.utils.data import DataLoader, Subset

from datamodules import collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.precision import MegatronPrecision
from mimo_strategy.runtime.data_parallel import module_config
from mimo_strategy.testing import RankError, run_on_ranks

BATCH = 8
LAYOUTS = {
    "colocated": {"images": P(dp=2), "language": P(tp=2, ep=2)},
    "non-colocated": {"images": P(dp=1), "language": P(dp=1, rank_offset=1)},
}


def fit(modules, precision, callbacks, config=OPTIMIZER, num_steps=2):
    """On a CPU Lightning takes ``precision="16-mixed"`` for bf16-mixed, but not if the plugin says it."""
    flag = {"plugins": MegatronPrecision(precision)} if precision == "16-mixed" else {"precision": precision}
    trainer = make_trainer(
        MimoHeteroStrategy(modules, num_microbatches=2), max_steps=num_steps, callbacks=callbacks, **flag
    )
    model = vision_language("M*E")
    model.optimizer_config = config
    model.warmup_steps = 0
    data = DataLoader(Subset(digits().train_dataset, range(num_steps * BATCH)), BATCH, collate_fn=collate)
    trainer.fit(model, data)
    return trainer


class Dtypes(Callback):
    """Of parameters, gradients and the optimizer's parameters, and what the configs say, by module."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, *_):
        self.losses.append(trainer.callback_metrics["train_loss"].item())
        infos = trainer.optimizers[0].megatron_optimizer.module_infos
        self.seen = {}
        for name, part in module.model.own_modules().items():
            config = module_config(part)
            parameters = list(part.parameters())
            main = {value.dtype for group in infos[name].optimizer.param_groups for value in group["params"]}
            self.seen[name] = (
                {value.dtype for value in parameters if not getattr(value, "keep_fp32", False)},
                {value.main_grad.dtype for value in parameters},
                main,
                (config.params_dtype, config.pipeline_dtype, config.bf16, config.fp16),
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("precision", "dtype", "gradients"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("16-mixed", torch.float16, torch.float32),
    ],
)
def test_the_precision_reaches_parameters_gradients_and_configs(layout, precision, dtype, gradients):
    def run():
        dtypes = Dtypes()
        fit(LAYOUTS[layout], precision, [dtypes], replace(OPTIMIZER, initial_loss_scale=256.0))
        return dtypes.seen, dtypes.losses

    ranks = run_on_ranks(run, 2)
    flags = (dtype, dtype, dtype is torch.bfloat16, dtype is torch.float16)
    modules = {}
    for seen, losses in ranks:
        assert losses == ranks[0][1]
        assert all(3 < loss < 5 for loss in losses)
        modules |= seen
    assert modules.keys() == {"images", "language"}
    for name, seen in modules.items():
        assert seen == ({dtype}, {gradients}, {torch.float32}, flags), name


class Overflow(Callback):
    """Gradients of one module overflow on one rank in the second step; what the optimizer makes of it."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        own = module.model.own_modules()
        if trainer.global_step == 1 and self.module in own:
            next(own[self.module].parameters()).main_grad.view(-1)[:1] = float("inf")

    def on_train_batch_end(self, trainer, module, *_):
        optimizer = trainer.optimizers[0]
        inner = [part.grad_scaler.scale.item() for part in optimizer.megatron_optimizer.parts]
        logged = optimizer.last_step()
        weights = sum(value.double().abs().sum().item() for value in module.parameters())
        self.seen.append(
            (float(logged["loss_scale"]), logged["skipped_steps"], "grad_norm" in logged, set(inner), weights)
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", ["images", "language"])
def test_an_overflow_in_one_module_lowers_the_scale_of_all_and_skips_the_step(layout, module):
    config = replace(OPTIMIZER, initial_loss_scale=512.0, hysteresis=1, loss_scale_window=2)

    def run():
        overflow = Overflow(module)
        fit(LAYOUTS[layout], "16-mixed", [overflow], config, num_steps=5)
        return overflow.seen

    for seen in run_on_ranks(run, 2):
        scales, skipped, has_norm, inner, weights = zip(*seen, strict=True)
        # it doubles after two steps without overflow
        assert scales == (512, 256, 256, 512, 512)
        assert inner == tuple({scale} for scale in scales)
        assert skipped == (0, 1, 1, 1, 1)
        assert has_norm == (True, False, True, True, True)
        assert weights[1] == weights[0] != weights[2]


def test_ranks_of_different_precision_are_told():
    def run():
        fit(LAYOUTS["colocated"], ("32-true", "bf16-mixed")[dist.get_rank()], [])

    message = "the precision must be the same on every rank, but is 32-true on rank.* 0, bf16-mixed on rank.* 1"
    with pytest.raises(RankError, match=message):
        run_on_ranks(run, 2, timeout=60)


def test_the_loss_scale_changes_no_gradient():
    def run(scale):
        class Norms(Callback):
            norms = ()

            def on_train_batch_end(self, trainer, *_):
                self.norms += (trainer.optimizers[0].grad_norm,)

        norms = Norms()
        fit(LAYOUTS["colocated"], "16-mixed", [norms], replace(OPTIMIZER, loss_scale=scale))
        return norms.norms

    small, large = (run_on_ranks(run, 2, scale)[0] for scale in (64.0, 1024.0))
    assert small == pytest.approx(large, rel=0.02)
