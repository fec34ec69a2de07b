"""The benchmark on GPUs takes a model that they hold."""

import pytest
import torch

from benchmarks.gpu import Bench, cases, largest_that_fits, why_not
from benchmarks.gpu_sizes import SIZES

GIB = 2**30


def bench(num_gpus: int) -> Bench:
    return Bench(tiny=False, warmup=0, steps=1, device=torch.device("cpu"), dtype=torch.bfloat16, num_gpus=num_gpus)


def test_no_loop_needs_more_than_is_told() -> None:
    """Peak memory and communicators of two H200s, as docs/gpu-measurements.md has them."""
    measured = {
        ("colocated", "megatron", 1): 77 + 11.1,
        ("colocated", "strategy", 1): 75 + 1.2,
        ("encoder batching", "strategy", 4): 84 + 1.2,
        ("non-colocated", "megatron", 1): 55 + 6.3,
        ("heterogeneous", "strategy", 1): 50 + 1.7,
    }
    told = {(case.name, case.loop, case.encoder_batching): bench(2).needed_bytes(case) / GIB for case in cases(2)}
    for case, gibibytes in measured.items():
        assert gibibytes <= told[case] <= 1.2 * gibibytes, case


def test_an_encoder_that_runs_ahead_may_be_what_needs_most() -> None:
    apart = [case for case in cases(4) if case.name == "non-colocated" and case.cuda_graphs]
    needed = {case.encoder_ahead: bench(4).needed_bytes(case) for case in apart}
    assert needed[2] > needed[1] == needed[0]


@pytest.mark.parametrize("num_gpus", [1, 2, 4])
def test_smaller_gpus_get_a_smaller_model(num_gpus: int) -> None:
    first, *_ = every_case = cases(num_gpus)
    assert largest_that_fits(bench(num_gpus), first, 139 * GIB).sizes == SIZES[0]
    smaller = largest_that_fits(bench(num_gpus), first, 79 * GIB)
    assert smaller.sizes != SIZES[0]
    assert smaller.model(first).language.config.num_experts >= 8
    left_out = {case.name for case in every_case if not case.fp8 and why_not(smaller, case, 79 * GIB)}
    assert left_out <= {"encoder batching"}
