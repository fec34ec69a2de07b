"""Estimates agree with what runs hold and with what was measured; the search finds what it should."""

import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mimo_strategy import DistributedDataParallelConfig, Layout, MimoModule, ModuleParallel, planning
from mimo_strategy.layout import LANGUAGE, Placement
from mimo_strategy.planning.cost import CostUnknown, Transfer, Workload
from mimo_strategy.planning.estimate import Estimator, Job
from mimo_strategy.planning.explain import as_yaml, why
from mimo_strategy.planning.groups import feeds, groups, lane_ranks
from mimo_strategy.planning.machine import MACHINES, read_machine, write_machine
from mimo_strategy.planning.memory import Training, gibibytes
from mimo_strategy.planning.report import report_layout
from mimo_strategy.planning.search import candidates, search
from mimo_strategy.runtime.data_parallel import resolve_ddp
from mimo_strategy.testing import run_on_ranks
from mimo_strategy.testing.costs import KeptActivations, MeasuredCosts, ModuleBytes, measure_costs
from modules import NEMOTRON_54_LAYERS, MambaMoEConfig, NemotronVLM, RadioConfig
from tests.tiny_runs import text_only

IMAGE_TOKEN, LENGTH = 1, 24

# Step times of a bare megatron-core loop, median of 9 steps: 4 H200s, 2026-11-22; RADIO ViT-H on one 1024 x 2048 image
# a sample, 20 layers with 32 experts, sequences of 4,096 tokens, step batch 8, bfloat16, Transformer Engine.
MEASURED = [
    (0.683, ModuleParallel(dp=4), ModuleParallel(dp=4, ep=4), 1),
    (0.953, ModuleParallel(dp=4), ModuleParallel(tp=4, ep=4), 2),
    (0.987, ModuleParallel(dp=4), ModuleParallel(dp=4, ep=4), 2),
    (1.154, ModuleParallel(dp=2), ModuleParallel(dp=2, ep=2, rank_offset=2), 4),
    (1.744, ModuleParallel(tp=4), ModuleParallel(tp=4, ep=4), 4),
]


# Peak memory in GiB of `benchmarks/gpu.py`: 2 H200s, 2026-11-22; the same model with 16 experts.
MEASURED_GIB = [
    (75, ModuleParallel(dp=2), ModuleParallel(dp=2, ep=2), 4, 1, 1),
    (54, ModuleParallel(dp=2), ModuleParallel(dp=2, ep=2), 8, 4, 1),
    (84, ModuleParallel(dp=2), ModuleParallel(dp=2, ep=2), 8, 4, 4),
    (50, ModuleParallel(dp=2), ModuleParallel(tp=2, ep=2), 4, 2, 1),
    (40, ModuleParallel(tp=2), ModuleParallel(tp=2, ep=2), 4, 4, 1),
    (54, ModuleParallel(dp=1), ModuleParallel(dp=1, rank_offset=1), 4, 4, 1),
]


def reference(**language: object) -> NemotronVLM:
    """The model that was measured."""
    return NemotronVLM(
        RadioConfig(image_height=1024, image_width=2048),
        MambaMoEConfig(**{"num_experts": 32, "max_sequence_length": 4096} | language),
        image_token_id=511,
        end_token_id=2,
    )


def reference_job(batch_size: int = 8, memory: float = MACHINES["h200"].memory, **language: object) -> Job:
    machine = replace(MACHINES["h200"], memory=memory)
    return Job(reference(**language), batch_size, 4096, {"images": 1}, Training("bf16-mixed"), machine)


def tiny(pattern: str = "M*-E", **changes: object) -> NemotronVLM:
    return NemotronVLM(RadioConfig.tiny(), MambaMoEConfig.tiny(pattern=pattern, **changes), IMAGE_TOKEN, end_token_id=2)


