"""The arithmetic of layouts, against enumerations of its own, and what is said of a wrong layout."""

import math
import pickle
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mimo_strategy.layout import LANGUAGE, Layout, LayoutError, ModuleParallel, ModuleSizes, Placement

P = ModuleParallel

SIZES = {
    "images": ModuleSizes(tp_divides={"num_attention_heads": 16}),
    LANGUAGE: ModuleSizes(
        tp_divides={"num_attention_heads": 16, "num_query_groups": 4},
        etp_divides={"expert_ffn_hidden_size": 24},
        num_experts=8,
        pp_stages=frozenset({1, 2, 4}),
    ),
}


def resolve(world_size, **modules):
    return Layout.resolve({name: SIZES[name] for name in modules}, world_size, modules)


def resolve_language(world_size, parallel):
    """The language model on the last ranks; where it leaves the first rank, an encoder takes that."""
    encoder = {"images": P(dp=1)} if parallel.rank_offset else {}
    return resolve(world_size, **encoder, language=parallel).modules[LANGUAGE]


def shown(value):
    if isinstance(value, dict):
        return ", ".join(f"{name} {parallel}" for name, parallel in value.items())
    return str(value)


@pytest.mark.parametrize(
    ("world_size", "parallel", "dp", "edp"),
    [
        (6, P(), 6, 6),
        (8, P(tp=2), 4, 8),
        (8, P(tp=2, dp=4), 4, 8),
        (8, P(tp=2, num_ranks=8), 4, 8),
        (16, P(tp=2, pp=2), 4, 8),
        (8, P(tp=4, ep=2), 2, 4),
        (8, P(tp=2, ep=8), 4, 1),
        (16, P(tp=4, etp=2, ep=4, pp=2), 2, 1),
        (6, P(dp=6, ep=2, etp=3), 6, 1),
        (9, P(tp=4, ep=4, rank_offset=1), 2, 2),
        (5, P(tp=2, dp=2, ep=4, rank_offset=1), 2, 1),
    ],
    ids=shown,
)
def test_derived_factors(world_size, parallel, dp, edp):
    module = resolve_language(world_size, parallel)
    assert (module.dp, module.edp) == (dp, edp)
    assert module.ranks == range(parallel.rank_offset, world_size)


def test_a_given_dp_or_num_ranks_leaves_the_other_ranks_to_other_modules():
    by_dp = resolve(8, images=P(tp=2, dp=2), language=P(rank_offset=4))
    by_num_ranks = resolve(8, images=P(tp=2, num_ranks=4), language=P(rank_offset=4))
    assert by_dp == by_num_ranks
    assert by_dp.modules["images"].ranks == range(4)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (8, P(tp=2, ep=4)),
        (16, P(tp=2, pp=2, ep=2)),
        (32, P(tp=4, pp=4, etp=2, ep=4)),
        (16, P(pp=2, etp=4, ep=2)),
        (9, P(tp=2, pp=2, ep=2, rank_offset=1)),
        (24, P(etp=3, ep=4)),
    ],
    ids=shown,
)
@pytest.mark.parametrize("factors", ["tp cp dp pp", "etp ep edp pp"])
def test_coordinates_are_those_of_a_grid_whose_first_factor_varies_fastest(world_size, parallel, factors):
    module = resolve_language(world_size, parallel)
    outermost_first = factors.split()[::-1]
    grid = np.array(module.ranks).reshape([getattr(module, factor) for factor in outermost_first])
    for rank in module.ranks:
        (expected,) = np.argwhere(grid == rank).tolist()
        assert [module.coordinates(rank)[factor] for factor in outermost_first] == expected


def test_context_parallel_ranks_count_between_tensor_and_data_parallel_ones():
    module = replace(resolve_language(8, P(tp=2)), cp=2, dp=2)
    for rank in module.ranks:
        at = module.coordinates(rank)
        assert rank == at["tp"] + 2 * (at["cp"] + 2 * at["dp"])


@pytest.mark.parametrize("rank", [-1, 0, 5])
def test_a_module_has_no_coordinates_on_other_ranks(rank):
    module = resolve_language(5, P(tp=2, dp=2, rank_offset=1))
    with pytest.raises(ValueError, match=f"rank {rank} is not among the ranks 1-4 of language"):
        module.coordinates(rank)


