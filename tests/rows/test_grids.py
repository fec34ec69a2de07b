"""Grids and their groups, spelled out rank by rank. The rows are numbered through with those of ``test_training``."""

import pytest
import torch
import torch.distributed as dist
from no_global_groups import assert_no_global_groups

from mimo_strategy import Layout, LayoutError
from mimo_strategy import ModuleParallel as P
from mimo_strategy.layout import LANGUAGE, ModuleLayout, ModuleSizes
from mimo_strategy.topology import EXPERT_VIEW, Grid, ProcessGroups, build_grid, collect_groups

SIZES = {
    "images": ModuleSizes(),
    LANGUAGE: ModuleSizes(num_experts=12, pp_stages=frozenset({1, 2})),
}

EXPERT_DIMS = ["expt_tp", "ep", "expt_dp", "pp"]


def language_layout(world_size: int, language: P) -> ModuleLayout:
    """The language model on the last ranks; where it leaves the first, an encoder takes these."""
    modules = {"images": P(dp=language.rank_offset)} if language.rank_offset else {}
    modules |= {LANGUAGE: language}
    return Layout.resolve({name: SIZES[name] for name in modules}, world_size, modules).modules[LANGUAGE]


def with_grid(layout: ModuleLayout, read, *, expert_view: bool = True):
    """A function for ranks: what ``read`` finds in the grid of ``layout``, whose groups are destroyed then."""

    def on_rank():
        assert_no_global_groups()
        process_groups = ProcessGroups()
        found = read(build_grid(layout, process_groups, expert_view=expert_view))
        assert_no_global_groups()
        dist.barrier()
        process_groups.destroy()
        return found

    return on_rank


def connected(group: dist.ProcessGroup | None) -> list[int] | None:
    """The ranks that a group really connects: each adds its bit."""
    if group is None:
        return None
    bits = torch.tensor(1 << dist.get_rank(), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(bits, group=group)
    return [rank for rank in range(dist.get_world_size()) if bits.item() >> rank & 1]


@pytest.mark.parametrize(
    ("world_size", "language", "lines"),
    [
        pytest.param(2, P(tp=2), {"tp": [[0, 1]], "dp": [[0], [1]], "pp": [[0], [1]]}, id="2-ranks"),
        pytest.param(
            8,
            P(tp=2, pp=2),
            {
                "tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
                "dp": [[0, 2], [1, 3], [4, 6], [5, 7]],
                "pp": [[0, 4], [1, 5], [2, 6], [3, 7]],
            },
            id="8-ranks",
        ),
        pytest.param(
            8,
            P(tp=3, pp=2, rank_offset=2),
            {"tp": [[2, 3, 4], [5, 6, 7]], "dp": [[2], [3], [4], [5], [6], [7]], "pp": [[2, 5], [3, 6], [4, 7]]},
            id="8-ranks-of-which-the-last-6",
        ),
    ],
)
def test_row_01_grid_arithmetic(on_ranks, world_size, language, lines):
    layout = language_layout(world_size, language)

    def read(grid: Grid):
        return grid.shape, grid.size, {dim: grid.get_rank_enum(dim) for dim in lines}

    shape = [layout.tp, layout.cp, layout.dp, layout.pp]
    expected = (shape, world_size - language.rank_offset, lines)
    assert on_ranks(with_grid(layout, read), world_size) == [expected] * world_size
    for dim, ranks_of_lines in lines.items():
        for ranks in ranks_of_lines:
            assert [layout.coordinates(rank)[dim] for rank in ranks] == list(range(len(ranks)))


@pytest.mark.parametrize(
    ("world_size", "language", "shape", "lines"),
    [
        pytest.param(
            2, P(tp=2, ep=2), [1, 2, 1, 1], {"expt_tp": [[0], [1]], "ep": [[0, 1]], "expt_dp": [[0], [1]]}, id="2-ranks"
        ),
        pytest.param(
            8,
            P(tp=2, pp=2, ep=2),
            [1, 2, 2, 2],
            {
                "expt_tp": [[0], [1], [2], [3], [4], [5], [6], [7]],
                "ep": [[0, 1], [2, 3], [4, 5], [6, 7]],
                "expt_dp": [[0, 2], [1, 3], [4, 6], [5, 7]],
                "pp": [[0, 4], [1, 5], [2, 6], [3, 7]],
            },
            id="8-ranks-pp2",
        ),
        pytest.param(
            8,
            P(tp=4, etp=2, ep=2),
            [2, 2, 2, 1],
            {
                "expt_tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
                "ep": [[0, 2], [1, 3], [4, 6], [5, 7]],
                "expt_dp": [[0, 4], [1, 5], [2, 6], [3, 7]],
            },
            id="8-ranks-etp2",
        ),
    ],
)
def test_row_02_alt_factorization_arithmetic(on_ranks, world_size, language, shape, lines):
    layout = language_layout(world_size, language)
    tp, cp, dp, pp, etp, ep, edp = (getattr(layout, factor) for factor in ["tp", "cp", "dp", "pp", "etp", "ep", "edp"])
    assert [etp, ep, edp, pp] == shape
    assert tp * cp * dp == etp * ep * edp

    def read(grid: Grid):
        with pytest.raises(ValueError, match=f"has size {2 * world_size}, but the grid size is {world_size}"):
            grid.register_view("too-large", [etp, ep, 2 * edp, pp], EXPERT_DIMS, shared_dims=["pp"])
        if pp > 1:
            with pytest.raises(ValueError, match="Shared dim 'pp' has different membership across views"):
                grid.register_view("pp-innermost", [pp, etp, ep, edp], ["pp", *EXPERT_DIMS[:3]], shared_dims=["pp"])
        return {dim: grid.get_rank_enum(dim, view=EXPERT_VIEW) for dim in lines}

    assert on_ranks(with_grid(layout, read), world_size) == [lines] * world_size
    ranks = world_size // pp
    with pytest.raises(
        LayoutError, match=f"x edp must equal tp {tp} x cp 1 x dp {dp} = {ranks}, which {ranks + 1} does"
    ):
        language_layout(world_size, P(tp=tp, pp=pp, ep=ranks + 1))


@pytest.mark.parametrize(
    ("world_size", "language", "stages", "expert_groups"),
    [
        pytest.param(2, P(tp=2, ep=2), [[0, 1]], [[0, 1]], id="2-ranks"),
        pytest.param(2, P(pp=2), [[0], [1]], [[0], [1]], id="2-ranks-pp2"),
        pytest.param(8, P(tp=2, pp=2, ep=4), [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]], id="8-ranks"),
        pytest.param(
            8, P(tp=3, pp=2, ep=3, rank_offset=2), [[2, 3, 4], [5, 6, 7]], [[2, 3, 4], [5, 6, 7]], id="8-ranks-last-6"
        ),
        pytest.param(
            8,
            P(dp=4, pp=2, ep=2),
            [[0, 1, 2, 3], [4, 5, 6, 7]],
            [[0, 1], [2, 3], [4, 5], [6, 7]],
            id="8-ranks-edp2",
        ),
    ],
)
def test_row_03_expert_groups_overlap_dense_ranks_and_never_cross_a_stage(
    on_ranks, world_size, language, stages, expert_groups
):
    layout = language_layout(world_size, language)

    def read(grid: Grid):
        groups = collect_groups(grid)
        within = [connected(group) for group in (groups.ep, groups.expt_tp, groups.expt_dp, groups.tp_ep)]
        return connected(groups.tp_dp_cp), within, connected(groups.tp_ep_pp)

    for rank, (stage, within, across) in enumerate(on_ranks(with_grid(layout, read), world_size)):
        if rank not in layout.ranks:
            assert (stage, within, across) == (None, [None] * 4, None)
            continue
        assert stage in stages
        assert within[0] in expert_groups
        for ranks in within:
            assert rank in ranks
            assert set(ranks) <= set(stage)
        # the one that is meant to cross takes its share of every stage
        assert [len(set(across) & set(ranks)) for ranks in stages] == [layout.etp * layout.ep] * layout.pp