def tiny_batch(num_samples: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 60, (num_samples, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens[:, : RadioConfig.tiny().tokens_per_image] = IMAGE_TOKEN
    return {
        "input_ids": tokens,
        "labels": tokens,
        "loss_mask": torch.ones(num_samples, LENGTH),
        "images": torch.randn(num_samples, 3, 16, 16),
        "num_images": torch.ones(num_samples, dtype=torch.long),
    }


COLOCATED_4 = {"images": ModuleParallel(dp=4), "language": ModuleParallel(tp=2, ep=2)}
APART_2 = {"images": ModuleParallel(dp=1), "language": ModuleParallel(dp=1, rank_offset=1)}
PIPELINED_3 = {"images": ModuleParallel(dp=1), "language": ModuleParallel(dp=1, pp=2, rank_offset=1)}
WHOLE_2 = {"images": ModuleParallel(dp=2), "language": ModuleParallel(dp=2)}
WHOLE_EXPERTS_2 = {"images": ModuleParallel(tp=2), "language": ModuleParallel(tp=2)}
EXPERT_TP_4 = {"images": ModuleParallel(tp=2), "language": ModuleParallel(tp=2, ep=2, etp=2)}
SHARDED = DistributedDataParallelConfig(use_distributed_optimizer=True)
WHOLE = DistributedDataParallelConfig(use_distributed_optimizer=False)
BUCKETS = DistributedDataParallelConfig(
    use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=20_000, pad_buckets_for_high_nccl_busbw=True
)

exhaustive = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("modules", "precision", "ddp", "recompute"),
    [
        (COLOCATED_4, "bf16-mixed", SHARDED, False),
        (APART_2, "32-true", WHOLE, False),
        (WHOLE_EXPERTS_2, "bf16-true", SHARDED, False),
        (PIPELINED_3, "bf16-mixed", {"images": WHOLE, "language": BUCKETS}, True),
        pytest.param(COLOCATED_4, "32-true", SHARDED, False, marks=exhaustive),
        pytest.param(COLOCATED_4, "32-true", SHARDED, True, marks=exhaustive),
        pytest.param(COLOCATED_4, "bf16-true", BUCKETS, False, marks=exhaustive),
        pytest.param(COLOCATED_4, "bf16-mixed", WHOLE, False, marks=exhaustive),
        pytest.param(EXPERT_TP_4, "bf16-mixed", BUCKETS, False, marks=exhaustive),
        pytest.param(EXPERT_TP_4, "32-true", SHARDED, False, marks=exhaustive),
        pytest.param(PIPELINED_3, "bf16-mixed", BUCKETS, True, marks=exhaustive),
        pytest.param(PIPELINED_3, "32-true", WHOLE, False, marks=exhaustive),
        pytest.param(None, "32-true", BUCKETS, False, marks=exhaustive),
    ],
)
def test_runs_hold_the_bytes_that_were_told(
    modules: dict[str, ModuleParallel] | None,
    precision: str,
    ddp: DistributedDataParallelConfig | dict[str, DistributedDataParallelConfig],
    recompute: bool,
) -> None:
    world_size = 3 if modules is PIPELINED_3 else 2 if modules in (APART_2, WHOLE_EXPERTS_2) else 4
    job = Job(tiny(recompute_layers=recompute), 8, LENGTH, {"images": 1}, Training(precision), MACHINES["cpu"])
    check_bytes(job, world_size, modules, 2, ddp)


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=exhaustive)])
def test_encoders_that_take_microbatches_at_once_keep_what_was_told(recompute: bool) -> None:
    model = NemotronVLM(
        RadioConfig.tiny(recompute_layers=recompute), MambaMoEConfig.tiny(pattern="M"), IMAGE_TOKEN, end_token_id=2
    )
    one = Job(model, 16, LENGTH, {"images": 1}, Training("32-true"), MACHINES["cpu"])
    peaks = [
        check_bytes(replace(one, encoder_batching=at_once), 2, WHOLE_2, num_microbatches=4, ddp=SHARDED)
        for at_once in (1, 4)
    ]
    # beyond what the comparison of each lets pass
    assert peaks[1] > (1.2 if recompute else 1.5) * peaks[0]


def test_encoders_that_run_ahead_keep_what_was_told() -> None:
    job = Job(
        NemotronVLM(RadioConfig.tiny(), MambaMoEConfig.tiny(pattern="M"), IMAGE_TOKEN, end_token_id=2),
        16,
        LENGTH,
        {"images": 1},
        Training("32-true"),
        MACHINES["cpu"],
    )
    peaks = [
        check_bytes(replace(job, encoder_ahead=ahead), 2, APART_2, num_microbatches=4, ddp=SHARDED) for ahead in (0, 2)
    ]
    # beyond what the comparison of each lets pass
    assert peaks[1] > 1.5 * peaks[0]


