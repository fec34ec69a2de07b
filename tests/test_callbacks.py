"""Summary and speed: what they show of modules on other ranks, and that every operation is counted once."""

import json
import logging
from io import StringIO
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelSummary
from tiny_runs import BATCH_SIZE, OPTIMIZER, digits, make_trainer, vision_language
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from datamodules import DigitsDataModule, collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.callbacks import CaptionWriter, ModuleSummary, Throughput
from mimo_strategy.prediction import Prediction
from mimo_strategy.testing import RankError, run_on_ranks
from modules import MambaMoE, MambaMoEConfig, NemotronVLM, Projector, ProjectorConfig, RadioConfig, RadioEncoder

LAYOUTS = {
    "colocated": {"images": P(dp=4), "language": P(tp=2, dp=2, ep=2)},
    "non-colocated": {"images": P(dp=2), "language": P(tp=2, dp=1, ep=2, rank_offset=2)},
    "pipelined": {"images": P(dp=2), "language": P(pp=2, dp=1, rank_offset=2)},
}
SEQUENCE = 24


def fit(modules: dict[str, P], model: Any, num_steps: int = 3, **settings: Any):
    data = DataLoader(Subset(digits().train_dataset, range(num_steps * BATCH_SIZE)), BATCH_SIZE, collate_fn=collate)
    trainer = make_trainer(MimoHeteroStrategy(modules, num_microbatches=2), max_steps=num_steps, **settings)
    trainer.fit(model, data)
    return trainer


# ---- operations


class FrozenEncoder(Callback):
    def on_train_start(self, trainer, module):
        for name, part in module.model.own_modules().items():
            if name == "images":
                part.requires_grad_(False)


class Speed(Callback):
    """What was reduced, and what is logged of it."""

    def on_train_batch_end(self, trainer, module, *_):
        reported = module.runtime.reported.get("_throughput")
        if reported is not None:
            self.seconds = (reported.sum[0] / reported.count).item()
            self.counted = reported.sum[1:].tolist()
        self.logged = {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("tokens", "step_time", "TFLOP", "mfu"))
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_operation_of_a_step_counts_once_on_whatever_ranks(layout):
    peak = 1e9

    def run():
        speed = Speed()
        # what Throughput logs, it logs before Speed looks
        model = vision_language("M*EE")
        trainer = fit(LAYOUTS[layout], model, callbacks=[Throughput(peak), speed])
        return (
            speed.seconds,
            speed.counted,
            speed.logged,
            {n: m.num_ranks for n, m in trainer.strategy.layout.modules.items()},
        )

    model = vision_language("M*EE")
    batch = collate([digits().train_dataset[index] for index in range(BATCH_SIZE)])
    images, language = (3 * model.forward_flops(name, batch) for name in ("images", "language"))
    ranks = run_on_ranks(run, 4)
    assert ranks == ranks[:1] * 4
    seconds, counted, logged, sizes = ranks[0]
    assert counted == pytest.approx([BATCH_SIZE * SEQUENCE, images, language], rel=1e-12)
    assert logged == pytest.approx(
        {
            "tokens/s": BATCH_SIZE * SEQUENCE / seconds,
            "step_time": seconds,
            "TFLOP/s": (images + language) / seconds / 4 / 1e12,
            "mfu/images": images / seconds / sizes["images"] / peak,
            "mfu/language": language / seconds / sizes["language"] / peak,
        }
    )


def test_a_frozen_encoder_has_no_backward_pass():
    def run():
        speed = Speed()
        fit({"images": P(), "language": P()}, vision_language("*"), callbacks=[FrozenEncoder(), Throughput(), speed])
        return speed.counted[1:], sorted(speed.logged)

    model = vision_language("*")
    batch = collate([digits().train_dataset[index] for index in range(BATCH_SIZE)])
    ((counted, logged),) = run_on_ranks(run, 1)
    assert counted == pytest.approx([model.forward_flops("images", batch), 3 * model.forward_flops("language", batch)])
    # nobody knows the peak of a CPU
    assert logged == ["TFLOP/s", "step_time", "tokens/s"]


def counted_flops(module: Any, *inputs: Any, **settings: Any) -> float:
    module.configure_model()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs, **settings)
    torch.distributed.destroy_process_group()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["affine", "mlp"])
def test_the_formula_of_the_projector_is_what_torch_counts(kind):
    def run():
        projector = Projector(ProjectorConfig(64, 32, kind=kind))
        return counted_flops(projector, torch.zeros(10, 3, 64)), projector.forward_flops(30)

    ((counted, formula),) = run_on_ranks(run, 1)
    assert formula == counted


def test_the_formula_of_the_encoder_is_what_torch_counts():
    def run():
        encoder = RadioEncoder(RadioConfig.tiny())
        return counted_flops(encoder, torch.zeros(3, 3, 16, 16)), encoder.forward_flops(3)

    ((counted, formula),) = run_on_ranks(run, 1)
    assert formula == counted


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "*-E"},
        {"pattern": "EE", "shared_expert_ffn_hidden_size": 0, "experts_per_token": 3},
        {"pattern": "**", "num_query_groups": 4, "kv_channels": None},
    ],
    ids=str,
)
def test_the_formula_of_the_language_model_is_what_torch_counts(changes):
    batch = collate([digits().train_dataset[index] for index in range(3)])

    def run():
        model = MambaMoE(MambaMoEConfig.tiny(**changes), OPTIMIZER)
        return counted_flops(model, batch), model.forward_flops("language", batch)

    ((counted, formula),) = run_on_ranks(run, 1)
    assert formula == counted


