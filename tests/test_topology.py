"""Which ranks every process group holds, on real gloo groups, against an enumeration of their own."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

from mimo_strategy.layout import LANGUAGE, Layout, ModuleParallel, ModuleSizes
from mimo_strategy.testing import run_on_ranks
from mimo_strategy.topology import Topology

P = ModuleParallel

LAYOUTS = {
    "colocated": (4, {"images": P(), LANGUAGE: P(tp=2, ep=2)}),
    "colocated-etp": (4, {"images": P(tp=4), LANGUAGE: P(tp=2, etp=2, ep=2)}),
    "apart-pipelined": (8, {"images": P(dp=2), LANGUAGE: P(tp=3, pp=2, ep=3, rank_offset=2)}),
    "text-only-pipelined": (8, {LANGUAGE: P(tp=2, pp=2, ep=4)}),
    "text-only-context": (8, {LANGUAGE: P(tp=2, etp=4, ep=2)}),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS, indirect=True)

# The factors that vary within the group of each field; the others are those of the rank.
PRIMARY = {
    "tp": "tp",
    "cp": "cp",
    "pp": "pp",
    "dp": "dp",
    "dp_cp": "cp dp",
    "intra_dp_cp": "cp dp",
    "dp_cp_gtp_remat": "cp dp",
    "tp_cp": "tp cp",
    "tp_dp_cp": "tp cp dp",
    "mp": "tp pp",
    "intra_dist_opt": "tp cp dp pp",
}
EXPERT = {
    "ep": "ep",
    "expt_tp": "etp",
    "expt_dp": "edp",
    "intra_expt_dp": "edp",
    "expt_dp_gtp_remat": "edp",
    "tp_ep": "etp ep",
    "tp_ep_pp": "etp ep pp",
    "tp_ep_pp_with_egtp_remat": "etp ep pp",
}


@pytest.fixture
def layout(request) -> Layout:
    world_size, modules = LAYOUTS[request.param]
    sizes = {name: ModuleSizes(num_experts=12, pp_stages=frozenset({1, 2})) for name in modules}
    resolved = Layout.resolve(sizes, world_size, modules)
    if request.param == "text-only-context":
        # which may not be asked for, but megatron-core wants its groups
        cut = {name: replace(module, cp=2, dp=module.dp // 2) for name, module in resolved.modules.items()}
        resolved = replace(resolved, modules=cut)
    return resolved


def expected_ranks(module, factors, varying):
    """By rank, the ranks that differ from it in the varying factors only."""
    outermost_first = factors.split()[::-1]
    grid = np.array(module.ranks).reshape([getattr(module, factor) for factor in outermost_first])
    groups = {}
    for position in np.ndindex(grid.shape):
        around = tuple(
            slice(None) if factor in varying.split() else index
            for factor, index in zip(outermost_first, position, strict=True)
        )
        groups[int(grid[position])] = sorted(grid[around].flatten().tolist())
    return groups


def expected_fields(module, rank):
    fields = {field: expected_ranks(module, "tp cp dp pp", varying)[rank] for field, varying in PRIMARY.items()}
    fields |= {field: expected_ranks(module, "etp ep edp pp", varying)[rank] for field, varying in EXPERT.items()}
    pipeline, is_language = fields["pp"], module.name == LANGUAGE
    first, last = pipeline[0], pipeline[-1]
    fields["embd"] = sorted({first, last}) if is_language and rank in (first, last) else None
    fields["pos_embd"] = [first] if is_language and rank == first else None
    return fields


def ranks_of(group):
    return None if group is None else sorted(dist.get_process_group_ranks(group))


@layouts
def test_every_field_holds_the_ranks_that_it_should(layout):
    def fields():
        topology = Topology(layout)
        found = {
            name: {field: ranks_of(group) for field, group in vars(groups).items()}
            for name, groups in topology.groups.items()
        }
        topology.destroy()
        return found

    for rank, found in enumerate(run_on_ranks(fields, layout.world_size)):
        expected = {
            name: expected_fields(module, rank) for name, module in layout.modules.items() if rank in module.ranks
        }
        assert found == expected


@layouts
def test_one_group_for_each_set_of_ranks(layout):
    def groups():
        topology = Topology(layout)
        members = [g for collection in topology.groups.values() for g in vars(collection).values() if g is not None]
        distinct_objects = {id(group) for group in members}
        distinct_ranks = {tuple(ranks_of(group)) for group in members}
        made = [tuple(ranks_of(group)) for group in distributed_c10d._world.pg_map]
        return distinct_objects, distinct_ranks, made, len(members)

    for objects, ranks, made, members in run_on_ranks(groups, layout.world_size):
        assert len(objects) == len(ranks) < members
        assert sorted(made) == sorted(ranks | {tuple(range(layout.world_size))})


@pytest.mark.parametrize("layout", ["colocated", "apart-pipelined"], indirect=True)
def test_destroy_leaves_the_world_alone_for_another_topology(layout):
    def twice():
        left = []
        for _ in range(2):
            topology = Topology(layout)
            made = len(distributed_c10d._world.pg_map)
            total = sum(len(ranks_of(groups.tp)) for groups in topology.groups.values())
            topology.destroy()
            dist.barrier()
            left.append((made > 1, total, len(distributed_c10d._world.pg_map), topology.grids, topology.groups))
        return left

    for first, second in run_on_ranks(twice, layout.world_size):
        assert first == second
        assert first[0] is True
        assert first[2:] == (1, {}, {})


def test_no_rank_goes_on_before_all_have_their_groups():
    sizes = {"images": ModuleSizes(), LANGUAGE: ModuleSizes()}
    layout = Layout.resolve(sizes, 2, {"images": P(dp=1), LANGUAGE: P(rank_offset=1)})

    def times():
        time.sleep(0.5 * dist.get_rank())
        started = time.monotonic()
        Topology(layout).destroy()
        return started, time.monotonic()

    (_, first_ended), (last_started, _) = run_on_ranks(times, 2)
    assert first_ended > last_started


def test_no_global_parallel_state():
    world_size, modules = LAYOUTS["colocated"]
    layout = Layout.resolve({name: ModuleSizes(num_experts=2) for name in modules}, world_size, modules)

    def global_state():
        def existing():
            names = [name for name in vars(parallel_state) if name.startswith("_") and name.isupper()]
            return [name for name in names if vars(parallel_state)[name] not in (None, {})]

        topology = Topology(layout)
        during = existing(), parallel_state.model_parallel_is_initialized()
        topology.destroy()
        return during, existing()

    during = (["_GLOBAL_MEMORY_BUFFER"], False)
    assert run_on_ranks(global_state, world_size) == [(during, [])] * world_size


@pytest.mark.parametrize("world_size_in_environment", ["1", "99", "many", None])
def test_a_wrong_world_size_in_the_environment_is_not_believed(world_size_in_environment):
    layout = Layout.resolve({LANGUAGE: ModuleSizes()}, 2, {LANGUAGE: P(tp=2)})

    def build():
        os.environ.pop("WORLD_SIZE")
        if world_size_in_environment is not None:
            os.environ["WORLD_SIZE"] = world_size_in_environment
        topology = Topology(layout)
        ranks = ranks_of(topology.groups[LANGUAGE].tp)
        topology.destroy()
        return ranks, os.environ.get("WORLD_SIZE")

    assert run_on_ranks(build, 2) == [([0, 1], world_size_in_environment)] * 2


def test_a_layout_of_another_world_is_refused():
    layout = Layout.resolve({LANGUAGE: ModuleSizes()}, 4)

    def build():
        with pytest.raises(ValueError, match="layout is for 4 ranks, torch"):
            Topology(layout)

    run_on_ranks(build, 2)


def test_a_single_process_holds_all_modules_where_it_is_alone():
    sizes = {"images": ModuleSizes(), LANGUAGE: ModuleSizes(num_experts=4)}

    def alone():
        dist.destroy_process_group()
        topology = Topology.single_process(sizes)
        return topology.layout.world_size, list(topology.groups), ranks_of(topology.groups["images"].intra_dist_opt)

    def among_others():
        with pytest.raises(RuntimeError, match="trains on many ranks under MimoHeteroStrategy only"):
            Topology.single_process(sizes)

    assert run_on_ranks(alone, 1) == [(1, ["images", LANGUAGE], [0])]
    run_on_ranks(among_others, 2)
