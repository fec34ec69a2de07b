"""What only GPUs can show: where the host waits for the device, and what half precision does to the losses."""

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from tiny_runs import digits, make_trainer, vision_language
from torch.utils.data import DataLoader

from benchmarks.gpu import Bench, Case
from datamodules import collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.checkpoint.weights import save_weights

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


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_losses_in_half_precision_stay_within_a_hundredth(on_ranks, tmp_path, precision):
    start = tmp_path / "start"

    def losses(precision):
        seed_everything(1, verbose=False)
        model = vision_language()
        if start.exists():
            model.load_weights(start)
        recorder = Losses(None if start.exists() else start)
        data = DataLoader(digits().train_dataset, 24, collate_fn=collate)
        trainer = make_trainer(
            MimoHeteroStrategy(LAYOUTS["colocated"], 2),
            accelerator="gpu",
            precision=precision,
            max_steps=STEPS,
            callbacks=[recorder],
        )
        trainer.fit(model, data)
        return recorder.losses

    whole = on_ranks(lambda: losses("32-true"), 2)[0]
    half = on_ranks(lambda: losses(precision), 2)[0]
    assert len(whole) == STEPS
    assert whole[-1] < 0.9 * whole[0]
    print([(round(w, 4), round(h / w - 1, 5)) for w, h in zip(whole, half, strict=True)])
    assert half == pytest.approx(whole, rel=0.01)