def check_bytes(
    job: Job,
    world_size: int,
    modules: dict[str, ModuleParallel] | None,
    num_microbatches: int,
    ddp: DistributedDataParallelConfig | dict[str, DistributedDataParallelConfig],
) -> int:
    """Compare all ranks' bytes with what is told of them; returns the most activations that any rank kept."""
    layout = Layout.resolve(job.model.module_sizes(), world_size, modules)

    def on_rank() -> MeasuredCosts:
        return measure_costs(
            job.model,
            layout,
            tiny_batch,
            batch_size=job.batch_size,
            num_microbatches=num_microbatches,
            encoder_batching=job.encoder_batching,
            encoder_ahead=job.encoder_ahead,
            precision=job.training.precision,
            ddp=ddp,
        )

    of_modules = resolve_ddp(layout.modules, ddp, on_gpus=False)
    trainings = {name: Training.of(config, job.training.precision) for name, config in of_modules.items()}
    job = replace(job, trainings=trainings)
    report = report_layout(job, world_size, modules, num_microbatches)
    ranks = run_on_ranks(on_rank, world_size)
    for rank, measured in enumerate(ranks):
        told = {name: report.memory(report.layout.modules[name], rank) for name in measured.modules}
        assert measured.modules == {
            name: ModuleBytes(memory.parameters, memory.gradients, memory.optimizer) for name, memory in told.items()
        }, f"rank {rank}"
        activations = sum(memory.activations for memory in told.values())
        assert activations == pytest.approx(measured.activations, rel=0.2), f"rank {rank}"
    return max(measured.activations for measured in ranks)


def test_the_kept_activations_are_counted_once_and_forgotten() -> None:
    weight, inputs = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8)
    with KeptActivations([weight, inputs]) as kept:
        hidden = (inputs @ weight).exp()
        # both the product and the square keep what exp returned
        loss = (hidden * hidden).sum()
        assert kept.bytes == hidden.nbytes
        loss.backward()
    assert (kept.bytes, kept.peak) == (0, hidden.nbytes)


def test_layouts_are_ranked_as_they_were_measured() -> None:
    job = reference_job()
    estimator = Estimator(job)
    estimates = [
        estimator.estimate(
            Layout.resolve(job.model.module_sizes(), 4, {"images": images, "language": language}), num_microbatches
        ).step_seconds
        for _, images, language, num_microbatches in MEASURED
    ]
    assert estimates == sorted(estimates)
    page = (Path(__file__).parents[1] / "docs/planning.md").read_text()
    for estimate, (measured, *_) in zip(estimates, MEASURED, strict=True):
        assert estimate == pytest.approx(measured, rel=0.25)
        assert f"| {measured:.3f} s | {estimate:.3f} s |" in page


def test_memory_on_gpus_is_what_was_measured() -> None:
    page = (Path(__file__).parents[1] / "docs/planning.md").read_text()
    for measured, images, language, batch_size, num_microbatches, at_once in MEASURED_GIB:
        job = replace(reference_job(batch_size, num_experts=16), encoder_batching=at_once)
        layout = Layout.resolve(job.model.module_sizes(), 2, {"images": images, "language": language})
        peak = Estimator(job).estimate(layout, num_microbatches).peak_bytes
        assert 0.9 * measured < peak / 2**30 < measured
        assert f"| {measured} GiB | {gibibytes(peak)} |" in page


def test_encoders_that_take_microbatches_at_once_launch_less_and_keep_more() -> None:
    job = reference_job()
    colocated = {"images": ModuleParallel(dp=2), "language": ModuleParallel(dp=2, ep=2)}
    layout = Layout.resolve(job.model.module_sizes(), 2, colocated)
    one, four = (Estimator(replace(job, encoder_batching=at_once)).estimate(layout, 4) for at_once in (1, 4))
    assert (one.encoder_batching, four.encoder_batching) == (1, 4)
    assert four.activations["images"] == pytest.approx((4 * one.activations["images"][0],))
    assert four.activations["language"] == one.activations["language"]
    slow_host = replace(job, machine=replace(job.machine, dispatch=1e-3))
    one, four = (Estimator(replace(slow_host, encoder_batching=at_once)).estimate(layout, 4) for at_once in (1, 4))
    assert four.seconds["dispatch"] < one.seconds["dispatch"]
    for unchanged in ("compute", "bridge", "ep", "dp", "update"):
        assert four.seconds[unchanged] == pytest.approx(one.seconds[unchanged])
    assert "encoder_batching: 4" in as_yaml(four)


