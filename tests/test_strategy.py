"""The strategy under a Trainer: its verbs, what ranks agree on, and what it refuses."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, seed_everything
from megatron.core import parallel_state
from tiny_runs import PATTERN, digits, make_trainer, text_only, train, vision_language
from torch.utils.data import DataLoader, Subset

from datamodules import MockImageDataModule, collate
from mimo_strategy import LayoutError, MimoHeteroStrategy, MimoModule, OptimizerConfig
from mimo_strategy import ModuleParallel as P
from mimo_strategy.checkpoint import load_weights
from mimo_strategy.launcher import CheckingLauncher
from mimo_strategy.testing import RankError, run_on_ranks
from modules import MambaMoE, MambaMoEConfig, NemotronVLM, RadioConfig

PLACEMENTS = {
    "colocated": {"images": P(dp=4), "language": P(tp=2, dp=2, ep=2)},
    "non-colocated": {"images": P(dp=2), "language": P(tp=2, dp=1, ep=2, rank_offset=2)},
}


@pytest.fixture(params=PLACEMENTS)
def four_ranks(request) -> dict[str, P]:
    """A layout of four ranks in each placement."""
    return PLACEMENTS[request.param]


def loader(num_samples: int, batch_size: int = 8) -> DataLoader:
    return DataLoader(Subset(digits().train_dataset, range(num_samples)), batch_size, collate_fn=collate)


# ---- what happens to the model


class GlobalGroups(Callback):
    """Which process groups megatron-core holds globally, after setup and after training."""

    def __init__(self):
        self.names = []

    def look(self, *_):
        held = vars(parallel_state).items()
        self.names.append([name for name, value in held if isinstance(value, dist.ProcessGroup)])

    on_train_start = on_train_end = look


@pytest.mark.parametrize("text_alone", [False, True], ids=["vision-language", "text"])
def test_no_process_group_is_global(text_alone):
    def run():
        groups = GlobalGroups()
        modules = {"language": P(pp=2)} if text_alone else {"images": P(tp=2), "language": P(dp=2, ep=2)}
        trainer = make_trainer(MimoHeteroStrategy(modules), max_steps=1, callbacks=[groups])
        trainer.fit(text_only() if text_alone else vision_language(), loader(8))
        return groups.names, parallel_state.model_parallel_is_initialized()

    assert run_on_ranks(run, 2) == [([[], []], False)] * 2


class Weights(Callback):
    """Copies of a rank's weights before training and after each step, and the largest gradients after each step."""

    def __init__(self):
        self.copies, self.gradients = [], []

    def on_train_start(self, trainer, module):
        self.copies.append({name: value.clone() for name, value in module.named_parameters()})

    def on_train_batch_end(self, trainer, module, *_):
        self.on_train_start(trainer, module)
        largest = {name: value.main_grad.abs().max().item() for name, value in module.named_parameters()}
        self.gradients.append(largest)


def test_each_step_changes_every_weight_and_leaves_its_gradients_to_be_seen(four_ranks):
    def run():
        weights = Weights()
        make_trainer(MimoHeteroStrategy(four_ranks), max_steps=2, callbacks=[weights]).fit(
            vision_language(), loader(16)
        )
        before, after, later = weights.copies
        still = [
            name for name in before if torch.equal(before[name], after[name]) or torch.equal(after[name], later[name])
        ]
        return (
            still,
            [name for seen in weights.gradients for name, largest in seen.items() if largest == 0],
            len(before),
        )

    for unchanged, without_gradient, number in run_on_ranks(run, 4):
        assert number > 10
        assert unchanged == without_gradient == []


# ---- the Trainer's verbs


def test_the_verbs_of_a_trainer_one_after_another(four_ranks):
    def run():
        model, batches = vision_language("M*E"), loader(16)
        # validation is on the training data
        strategy = MimoHeteroStrategy(four_ranks, num_microbatches=2)
        trainer = make_trainer(strategy, max_steps=4, limit_val_batches=None, limit_test_batches=1)
        seen = []

        def record(metrics):
            seen.append((trainer.global_step, {name: float(value) for name, value in metrics.items()}))

        record(trainer.validate(model, batches, verbose=False)[0])
        trainer.fit(model, batches, batches)
        record(trainer.callback_metrics)
        record(trainer.test(model, batches, verbose=False)[0])
        trainer.fit_loop.epoch_loop.max_steps = 8
        trainer.fit(model, batches, batches)
        record(trainer.callback_metrics)
        record(trainer.validate(model, batches, verbose=False)[0])
        return seen

    results = run_on_ranks(run, 4)
    assert results == results[:1] * 4
    steps, (before, fitted, tested, refitted, after) = zip(*results[0], strict=True)
    assert steps == (0, 4, 4, 8, 8)
    assert before.keys() == after.keys() == {"val_loss"}
    assert tested.keys() == {"heldout_accuracy"}
    assert fitted.keys() == refitted.keys() >= {"train_loss", "val_loss"}
    assert before["val_loss"] - 0.1 > fitted["val_loss"] > refitted["val_loss"] == after["val_loss"]