def test_a_mamba_layer_costs_its_projections_and_little_more():
    batch = collate([digits().train_dataset[index] for index in range(3)])
    config = MambaMoEConfig.tiny(pattern="M")
    inner = config.mamba_num_heads * config.mamba_head_dim
    projections = config.hidden_size * (3 * inner + 2 * 2 * config.mamba_state_dim + config.mamba_num_heads)
    tokens = batch["input_ids"].numel()
    without_output = MambaMoE(config).forward_flops("language", batch) - 2 * tokens * config.hidden_size * 64
    assert 1 < without_output / (2 * tokens * projections) < 1.3


# ---- summary


@pytest.mark.parametrize("callback", [None, ModelSummary, ModuleSummary], ids=str)
def test_the_summary_shows_every_module_of_every_rank_by_default(callback, capfd):
    def run():
        callbacks = [] if callback is None else [callback()]
        modules = {"images": P(dp=1), "language": P(tp=2, ep=2, rank_offset=1)}
        fit(modules, vision_language("*E"), 1, enable_model_summary=True, callbacks=callbacks)

    run_on_ranks(run, 3)
    printed = capfd.readouterr().out
    assert printed.count("Ranks") == printed.count("images ") == printed.count("language ") == 1
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.startswith(("images", "language"))}
    assert rows["images"][1] == "0"
    assert rows["language"][1] == "1-2"
    totals = {name: [int(number.replace(",", "")) for number in row if "," in number] for name, row in rows.items()}
    assert totals["images"][0] == totals["images"][1]
    total, per_rank = totals["language"]
    assert total / 2 < per_rank < total
    assert rows["images"][-1] == rows["language"][-1] == "all"


def test_under_another_strategy_the_summary_is_lightnings_and_speed_is_refused():
    def run(*callbacks):
        data = DataLoader(Subset(digits().train_dataset, range(8)), 8, collate_fn=collate)
        trainer = make_trainer("auto", max_steps=1, callbacks=[*callbacks])
        log, written = logging.getLogger("lightning.pytorch"), StringIO()
        log.setLevel(logging.INFO)
        log.addHandler(logging.StreamHandler(written))
        trainer.fit(vision_language("*"), data)
        return written.getvalue()

    assert "Trainable params" in run_on_ranks(run, 1, ModuleSummary())[0]
    with pytest.raises(RankError, match="layout of MimoHeteroStrategy, there is none under SingleDeviceStrategy"):
        run_on_ranks(run, 1, Throughput())


def test_no_summary_if_the_trainer_wants_none(capfd):
    run_on_ranks(lambda: fit(None, vision_language("*"), 1) and None, 1)
    assert "images" not in capfd.readouterr().out


class Unlabelled(DigitsDataModule):
    """Three questions in two step batches, without answers and without words."""

    def predict_dataloader(self) -> DataLoader:
        self.vocabulary = None

        def unlabelled(samples):
            return {name: value for name, value in collate(samples).items() if name not in ("labels", "loss_mask")}

        return DataLoader(Subset(self.val_dataset, range(3)), batch_size=2, collate_fn=unlabelled)


def predict_alone(folder):
    model = vision_language("M*E")
    model.max_new_tokens = 2
    make_trainer("auto", callbacks=[CaptionWriter(folder)]).predict(model, Unlabelled(2, seq_length=24))
    model.predict_step = lambda batch, batch_idx: batch["input_ids"]
    with pytest.raises(TypeError, match="as a Prediction"):
        make_trainer("auto", callbacks=[CaptionWriter(folder / "none")]).predict(model, digits(4))


class Answering(NemotronVLM):
    """Generates what each sample's labels say, with the end token."""

    def predict_step(self, batch, batch_idx):
        answers = [row[mask > 0].tolist() for row, mask in zip(batch["labels"], batch["loss_mask"], strict=True)]
        assert all(answer[-1] == self.end_token_id for answer in answers)
        return Prediction(batch["sample_id"].tolist(), answers, [])


def test_right_answers_read_as_what_is_right_without_words(tmp_path):
    class Wordless(DigitsDataModule):
        def predict_dataloader(self):
            self.vocabulary = None
            return DataLoader(Subset(self.val_dataset, range(3)), batch_size=3, collate_fn=collate)

    def run():
        vocabulary = digits().vocabulary
        model = Answering(
            RadioConfig.tiny(), MambaMoEConfig.tiny(pattern="*"), vocabulary.image_token_id, vocabulary.end_token_id
        )
        make_trainer("auto", callbacks=[CaptionWriter(tmp_path)]).predict(model, Wordless(4, seq_length=24))

    run_on_ranks(run, 1)
    records = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [record["text"] for record in records] == [record["truth"] for record in records]


def test_captions_are_written_by_one_process_and_without_labels(tmp_path):
    run_on_ranks(predict_alone, 1, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [record["sample_id"] for record in records] == [0, 1, 2]
    assert all(record["truth"] is None for record in records)
    assert all(word.isdecimal() for record in records for word in record["text"].split() + record["prompt"].split())
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"0.png", "1.png", "2.png"}
    assert (tmp_path / "captions.png").exists()
