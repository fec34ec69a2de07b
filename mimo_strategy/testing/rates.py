"""Measure a machine's rates: what one rank computes, and what ranks exchange."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mimo_strategy.module import BuildContext
from mimo_strategy.planning.cost import Workload
from mimo_strategy.planning.estimate import forward_and_backward_operations
from mimo_strategy.planning.machine import MACHINES, Machine
from mimo_strategy.testing.ranks import Accelerator, run_on_ranks
from mimo_strategy.topology import Topology

_LEAST_SECONDS = 0.2
"""For which something is repeated."""
_REACHED_IN_TRAINING = 0.4
"""Of the bandwidth that collectives reach alone, what they reach between matrix products: 130 of 340 GB/s on H200s."""


def measure_machine(num_ranks: int, accelerator: Accelerator) -> Machine:
    """Measure this machine; what ``num_ranks`` do not tell (one rank: links; one node: other nodes) is as built in.

    Args:
        num_ranks: ranks that exchange, on this machine.
        accelerator: ``cpu`` or ``gpu``.
    """
    [rates] = run_on_ranks(_device_rates, 1, accelerator, accelerator=accelerator)
    base = MACHINES["h200" if accelerator == "gpu" else "cpu"]
    machine = replace(base, **rates)
    if accelerator == "cpu":
        machine = replace(machine, processors=len(os.sched_getaffinity(0)))
    else:
        machine = replace(machine, ranks_per_node=num_ranks if num_ranks > 1 else base.ranks_per_node)
    if num_ranks > 1:
        links = run_on_ranks(_link_rates, num_ranks, accelerator, accelerator=accelerator)
        machine = replace(machine, **links[0])
    return machine


def _device_rates(accelerator: Accelerator) -> dict[str, float | str]:
    on_gpu = accelerator == "gpu"
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    size, length, heads, width = (8192, 8192, 16, 128) if on_gpu else (512, 256, 4, 64)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    seconds = _seconds(lambda: matrix @ matrix, device)
    rates: dict[str, float | str] = {"matmul": 2 * size**3 / seconds}

    queries = torch.randn(1, heads, length, width, device=device, dtype=dtype, requires_grad=True)
    attend = F.scaled_dot_product_attention if on_gpu else _plain_attention
    seconds = _seconds(lambda: attend(queries, queries, queries).sum().backward(), device)
    rates["attention"] = 3 * 4 * length**2 * heads * width / seconds

    bytes_ = 2**30 if on_gpu else 2**26
    source = torch.zeros(bytes_ // 4, device=device)
    target = torch.empty_like(source)
    rates["memory_bandwidth"] = 2 * bytes_ / _seconds(lambda: target.copy_(source), device)
    if on_gpu:
        rates |= {"name": torch.cuda.get_device_name(), "memory": float(torch.cuda.mem_get_info()[1])}
    else:
        rates |= {"name": "cpu", "memory": float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))}
    if find_spec("modules") is not None:
        rates["dispatch"] = _dispatch_seconds(device, dtype)
    return rates


def _dispatch_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Of one operation: a tiny model has nothing to compute, and all its time is the host's."""
    modules = import_module("modules")
    model = modules.MambaMoE(modules.MambaMoEConfig.tiny())
    topology = Topology.single_process(model.module_sizes())
    model.build_context = BuildContext(topology, dtype, device, seed=0)
    model.configure_model()
    tokens = torch.zeros(1, 8, dtype=torch.long, device=device)
    batch = {"input_ids": tokens, "labels": tokens, "loss_mask": torch.ones(1, 8, device=device)}
    seconds = _seconds(lambda: model.loss_step(model.forward_step(batch), batch).sum.backward(), device)
    [(name, layout)] = topology.layout.modules.items()
    cost = model.module_cost(name, layout, Workload(1, 8, fused=device.type == "cuda"))
    return seconds / forward_and_backward_operations(cost, cost.stages[0])


def _link_rates(accelerator: Accelerator) -> dict[str, float]:
    on_gpu = accelerator == "gpu"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    size = dist.get_world_size()
    large = torch.zeros((2**28 if on_gpu else 2**22) // 4 // size * size, device=device)
    received = torch.empty_like(large)
    share = large.nbytes * (size - 1) / size
    rates = [
        2 * share / _seconds(lambda: dist.all_reduce(large), device, agree=True),
        share / _seconds(lambda: dist.all_to_all_single(received, large), device, agree=True),
        large.nbytes / _seconds(lambda: _pass_on(large, received), device, agree=True),
    ]
    small = torch.zeros(256, device=device)
    latency = _seconds(lambda: dist.all_reduce(small), device, agree=True) / math.log2(size)
    # all kinds of exchange share one rate: the middle one
    bandwidth = sorted(rates)[1] * (_REACHED_IN_TRAINING if on_gpu else 1.0)
    return {"bandwidth": bandwidth, "latency": latency}


def _pass_on(tensor: torch.Tensor, received: torch.Tensor) -> None:
    """Every rank sends to the next."""
    rank, size = dist.get_rank(), dist.get_world_size()
    sends = [
        dist.P2POp(dist.isend, tensor, (rank + 1) % size),
        dist.P2POp(dist.irecv, received, (rank - 1) % size),
    ]
    for request in dist.batch_isend_irecv(sends):
        request.wait()


def _plain_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (queries @ keys.mT).softmax(-1) @ values


def _seconds(function: Callable[[], object], device: torch.device, *, agree: bool = False) -> float:
    """Of one call, from as many as take a while; ``agree`` where all ranks must make equally many."""
    function()
    once = _timed(function, 1, device)
    number = max(3, math.ceil(_LEAST_SECONDS / once))
    if agree:
        wanted = torch.tensor([number], device=device)
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        number = int(wanted)
    return min(_timed(function, number, device) for _ in range(3))


def _timed(function: Callable[[], object], number: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(number):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / number