def test_the_first_step_by_name_on_eight_ranks(capsys):
    class FirstStep(Callback):
        def on_train_batch_end(self, trainer, *_):
            self.at = time.monotonic()
            self.loss = trainer.callback_metrics["train_loss"].item()

    def run():
        first = FirstStep()
        make_trainer("mimo_hetero", max_steps=1, callbacks=[first]).fit(vision_language("M*E"), loader(8))
        return first.at, first.loss

    began = time.monotonic()
    ended, losses = zip(*run_on_ranks(run, 8), strict=True)
    assert len(set(losses)) == 1
    with capsys.disabled():
        print(f"\neight ranks, from start to the end of the first step: {max(ended) - began:.1f} s")


# ---- data


class ImagesShowTheirSample:
    """Samples whose image's pixels are all the sample's id."""

    def __init__(self, dataset):
        self._dataset = dataset

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, index):
        sample = self._dataset[index]
        return sample | {"images": torch.full_like(sample["images"], index)}


class SeesSamples(NemotronVLM):
    """Records which samples each module is given, by microbatch."""

    def forward(self, batch, *, labels=None):
        self.seen["language"].append(batch["sample_id"].tolist())
        if "images" in batch:
            self.seen["images"].append(batch["images"][:, 0, 0, 0].int().tolist())
        return super().forward(batch, labels=labels)


@pytest.mark.parametrize(
    ("world_size", "modules", "shuffle"),
    [
        pytest.param(4, PLACEMENTS["colocated"], False, id="fan-in"),
        pytest.param(4, PLACEMENTS["colocated"], True, id="fan-in-shuffled"),
        pytest.param(4, {"images": P(tp=2, dp=2), "language": P(dp=4, ep=2)}, True, id="fan-out-shuffled"),
        pytest.param(3, {"images": P(dp=1), "language": P(dp=2, rank_offset=1)}, True, id="dp1+dp2-shuffled"),
        pytest.param(4, {"images": P(dp=2), "language": P(pp=2, dp=1, rank_offset=2)}, False, id="dp2+pp2"),
    ],
)
def test_every_module_sees_the_same_samples_in_the_same_order(world_size, modules, shuffle):
    num_samples, batch_size, num_microbatches = 32, 16, 2

    def run():
        data = ImagesShowTheirSample(digits().train_dataset)
        data = DataLoader(Subset(data, range(num_samples)), batch_size, shuffle=shuffle, collate_fn=collate)
        vocabulary = digits().vocabulary
        model = SeesSamples(RadioConfig.tiny(), MambaMoEConfig.tiny(pattern="*E"), vocabulary.image_token_id, 1)
        model.seen = {"images": [], "language": []}
        strategy = MimoHeteroStrategy(modules, num_microbatches)
        trainer = make_trainer(strategy, max_epochs=1, use_distributed_sampler=shuffle)
        trainer.fit(model, data)
        layouts = trainer.strategy.layout.modules
        lanes = {
            name: layout.coordinates(dist.get_rank())["dp"]
            for name, layout in layouts.items()
            if dist.get_rank() in layout.ranks
        }
        return model.seen, lanes, {name: layout.dp for name, layout in layouts.items()}

    orders = {}
    for seen, lanes, sizes in run_on_ranks(run, world_size):
        for name, lane in lanes.items():
            by_lane = orders.setdefault(name, [None] * sizes[name])
            assert by_lane[lane] in (None, seen[name]), f"ranks of lane {lane} of {name} see different samples"
            by_lane[lane] = seen[name]
    num_steps = num_samples // batch_size
    whole = {
        name: [sample for parts in zip(*by_lane, strict=True) for part in parts for sample in part]
        for name, by_lane in orders.items()
    }
    assert all(len(microbatches) == num_steps * num_microbatches for microbatches in orders["images"])
    assert whole["images"] == whole["language"]
    assert sorted(whole["language"]) == list(range(num_samples))
    assert (whole["language"] == list(range(num_samples))) is not shuffle