@pytest.mark.parametrize(
    ("world_size", "ep"), [(1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 4), (10, 2), (16, 4), (18, 6), (24, 12)]
)
def test_the_default_layout_has_the_largest_ep_that_fits(world_size, ep):
    layout = Layout.resolve({"images": ModuleSizes(), LANGUAGE: ModuleSizes(num_experts=12)}, world_size)
    assert layout.placement is Placement.COLOCATED
    for module in layout.modules.values():
        assert module.ranks == range(world_size)
        assert (module.tp, module.cp, module.dp, module.pp, module.etp) == (1, 1, world_size, 1, 1)
    images, language = layout.modules.values()
    assert (images.ep, images.edp) == (1, world_size)
    assert (language.ep, language.edp) == (ep, world_size // ep)


@pytest.mark.parametrize(
    ("modules", "placement", "first_of_last_stage"),
    [
        ({LANGUAGE: P(tp=2)}, Placement.COLOCATED, 0),
        ({LANGUAGE: P(tp=2, pp=2)}, Placement.COLOCATED, 4),
        ({"images": P(), LANGUAGE: P(tp=4)}, Placement.COLOCATED, 0),
        ({"images": P(dp=4), LANGUAGE: P(tp=4, rank_offset=4)}, Placement.NON_COLOCATED, 4),
        ({"images": P(dp=2), LANGUAGE: P(tp=3, dp=1, pp=2, rank_offset=2)}, Placement.NON_COLOCATED, 5),
        ({"images": P(rank_offset=4), LANGUAGE: P(dp=2, pp=2)}, Placement.NON_COLOCATED, 2),
    ],
    ids=shown,
)
def test_placement_and_first_of_last_stage(modules, placement, first_of_last_stage):
    sizes = {name: ModuleSizes(pp_stages=frozenset({1, 2, 4})) for name in modules}
    layout = Layout.resolve(sizes, 8, modules)
    assert layout.placement is placement
    assert layout.first_of_last_stage == first_of_last_stage


def test_modules_are_in_the_order_of_the_model_whatever_the_order_of_the_layout():
    layout = resolve(4, language=P(), images=P())
    assert list(Layout.resolve(SIZES, 4, {LANGUAGE: P(), "images": P()}).modules) == list(SIZES)
    assert list(layout.modules) == [LANGUAGE, "images"]


def test_a_layout_is_shown_as_what_makes_it():
    asked = P(tp=2, dp=3, ep=2, rank_offset=4)
    assert str(asked) == "ModuleParallel(tp=2, dp=3, ep=2, rank_offset=4)"
    assert eval(str(asked), {"ModuleParallel": ModuleParallel}) == asked
    module = resolve_language(9, P(tp=2, pp=2, ep=4, rank_offset=1))
    assert str(module) == "language: ranks 1-8 = tp 2 x cp 1 x dp 2 x pp 2 = etp 1 x ep 4 x edp 1 x pp 2"


REFUSED = {
    "dp-given-wrong": (8, {LANGUAGE: P(tp=2, dp=3, num_ranks=8)}, "tp 2 x cp 1 x dp 3 x pp 1 = 6", "its 8 ranks"),
    "ranks-not-divided": (6, {LANGUAGE: P(tp=4)}, "tp 4 x cp 1 x dp ? x pp 1 = 4 x dp", "its 6 ranks"),
    "more-than-the-ranks": (2, {LANGUAGE: P(tp=4)}, "tp 4 x cp 1 x dp ? x pp 1 = 4 x dp", "its 2 ranks"),
    "tp-heads": (3, {"images": P(tp=3), LANGUAGE: P()}, "images: tp 3 does not divide num_attention_heads 16"),
    "tp-groups": (8, {LANGUAGE: P(tp=8)}, "language: tp 8 does not divide num_query_groups 4"),
    "etp": (16, {LANGUAGE: P(etp=16)}, "language: etp 16 does not divide expert_ffn_hidden_size 24"),
    "ep": (3, {LANGUAGE: P(ep=3)}, "language: ep 3 does not divide its 8 experts"),
    "ep-without-experts": (2, {"images": P(ep=2), LANGUAGE: P()}, "images: ep 2 but the module has no experts"),
    "alt-ep": (
        6,
        {LANGUAGE: P(tp=2, ep=4)},
        "etp 1 x ep 4 x edp must equal tp 2 x cp 1 x dp 3 = 6",
        "4 does not divide",
    ),
    "alt-etp": (4, {LANGUAGE: P(etp=4, ep=2)}, "etp 4 x ep 2 x edp must equal", "= 4, which 8 does not divide"),
    "alt-within-a-stage": (8, {LANGUAGE: P(pp=4, ep=4)}, "must equal tp 1 x cp 1 x dp 2 = 2, which 4 does not divide"),
    "overlap": (
        4,
        {"images": P(dp=3), LANGUAGE: P(dp=2, rank_offset=2)},
        "overlap in part: images on 0-2, language on 2-3",
    ),
    "within": (4, {"images": P(dp=2), LANGUAGE: P()}, "overlap in part: images on 0-1, language on 0-3"),
    "gap": (6, {"images": P(dp=2), LANGUAGE: P(dp=2, rank_offset=4)}, "ranks [2, 3] of 6 would have no work"),
    "gap-at-the-end": (4, {"images": P(dp=2), LANGUAGE: P(dp=2)}, "images on 0-1, language on 0-1; ranks [2, 3] of 4"),
    "beyond": (
        4,
        {LANGUAGE: P(tp=2, dp=4)},
        "rank_offset 0 + 8 ranks (tp 2 x cp 1 x dp 4 x pp 1) exceeds the world of 4",
    ),
    "offset-beyond": (4, {LANGUAGE: P(rank_offset=4)}, "rank_offset 4 is beyond the world of 4 ranks, 0 to 3"),
    "missing": (4, {"images": P()}, "the model's modules are ['images', 'language']", "missing: ['language']"),
    "unknown": (4, {"image": P(), "images": P(), LANGUAGE: P()}, "the layout names ['image', ", "unknown: ['image']"),
    "zero": (4, {LANGUAGE: P(tp=0)}, "language: tp must be a whole number of at least 1, got 0"),
    "negative-dp": (4, {LANGUAGE: P(dp=-2)}, "language: dp must be a whole number of at least 1, got -2"),
    "negative-offset": (4, {LANGUAGE: P(rank_offset=-1)}, "rank_offset must be a whole number of at least 0, got -1"),
    "float": (4, {LANGUAGE: P(tp=2.0)}, "language: tp must be a whole number of at least 1, got 2.0"),
    "text": (4, {LANGUAGE: P(ep="2")}, "language: ep must be a whole number of at least 1, got '2'"),
    "bool": (4, {LANGUAGE: P(pp=True)}, "language: pp must be a whole number of at least 1, got True"),
    "none": (4, {LANGUAGE: P(cp=None)}, "language: cp must be a whole number of at least 1, got None"),
    "pp": (8, {LANGUAGE: P(pp=8)}, "language: pp 8 is not possible; its layers can be cut into 1, 2, 4 stage(s)"),
    "pp-encoder": (
        4,
        {"images": P(pp=2, dp=1), LANGUAGE: P(rank_offset=2)},
        "images: pp 2 is not possible; ",
        " 1 stage(s)",
    ),
    "cp": (4, {LANGUAGE: P(cp=2)}, "language: cp 2 is not supported: neither lanes nor bridges cut sequences; "),
    "colocated-pp": (4, {"images": P(), LANGUAGE: P(pp=2)}, "cannot be pipelined: language has pp 2 on ranks 0-3"),
    "dp": (
        5,
        {"images": P(dp=2), LANGUAGE: P(rank_offset=2)},
        "multiple of the other: images has dp 2, language has dp 3",
    ),
}


@pytest.mark.parametrize(("world_size", "modules", "said"), [(w, m, s) for w, m, *s in REFUSED.values()], ids=REFUSED)
def test_a_wrong_layout_is_refused_with_its_numbers_and_one_that_fits(world_size, modules, said):
    sizes = SIZES if "images" in modules else {LANGUAGE: SIZES[LANGUAGE]}
    with pytest.raises(LayoutError) as refused:
        Layout.resolve(sizes, world_size, modules)
    for part in said:
        assert part in str(refused.value)
    Layout.resolve(sizes, world_size, suggested(refused.value))


@pytest.mark.parametrize(
    ("world_size", "wrong", "near"),
    [
        (
            8,
            {"images": P(dp=4), LANGUAGE: P(tp=3, rank_offset=4)},
            {"images": P(dp=4), LANGUAGE: P(tp=2, dp=2, rank_offset=4)},
        ),
        (8, {"images": P(), LANGUAGE: P(tp=8)}, {"images": P(dp=8), LANGUAGE: P(tp=4, dp=2)}),
        (6, {LANGUAGE: P(pp=4)}, {LANGUAGE: P(dp=3, pp=2)}),
        (4, {LANGUAGE: P(etp=4, ep=4)}, {LANGUAGE: P(dp=4, etp=4)}),
        (8, {"images": P(tp=2.5), LANGUAGE: P(tp=2, ep=4)}, {"images": P(dp=8), LANGUAGE: P(tp=2, dp=4, ep=4)}),
    ],
    ids=shown,
)
def test_the_suggestion_keeps_what_fits(world_size, wrong, near):
    with pytest.raises(LayoutError) as refused:
        resolve(world_size, **wrong)
    assert suggested(refused.value) == near


def test_of_several_encoders_any_two_dp_must_fit_each_other():
    sizes = {name: ModuleSizes(tp_divides={"heads": 12}) for name in ("images", "audio", LANGUAGE)}
    Layout.resolve(sizes, 12, {"images": P(tp=3), "audio": P(tp=6), LANGUAGE: P()})
    with pytest.raises(LayoutError, match="images has dp 4, audio has dp 6"):
        Layout.resolve(sizes, 12, {"images": P(tp=3), "audio": P(tp=2), LANGUAGE: P()})


def test_a_model_without_language_module_is_refused():
    with pytest.raises(LayoutError, match=r"modules are \['images'\], but one must be named language"):
        Layout.resolve({"images": ModuleSizes()}, 1)


def test_a_model_that_must_be_pipelined_is_offered_its_stages():
    sizes = {LANGUAGE: ModuleSizes(pp_stages=frozenset({2, 4}))}
    with pytest.raises(LayoutError, match="pp 1 is not possible") as refused:
        Layout.resolve(sizes, 8, {LANGUAGE: P()})
    assert suggested(refused.value) == {LANGUAGE: P(dp=4, pp=2)}
    with pytest.raises(LayoutError, match=r"No layout near this one fits 3 rank\(s\)"):
        Layout.resolve(sizes, 3, {LANGUAGE: P()})


def test_whatever_is_refused_is_refused_with_a_layout_that_resolves():
    choose = random.Random(1)
    outcomes = Counter()
    for _ in range(1500):
        names = choose.choice([[LANGUAGE], ["images", LANGUAGE], ["images", "audio", LANGUAGE]])
        sizes = {name: random_sizes(choose) for name in names}
        world_size = choose.choice([1, 2, 3, 4, 6, 8, 12, 16])
        modules = {name: random_parallel(choose, world_size) for name in sizes}
        try:
            layout = Layout.resolve(sizes, world_size, modules)
        except LayoutError as error:
            outcomes["refused"] += 1
            layout = Layout.resolve(sizes, world_size, suggested(error))
        else:
            outcomes["accepted"] += 1
        assert_holds(layout, sizes, world_size)
    assert outcomes["refused"] > 500
    assert outcomes["accepted"] > 100


@pytest.mark.parametrize(
    ("batch_size", "num_microbatches", "said", "valid"),
    [
        (
            12,
            2,
            "12 samples must be a multiple of num_microbatches 2 x the largest dp 4 (images dp 4, language dp 2) = 8",
            [8, 16],
        ),
        (3, 1, "3 samples must be a multiple of num_microbatches 1 x the largest dp 4", [4]),
        (0, 4, "0 samples must be a multiple of num_microbatches 4 x the largest dp 4", [16]),
    ],
)
def test_a_step_batch_that_cannot_be_cut_is_refused_with_sizes_that_can(batch_size, num_microbatches, said, valid):
    layout = resolve(4, images=P(), language=P(tp=2))
    with pytest.raises(ValueError) as refused:
        layout.check_batch(batch_size, num_microbatches)
    assert said in str(refused.value)
    assert [int(size) for size in str(refused.value).split("valid: ")[1].split(" or ")] == valid
    for size in valid:
        layout.check_batch(size, num_microbatches)


def suggested(error):
    """The layout that an error offers, as a user would copy it."""
    offered = re.search(r"A layout that fits \d+ rank\(s\): modules=(\{.*\})$", str(error))
    assert offered, str(error)
    return eval(offered[1], {"ModuleParallel": ModuleParallel})


def random_sizes(choose):
    stages = choose.sample([2, 3, 4], choose.randrange(4))
    return ModuleSizes(
        tp_divides={"heads": choose.choice([1, 4, 6, 8, 12]), "groups": choose.choice([2, 4, 12])},
        etp_divides={"ffn": choose.choice([4, 6])},
        num_experts=choose.choice([0, 3, 4, 8]),
        pp_stages=frozenset([1, *stages]),
    )


def random_parallel(choose, world_size):
    factors = [1, 1, 1, 1, 1, 2, 2, 3, 4]
    parallel = {name: choose.choice(factors) for name in ("tp", "cp", "pp", "ep", "etp") if choose.random() < 0.35}
    if choose.random() < 0.4:
        parallel["dp"] = choose.choice([None, *factors])
    if choose.random() < 0.3:
        parallel["rank_offset"] = choose.randrange(world_size + 1)
    if choose.random() < 0.3:
        parallel["num_ranks"] = choose.randrange(1, world_size + 2)
    if choose.random() < 0.1:
        parallel[choose.choice(list(vars(P())))] = choose.choice(
            [0, -1, -8, 2.0, 1.5, math.inf, math.nan, "2", True, None]
        )
    return P(**parallel)


def assert_holds(layout, sizes, world_size):
    modules = layout.modules.values()
    covered = Counter(rank for module in modules for rank in module.ranks)
    assert set(covered) == set(range(world_size))
    assert set(covered.values()) == {len(sizes) if layout.placement is Placement.COLOCATED else 1}
    for module in modules:
        size = sizes[module.name]
        assert module.tp * module.cp * module.dp * module.pp == module.num_ranks
        assert module.etp * module.ep * module.edp * module.pp == module.num_ranks
        assert all(number % module.tp == 0 for number in size.tp_divides.values())
        assert all(number % module.etp == 0 for number in size.etp_divides.values())
        assert module.ep == 1 or (size.num_experts and size.num_experts % module.ep == 0)
        assert module.pp in size.pp_stages
        assert module.cp == 1
        assert all(max(module.dp, other.dp) % min(module.dp, other.dp) == 0 for other in modules)
        if layout.placement is Placement.COLOCATED and len(sizes) > 1:
            assert module.pp == 1


def test_every_failure_is_told_and_survives_a_pickle() -> None:
    sizes = {
        "images": ModuleSizes(tp_divides={"heads": 4}),
        "language": ModuleSizes(tp_divides={"heads": 8}, num_experts=4),
    }
    modules = {"images": ModuleParallel(tp=3, dp=1), "language": ModuleParallel(tp=3, dp=2, ep=3, rank_offset=3, pp=0)}
    with pytest.raises(LayoutError) as raised:
        Layout.resolve(sizes, 40, modules)
    assert raised.value.failures == (
        "images: tp 3 does not divide heads 4",
        "language: pp must be a whole number of at least 1, got 0",
    )
    modules["language"] = replace(modules["language"], pp=1)
    with pytest.raises(LayoutError) as raised:
        Layout.resolve(sizes, 40, modules)
    assert raised.value.failures == (
        "images: tp 3 does not divide heads 4",
        "language: tp 3 does not divide heads 8",
        "language: ep 3 does not divide its 4 experts",
        "the modules leave a gap: images on 0-2, language on 3-8; ranks 9 to 39, 31 of 40 would have no work",
    )
    assert raised.value.suggestion.startswith("A layout that fits 40 rank(s)")
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (copy.failures, copy.suggestion, str(copy)) == (
        raised.value.failures,
        raised.value.suggestion,
        str(raised.value),
    )
