"""What the strategy adds to a step of megatron-core: collectives, and waits of the host for the device."""

from collections import Counter
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import OPTIMIZER, digits, make_trainer, vision_language
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Subset

from benchmarks.bare_loop import BareLoop
from datamodules import collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.callbacks import Throughput
from mimo_strategy.testing import run_on_ranks

BATCH, STEPS, MICROBATCHES = 8, 5, 2
LAYOUTS = {
    "colocated": (4, {"images": P(dp=4), "language": P(tp=2, dp=2, ep=2)}),
    "non-colocated": (2, {"images": P(dp=1), "language": P(dp=1, rank_offset=1)}),
}


def counted(profiler: profile) -> Counter[str]:
    """Collectives by name; and reads of a tensor's value, each of which waits for a GPU."""
    names = Counter({event.key: event.count for event in profiler.key_averages()})
    return Counter(
        {
            name.removeprefix("c10d::").rstrip("_"): count
            for name, count in names.items()
            if name.startswith("c10d::") or name == "aten::_local_scalar_dense"
        }
    )


class CountsStep(Callback):
    """Profiles the last step but one, from its end to that of the last."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == STEPS - 2:
            self._profiler = profile(activities=[ProfilerActivity.CPU])
            self._profiler.start()
        if batch_idx == STEPS - 1:
            self._profiler.stop()
            self.strategy = counted(self._profiler)
            bare = BareLoop(vision_language("M*E"), trainer.strategy.layout, MICROBATCHES, OPTIMIZER)
            for _ in range(2):
                bare.step(batch, OPTIMIZER.lr)
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                bare.step(batch, OPTIMIZER.lr)
            self.bare = counted(profiler)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_adds_few_collectives_and_waits(layout):
    world_size, modules = LAYOUTS[layout]

    def run() -> tuple[dict[str, Any], dict[str, Any]]:
        counts = CountsStep()
        data = DataLoader(Subset(digits().train_dataset, range(STEPS * BATCH)), BATCH, collate_fn=collate)
        trainer = make_trainer(
            MimoHeteroStrategy(modules, MICROBATCHES),
            max_steps=STEPS,
            callbacks=[counts, Throughput()],
            log_every_n_steps=100,
        )
        model = vision_language("M*E")
        # it reads batches that are still in host memory, which waits for no device
        model.check_batch = lambda batch: None
        trainer.fit(model, data)
        return dict(counts.strategy), dict(counts.bare)

    for strategy, bare in run_on_ranks(run, world_size):
        added = Counter(strategy)
        added.subtract(bare)
        waits = added.pop("aten::_local_scalar_dense", 0)
        # the loss, all metrics and signals take the place of the bare loop's loss
        assert {name: number for name, number in added.items() if number} == {}
        # the two of the progress bar; the sums are read in one, instead of the loss
        assert waits <= 2, (strategy, bare)


def test_the_profiler_sees_collectives_and_waits():
    def run():
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            value = torch.ones(2)
            torch.distributed.all_reduce(value)
            torch.distributed.broadcast(value, 0)
            value[0].item()
            value.sum().item()
        return dict(counted(profiler))

    assert run_on_ranks(run, 2) == [{"allreduce": 1, "broadcast": 1, "aten::_local_scalar_dense": 2}] * 2


def test_updated_parameters_are_copied_at_once():
    def run():
        trainer = make_trainer(MimoHeteroStrategy(), max_steps=1)
        trainer.fit(vision_language("M*E"), digits())
        optimizer = trainer.optimizers[0].megatron_optimizer
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for part in optimizer.parts:
                part._copy_main_params_to_model_params()
        names = Counter({event.key: event.count for event in profiler.key_averages()})
        return len(parameters), len(optimizer.parts), names["aten::_foreach_copy_"]

    ((num_parameters, num_parts, num_copies),) = run_on_ranks(run, 1)
    assert num_copies == num_parts < num_parameters / 10
