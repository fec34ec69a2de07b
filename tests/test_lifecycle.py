"""What Trainers leave behind in a process, and what a later one finds."""

import gc
import os
import threading
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, seed_everything
from tiny_runs import Recorder, digits, make_trainer, text_only, vision_language
from torch.distributed.distributed_c10d import _world
from torch.utils.data import DataLoader, Subset

from datamodules import collate
from mimo_strategy import DistributedDataParallelConfig, LayoutError, MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.testing import run_on_ranks

LAYOUTS = {
    "colocated": {"images": P(dp=2), "language": P(tp=2)},
    "non-colocated": {"images": P(dp=1), "language": P(dp=1, rank_offset=1)},
}


def data(number: int = 16) -> DataLoader:
    return DataLoader(Subset(digits().train_dataset, range(number)), 8, collate_fn=collate)


def held() -> tuple[int, int, int]:
    """Process groups, threads and open files of this process."""
    return len(_world.pg_map), threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trainers_one_after_another_leave_nothing_behind(layout, tmp_path):
    def one():
        model = vision_language("*E")
        trainer = make_trainer(MimoHeteroStrategy(LAYOUTS[layout]), max_steps=1, default_root_dir=tmp_path)
        trainer.fit(model, data())
        trainer.validate(model, data(), verbose=False)
        return held(), (weakref.ref(model), weakref.ref(next(model.model.parameters())))

    def run():
        seen, kept = zip(*(one() for _ in range(4)), strict=True)
        gc.collect()
        collected = [part() is None for parts in kept for part in parts]
        return seen, collected, sorted(path.name for path in Path(tmp_path).iterdir())

    for seen, collected, files in run_on_ranks(run, 2):
        # the first leaves what a process sets up once
        assert seen[1] == seen[2] == seen[3]
        assert seen[1][0] == seen[0][0] > 1
        assert all(collected)
        assert files == []


@pytest.mark.parametrize(
    "modules",
    [
        {"images": P(dp=4), "language": P(tp=2)},
        {"images": P(tp=2, dp=2), "language": P(dp=4)},
        {"images": P(dp=2), "language": P(tp=2, dp=1, rank_offset=2)},
        {"images": P(tp=2, dp=1), "language": P(dp=1, pp=2, rank_offset=2)},
    ],
    ids=["fan-in", "fan-out", "disjoint", "disjoint-pipelined"],
)
def test_one_group_for_each_set_of_ranks_that_waits_as_long_as_the_strategy_says(modules):
    """Groups of bridges too, for which megatron-core makes some of its own."""
    timeout = timedelta(minutes=3)

    def run():
        model = vision_language("*E")
        make_trainer(MimoHeteroStrategy(modules, timeout=timeout), max_steps=1).fit(model, data())
        # as megatron-core's own models let go of their bridges
        bridges = list(model.model.colocated_comms.values())
        model.model.destroy()
        assert all(bridge.gather_pg in _world.pg_map for bridge in bridges)
        own = [group for group in _world.pg_map if group is not dist.group.WORLD]
        ranks = [tuple(dist.get_process_group_ranks(group)) for group in own]
        return sorted(ranks), {group._get_backend(torch.device("cpu")).options._timeout for group in own}

    for ranks, timeouts in run_on_ranks(run, 4):
        assert len(set(ranks)) == len(ranks)
        assert (0, 1, 2, 3) not in ranks
        assert timeouts == {timeout}


def test_two_models_that_live_on_are_used_in_turn():
    def run():
        losses = []
        pairs = [
            (vision_language("*"), MimoHeteroStrategy(LAYOUTS[layout])) for layout in ("colocated", "non-colocated")
        ]
        recorders = [Recorder(), Recorder()]
        trainers = [
            make_trainer(strategy, max_steps=2, callbacks=[recorder], limit_val_batches=None)
            for (_, strategy), recorder in zip(pairs, recorders, strict=True)
        ]
        for trainer, (model, _) in zip(trainers, pairs, strict=True):
            trainer.fit(model, data())
        for trainer, (model, _) in zip(trainers, pairs, strict=True):
            losses.append(trainer.validate(model, data(), verbose=False)[0]["val_loss"])
            trainer.fit_loop.epoch_loop.max_steps = 4
            trainer.fit(model, data())
        return losses, [len(recorder.steps.losses) for recorder in recorders]

    ranks = run_on_ranks(run, 2)
    assert ranks[0] == ranks[1]
    assert ranks[0][1] == [4, 4]


def test_groups_that_went_with_their_world_are_left_alone(tmp_path):
    def train():
        make_trainer(MimoHeteroStrategy(LAYOUTS["colocated"]), max_steps=1).fit(vision_language("*"), data())

    def run():
        train()
        rank = dist.get_rank()
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        train()
        return len(_world.pg_map)

    assert run_on_ranks(run, 2) == [2, 2]


