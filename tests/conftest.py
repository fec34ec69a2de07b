"""What every test runs in: one thread, megatron imported once for all forked ranks, and nothing left behind."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import psutil
import pytest
import torch.distributed as dist

import mimo_strategy  # noqa: F401


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = set(psutil.Process().children())
    yield
    left = set(psutil.Process().children()) - before
    assert not left, f"the test left processes running: {left}"
    assert not dist.is_initialized(), "the test left torch.distributed initialised in the process of all tests"
