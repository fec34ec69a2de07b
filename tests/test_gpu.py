"""What only GPUs can show: where the host waits for the device, and what half precision and fp8 do to the losses."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from tiny_runs import OPTIMIZER, PATTERN, digits, make_trainer, vision_language
from torch.utils.data import DataLoader

from benchmarks.gpu import Bench, Case, plain_kernels
from datamodules import collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.checkpoint.weights import save_weights
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

STEPS = 50
LAYOUTS = {
    "colocated": {"images": P(dp=2), "language": P(dp=2, ep=2)},
    "heterogeneous": {"images": P(dp=2), "language": P(tp=2, dp=1, ep=2)},
    "non-colocated": {"images": P(dp=1), "language": P(dp=1, rank_offset=1)},
}


@pytest.fixture(autouse=True)
def needs_gpus(accelerator):
    if accelerator != "gpu":
        pytest.skip("needs GPUs")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_host_waits_at_most_twice_more_than_in_a_loop_on_megatron_core(on_ranks, layout):
    def waits(loop):
        modules = LAYOUTS[layout]
        bench = Bench(
            tiny=True,
            warmup=2,
            steps=1,
            device=torch.device("cuda", torch.cuda.current_device()),
            dtype=torch.bfloat16,
            num_gpus=2,
        )
        return bench.measure(Case(layout, loop, modules["images"], modules["language"], 2, 8)).waits

    def both():
        return waits("megatron"), waits("strategy")

    for megatron, strategy in on_ranks(both, 2):
        assert sum(megatron.values()) > 0
        assert sum(strategy.values()) <= sum(megatron.values()) + 2, (strategy, megatron)


class Losses(Callback):
    """Records the losses, and writes the weights that they start from where ``path`` is given."""

    def __init__(self, path=None):
        self.losses = []
        self._path = path

    def on_train_start(self, trainer, module):
        if self._path is not None:
            save_weights(self._path, module.model)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def train(make_model, modules, path, *, precision, num_steps=STEPS):
    """Losses from the weights at ``path``, which the first training writes; and the model."""
    seed_everything(1, verbose=False)
    model = make_model()
    if path.exists():
        model.load_weights(path)
    recorder = Losses(None if path.exists() else path)
    data = DataLoader(digits().train_dataset, 24, collate_fn=collate)
    trainer = make_trainer(
        MimoHeteroStrategy(modules, 2),
        accelerator="gpu",
        precision=precision,
        max_steps=num_steps,
        callbacks=[recorder],
    )
    trainer.fit(model, data)
    return recorder.losses, model


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_losses_in_half_precision_stay_within_a_hundredth(on_ranks, tmp_path, precision):
    def losses(precision):
        return train(vision_language, LAYOUTS["colocated"], tmp_path / "start", precision=precision)[0]

    whole = on_ranks(losses, 2, "32-true")[0]
    half = on_ranks(losses, 2, precision)[0]
    assert len(whole) == STEPS
    assert whole[-1] < 0.9 * whole[0]
    print([(round(w, 4), round(h / w - 1, 5)) for w, h in zip(whole, half, strict=True)])
    assert half == pytest.approx(whole, rel=0.01)


def test_fused_kernels_compute_the_same(on_ranks, tmp_path):
    def losses(is_plain):
        with plain_kernels() if is_plain else nullcontext():
            losses, model = train(vision_language, None, tmp_path / "start", precision="32-true", num_steps=3)
        from megatron.core.extensions.transformer_engine import TERowParallelLinear

        layers = model.model.modality_submodules["images"].modules()
        biases = {layer.te_return_bias for layer in layers if isinstance(layer, TERowParallelLinear)}
        assert biases == {is_plain}
        return losses

    plain = on_ranks(losses, 1, True)[0]
    assert on_ranks(losses, 1, False)[0] == pytest.approx(plain, rel=2e-5)


def sized_for_fp8(images, language, **changes):
    """A tiny model of sizes that fp8 takes, also on two tensor parallel ranks."""
    vocabulary = digits().vocabulary
    return NemotronVLM(
        RadioConfig.tiny(class_tokens=16, fp8=images),
        MambaMoEConfig.tiny(pattern=PATTERN, mamba_num_heads=32, fp8=language, **changes),
        image_token_id=vocabulary.image_token_id,
        end_token_id=vocabulary.end_token_id,
        optimizer=OPTIMIZER,
    )


def num_fp8_layers(model):
    """Of each module: the layers that computed in fp8 when they ran last."""
    return {
        name: sum(getattr(layer, "fp8", False) for layer in part.modules())
        for name, part in model.runtime.model.own_modules().items()
    }


@pytest.mark.parametrize(("layout", "world_size"), [(None, 1), ("heterogeneous", 2)])
def test_losses_in_fp8_stay_near_those_in_bfloat16(on_ranks, tmp_path, layout, world_size):
    def losses(in_fp8):
        make_model = partial(sized_for_fp8, images=in_fp8, language=in_fp8)
        losses, model = train(make_model, LAYOUTS.get(layout), tmp_path / "start", precision="bf16-mixed")
        assert all(bool(number) is in_fp8 for number in num_fp8_layers(model).values())
        return losses

    bf16 = on_ranks(losses, world_size, False)[0]
    fp8 = on_ranks(losses, world_size, True)[0]
    assert len(bf16) == STEPS
    assert bf16[-1] < 0.9 * bf16[0]
    print([(round(b, 4), round(f / b - 1, 5)) for b, f in zip(bf16, fp8, strict=True)])
    assert fp8 != bf16
    assert fp8 == pytest.approx(bf16, rel=0.05)


@pytest.mark.parametrize(("images", "language"), [(True, False), (False, True)])
def test_modules_choose_fp8_for_themselves(on_ranks, tmp_path, images, language):
    """The language model computes its layers again in the backward, and what was trained can be saved."""

    def layers():
        make_model = partial(sized_for_fp8, images, language, recompute_layers=True)
        _, model = train(make_model, None, tmp_path / "start", precision="bf16-true", num_steps=3)
        save_weights(tmp_path / "end", model.model)
        return num_fp8_layers(model)

    (numbers,) = on_ranks(layers, 1)
    assert {name: number > 0 for name, number in numbers.items()} == {"images": images, "language": language}
