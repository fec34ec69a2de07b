"""An encoder of one's own, as the documentation shows it, trains in every layout like one process."""

import sys
from functools import cache
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from datamodules import DigitsDataModule, collate
from mimo_strategy import MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.testing import Reference

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = DigitsDataModule(batch_size=8)


@cache
def reference() -> Reference:
    sys.path.insert(0, str(EXAMPLES))
    from own_encoder import make_model

    sys.path.remove(str(EXAMPLES))
    return Reference(lambda: make_model(DATA), lambda: DataLoader(DATA.train_dataset, 8, collate_fn=collate))


@pytest.mark.parametrize(
    ("world_size", "modules"),
    [
        pytest.param(3, {"images": P(dp=2), "language": P(dp=1, rank_offset=2)}, id="non_colocated, fan-in"),
        pytest.param(4, {"images": P(tp=2, dp=2), "language": P(dp=4, ep=4)}, id="colocated, fan-out"),
    ],
)
def test_siglip_trains_like_one_process(world_size, modules):
    reference().assert_alike(MimoHeteroStrategy(modules, num_microbatches=2), world_size)
