"""``Trainer.predict``: every rank's own samples, in order, with text, whatever the layout."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BasePredictionWriter
from tiny_runs import PATTERN, digits, make_trainer, train, vision_language
from torch.utils.data import DataLoader, Subset

from datamodules import DigitsDataModule, collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.checkpoint import load_weights
from mimo_strategy.generation import Sampling
from mimo_strategy.prediction import own_rows
from mimo_strategy.testing import run_on_ranks

LAYOUTS = {
    "colocated": (4, {"images": P(dp=4), "language": P(tp=2, dp=2, ep=2)}),
    "non-colocated": (4, {"images": P(dp=2), "language": P(tp=2, dp=1, ep=2, rank_offset=2)}),
    "pipelined": (3, {"images": P(dp=1), "language": P(pp=2, dp=1, rank_offset=1)}),
}
# the second step batch is not full
NUM_SAMPLES, BATCH_SIZE = 13, 8


class FewDigits(DigitsDataModule):
    """The first held-out digits."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        super().__init__(BATCH_SIZE, seq_length=24)
        self._without = keys

    def predict_dataloader(self) -> DataLoader:
        def without(samples):
            return {name: value for name, value in collate(samples).items() if name not in self._without}

        return DataLoader(Subset(self.train_dataset, range(NUM_SAMPLES)), batch_size=BATCH_SIZE, collate_fn=without)


class Start(Callback):
    def __init__(self, weights):
        self._weights = weights

    def on_predict_start(self, trainer, module):
        load_weights(module.model, self._weights)


class Writer(BasePredictionWriter):
    def __init__(self):
        super().__init__("batch_and_epoch")
        self.written, self.indices = [], None

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, *_):
        self.written.append((prediction.sample_ids, batch_indices))

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        self.indices = batch_indices


def predict(modules: Any, weights: Any, *settings: dict[str, Any], without: tuple[str, ...] = ()) -> list[Any]:
    """Predictions for each of ``settings``, with one Trainer, and what a writer was given."""
    writer = Writer()
    strategy = "auto" if modules == "auto" else MimoHeteroStrategy(modules, num_microbatches=2)
    trainer = make_trainer(strategy, callbacks=[Start(weights), writer])
    model = vision_language(PATTERN)
    results = []
    for setting in settings:
        for name, value in setting.items():
            setattr(model, name, value)
        results.append([tuple(part) for part in trainer.predict(model, datamodule=FewDigits(without))])
    return [results, writer.written, writer.indices]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights that answer some questions."""
    path = tmp_path_factory.mktemp("weights") / "weights"
    run_on_ranks(train, 1, vision_language, MimoHeteroStrategy(), None, path, 12)
    return path


SAMPLING = Sampling(temperature=2.0, top_k=20, top_p=0.95, seed=3)
SETTINGS = ({}, {"max_new_tokens": 5, "sampling": SAMPLING})


@pytest.fixture(scope="module")
def alone(weights):
    """Batches of sample ids, tokens and texts on one plain device: greedy, then sampled."""
    return run_on_ranks(predict, 1, "auto", weights, *SETTINGS)[0][0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_together_predict_each_sample_once_as_one_device_does(weights, alone, layout):
    world_size, modules = LAYOUTS[layout]
    ranks = run_on_ranks(predict, world_size, modules, weights, *SETTINGS)
    for setting, expected in enumerate(alone):
        for number, whole in enumerate(expected):
            parts = [results[setting][number] for results, *_ in ranks]
            assert all(part[0] for part in parts), "every rank has samples of its own"
            together = tuple([item for part in parts for item in part[field]] for field in range(3))
            assert together == whole
    for results, written, indices in ranks:
        predicted = [batch[0] for setting in results for batch in setting]
        assert written == [(samples, samples) for samples in predicted]
        assert indices == [predicted[len(predicted) // 2 :]]


def test_texts_are_the_tokens_before_the_end(alone):
    vocabulary = digits().vocabulary
    (greedy, sampled) = alone
    assert [sample for batch in greedy for sample in batch[0]] == list(range(NUM_SAMPLES))
    for batch in (*greedy, *sampled):
        for tokens, text in zip(*batch[1:], strict=True):
            assert text == vocabulary.decode(tokens)
            assert vocabulary.end_token_id not in tokens[:-1]
    assert len({text for batch in greedy for text in batch[2]}) > 2
    assert [batch[2] for batch in greedy] != [batch[2] for batch in sampled]


def test_stop_tokens_and_prompts_without_answers(weights, alone):
    stop = alone[0][0][1][0][0]
    settings = {"stop_token_ids": (stop,), "max_new_tokens": 3}

    def run(modules):
        return predict(modules, weights, settings, without=("labels", "loss_mask"))[0][0]

    ranks = run_on_ranks(run, 2, {"images": P(tp=2), "language": P(dp=2)})
    vocabulary = digits().vocabulary
    for number, (_, tokens, _) in enumerate(alone[0]):
        together = [(ids, text) for rank in ranks for ids, text in zip(*rank[number][1:], strict=True)]
        for whole, (ids, text) in zip(tokens, together, strict=True):
            ends = [position for position, token in enumerate(whole) if token in (stop, vocabulary.end_token_id)]
            assert ids[: len(whole)] == whole[: min([3, *(end + 1 for end in ends)])][: len(ids)]
            assert len(ids) <= 3
            if ids[-1] == stop:
                assert text == vocabulary.decode(ids[:-1])


# ---- parts of it


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 8, 17])
def test_own_rows_cover_each_row_once_in_order(num_rows, world_size):
    rows = list(range(num_rows))
    parts = [rows[own_rows(num_rows, rank, world_size)] for rank in range(world_size)]
    assert [row for part in parts for row in part] == rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_draws_follow_the_probabilities_within_top_k_and_top_p():
    probabilities = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])
    scores = probabilities.log().expand(20_000, -1)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def shares(**settings):
        return torch.bincount(Sampling(**settings).choose(scores, draws), minlength=5) / len(draws)

    torch.testing.assert_close(shares(), probabilities, atol=0.01, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0, 0.4, 0.25, 0, 0]) / 0.65, atol=0.01, rtol=0)
    # 0.4 and 0.25 do not reach 0.7 yet
    torch.testing.assert_close(shares(top_p=0.7), torch.tensor([0, 0.4, 0.25, 0.2, 0]) / 0.85, atol=0.01, rtol=0)
    squared = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(shares(temperature=0.5), squared, atol=0.01, rtol=0)
    assert shares(top_k=1)[1] == 1


def test_draws_depend_on_seed_and_sample_only():
    ids = torch.tensor([4, 9, 4])
    first, second = Sampling(seed=1).draws(ids, 6), Sampling(seed=2).draws(ids, 6)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    assert torch.equal(Sampling(seed=1).draws(ids[1:], 6), first[1:])


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)])
def test_sampling_refuses_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must .* got {value}"):
        Sampling(**{name: value})