def test_encoders_take_as_many_microbatches_at_once_as_divide_and_share_ranks() -> None:
    job = replace(reference_job(), encoder_batching=4)
    apart = {"images": ModuleParallel(dp=2), "language": ModuleParallel(dp=2, ep=2, rank_offset=2)}
    shared = {"images": ModuleParallel(dp=4), "language": ModuleParallel(dp=4, ep=4)}
    for modules, num_microbatches, at_once in ((shared, 2, 2), (shared, 1, 1), (apart, 4, 1)):
        layout = Layout.resolve(job.model.module_sizes(), 4, modules)
        assert Estimator(job).estimate(layout, num_microbatches).encoder_batching == at_once
    report = report_layout(job, 4, apart, 4)
    assert report.failures == ("encoder_batching 4 is for encoders that share the ranks of language: leave it 1",)
    report = report_layout(replace(job, encoder_batching=1, encoder_ahead=2), 4, shared, 2)
    assert report.failures == ("encoder_ahead 2 is for encoders on other ranks than language: leave it 0",)


def test_costs_count_the_same_operations_as_forward_flops() -> None:
    model, dp, samples = tiny(), 2, 6
    layout = Layout.resolve(
        model.module_sizes(), 2 * dp, {n: ModuleParallel(tp=2, dp=dp) for n in ("images", LANGUAGE)}
    )
    workload = Workload(samples, LENGTH, {"images": samples})
    for name, module in layout.modules.items():
        cost = model.module_cost(name, module, workload)
        told = sum(layer.work.flops for stage in cost.stages for layer in stage)
        assert told == pytest.approx(model.forward_flops(name, tiny_batch(samples)))


def test_stages_share_the_layers_of_one() -> None:
    model = tiny("M*-E")
    layouts = {
        pp: Layout.resolve({LANGUAGE: model.module_sizes()[LANGUAGE]}, pp, {LANGUAGE: ModuleParallel(pp=pp)})
        for pp in (1, 4)
    }
    one, four = (model.module_cost(LANGUAGE, layouts[pp].modules[LANGUAGE], Workload(1, 8)) for pp in (1, 4))
    assert [[layer.name for layer in stage] for stage in four.stages] == [
        ["embedding", "mamba"],
        ["attention"],
        ["mlp"],
        ["experts", "output"],
    ]
    assert sum(four.kept(stage) for stage in range(4)) == pytest.approx(one.kept(0))


def test_a_model_that_tells_no_costs_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_only()
    monkeypatch.setattr(type(model), "module_cost", MimoModule.module_cost)
    monkeypatch.setattr(type(model), "longest_sample", MimoModule.longest_sample)
    job = Job(model, 4, LENGTH, {}, Training(), MACHINES["cpu"])
    with pytest.raises(CostUnknown, match=r"MambaMoE does not tell what its modules cost.*module_cost"):
        search(job, 2)
    report = report_layout(job, 2, None, 1)
    assert report.layout is not None
    assert "module_cost" in report.unknown
    with pytest.raises(CostUnknown, match="longest_sample"):
        model.longest_sample()


def test_search_ranks_what_fits() -> None:
    plan = search(reference_job(16, memory=60e9), 8, keep=5)
    times = [estimate.step_seconds for estimate in plan.best]
    assert times[:5] == sorted(times[:5])
    assert {estimate.layout.placement for estimate in plan.best} == set(Placement)
    assert all(estimate.peak_bytes <= plan.limit for estimate in plan.best)
    assert 0 < plan.fitting < plan.tried
    everything = search(reference_job(16, memory=1e15), 8, keep=10_000)
    assert everything.fitting == everything.tried == plan.tried
    fitting = [estimate for estimate in everything.best if estimate.peak_bytes <= plan.limit]
    assert len(fitting) == plan.fitting
    assert fitting[0].step_seconds == times[0]
    sentences = " ".join(why(plan))
    assert "What limits it" in sentences
    assert "The best non-colocated layout is" in sentences


def test_search_without_a_layout_that_fits_tells_the_smallest() -> None:
    plan = search(reference_job(memory=1e9), 4)
    assert plan.best == ()
    assert plan.smallest.peak_bytes > plan.limit == 0.9e9
    everything = search(reference_job(memory=1e15), 4, keep=10_000)
    assert plan.smallest.peak_bytes == min(estimate.peak_bytes for estimate in everything.best)


