"""Training goes on from a checkpoint as if it had never stopped, on the same layout and on any other."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_runs import COLOCATED, DISJOINT, Run, StopAfter, data, every_step, fit, model, strategy
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import make_trainer

from mimo_strategy import ModuleParallel as P
from mimo_strategy.checkpoint.random_state import random_streams
from mimo_strategy.layout import ModuleSizes
from mimo_strategy.testing import run_on_ranks
from mimo_strategy.topology import Topology

# Every difference that a layout can make: tp, dp, pp, ep, etp, the world, and whether modules share ranks. Also how
# the optimizer's state is held.
LAYOUTS = {
    "one-rank": (1, {}),
    "colocated": (4, {"modules": COLOCATED}),
    "dp2+pp2": (4, {"modules": {"images": P(dp=2), "language": P(pp=2, dp=1, rank_offset=2)}}),
    "tp4/tp2-etp2-ep2": (4, {"modules": {"images": P(tp=4), "language": P(tp=2, etp=2, ep=2)}}),
    "dp3-replicated": (3, {"distributed": False}),
    "dp2+tp2-ep2": (4, {"modules": {"images": P(dp=2), "language": P(tp=2, dp=1, ep=2, rank_offset=2)}}),
    "dp2-overlap": (2, {"overlap": True}),
    "dp1+tp2-replicated": (
        3,
        {"modules": {"images": P(dp=1), "language": P(tp=2, dp=1, rank_offset=1)}, "distributed": False},
    ),
}


def go_on(layout: str, start: Path | None, last: int, folder: Path) -> list[Run]:
    """Train up to step ``last``, saving every step to ``folder``."""
    world_size, settings = LAYOUTS[layout]
    return run_on_ranks(lambda: fit(strategy(**settings), last, start, callbacks=(every_step(folder),)), world_size)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, Run]:
    """Checkpoints of every step, and the run that wrote them; other layouts would initialise weights otherwise."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, go_on("one-rank", None, len(LAYOUTS), folder)[0]


def assert_same(ranks: list[Run], whole: Run, first: int, last: int, what: str) -> None:
    for rank in ranks:
        assert rank.losses == pytest.approx(whole.losses[first:last], rel=1e-5), what
        assert rank.grad_norms == pytest.approx(whole.grad_norms[first:last], rel=1e-5), what


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(list(LAYOUTS), id="there"),
        pytest.param(list(LAYOUTS)[::-1], id="and-back", marks=pytest.mark.exhaustive),
    ],
)
def test_every_step_may_be_on_another_layout(uninterrupted, tmp_path, order):
    folder, whole = uninterrupted
    start = folder / "step=1.ckpt"
    for step, layout in enumerate(order[1:], 1):
        assert_same(go_on(layout, start, step + 1, tmp_path), whole, step, step + 1, f"step {step} on {layout}")
        start = tmp_path / f"step={step + 1}.ckpt"


@pytest.mark.exhaustive
@pytest.mark.parametrize("before", LAYOUTS)
def test_any_layout_loads_what_any_other_saved(uninterrupted, tmp_path, before):
    folder, whole = uninterrupted
    go_on(before, folder / "step=1.ckpt", 2, tmp_path)
    for after in LAYOUTS:
        ranks = go_on(after, tmp_path / "step=2.ckpt", 5, tmp_path / after.replace("/", "-"))
        assert_same(ranks, whole, 2, 5, after)


class Seen(Callback):
    """Of every step its number, the batch's and the epoch's, the samples and the loss; and when epochs began."""

    def __init__(self) -> None:
        self.steps: list[tuple] = []
        self.epochs: list[tuple[int, int]] = []

    def on_train_epoch_start(self, trainer, module):
        self.epochs.append((trainer.global_step, trainer.current_epoch))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        samples = sorted(batch["sample_id"].tolist())
        self.steps.append((trainer.global_step, batch_idx, trainer.current_epoch, samples, outputs["loss"].item()))


