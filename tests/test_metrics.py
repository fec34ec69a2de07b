"""What is logged: the same names and values on every rank, whichever rank computed them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny_runs import BATCH_SIZE, OPTIMIZER, Recorder, digits, make_trainer, vision_language
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Subset
from torchmetrics import MeanMetric, SumMetric

from datamodules import collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.runtime.loss import LossOutput
from mimo_strategy.runtime.optimizer import HeteroOptimizer
from mimo_strategy.runtime.step_sums import StepSums
from mimo_strategy.testing import RankError, run_on_ranks
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

# the first of two stages has no experts
PATTERN = "M*EE"
STEPS = 4
LAYOUTS = {
    "colocated": {"images": P(dp=4), "language": P(tp=2, dp=2, ep=2)},
    "non-colocated": {"images": P(dp=2), "language": P(tp=2, dp=1, ep=2, rank_offset=2)},
    "pipelined": {"images": P(dp=2), "language": P(pp=2, dp=1, rank_offset=2)},
}


def batches(num_steps: int, batch_size: int = BATCH_SIZE) -> DataLoader:
    samples = Subset(digits().train_dataset, range(num_steps * batch_size))
    return DataLoader(samples, batch_size, collate_fn=collate)


class Logs(NemotronVLM):
    """Logs in every way that a root module can."""

    def __init__(self) -> None:
        vocabulary = digits().vocabulary
        super().__init__(
            RadioConfig.tiny(),
            MambaMoEConfig.tiny(pattern=PATTERN, aux_loss_coeff=1e-2),
            image_token_id=vocabulary.image_token_id,
            end_token_id=vocabulary.end_token_id,
            optimizer=OPTIMIZER,
        )
        self.mean_answer = MeanMetric()
        self.num_answers = SumMetric()

    def loss_step(self, output: torch.Tensor, microbatch: dict[str, Any]) -> LossOutput:
        loss = super().loss_step(output, microbatch)
        answer = (microbatch["labels"] * microbatch["loss_mask"]).sum()
        self.log("answer", answer / loss.count, batch_size=int(loss.count), prog_bar=True)
        self.log("answer_of_epoch", answer / loss.count, batch_size=int(loss.count), on_step=False, on_epoch=True)
        self.mean_answer(answer / loss.count, weight=loss.count)
        self.num_answers(loss.count)
        self.log("mean_answer", self.mean_answer, on_step=False, on_epoch=True)
        self.log("num_answers", self.num_answers, on_step=False, on_epoch=True)
        return loss._replace(metrics={"longest": (microbatch["loss_mask"].sum(), torch.tensor(1.0))})

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make_optimizer(OPTIMIZER)
        # a metric that hardly changes: the rate falls after each epoch but the first
        plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0, threshold_mode="abs")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "train_loss", "interval": "epoch"},
        }


class Seen(Callback):
    """Copies of what was logged, after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_):
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(
    strategy: Any, start: Path, folder: Path, num_microbatches: int = 1
) -> tuple[list[dict[str, float]], dict[str, float], int]:
    seed_everything(3, verbose=False)
    seen = Seen()
    strategy = strategy if isinstance(strategy, str) else MimoHeteroStrategy(strategy, num_microbatches)
    callbacks = [
        Recorder(start),
        seen,
        LearningRateMonitor(),
        ModelCheckpoint(folder, monitor="answer", mode="max", filename="{step}-{answer:.4f}"),
        # the metric is the same in each epoch
        EarlyStopping("answer_of_epoch", patience=2, mode="min", strict=True),
    ]
    trainer = make_trainer(
        strategy,
        max_epochs=5,
        limit_train_batches=STEPS // 2,
        log_every_n_steps=1,
        callbacks=callbacks,
        enable_checkpointing=True,
        logger=CSVLogger(folder, name="logs", version=""),
    )
    trainer.fit(Logs(), batches(STEPS // 2))
    return seen.steps, {name: float(value) for name, value in trainer.callback_metrics.items()}, trainer.global_step


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights that all runs start from."""
    weights = tmp_path_factory.mktemp("start") / "weights"

    def write():
        make_trainer(MimoHeteroStrategy(), max_steps=1, callbacks=[Recorder(end=weights)]).fit(Logs(), batches(1))

    run_on_ranks(write, 1)
    return weights


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """On one plain device."""
    return run_on_ranks(fit, 1, "auto", start, tmp_path_factory.mktemp("alone"))[0]


@pytest.fixture(scope="module", params=LAYOUTS)
def run(request, start, tmp_path_factory):
    """All ranks of a layout, and the folder that they wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    return run_on_ranks(fit, 4, LAYOUTS[request.param], start, folder, 2), folder, request.param


def test_every_rank_holds_the_same_names_and_values(run):
    ranks, *_ = run
    assert ranks == ranks[:1] * 4


def test_values_are_those_of_one_device(run, alone):
    (steps, ended, _), *_ = run[0]
    steps_alone, ended_alone, _ = alone
    for step, step_alone in zip(steps, steps_alone, strict=True):
        for name in ("train_loss", "answer"):
            assert step[name] == pytest.approx(step_alone[name], rel=1e-5), name
    for name in ("answer_of_epoch", "mean_answer", "num_answers"):
        assert ended[name] == pytest.approx(ended_alone[name], rel=1e-6), name
    num_answers = sum(int(sample["loss_mask"].sum()) for sample in batches(STEPS // 2).dataset)
    assert ended["num_answers"] == num_answers
    # a mean over microbatches and lanes, of which one device has one
    parts = 2 * {"colocated": 2, "non-colocated": 1, "pipelined": 1}[run[2]]
    assert ended["longest"] == pytest.approx(ended_alone["longest"] / parts)


def test_early_stopping_and_checkpoints_follow_a_metric_of_the_loss(run):
    (steps, *_), folder, _ = run[0][0], *run[1:]
    assert len(steps) == 3 * STEPS // 2
    best = max(steps[STEPS // 2 - 1 :: STEPS // 2], key=lambda step: step["answer"])["answer"]
    (saved,) = [path.name for path in folder.glob("*.ckpt")]
    assert saved.endswith(f"answer={best:.4f}.ckpt")


def test_learning_rates_follow_the_plateau_by_module(run):
    _, folder, _ = run
    header, *rows = (line.split(",") for line in (folder / "logs" / "metrics.csv").read_text().splitlines())
    for module in ("images", "language"):
        (column,) = [number for number, name in enumerate(header) if name.endswith(f"/{module}") and "lr" in name]
        rates = [float(row[column]) for row in rows if row[column]]
        assert rates == pytest.approx([OPTIMIZER.lr, OPTIMIZER.lr, OPTIMIZER.lr / 2])


def test_norms_of_modules_make_the_norm_of_all(run):
    steps, ended, _ = run[0][0]
    for step in (*steps[1:], ended):
        assert min(step["grad_norm/images"], step["grad_norm/language"]) > 0
        assert math.hypot(step["grad_norm/images"], step["grad_norm/language"]) == pytest.approx(step["grad_norm"])


def test_tokens_per_expert_count_each_token_of_each_layer_once(run):
    (steps, *_), *_ = run[0]
    experts = [name for name in steps[-1] if name.startswith("tokens_per_expert/")]
    assert len(experts) == 4
    layers, top = PATTERN.count("E"), MambaMoEConfig.tiny().experts_per_token
    tokens = BATCH_SIZE * 24
    assert sum(steps[1][name] for name in experts) == pytest.approx(layers * top * tokens, rel=1e-6)


def test_the_balancing_loss_is_that_of_one_rank(run, start, tmp_path):
    """A mean over sequences, and 1 where tokens are spread evenly."""
    (steps, *_), *_ = run[0]
    (steps_alone, *_), *_ = run_on_ranks(fit, 1, None, start, tmp_path, 2)
    name = "seq_load_balancing_loss"
    assert [step[name] for step in steps] == pytest.approx([step[name] for step in steps_alone], rel=1e-4)
    assert 1 <= steps[0][name] < 2


# ---- the reduction


def test_sums_are_read_when_the_optimizer_s_step_has_been_launched(monkeypatch):
    def order():
        events = []

        def listen(owner, name):
            original = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda self, *args: events.append(name) or original(self, *args))

        listen(StepSums, "reduce_loss")
        listen(HeteroOptimizer, "step")
        listen(StepSums, "reported")
        make_trainer(MimoHeteroStrategy(), max_steps=2).fit(vision_language(), batches(2))
        return events

    assert run_on_ranks(order, 2) == [["reduce_loss", "step", "reported"] * 2] * 2


def test_sums_of_ranks_that_know_different_names():
    def reduce():
        rank, sums = dist.get_rank(), StepSums(torch.device("cpu"))
        seen = []
        for step in range(3):
            sums.add_loss(LossOutput(torch.tensor(2.0 + step), torch.tensor(1.0)))
            if rank == 1:
                sums.add("one", 3.0, 2)
            if rank == 2 and step == 1:
                sums.add("many", torch.tensor([1.0, 2.0]), 1, {"prog_bar": True})
            loss = sums.reduce_loss()
            reported = sums.reported()
            seen.append(
                (loss.mean.item(), {name: (part.mean.tolist(), part.settings) for name, part in reported.items()})
            )
        return seen

    one = {"one": (1.5, None)}
    expected = [(2.0, one), (3.0, one | {"many": ([1.0, 2.0], {"prog_bar": True})}), (4.0, one)]
    assert run_on_ranks(reduce, 3) == [expected] * 3


def test_a_metric_may_be_named_as_the_loss_and_changes_no_gradient():
    class NamesLoss(NemotronVLM):
        names: tuple[str, str]

        def loss_step(self, output, microbatch):
            loss = super().loss_step(output, microbatch)
            self.log(self.names[0], 3.0, batch_size=5)
            return loss._replace(metrics={self.names[1]: (torch.tensor(4.0), torch.tensor(2.0))})

    def run(*names):
        seed_everything(1, verbose=False)
        vocabulary = digits().vocabulary
        model = NamesLoss(
            RadioConfig.tiny(), MambaMoEConfig.tiny(pattern="*"), vocabulary.image_token_id, vocabulary.end_token_id
        )
        model.names = names
        recorder = Recorder()
        trainer = make_trainer(MimoHeteroStrategy({"images": P(dp=2), "language": P(dp=2)}), max_steps=1)
        trainer.callbacks.append(recorder)
        trainer.fit(model, batches(1))
        return recorder.steps, [trainer.callback_metrics[name].item() for name in names]

    steps, logged = run_on_ranks(run, 2, "answer", "length")[0]
    assert run_on_ranks(run, 2, "loss", "length")[0] == (steps, logged)
    assert run_on_ranks(run, 2, "answer", "loss")[0] == (steps, logged)
    assert logged == [3.0, 2.0]


def test_a_metric_of_different_size_is_named():
    def reduce():
        sums = StepSums(torch.device("cpu"))
        for size in (2, 3):
            sums.add("load", torch.ones(size), 1)
            sums.reduce_loss()
            sums.reported()

    with pytest.raises(RankError, match="the metric load has 3 parts here, but 2 elsewhere"):
        run_on_ranks(reduce, 2)


@pytest.mark.parametrize(
    ("value", "settings", "message"),
    [
        (1.0, {"reduce_fx": "max"}, r"reduce_fx='max'"),
        (MeanMetric(), {}, "the metric wrong must be an attribute of LogsWrongly"),
    ],
    ids=["reduction", "foreign-metric"],
)
def test_what_cannot_be_logged_within_a_step(value, settings, message):
    class LogsWrongly(NemotronVLM):
        def loss_step(self, output, microbatch):
            self.log("wrong", value, **settings)
            return super().loss_step(output, microbatch)

    def run():
        vocabulary = digits().vocabulary
        model = LogsWrongly(
            RadioConfig.tiny(), MambaMoEConfig.tiny(pattern="*"), vocabulary.image_token_id, vocabulary.end_token_id
        )
        make_trainer(MimoHeteroStrategy(), max_steps=1).fit(model, batches(1))

    with pytest.raises(RankError, match=message):
        run_on_ranks(run, 1)


# ---- optimizers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": None}, "OptimizerConfig.lr of language must be a finite number of at least 0, got None"),
        ({"lr": math.nan}, "OptimizerConfig.lr of language must be a finite number of at least 0, got nan"),
        ({"optimizer": "sgd"}, "OptimizerConfig.optimizer='sgd' of language would not be heeded"),
        ({"clip_grad": 0.5}, r"OptimizerConfig.clip_grad=0.5 of language would not be heeded: Trainer\(gradient_clip"),
        ({"decoupled_lr": 1e-3}, "OptimizerConfig.decoupled_lr=0.001 of language would not be heeded"),
        ({"min_lr": 1e-5}, "OptimizerConfig.min_lr=1e-05 of language would not be heeded"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_would_not_be_heeded_are_refused(settings, message):
    model = vision_language()
    with pytest.raises(ValueError, match=message):
        model.make_optimizer({"images": OPTIMIZER, "language": replace(OPTIMIZER, **settings)})
    with pytest.raises(TypeError, match=r"of images must be an OptimizerConfig, got 0.1"):
        model.make_optimizer(0.1)


@pytest.mark.parametrize("make", [lambda parameters: torch.optim.SGD(parameters, lr=1.0), lambda parameters: None])
def test_an_optimizer_that_would_train_nothing_is_refused(make):
    class Own(NemotronVLM):
        def configure_optimizers(self):
            return make(self.parameters())

    def run():
        vocabulary = digits().vocabulary
        model = Own(RadioConfig.tiny(), MambaMoEConfig.tiny(), vocabulary.image_token_id, vocabulary.end_token_id)
        with pytest.raises(TypeError, match=r"configure_optimizers returned (SGD|None), but .*self.make_optimizer"):
            make_trainer(MimoHeteroStrategy(), max_steps=1).fit(model, batches(1))
        return True

    assert run_on_ranks(run, 1) == [True]


def test_settings_by_module_reach_its_groups_and_small_parameters_do_not_decay():
    configs = {"images": replace(OPTIMIZER, lr=1e-4, adam_beta2=0.9), "language": replace(OPTIMIZER, weight_decay=0.3)}

    class Groups(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            groups = trainer.optimizers[0].param_groups
            self.shown = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}

        def on_train_batch_end(self, trainer, module, *_):
            self.inner = {
                (name, group["lr"], group["betas"], group["weight_decay"])
                for name, info in trainer.optimizers[0].megatron_optimizer.module_infos.items()
                for group in info.optimizer.param_groups
                if group["params"]
            }

    def run():
        model = vision_language()
        model.optimizer_config = configs
        groups = Groups()
        trainer = make_trainer(MimoHeteroStrategy(), max_steps=1, callbacks=[groups])
        trainer.fit(model, batches(1))
        return groups.shown, groups.inner, set(trainer.callback_metrics)

    for shown, inner, logged in run_on_ranks(run, 2):
        # this is no step that loggers write
        assert logged == {"train_loss"}
        assert shown == {name: (config.lr, config.weight_decay) for name, config in configs.items()}
        assert inner == {
            (name, config.lr, (config.adam_beta1, config.adam_beta2), decay)
            for name, config in configs.items()
            for decay in (config.weight_decay, 0.0)
        }
