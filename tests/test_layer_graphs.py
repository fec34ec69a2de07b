"""Layers that CUDA graphs may replay. The graphs themselves need a GPU: tests/test_gpu.py."""

import pytest
import torch

from mimo_strategy import DistributedDataParallelConfig, LayoutError, MimoHeteroStrategy, OptimizerConfig
from mimo_strategy import ModuleParallel as P
from mimo_strategy.testing import run_on_ranks
from modules import MambaMoE, MambaMoEConfig


def replayable_layers(model):
    from mimo_strategy.runtime.layer_graphs import ReplayableLayer

    return {type(layer).__name__: layer for layer in model.modules() if isinstance(layer, ReplayableLayer)}


def test_every_parameter_of_a_layer_can_be_replaced():
    """A copy that a layer keeps elsewhere, as the Mamba mixer does, would be used, and recorded, in place of it."""

    def check():
        module = MambaMoE(MambaMoEConfig.tiny(pattern="ME"))
        module.configure_model()
        layers = replayable_layers(module.model)
        assert sorted(layers) == ["ReplayableMambaLayer", "ReplayableSharedExpert"]
        for layer in layers.values():
            hidden_states = torch.randn(16, 2, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
            others = {
                name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in layer.named_parameters()
            }
            own, replaced = layer(hidden_states=hidden_states), layer.run_with(others, hidden_states)
            torch.testing.assert_close(own, replaced, rtol=0, atol=0)
            gradients = torch.autograd.grad(own.square().sum(), list(layer.parameters()))
            in_place = torch.autograd.grad(replaced.square().sum(), list(others.values()))
            for gradient, other in zip(gradients, in_place, strict=True):
                torch.testing.assert_close(gradient, other, rtol=0, atol=0)
            # and are its own again
            again = layer(hidden_states=hidden_states)
            assert torch.autograd.grad(again.sum(), list(layer.parameters()))

    run_on_ranks(check, 1)


@pytest.mark.parametrize(
    ("changes", "number"), [({}, 2), ({"dropout": 0.1}, 0), ({"recompute_layers": True}, 0)], ids=str
)
def test_layers_with_other_kernels_in_each_pass_are_left_out(changes, number):
    def count():
        module = MambaMoE(MambaMoEConfig.tiny(pattern="M*-E", **changes))
        module.configure_model()
        return sum(layer.is_replayable for layer in replayable_layers(module.model).values())

    assert run_on_ranks(count, 1) == [number]


@pytest.mark.parametrize(
    ("modules", "ddp", "error", "message"),
    [
        ({"language": P(tp=2, dp=1)}, None, LayoutError, r"language that do not talk to other ranks, but it has tp 2;"),
        ({"language": P(pp=2, dp=1)}, None, LayoutError, r"but it has pp 2; make each 1 or leave cuda_graphs False"),
        (
            {"language": P(dp=2)},
            DistributedDataParallelConfig(
                use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
            ),
            ValueError,
            "leave overlap_param_gather False in the ddp settings of language",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_ranks_start(modules, ddp, error, message):
    from lightning.pytorch import Trainer

    strategy = MimoHeteroStrategy(modules, ddp=ddp, cuda_graphs=True)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    model = MambaMoE(MambaMoEConfig.tiny(pattern="M*"), OptimizerConfig(lr=1e-3))
    with pytest.raises(error, match=message):
        strategy.check(trainer, model)


def test_the_argument_is_checked():
    with pytest.raises(TypeError, match="cuda_graphs must be True or False, got 'yes'"):
        MimoHeteroStrategy(cuda_graphs="yes")
