"""What every test runs in: one thread, megatron imported once for all forked ranks, and nothing left behind."""

import os
import sys
from functools import partial

# megatron-core is made ready for GPUs, where a process sees any, as it is imported
os.environ |= {} if "--accelerator=gpu" in "=".join(sys.argv) else {"CUDA_VISIBLE_DEVICES": ""}
os.environ["OMP_NUM_THREADS"] = "1"
# GPUs would otherwise multiply in TF32, of 10 bits. The first is for cuBLAS and cuDNN, so also for Transformer Engine,
# and must be there before they are loaded; the second is for the Triton kernels of mamba_ssm.
os.environ |= {"NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "ieee"}
# Every rank is a new process, and would tune the Triton kernels again.
os.environ["TRITON_CACHE_AUTOTUNING"] = "1"

import psutil
import pytest
import torch.distributed as dist

from mimo_strategy.testing import run_on_ranks
from mimo_strategy.testing.ranks import DEFAULT_TIMEOUT


def pytest_addoption(parser):
    parser.addoption(
        "--accelerator",
        choices=["cpu", "gpu"],
        default="cpu",
        help="gpu runs the tests that ask for the accelerator, and only these, on GPUs with NCCL",
    )
    parser.addoption("--write-proof", metavar="FILE", help="write a table of all comparisons with one process")


def pytest_collection_modifyitems(config, items):
    if config.getoption("accelerator") == "gpu":
        for item in items:
            if "accelerator" in item.fixturenames:
                # may start ranks three times: two for what it compares with
                item.add_marker(pytest.mark.timeout(3 * DEFAULT_TIMEOUT["gpu"]))
            else:
                item.add_marker(pytest.mark.skip(reason="runs its ranks on CPUs only"))


@pytest.fixture(scope="session")
def accelerator(pytestconfig):
    return pytestconfig.getoption("accelerator")


@pytest.fixture(scope="session")
def on_ranks(accelerator):
    """``run_on_ranks`` on the accelerator of this run."""
    return partial(run_on_ranks, accelerator=accelerator)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = set(psutil.Process().children())
    yield
    left = set(psutil.Process().children()) - before
    assert not left, f"the test left processes running: {left}"
    assert not dist.is_initialized(), "the test left torch.distributed initialised in the process of all tests"