@pytest.mark.parametrize("expert_view", [True, False])
@pytest.mark.parametrize(
    ("world_size", "language", "rank", "dense", "expert"),
    [
        pytest.param(
            2,
            P(tp=2, ep=2),
            1,
            {"tp": [0, 1], "cp": [1], "dp": [1], "pp": [1], "tp_dp_cp": [0, 1], "mp": [0, 1]},
            {"expt_tp": [1], "ep": [0, 1], "expt_dp": [1], "tp_ep": [0, 1], "tp_ep_pp": [0, 1]},
            id="2-ranks",
        ),
        pytest.param(
            8,
            P(tp=2, pp=2, ep=2),
            5,
            {
                "tp": [4, 5],
                "cp": [5],
                "dp": [5, 7],
                "pp": [1, 5],
                "dp_cp": [5, 7],
                "tp_cp": [4, 5],
                "tp_dp_cp": [4, 5, 6, 7],
                "mp": [0, 1, 4, 5],
                "intra_dist_opt": [0, 1, 2, 3, 4, 5, 6, 7],
            },
            {"expt_tp": [5], "ep": [4, 5], "expt_dp": [5, 7], "tp_ep": [4, 5], "tp_ep_pp": [0, 1, 4, 5]},
            id="8-ranks",
        ),
    ],
)
def test_row_04_process_group_collection_from_a_grid(on_ranks, world_size, language, rank, dense, expert, expert_view):
    layout = language_layout(world_size, language)

    def read(grid: Grid):
        return {field: connected(group) for field, group in vars(collect_groups(grid)).items()}

    found = on_ranks(with_grid(layout, read, expert_view=expert_view), world_size)[rank]
    expected = dense | (expert if expert_view else {})
    assert {field: found[field] for field in expected} == expected
    of_experts = {field for field in found if {"ep", "expt"} & set(field.split("_"))}
    assert len(of_experts) == 8
    assert {field for field in of_experts if found[field] is not None} == (of_experts if expert_view else set())