@pytest.mark.parametrize("world_size", [1, 6, 8])
def test_candidates_are_layouts_that_resolve_and_hold_the_default(world_size: int) -> None:
    sizes = tiny().module_sizes()
    found = list(candidates(sizes, world_size, batch_size=24))
    assert len(set(map(str, found))) == len(found)
    if 24 % world_size == 0:
        assert any(layout.modules == Layout.resolve(sizes, world_size).modules for layout in found)
    for layout in found:
        layout.check_batch(24, 1)


def test_search_of_many_ranks_tries_deep_pipelines_and_many_lanes() -> None:
    job = reference_job(batch_size=512, pattern=NEMOTRON_54_LAYERS, num_experts=128)
    plan = search(job, 256, keep=10_000)
    tried = [estimate.layout.modules[LANGUAGE] for estimate in plan.best]
    assert {1, 2, 3, 6} <= {module.pp for module in tried}
    assert max(module.dp for module in tried) == 256


def test_the_winner_is_told_as_a_configuration_that_gives_it() -> None:
    import yaml

    job = reference_job()
    estimate = next(e for e in search(job, 4).best if e.layout.placement is Placement.NON_COLOCATED)
    told = yaml.safe_load(as_yaml(estimate))
    modules = {name: ModuleParallel(**settings) for name, settings in told["modules"].items()}
    assert Layout.resolve(job.model.module_sizes(), 4, modules).modules == estimate.layout.modules
    assert told["num_microbatches"] == estimate.num_microbatches


def test_groups_are_those_of_the_grid() -> None:
    layout = Layout.resolve(tiny().module_sizes(), 8, {n: ModuleParallel(tp=2) for n in ("images", LANGUAGE)})
    language = replace(layout.modules[LANGUAGE], ep=4, edp=2)
    for rank in range(8):
        for factor, ranks in groups(language, rank).items():
            others = [language.coordinates(other) for other in ranks]
            assert [at[factor] for at in others] == list(range(getattr(language, factor)))
            names = ("tp", "cp", "dp", "pp") if factor in ("tp", "cp", "dp", "pp") else ("etp", "ep", "edp", "pp")
            rest = [{name: at[name] for name in names if name != factor} for at in others]
            assert all(one == rest[0] for one in rest)
            assert rank in ranks
    assert lane_ranks(language, 3, 0) == range(6, 8)


def test_feeds_cover_all_lanes_of_both_sides() -> None:
    layout = Layout.resolve(tiny().module_sizes(), 4, COLOCATED_4)
    told = feeds(layout.modules["images"], layout.modules["language"])
    assert [(list(feed.encoder), list(feed.language)) for feed in told] == [([0, 1], [0]), ([2, 3], [1])]


def test_collectives_between_nodes_are_slower_and_one_rank_needs_none() -> None:
    machine = MACHINES["h200"]
    gather = Transfer("dp", "all_gather", 1e9)
    assert machine.seconds(gather, 1, 1) == 0
    assert machine.seconds(gather, 8, 1) < machine.seconds(gather, 16, 1)
    # one link a node instead of eight
    assert machine.seconds(gather, 16, 1) < machine.seconds(gather, 16, 8)
    assert machine.seconds(gather._replace(operation="all_reduce"), 8, 1) > machine.seconds(gather, 8, 1)


def test_profiles_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_machine(MACHINES["h100"], path)
    assert read_machine(path) == MACHINES["h100"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values: values.pop("latency"), "no whole profile"),
        (lambda values: values.update(latency=-1), "latency must be positive"),
        (lambda values: values.update(speed=1), "no profile that"),
    ],
)
def test_a_profile_that_is_none_is_refused(tmp_path: Path, spoil: Callable[[dict], object], message: str) -> None:
    path = tmp_path / "profile.json"
    write_machine(MACHINES["cpu"], path)
    values = json.loads(path.read_text())
    spoil(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        read_machine(path)


def test_bytes_are_told_in_the_unit_that_fits() -> None:
    assert [gibibytes(size) for size in (0, 512, 2048, 3 * 2**30, 5e15)] == [
        "0 B",
        "512 B",
        "2.0 KiB",
        "3.0 GiB",
        "4547.5 TiB",
    ]


def test_planning_needs_no_torch() -> None:
    modules = pkgutil.iter_modules(planning.__path__, "mimo_strategy.planning.")
    imports = "; ".join(f"import {module.name}" for module in modules)
    subprocess.run([sys.executable, "-c", f"import sys; {imports}; assert 'torch' not in sys.modules"], check=True)