MOMENTS = {
    "steps": {"every_n_train_steps": 2},
    "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    "epochs": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "fit": {"every_n_train_steps": 100},
}


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 12}], ids=lambda limit: next(iter(limit)))
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_goes_on_again_and_again_whenever_it_was_saved(tmp_path, moment, limit):
    """Each time from what it saved itself since; 12 steps in 3 epochs, validated at every other step."""

    def run(start, end, folder):
        seed_everything(4, workers=True, verbose=False)
        seen, validates = Seen(), moment == "validation"
        trainer = make_trainer(
            strategy(),
            callbacks=[seen, StopAfter(end), ModelCheckpoint(folder, "{step}", save_top_k=-1, **MOMENTS[moment])],
            enable_checkpointing=True,
            use_distributed_sampler=True,
            limit_val_batches=int(validates),
            val_check_interval=2 if validates else None,
            num_sanity_val_steps=0,
            **limit,
        )
        trainer.fit(model(), data(), data() if validates else None, ckpt_path=start)
        if moment == "fit":
            trainer.save_checkpoint(Path(folder) / f"step={trainer.global_step}.ckpt")
        return seen.steps, seen.epochs

    steps, epochs = run_on_ranks(run, 1, None, 12, tmp_path / "whole")[0]
    assert [begun for begun, _ in epochs] == [0, 4, 8]
    every = 4 if moment in ("epochs", "fit") else 2
    start = tmp_path / "whole" / f"step={every}.ckpt"
    if moment == "fit":
        run_on_ranks(run, 1, None, every, tmp_path / "whole")
    for first in range(every, 12, every):
        again = run_on_ranks(run, 1, start, first + every, tmp_path / str(first))[0]
        assert again[0] == steps[first : first + every]
        assert again[1] == [begun for begun in epochs if first <= begun[0] < first + every]
        start = tmp_path / str(first) / f"step={first + every}.ckpt"


EXACT = {
    "one-rank": (1, {}),
    "colocated": (4, {"modules": COLOCATED}),
    "disjoint": (3, {"modules": DISJOINT}),
    "dp2-replicated": (2, {"distributed": False}),
    "dp2-overlap": (2, {"overlap": True}),
    "dp2-half": (2, {}, {"precision": "bf16-true"}),
}


@pytest.mark.parametrize(
    "layout",
    [
        *("colocated", "disjoint", "dp2-half"),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("one-rank", "dp2-replicated", "dp2-overlap")),
    ],
)
def test_the_same_layout_goes_on_bit_for_bit(tmp_path, layout):
    """With dropout and random crops, within an epoch and over its end, with and without workers."""
    world_size, settings, *precision = EXACT[layout]

    def run(last, step=0, **changes):
        changes |= precision[0] if precision else {}
        saved = tmp_path / f"step={step}.ckpt" if step else None
        return run_on_ranks(
            lambda: fit(strategy(**settings), last, saved, module=model(random=True), **changes), world_size
        )

    whole = run(6, callbacks=(every_step(tmp_path),))
    for step, num_workers in ((3, 0), (1, 2)):
        for before, after in zip(whole, run(6, step, num_workers=num_workers), strict=True):
            assert after.losses == before.losses[step:]
            assert after.grad_norms == before.grad_norms[step:]
            assert after.weights == before.weights


class Streams(Callback):
    """The state of every stream of this rank's modules when training begins."""

    def on_train_start(self, trainer, module):
        self.states = {
            f"{name} {stream}": state.tolist()
            for name, rng in module.model.rngs.items()
            for stream, state in rng.states.items()
        }


def test_random_streams_of_modules_start_anew_on_another_layout(tmp_path):
    """At other seeds than a run that starts there, and than from another step."""
    run_on_ranks(lambda: fit(strategy(), 2, callbacks=(every_step(tmp_path),)), 1)

    def begin(step):
        streams = Streams()
        fit(strategy(), step + 1, tmp_path / f"step={step}.ckpt" if step else None, callbacks=(streams,))
        return streams.states

    started, first, second, again = (run_on_ranks(begin, 2, step) for step in (0, 1, 2, 2))
    assert second == again
    for rank in range(2):
        assert len(started[rank]) > 3
        for stream in started[rank]:
            assert len({str(states[rank][stream]) for states in (started, first, second)}) == 3, stream


def test_the_default_generator_starts_anew_after_another_number_of_updates():
    def run():
        topology = Topology.single_process({"language": ModuleSizes()})
        states = []
        for num_updates in (0, 1, 2):
            torch.manual_seed(7)
            (default,) = random_streams(SimpleNamespace(rngs={}), topology, torch.device("cpu"))
            default.restart(num_updates)
            states.append(torch.get_rng_state().tolist())
        return len(set(map(str, states)))

    assert run_on_ranks(run, 1) == [3]