def test_a_model_of_another_layout_or_of_no_strategy_is_refused():
    def run():
        by_hand = text_only("*")
        by_hand.configure_model()
        with pytest.raises(ValueError, match="built without this strategy and cannot be used under it"):
            make_trainer(MimoHeteroStrategy(), max_steps=1).fit(by_hand, data())

    def on_two():
        model = vision_language("*")
        make_trainer(MimoHeteroStrategy(LAYOUTS["colocated"]), max_steps=1).fit(model, data())
        said = r"was built for\n  images: .* dp 2 .*\n.*\nand cannot be used with\n  images: .* dp 1 "
        with pytest.raises(LayoutError, match=said):
            make_trainer(MimoHeteroStrategy(LAYOUTS["non-colocated"]), max_steps=1).fit(model, data())

    run_on_ranks(run, 1)
    run_on_ranks(on_two, 2)


def test_a_model_that_is_destroyed_takes_nothing_from_another():
    def run():
        strategies = [MimoHeteroStrategy(LAYOUTS["colocated"]) for _ in range(2)]
        models = [vision_language("*") for _ in range(2)]
        trainers = [make_trainer(strategy, max_steps=1, limit_val_batches=1) for strategy in strategies]
        for trainer, model in zip(trainers, models, strict=True):
            trainer.fit(model, data())
        models[0].runtime.destroy()
        return trainers[1].validate(models[1], data(), verbose=False)[0]["val_loss"]

    ranks = run_on_ranks(run, 2)
    assert ranks[0] == ranks[1]


def test_a_model_is_not_built_again_for_the_next_verb():
    def run():
        model = vision_language("*")
        trainer = make_trainer(MimoHeteroStrategy(LAYOUTS["non-colocated"]), max_steps=1)
        built = []
        for verb in (trainer.fit, trainer.validate, trainer.test, trainer.fit):
            verb(model, data())
            built.append((id(model.runtime), id(model.model), len(_world.pg_map)))
        # a second Trainer goes on with it
        make_trainer(MimoHeteroStrategy(LAYOUTS["non-colocated"]), max_steps=1).fit(model, data())
        built.append((id(model.runtime), id(model.model), len(_world.pg_map)))
        return built

    for built in run_on_ranks(run, 2):
        assert built == built[:1] * 5


class FailsOnce(Callback):
    """An error in the second microbatch of the first step, which the schedule does not live through."""

    def on_train_start(self, trainer, module):
        loss_step, seen = module.loss_step, []

        def failing(output, microbatch):
            seen.append(microbatch)
            if len(seen) == 2:
                raise ArithmeticError
            return loss_step(output, microbatch)

        module.loss_step = failing


def test_a_step_that_failed_leaves_nothing_to_the_next_fit():
    def run():
        steps = []
        for fails in (False, True):
            seed_everything(1, verbose=False)
            model, recorder = vision_language("*"), Recorder()
            if fails:
                with pytest.raises(ArithmeticError):
                    make_trainer(MimoHeteroStrategy(None, 4), max_steps=1, callbacks=[FailsOnce()]).fit(model, data())
                del model.loss_step
            make_trainer(MimoHeteroStrategy(None, 4), max_steps=1, callbacks=[recorder]).fit(model, data())
            steps.append(recorder.steps)
        return steps

    ((steps, after_failure),) = run_on_ranks(run, 1)
    assert after_failure == steps


def test_a_model_is_not_used_with_settings_that_it_was_not_built_for():
    def run():
        model = vision_language("*")
        make_trainer(MimoHeteroStrategy(), max_steps=1).fit(model, data())
        with pytest.raises(ValueError, match=r"was built in torch.float32 and cannot be used in torch.bfloat16"):
            make_trainer(MimoHeteroStrategy(), precision="bf16-mixed").validate(model, data())
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=False)
        with pytest.raises(ValueError, match="images was wrapped with"):
            make_trainer(MimoHeteroStrategy(ddp=ddp), max_steps=1).fit(model, data())
        # where nothing is reduced, that makes no difference
        make_trainer(MimoHeteroStrategy(ddp=ddp), limit_val_batches=1).validate(model, data(), verbose=False)
        with pytest.raises(ValueError, match="another strategy and cannot be used under SingleDeviceStrategy"):
            make_trainer("auto", max_steps=1).fit(model, data())
        return True

    assert run_on_ranks(run, 1) == [True]


def test_no_group_outlives_the_process_group():
    """So that a fresh one can be made."""

    def run():
        trainer = make_trainer(MimoHeteroStrategy(LAYOUTS["colocated"]), max_steps=1)
        trainer.fit(vision_language("*"), data())
        dist.barrier()
        dist.destroy_process_group()
        return len(_world.pg_map)

    assert run_on_ranks(run, 2) == [0, 0]
