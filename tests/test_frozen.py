"""Frozen parts stay as they are, cost nothing backward, and the rest trains as on one process."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from tiny_runs import OPTIMIZER, OVERLAPPED, PLAIN, make_trainer
from torch.utils.data import DataLoader

from datamodules import MockImageDataModule, collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.runtime.pipeline_bridge import PipelineBridge
from mimo_strategy.testing import Reference, run_on_ranks
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

NUM_STEPS, BATCH_SIZE = 2, 8

FROZEN = {
    "encoder": [".encoders."],
    "projector": [".input_projections."],
    "images": ["modality_submodules."],
    "language": ["language_model."],
    "all but projector": [".encoders.", "language_model."],
}


class Frozen(NemotronVLM):
    """A model that is frozen in the way that ``MimoModule`` tells."""

    def __init__(self, frozen: str) -> None:
        super().__init__(
            RadioConfig.tiny(),
            MambaMoEConfig.tiny(pattern="M*E-"),
            image_token_id=2,
            end_token_id=1,
            optimizer=OPTIMIZER,
        )
        self.frozen = FROZEN[frozen]

    def configure_model(self):
        super().configure_model()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in self.frozen))


def make_data() -> DataLoader:
    """Samples with 0 to 3 images; in the second batch only those without."""
    dataset = MockImageDataModule(
        image_size=16,
        tokens_per_image=4,
        images_per_sample=(0, 3),
        seq_length=24,
        vocab_size=64,
        image_token_id=2,
        batch_size=BATCH_SIZE,
        num_samples=100,
    ).train_dataset
    texts = [sample for sample in dataset if len(sample["images"]) == 0]
    samples = [dataset[index] for index in range(BATCH_SIZE)] + texts[:BATCH_SIZE]
    return DataLoader(samples, BATCH_SIZE, collate_fn=collate)


@pytest.fixture(scope="module")
def references(accelerator):
    return {
        name: Reference(partial(Frozen, name), make_data, num_steps=NUM_STEPS, accelerator=accelerator)
        for name in FROZEN
    }


@pytest.mark.parametrize("frozen", FROZEN)
def test_what_is_frozen_keeps_its_values_and_the_rest_changes(references, frozen):
    reference = references[frozen]
    end = reference.steps[-1].weights
    kept = {name for name in end if torch.equal(end[name], reference.start[name])}
    assert kept == {name for name in end if any(part in name for part in FROZEN[frozen])}
    # the bias follows the tokens, and not any gradient
    assert any(name.endswith("expert_bias") for name in end)


LAYOUTS = {
    "fan-in": ({"images": P(dp=4), "language": P(tp=2, dp=2, ep=2)}, 4),
    "fan-out": ({"images": P(tp=2, dp=1), "language": P(dp=2)}, 2),
    "dp1+dp2": ({"images": P(dp=1), "language": P(dp=2, rank_offset=1)}, 3),
    "dp2+dp1": ({"images": P(dp=2), "language": P(dp=1, rank_offset=2)}, 3),
    "dp1+pp2": ({"images": P(dp=1), "language": P(dp=1, pp=2, rank_offset=1)}, 3),
}


@pytest.mark.parametrize(
    ("frozen", "layout", "ddp"),
    [
        ("projector", "fan-in", None),
        ("encoder", "fan-out", None),
        ("images", "dp1+pp2", OVERLAPPED),
        ("language", "dp1+dp2", PLAIN),
        ("all but projector", "fan-out", OVERLAPPED),
    ],
    ids=lambda value: {id(OVERLAPPED): "overlapped", id(PLAIN): "plain", id(None): "sharded"}.get(id(value)),
)
def test_training_is_that_of_one_process(references, frozen, layout, ddp):
    modules, world_size = LAYOUTS[layout]
    encoder_batching = 2 if (frozen, layout) == ("encoder", "fan-out") else 1
    strategy = MimoHeteroStrategy(modules, 2, ddp=ddp, encoder_batching=encoder_batching)
    references[frozen].assert_alike(strategy, world_size)


@pytest.mark.parametrize(("frozen", "anything_kept"), [("encoder", True), ("images", False), ("language", True)])
def test_nothing_of_a_frozen_encoder_is_kept_for_backward(frozen, anything_kept):
    def kept():
        module = Frozen(frozen)
        module.configure_model()
        encoder = module.model.modality_submodules["images"]
        saved = {True: 0, False: 0}
        inside = []
        encoder.encoders["radio"].register_forward_pre_hook(lambda *_: inside.append(True))
        encoder.encoders["radio"].register_forward_hook(lambda *_: inside.clear())

        def count(tensor):
            saved[bool(inside)] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            encoder(encoder_inputs=module.encoder_inputs("images", torch.randn(2, 3, 16, 16)))
        return saved[True], saved[False]

    ((in_encoder, beside_it),) = run_on_ranks(kept, 1)
    assert (in_encoder > 0) == (frozen == "language")
    assert (beside_it > 0) == anything_kept


@pytest.mark.parametrize(("frozen", "returned"), [("images", 0), ("language", 2 * NUM_STEPS)])
def test_no_gradient_crosses_the_bridge_to_a_frozen_module(frozen, returned):
    def count():
        received = []
        receive = PipelineBridge._recv_gradient

        def listen(bridge, *args):
            received.append(receive(bridge, *args))
            return received[-1]

        PipelineBridge._recv_gradient = listen
        fit(Frozen(frozen), MimoHeteroStrategy(LAYOUTS["dp2+dp1"][0], 2))
        return len(received)

    assert run_on_ranks(count, 3) == [returned, returned, 0]


def fit(module, strategy, ckpt_path=None, **settings):
    seed_everything(1, verbose=False)
    trainer = make_trainer(strategy, max_steps=NUM_STEPS, gradient_clip_val=None, limit_val_batches=None, **settings)
    trainer.fit(module, make_data(), ckpt_path=ckpt_path)
    return trainer


class SaveHalfway(Callback):
    def __init__(self, path):
        self._path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            trainer.save_checkpoint(self._path)


@pytest.mark.parametrize("frozen", ["images", "language"])
def test_a_frozen_module_may_be_saved_resumed_and_validated(tmp_path, frozen):
    modules = {"images": P(dp=1), "language": P(dp=1, rank_offset=1)}
    path = tmp_path / "half.ckpt"

    def train(**settings):
        module = Frozen(frozen)
        trainer = fit(module, MimoHeteroStrategy(modules, 2), **settings)
        # configure_model runs again, on modules that are wrapped now
        (metrics,) = trainer.validate(module, make_data(), verbose=False)
        return metrics["val_loss"]

    whole = run_on_ranks(lambda: train(callbacks=[SaveHalfway(path)]), 2)
    resumed = run_on_ranks(lambda: train(ckpt_path=path), 2)
    assert resumed == whole
