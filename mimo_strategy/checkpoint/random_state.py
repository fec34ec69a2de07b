"""The random streams of every rank as tensors of a checkpoint, named after the layout that they belong to.

A module whose layout is the one that it was saved with gets its streams back, wherever its ranks are now, and a rank of
a run whose whole layout is the same gets its default generators back: training goes on bit for bit. Under another
layout the same numbers could not be drawn anyway; the streams then start anew, at seeds that no earlier part of the run
has used.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from mimo_strategy.layout import Layout
from mimo_strategy.runtime.model import HeteroMimoModel
from mimo_strategy.topology import Topology

RANDOM = "random."

_FACTORS = ("tp", "cp", "dp", "pp", "etp", "ep")


@dataclass(frozen=True)
class Streams:
    """The streams of one owner that are saved and loaded together.

    Attributes:
        shards: one per stream.
        put_back: makes the streams go on from the shards' data.
        restart: starts them anew, given the number of updates made so far.
    """

    shards: list[ShardedTensor]
    put_back: Callable[[], None]
    restart: Callable[[int], None]


def random_streams(model: HeteroMimoModel, topology: Topology, device: torch.device) -> list[Streams]:
    """This rank's default generators and the streams of its modules, a copy of their state.

    They must be put back or restarted in this order, as a module that is running owns the device's default generator.
    """
    layout, rank = topology.layout, topology.rank
    states = _default_states(device)
    owner = "/".join(f"{_name(layout, name)}@{module.rank_offset}" for name, module in layout.modules.items())
    shards = _shards(f"default.{owner}", states, rank, layout.world_size)
    streams = [Streams(shards, partial(_set_default_states, states, device), _restart_default)]
    for name, rng in model.rngs.items():
        module = layout.modules[name]
        states = {stream: state.clone() for stream, state in rng.states.items()}
        shards = _shards(_name(layout, name), states, rank - module.rank_offset, module.num_ranks)
        streams.append(Streams(shards, partial(rng.set_states, states), rng.restart))
    return streams


def _name(layout: Layout, module: str) -> str:
    factors = vars(layout.modules[module])
    return f"{module}({','.join(f'{factor}={factors[factor]}' for factor in _FACTORS)})"


def _shards(owner: str, states: Mapping[str, torch.Tensor], index: int, count: int) -> list[ShardedTensor]:
    return [
        ShardedTensor.from_rank_offsets(f"{RANDOM}{owner}.{name}", state[None], (0, index, count))
        for name, state in states.items()
    ]


def _default_states(device: torch.device) -> dict[str, torch.Tensor]:
    _, words, position, has_gauss, gauss = np.random.get_state()
    _, python_words, python_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        # 32-bit words and a normal deviate: all exact in double precision
        "numpy": torch.tensor([*words.tolist(), position, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor(
            [*python_words, float("nan") if python_gauss is None else python_gauss], dtype=torch.float64
        ),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_default_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    *words, position, has_gauss, gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), int(position), int(has_gauss), gauss))
    *words, gauss = states["python"].tolist()
    random.setstate((3, tuple(map(int, words)), None if gauss != gauss else gauss))
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _restart_default(num_updates: int) -> None:
    """The same on every rank, as after building; the other libraries' generators are the user's."""
    torch.manual_seed(torch.initial_seed() + num_updates)
