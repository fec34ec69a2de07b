"""Shards are initialised differently and replicas alike, whatever else runs on the same ranks."""

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from mimo_strategy.layout import LANGUAGE, Layout, ModuleParallel, ModuleSizes
from mimo_strategy.runtime.model import build_model
from mimo_strategy.runtime.seeding import ModuleRng
from mimo_strategy.testing import run_on_ranks
from mimo_strategy.topology import Topology
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

P = ModuleParallel
RANKS = range(4)

# What tells apart the ranks that hold different values of a parameter.
DENSE, EXPERT, REPLICATED = ("tp",), ("etp", "ep"), ()


def make_model():
    return NemotronVLM(RadioConfig.tiny(), MambaMoEConfig.tiny(), image_token_id=1, end_token_id=2)


def build(images, language):
    """The layout, and by rank and name of the random parameters: what shards each, and its values."""
    description = make_model()
    layout = Layout.resolve(description.module_sizes(), len(RANKS), {"images": images, LANGUAGE: language})

    def parameters():
        topology = Topology(layout)
        model = build_model(description, topology, dtype=torch.float32, device=torch.device("cpu"), seed=5)
        return {
            name: (sharding(parameter), parameter.tolist())
            for name, parameter in model.named_parameters()
            if parameter.min() < parameter.max()
        }

    return layout, run_on_ranks(parameters, len(RANKS))


def sharding(parameter):
    if getattr(parameter, "allreduce", True) is False:
        return EXPERT
    return DENSE if getattr(parameter, "tensor_model_parallel", False) else REPLICATED


def module_of(name):
    return LANGUAGE if name.startswith("language_model.") else "images"


@pytest.mark.parametrize(
    ("images", "language"),
    [
        (P(tp=4), P(tp=2, ep=2)),
        (P(tp=4), P(tp=2, ep=2, etp=2)),
        (P(tp=2), P(tp=2, ep=4)),
        (P(), P(ep=2)),
        (P(tp=4), P()),
    ],
    ids=str,
)
def test_two_ranks_hold_the_same_values_if_and_only_if_they_hold_the_same_shard(images, language):
    layout, ranks = build(images, language)
    for name, (shards, _) in ranks[0].items():
        module = layout.modules[module_of(name)]
        held = [[module.coordinates(rank)[factor] for factor in shards] for rank in RANKS]
        for one in RANKS:
            for other in RANKS:
                same_values = ranks[one][name] == ranks[other][name]
                assert same_values == (held[one] == held[other]), f"{name} on ranks {one} and {other}"


def test_every_kind_of_parameter_is_among_those_compared():
    _, (parameters, *_) = build(P(tp=4), P(tp=2, ep=2))
    kinds = {(module_of(name), shards) for name, (shards, _) in parameters.items()}
    assert kinds == {("images", DENSE), ("images", REPLICATED)} | {(LANGUAGE, s) for s in (DENSE, EXPERT, REPLICATED)}
    assert "language_model.decoder.layers.4.mlp.router.weight" in parameters


def test_norms_are_alike_everywhere():
    description = make_model()
    layout = Layout.resolve(description.module_sizes(), 4, {"images": P(tp=4), LANGUAGE: P(tp=2)})

    def norms():
        model = build_model(description, Topology(layout), dtype=torch.float32, device=torch.device("cpu"), seed=5)
        return {name: weight.unique().tolist() for name, weight in model.named_parameters() if "norm" in name}

    first, *others = run_on_ranks(norms, 4)
    assert len(first) > 10
    assert others == [first] * 3
    assert {tuple(values) for values in first.values()} == {(0.0,), (1.0,)}


def test_a_module_is_initialised_alike_beside_any_other():
    _, beside_tp4 = build(P(tp=4), P(tp=2, ep=2))
    _, beside_dp4 = build(P(), P(tp=2, ep=2))
    _, beside_dense = build(P(), P())
    for first, second, third in zip(beside_tp4, beside_dp4, beside_dense, strict=True):
        for name in first:
            if module_of(name) == LANGUAGE:
                assert first[name] == second[name], name
            else:
                assert second[name] == third[name], name


def draw():
    with get_cuda_rng_tracker().fork():
        return torch.rand(4).tolist()


def test_pipeline_stages_draw_differently():
    layout = Layout.resolve({LANGUAGE: ModuleSizes(pp_stages=frozenset({1, 2}))}, 2, {LANGUAGE: P(pp=2)})

    def draws():
        with ModuleRng(1, Topology(layout).groups[LANGUAGE]).building():
            return draw(), torch.rand(4).tolist()

    first, last = run_on_ranks(draws, 2)
    assert len({tuple(drawn) for drawn in first + last}) == 4


def test_building_starts_from_the_seed_whatever_was_drawn_before():
    layout = Layout.resolve({LANGUAGE: ModuleSizes()}, 1)

    def draws():
        groups = Topology(layout).groups[LANGUAGE]
        built = []
        for drawn_before in (3, 5):
            rng, _ = ModuleRng(2, groups), ModuleRng(1, groups)
            torch.rand(drawn_before)
            with rng.building():
                built.append((draw(), torch.rand(4).tolist()))
        return built

    ((first, second),) = run_on_ranks(draws, 1)
    assert first == second


def test_modules_draw_from_streams_of_their_own():
    layout = Layout.resolve({LANGUAGE: ModuleSizes()}, 1)

    def draws():
        groups = Topology(layout).groups[LANGUAGE]
        encoder, language = ModuleRng(1, groups), ModuleRng(2, groups)
        alone = ModuleRng(2, groups)
        with alone.active():
            undisturbed = [draw(), draw()]
        language.make_current()
        seen = [draw()]
        module = torch.nn.Identity()
        encoder.activate_in_forward(module)
        inside = []
        module.register_forward_hook(lambda *_: inside.append(draw()), prepend=True)
        module(torch.ones(1))
        module(torch.ones(1))
        seen.append(draw())
        return undisturbed, seen, inside

    ((undisturbed, seen, inside),) = run_on_ranks(draws, 1)
    assert seen == undisturbed
    assert len({tuple(drawn) for drawn in seen + inside}) == 4


def test_a_module_that_fails_in_its_forward_gives_the_streams_back():
    layout = Layout.resolve({LANGUAGE: ModuleSizes()}, 1)

    class Fails(torch.nn.Module):
        def forward(self, x):
            raise ValueError(x)

    def states():
        groups = Topology(layout).groups[LANGUAGE]
        ModuleRng(2, groups).make_current()
        before = get_cuda_rng_tracker().get_states()
        module = Fails()
        ModuleRng(1, groups).activate_in_forward(module)
        with pytest.raises(ValueError):
            module(torch.ones(1))
        after = get_cuda_rng_tracker().get_states()
        return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    assert run_on_ranks(states, 1) == [True]