# ---- evaluation and generation


class Generates(NemotronVLM):
    """Keeps what it generates in a test."""

    def test_step(self, batch, batch_idx):
        generation = super().test_step(batch, batch_idx)
        self.generated.append([part.tolist() for part in generation])


def evaluate(strategy, start) -> dict[str, Any]:
    vocabulary = digits().vocabulary
    model = Generates(
        RadioConfig.tiny(),
        MambaMoEConfig.tiny(pattern=PATTERN),
        image_token_id=vocabulary.image_token_id,
        end_token_id=vocabulary.end_token_id,
    )
    model.generated = []

    class Start(Callback):
        def on_validation_start(self, trainer, module):
            load_weights(module.model, start)

        on_test_start = on_validation_start

    # the second step batch is not full
    batches = loader(14)
    trainer = make_trainer(strategy, callbacks=[Start()], limit_val_batches=None)
    (validated,) = trainer.validate(model, batches, verbose=False)
    (tested,) = trainer.test(model, batches, verbose=False)
    return validated | tested | {"generated": model.generated}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights that answer some questions, and what they answer on one plain device."""
    start = tmp_path_factory.mktemp("trained") / "weights"
    run_on_ranks(train, 1, vision_language, MimoHeteroStrategy(), None, start, 12)
    return start, run_on_ranks(evaluate, 1, "auto", start)[0]


def test_evaluation_and_generation_are_those_of_one_device(trained, four_ranks):
    start, alone = trained
    strategy = MimoHeteroStrategy(four_ranks, num_microbatches=2)
    for rank in run_on_ranks(evaluate, 4, strategy, start):
        assert rank["generated"] == alone["generated"]
        assert rank["heldout_accuracy"] == alone["heldout_accuracy"]
        assert rank["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-6)


def test_generation_covers_each_sample_once_and_depends_on_it(trained):
    _, alone = trained
    assert [sample for *_, samples in alone["generated"] for sample in samples] == list(range(14))
    assert len({tuple(tokens) for texts, *_ in alone["generated"] for tokens in texts}) > 2


# ---- what is refused


def fit_on_two_ranks(
    *,
    modules: dict[str, P] | None = None,
    num_microbatches: int = 1,
    batch_size: int = 8,
    model: Callable[[], LightningModule] = vision_language,
    **settings: Any,
) -> None:
    """Would start a second rank, if nothing were wrong."""
    data = MockImageDataModule(
        image_size=32, tokens_per_image=16, seq_length=24, vocab_size=64, image_token_id=2, batch_size=batch_size
    )
    trainer = make_trainer(MimoHeteroStrategy(modules, num_microbatches), devices=2, max_steps=1, **settings)
    trainer.fit(model(), datamodule=data)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        pytest.param(
            {"modules": {"images": P(tp=4), "language": P()}}, LayoutError, "A layout that fits 2", id="layout"
        ),
        pytest.param({"modules": {"language": P()}}, LayoutError, "missing: ['images']", id="missing-module"),
        pytest.param({"batch_size": 7}, ValueError, "valid: 6 or 8", id="batch-size"),
        pytest.param({"num_microbatches": 3}, ValueError, "valid: 6 or 12", id="microbatches"),
        pytest.param({"model": LightningModule}, TypeError, "trains a mimo_strategy.MimoModule", id="root-module"),
        pytest.param({"precision": "64-true"}, ValueError, "'64-true' is not supported", id="precision"),
        pytest.param(
            {"accumulate_grad_batches": 2}, ValueError, "MimoHeteroStrategy(num_microbatches=...)", id="accumulation"
        ),
        pytest.param(
            {"gradient_clip_algorithm": "value"}, ValueError, "by their norm over all modules", id="clip-by-value"
        ),
    ],
)
def test_what_cannot_work_is_refused_before_another_rank_starts(settings, error, message, monkeypatch):
    monkeypatch.setattr(CheckingLauncher, "_call_children_scripts", lambda self: pytest.fail("another rank starts"))
    with pytest.raises(error) as refusal:
        fit_on_two_ranks(**settings)
    assert message in str(refusal.value)


def test_ranks_started_by_others_refuse_it_too():
    """As under torchrun: every rank checks before it makes process groups of its own."""

    def run():
        with pytest.raises(LayoutError, match="A layout that fits 2"):
            make_trainer(MimoHeteroStrategy({"images": P(tp=4), "language": P()}), max_steps=1).fit(
                vision_language(), loader(8)
            )
        return True

    assert run_on_ranks(run, 2) == [True, True]


def test_ranks_of_different_seeds_are_refused():
    """Weights and the order of samples would differ."""

    def run():
        seed_everything(7 + dist.get_rank(), verbose=False)
        with pytest.raises(ValueError, match=r"seed of seed_everything .* but is 7 on rank\(s\) 0, 8 on rank\(s\) 1"):
            make_trainer(MimoHeteroStrategy(), max_steps=1).fit(vision_language("*"), loader(8))
        return True

    assert run_on_ranks(run, 2) == [True, True]


def test_a_batch_that_one_rank_would_skip_ends_all():
    class Skips(NemotronVLM):
        def training_step(self, batch, batch_idx):
            return None if dist.get_rank() == 1 else super().training_step(batch, batch_idx)

    def run():
        model = Skips(RadioConfig.tiny(), MambaMoEConfig.tiny(), 2, 1, optimizer=OptimizerConfig(lr=1e-3))
        make_trainer(MimoHeteroStrategy(), max_steps=1).fit(model, loader(8))

    with pytest.raises(RankError, match=r"Skips.training_step returned None, but no rank can skip"):
        run_on_ranks(run, 2)


@pytest.mark.parametrize("missing", ["labels", "loss_mask"])
def test_a_batch_without_a_part_of_the_loss_is_refused(missing):
    def without(samples):
        return {name: value for name, value in collate(samples).items() if name != missing}

    def run():
        data = DataLoader(Subset(digits().train_dataset, range(8)), 8, collate_fn=without)
        with pytest.raises(ValueError, match=f"the batch has no {missing} to compute the loss from, only"):
            make_trainer(MimoHeteroStrategy(), max_steps=1).fit(vision_language("*"), data)
        return True

    assert run_on_ranks(run, 1) == [True]


def test_a_model_that_predicts_nothing_is_refused():
    class Silent(MambaMoE):
        predict_step = MimoModule.predict_step

    trainer = make_trainer(MimoHeteroStrategy())
    with pytest.raises(ValueError, match=r"Silent has no predict_step: write one that returns self.predict"):
        trainer.predict(Silent(MambaMoEConfig.tiny()), loader(8))


def test_stages_of_a_pipeline_share_no_weights():
    class Tied(MambaMoE):
        def module_spec(self, *args):
            spec = super().module_spec(*args)
            spec.params["share_embeddings_and_output_weights"] = True
            return spec

    def run():
        with pytest.raises(LayoutError, match="share_embeddings_and_output_weights=True, but with pp 2"):
            make_trainer(MimoHeteroStrategy({"language": P(pp=2)}, 2), max_steps=1).fit(
                Tied(MambaMoEConfig.tiny(pattern="**"), OptimizerConfig(lr=1e-3)), loader(8)
            )
        return True

    assert run_on_ranks(run, 2) == [True, True]


def test_sequences_that_tp_cannot_cut_are_refused_on_every_rank():
    data = MockImageDataModule(
        image_size=16, tokens_per_image=4, seq_length=25, vocab_size=64, image_token_id=2, batch_size=4
    )

    def run():
        modules = {"images": P(dp=1), "language": P(tp=2, dp=1, rank_offset=1)}
        with pytest.raises(ValueError, match=r"25 tokens cannot be cut over tp 2 of language; pad them to 26"):
            make_trainer(MimoHeteroStrategy(modules), max_steps=1).fit(vision_language("*"), data)
        return True

    assert run_on_ranks(run, 3) == [True] * 3


def test_more_ranks_than_one_need_the_strategy():
    def run():
        make_trainer("ddp", max_steps=1).fit(
            NemotronVLM(RadioConfig.tiny(), MambaMoEConfig.tiny(), 2, 1, optimizer=OptimizerConfig(lr=1e-3)), loader(8)
        )

    with pytest.raises(RankError, match="under MimoHeteroStrategy only"):
        run_on_ranks(run, 2)
