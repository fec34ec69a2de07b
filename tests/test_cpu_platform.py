"""Without a GPU megatron-core's modules get a redirected torch, and nobody else notices."""

import json
import pickle
import subprocess
import sys
from importlib.util import cache_from_source
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import random as megatron_random
from torch.utils.data import DataLoader

from mimo_strategy.cpu.redirecting_loader import RedirectingLoader
from mimo_strategy.testing import run_on_ranks

MEGATRON_TORCH = megatron_random.torch

# Lightning and torch._dynamo wrap names of torch themselves: they come first.
SHOW_REPLACED = """
import json, lightning.pytorch, torch, torch._dynamo, torch.distributed, torch.utils.data
owners = [torch, torch.cuda, torch.cuda.random, torch.distributed, torch.Tensor, torch.nn.Module, torch.utils.data]
before = [dict(vars(owner)) for owner in owners]
import mimo_strategy, modules, datamodules
print(json.dumps([
    f"{owner.__name__}.{name}"
    for owner, names in zip(owners, before, strict=True)
    for name, value in names.items()
    if vars(owner).get(name) is not value
]))
"""

IMPORT_AFTER_MEGATRON = """
import sys
sys.modules["megatron.core"] = sys
import mimo_strategy
"""


def run_python(code):
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)


def test_the_import_replaces_nothing_in_torch():
    result = run_python(SHOW_REPLACED)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []


def test_functions_of_torch_are_the_compiled_ones():
    assert torch.zeros is torch._C._VariableFunctions.zeros
    assert torch.Tensor.cuda is torch._C.TensorBase.cuda
    assert torch.Tensor.type is torch._C.TensorBase.type
    assert torch.Tensor.to is torch._C.TensorBase.to


def test_importing_megatron_first_is_refused():
    result = run_python(IMPORT_AFTER_MEGATRON)
    assert "ImportError: without a GPU, import mimo_strategy before megatron.core" in result.stderr


def test_all_modules_of_megatron_and_no_others_hold_the_redirected_torch():
    holders = {}
    for name, module in list(sys.modules.items()):
        held = vars(module).get("torch")
        if getattr(held, "__name__", None) == "torch":
            holders[name] = held
    redirected = {name for name, held in holders.items() if held is MEGATRON_TORCH}
    assert len(redirected) > 100
    assert redirected == {name for name in holders if name.startswith("megatron.core")}
    assert all(held is torch for name, held in holders.items() if name not in redirected)


@pytest.mark.parametrize(
    "use_cuda",
    [
        lambda: torch.nn.Linear(2, 2).to("cuda"),
        lambda: torch.nn.Linear(2, 2).cuda(),
        lambda: torch.zeros(1, device="cuda"),
        lambda: torch.zeros(1).cuda(),
        lambda: torch.cuda.current_device(),
    ],
    ids=["module.to", "module.cuda", "zeros", "tensor.cuda", "current_device"],
)
def test_cuda_is_as_missing_as_ever_to_others(use_cuda):
    with pytest.raises((AssertionError, RuntimeError), match=r"NVIDIA|not compiled with CUDA"):
        use_cuda()


def test_devices_and_types_are_as_ever_to_others():
    with torch.device("meta"):
        assert torch.zeros(2).device.type == torch.nn.Linear(2, 2).weight.device.type == "meta"
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.zeros(1).to(torch.float64).type() == "torch.DoubleTensor"


def test_plain_modules_and_tensors_pickle():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.GELU())
    copy, ones = pickle.loads(pickle.dumps((module, torch.ones(2))))
    assert torch.equal(copy(ones), module(ones))


def test_dataloader_workers_work():
    loader = DataLoader(list(range(6)), batch_size=3, num_workers=1)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5]]


def test_megatron_is_on_the_cpu():
    assert MEGATRON_TORCH.cuda.current_device() == torch.device("cpu")
    assert MEGATRON_TORCH.zeros(2, device="cuda").device.type == "cpu"
    assert MEGATRON_TORCH.tensor([1.5], device=MEGATRON_TORCH.cuda.current_device()).tolist() == [1.5]
    assert MEGATRON_TORCH.empty(1, device="meta").device.type == "meta"
    assert MEGATRON_TORCH.Tensor is torch.Tensor
    assert MEGATRON_TORCH.nn is torch.nn


def test_megatron_compiles_nothing():
    def function(x):
        return x

    assert MEGATRON_TORCH.compile(function) is function
    assert MEGATRON_TORCH.compile(dynamic=True)(function) is function


def test_one_generator_is_both_the_cpus_and_cudas():
    with torch.random.fork_rng(devices=[]):
        MEGATRON_TORCH.cuda.manual_seed(7)
        state = MEGATRON_TORCH.cuda.get_rng_state()
        drawn = torch.rand(3)
        MEGATRON_TORCH.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), drawn)
        torch.manual_seed(7)
        assert torch.equal(torch.rand(3), drawn)


def test_streams_and_events_do_nothing():
    stream, event = MEGATRON_TORCH.cuda.Stream(), MEGATRON_TORCH.cuda.Event()
    with MEGATRON_TORCH.cuda.stream(stream):
        event.record()
        stream.wait_event(event)
    assert stream.device == torch.device("cpu")
    assert MEGATRON_TORCH.cuda.synchronize() is None


