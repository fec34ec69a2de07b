"""What only GPUs can show: where the host waits for the device, and what half precision and fp8 do to the losses."""

from contextlib import nullcontext
from functools import partial
from unittest import mock

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
from mimo_strategy.runtime.layer_graphs import ReplayableLayer
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


def train(make_model, modules, path, *, precision, num_steps=STEPS, cuda_graphs=False):
    """Losses from the weights at ``path``, which the first training writes; and the model."""
    seed_everything(1, verbose=False)
    model = make_model()
    if path.exists():
        model.load_weights(path)
    recorder = Losses(None if path.exists() else path)
    data = DataLoader(digits().train_dataset, 24, collate_fn=collate)
    trainer = make_trainer(
        MimoHeteroStrategy(modules, 2, cuda_graphs=cuda_graphs),
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


def recorded_layers(model):
    """Of each kind of layer that can be replayed: whether every one has been recorded."""
    recorded = {}
    for layer in model.runtime.model.modules():
        if isinstance(layer, ReplayableLayer):
            recorded.setdefault(type(layer).__name__, []).append(layer._recorded is not None)
    return {kind: all(layers) for kind, layers in recorded.items()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_replayed_layers_compute_the_same(on_ranks, tmp_path, precision):
    def losses(cuda_graphs):
        losses, model = train(
            vision_language, None, tmp_path / "start", precision=precision, num_steps=8, cuda_graphs=cuda_graphs
        )
        kinds = dict.fromkeys(("ReplayableMambaLayer", "ReplayableSharedExpert"), cuda_graphs)
        assert recorded_layers(model) == kinds
        weights = torch.cat([parameter.detach().float().flatten() for parameter in model.runtime.model.parameters()])
        return losses, weights.cpu()

    ((eager, weights),) = on_ranks(losses, 1, False)
    ((replayed, replayed_weights),) = on_ranks(losses, 1, True)
    print([(round(e, 5), round(r / e - 1, 7)) for e, r in zip(eager, replayed, strict=True)])
    assert eager[-1] < 0.95 * eager[0]
    tolerance = {"32-true": 1e-5, "bf16-mixed": 2e-3}[precision]
    assert replayed == pytest.approx(eager, rel=tolerance)
    assert (replayed_weights - weights).norm() <= tolerance * weights.norm()


def test_experts_in_one_kernel_compute_the_same(on_ranks, tmp_path):
    def losses(one_kernel):
        from modules import experts

        products = []
        multiply = experts.GroupedProduct.apply
        with (
            nullcontext() if one_kernel else mock.patch.object(experts._InOneKernel, "_has_kernel", return_value=False),
            mock.patch.object(
                experts.GroupedProduct, "apply", lambda *arguments: (products.append(1), multiply(*arguments))[1]
            ),
        ):
            losses, _ = train(vision_language, None, tmp_path / "start", precision="bf16-mixed", num_steps=8)
        assert bool(products) is one_kernel
        return losses

    (one_by_one,) = on_ranks(losses, 1, False)
    (one_kernel,) = on_ranks(losses, 1, True)
    print([(round(o, 5), round(k / o - 1, 7)) for o, k in zip(one_by_one, one_kernel, strict=True)])
    assert one_by_one[-1] < 0.95 * one_by_one[0]
    assert one_kernel == pytest.approx(one_by_one, rel=2e-3)


def test_gradients_of_queries_keys_and_values_are_not_put_together(on_ranks):
    def is_where_it_was():
        from megatron.core.transformer import attention

        from modules.qkv_split import split_into_views

        split_into_views()
        mixed = torch.randn(4, 2, 24, device="cuda", requires_grad=True)
        parts = attention.SplitAlongDim(mixed, 2, [8, 8, 8])
        side_by_side = torch.randn_like(mixed)
        (gradient,) = torch.autograd.grad(parts, mixed, side_by_side.split(8, dim=2))
        assert torch.equal(gradient, side_by_side)
        return gradient.data_ptr() == side_by_side.data_ptr()

    assert on_ranks(is_where_it_was, 1) == [True]


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
