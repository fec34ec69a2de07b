"""Each module reduces its gradients, shards its optimizer and gathers its parameters as its own settings say."""

from dataclasses import replace

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from tiny_runs import BATCH_SIZE, OVERLAPPED, PLAIN, digits, make_trainer, vision_language
from torch.utils.data import DataLoader

from datamodules import collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.runtime.data_parallel import accumulate_in_kernels
from mimo_strategy.testing import RankError, Reference, run_on_ranks

REDUCED_EARLY = replace(OVERLAPPED, use_distributed_optimizer=False, overlap_param_gather=False)

COLOCATED = {"images": P(dp=2), "language": P(dp=2, ep=2)}
FAN_IN = {"images": P(dp=2), "language": P(tp=2, dp=1, ep=2)}
APART = {"images": P(dp=1), "language": P(dp=2, rank_offset=1)}


def make_data() -> DataLoader:
    return DataLoader(digits().train_dataset, BATCH_SIZE, collate_fn=collate)


@pytest.fixture(scope="module")
def reference(accelerator):
    return Reference(vision_language, make_data, accelerator=accelerator)


@pytest.mark.parametrize(
    ("modules", "ddp"),
    [
        pytest.param(COLOCATED, {"images": OVERLAPPED, "language": PLAIN}, id="colocated-encoder-overlapped"),
        pytest.param(FAN_IN, {"images": PLAIN, "language": OVERLAPPED}, id="fan-in-language-overlapped"),
        pytest.param(APART, {"images": REDUCED_EARLY}, id="disjoint-encoder-without-shards"),
    ],
)
def test_training_is_that_of_one_process(reference, modules, ddp):
    world_size = max(module.rank_offset + module.tp * module.dp for module in modules.values())
    reference.assert_alike(MimoHeteroStrategy(modules, 2, ddp=ddp), world_size)


def test_kernels_add_gradients_only_to_weights_that_are_trained():
    """A kernel of Transformer Engine that adds to a buffer needs one, which frozen weights have not."""

    def layer(is_trained):
        layer = torch.nn.Linear(2, 2).requires_grad_(is_trained)
        layer.fuse_wgrad_accumulation = False
        return layer

    layers = torch.nn.Sequential(layer(True), layer(False), torch.nn.Linear(2, 2))
    accumulate_in_kernels(layers)
    assert [getattr(each, "fuse_wgrad_accumulation", None) for each in layers] == [True, False, None]


@pytest.mark.parametrize("module", ["images", "language"])
def test_a_parameter_without_gradient_is_named_where_gradients_are_reduced_early(module):
    def run():
        model = vision_language("*")
        configure = model.configure_model

        def with_another_parameter():
            configure()
            part = model.model.own_modules()[module]
            if not hasattr(part, "unused"):
                part.unused = torch.nn.Linear(2, 2)

        model.configure_model = with_another_parameter
        strategy = MimoHeteroStrategy({"images": P(dp=2), "language": P(dp=2)}, 2, ddp=REDUCED_EARLY)
        make_trainer(strategy, max_steps=2).fit(model, make_data())

    message = rf"no gradient came for trainable parameters of {module}, .*: unused.weight, unused.bias\. Use"
    with pytest.raises(RankError, match=message):
        run_on_ranks(run, 2, timeout=60)


def test_settings_reach_the_module_that_they_name():
    def settings():
        module = vision_language()
        trainer = make_trainer(MimoHeteroStrategy(COLOCATED, ddp={"images": REDUCED_EARLY}), max_steps=1)
        trainer.fit(module, make_data())
        wrapped = {name: part.ddp_config for name, part in module.runtime.model.own_modules().items()}
        infos = trainer.optimizers[0].megatron_optimizer.module_infos
        return {
            name: (
                config.overlap_grad_reduce,
                config.use_distributed_optimizer,
                config.bucket_size,
                {isinstance(part, DistributedOptimizer) for part in infos[name].optimizer.chained_optimizers},
            )
            for name, config in wrapped.items()
        }

    for of_rank in run_on_ranks(settings, 2):
        assert of_rank == {"images": (True, False, 20_000, {False}), "language": (False, True, None, {True})}


@pytest.mark.parametrize(
    ("ddp", "error", "message"),
    [
        ({"imagse": PLAIN}, ValueError, "ddp has settings for imagse, but the modules are images, language"),
        ({"images": True}, TypeError, r"ddp\['images'\] must be a DistributedDataParallelConfig, got True"),
        (
            {"language": replace(PLAIN, overlap_param_gather=True)},
            ValueError,
            r"ddp\['language'\].overlap_param_gather=True needs ddp\['language'\].use_distributed_optimizer=True",
        ),
        (
            {"language": replace(PLAIN, average_in_collective=True)},
            ValueError,
            r"ddp\['language'\].average_in_collective=True is not supported",
        ),
    ],
)
def test_wrong_settings_are_refused(ddp, error, message):
    with pytest.raises(error, match=message):
        make_trainer(MimoHeteroStrategy(ddp=ddp), max_steps=1).fit(vision_language(), make_data())