def test_groups_that_ask_for_nccl_get_gloo():
    def backends():
        group = MEGATRON_TORCH.distributed.new_group([0, 1], backend="nccl", pg_options=object())
        subgroup, _ = MEGATRON_TORCH.distributed.new_subgroups_by_enumeration([[0], [1]], backend="nccl")
        return dist.get_backend(group), dist.get_backend(subgroup)

    assert run_on_ranks(backends, 2) == [("gloo", "gloo")] * 2


LENGTHS = [1, 3, 2]


def part(rank, length):
    return torch.arange(length * 2.0).reshape(length, 2) + 100 * (rank + 1)


def test_all_gather_of_unequal_lengths():
    def gather():
        rank = dist.get_rank()
        gathered = [torch.empty(length, 2) for length in LENGTHS]
        MEGATRON_TORCH.distributed.all_gather(gathered, part(rank, LENGTHS[rank]))
        equal = [torch.empty(2, 2) for _ in LENGTHS]
        MEGATRON_TORCH.distributed.all_gather(equal, part(rank, 2))
        return [each.tolist() for each in gathered], [each.tolist() for each in equal]

    unequal = [[[100, 101]], [[200, 201], [202, 203], [204, 205]], [[300, 301], [302, 303]]]
    equal = [[[100, 101], [102, 103]], [[200, 201], [202, 203]], [[300, 301], [302, 303]]]
    assert run_on_ranks(gather, 3) == [(unequal, equal)] * 3


def test_all_gather_of_unequal_lengths_within_a_group():
    def gather():
        group = dist.new_group([0, 2])
        if dist.get_rank() == 1:
            return None
        lengths = [LENGTHS[0], LENGTHS[2]]
        gathered = [torch.empty(length, 2) for length in lengths]
        MEGATRON_TORCH.distributed.all_gather(gathered, part(dist.get_rank(), LENGTHS[dist.get_rank()]), group=group)
        return [each.tolist() for each in gathered]

    expected = [[[100, 101]], [[300, 301], [302, 303]]]
    assert run_on_ranks(gather, 3) == [expected, None, expected]


def test_reduce_scatter_of_unequal_lengths():
    def scatter(operation):
        rank = dist.get_rank()
        output = torch.empty(LENGTHS[rank])
        inputs = [torch.full((length,), float(10**rank * (to + 1))) for to, length in enumerate(LENGTHS)]
        MEGATRON_TORCH.distributed.reduce_scatter(output, inputs, op=operation)
        equal = torch.empty(2)
        MEGATRON_TORCH.distributed.reduce_scatter(equal, [torch.full((2,), to + rank) * 1.0 for to in range(3)])
        return output.tolist(), equal.tolist()

    assert run_on_ranks(scatter, 3, dist.ReduceOp.SUM) == [
        ([111.0], [3.0, 3.0]),
        ([222.0, 222.0, 222.0], [6.0, 6.0]),
        ([333.0, 333.0], [9.0, 9.0]),
    ]
    assert [unequal for unequal, _ in run_on_ranks(scatter, 3, dist.ReduceOp.MAX)] == [
        [100.0],
        [200.0, 200.0, 200.0],
        [300.0, 300.0],
    ]


def test_unequal_lengths_cannot_be_asynchronous():
    def gather():
        gathered = [torch.empty(length) for length in (1, 2)]
        with pytest.raises(NotImplementedError, match="unequal lengths are synchronous"):
            MEGATRON_TORCH.distributed.all_gather(gathered, gathered[dist.get_rank()], async_op=True)
        with pytest.raises(NotImplementedError, match="unequal lengths are synchronous"):
            MEGATRON_TORCH.distributed.reduce_scatter(gathered[dist.get_rank()], gathered, async_op=True)

    run_on_ranks(gather, 2)


# How many values each rank (row) sends to each rank (column).
SENT = torch.tensor([[1, 0, 2], [0, 2, 1], [3, 1, 0]])


@pytest.mark.parametrize("as_sizes", [torch.Tensor.clone, torch.Tensor.tolist], ids=["tensors", "lists"])
def test_all_to_all_takes_split_sizes_as_tensors(as_sizes):
    def exchange():
        rank = dist.get_rank()
        output = torch.empty(int(SENT[:, rank].sum()))
        sent = torch.cat([torch.full((int(number),), 10.0 * rank + to) for to, number in enumerate(SENT[rank])])
        MEGATRON_TORCH.distributed.all_to_all_single(output, sent, as_sizes(SENT[:, rank]), as_sizes(SENT[rank]))
        return output.tolist()

    assert run_on_ranks(exchange, 3) == [[0, 20, 20, 20], [11, 11, 21], [2, 2, 12]]


def test_edited_modules_are_edited_here_and_not_in_the_cache_of_others():
    constants = repr(
        [function.__code__.co_consts for function in vars(clip_grads).values() if hasattr(function, "__code__")]
    )
    assert "torch.FloatTensor" in constants
    assert "torch.cuda.FloatTensor" not in constants
    cached = Path(cache_from_source(clip_grads.__file__))
    if cached.exists():
        assert b"torch.cuda.FloatTensor" in cached.read_bytes()


@pytest.mark.parametrize(
    ("source", "result", "is_cached"),
    [("moved = tensor.cuda()", "cpu", False), ("moved = tensor.numpy()", "numpy", True)],
    ids=["edited", "as-is"],
)
def test_only_unedited_modules_are_cached(tmp_path, monkeypatch, source, result, is_cached):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "source.py"
    path.write_text(source)
    code = RedirectingLoader("megatron.core.source", str(path)).get_code("megatron.core.source")
    assert code.co_names[1] == result
    assert Path(cache_from_source(path)).exists() is is_cached
