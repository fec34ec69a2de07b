"""What a test learns from ranks that return, raise, die or hang. No rank may outlive the call."""

import os
import signal
import time
from multiprocessing import get_context

import psutil
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from mimo_strategy import MimoHeteroStrategy
from mimo_strategy.testing import RankError, run_on_ranks, trainer_ranks


def test_results_come_in_rank_order():
    def answer(factor):
        # the first ranks end last
        time.sleep(0.1 * (2 - dist.get_rank()))
        total = torch.tensor(dist.get_rank())
        dist.all_reduce(total)
        return dist.get_rank() * factor, total, int(os.environ["RANK"]), os.environ["WORLD_SIZE"]

    assert run_on_ranks(answer, 3, 10) == [(0, 3, 0, "3"), (10, 3, 1, "3"), (20, 3, 2, "3")]


def test_ranks_run_on_the_accelerator_and_tensors_come_back_on_the_cpu(on_ranks, accelerator):
    num_ranks = 4

    def answer():
        device = torch.device("cpu" if accelerator == "cpu" else torch.cuda.current_device())
        total = torch.tensor(dist.get_rank(), device=device)
        dist.all_reduce(total)
        return dist.get_backend(), str(device), total

    on_gpus = accelerator == "gpu"
    # with fewer GPUs than ranks each rank sees one
    has_enough = on_gpus and torch.cuda.device_count() >= num_ranks
    devices = [f"cuda:{rank if has_enough else 0}" if on_gpus else "cpu" for rank in range(num_ranks)]
    results = on_ranks(answer, num_ranks)
    assert results == [("nccl" if on_gpus else "gloo", device, 6) for device in devices]
    assert {total.device.type for *_, total in results} == {"cpu"}


def test_ranks_on_gpus_need_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="need a GPU, this machine has none"):
        run_on_ranks(dist.get_rank, 1, accelerator="gpu")


def test_a_trainer_takes_these_ranks_also_within_a_job_of_slurm(monkeypatch):
    for name, value in {"NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_ID": 7, "JOB_NAME": "x"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))

    def ranks():
        trainer = Trainer(**trainer_ranks(), strategy=MimoHeteroStrategy(), accelerator="cpu", logger=False)
        return trainer.global_rank, trainer.world_size

    assert run_on_ranks(ranks, 2) == [(0, 2), (1, 2)]


def test_ranks_leave_the_environment_of_the_test_as_it_is():
    before = dict(os.environ)
    run_on_ranks(lambda: os.environ.update(LEFT="behind"), 2)
    assert dict(os.environ) == before


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_raises_is_named_and_ends_those_that_wait_for_it(failing):
    def raise_on_one_rank():
        dist.barrier()
        if dist.get_rank() == failing:
            raise KeyError("no such layer")
        dist.barrier()

    started = time.monotonic()
    with pytest.raises(RankError, match=f"^rank {failing} failed first:") as error:
        run_on_ranks(raise_on_one_rank, 3)
    assert time.monotonic() - started < 20
    assert "in raise_on_one_rank" in str(error.value)
    assert "KeyError: 'no such layer'" in str(error.value)


def test_a_rank_that_fails_while_others_compute_ends_them():
    def raise_or_sleep():
        if dist.get_rank() == 1:
            raise ValueError("at once")
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1 failed first:"):
        run_on_ranks(raise_or_sleep, 2)
    assert time.monotonic() - started < 20


def test_a_result_that_cannot_be_sent_is_an_error_of_its_rank():
    with pytest.raises(RankError, match="rank 0 failed first:"):
        run_on_ranks(lambda: lambda: None, 1)


def test_a_killed_rank_is_named_although_others_then_fail_with_a_traceback(monkeypatch):
    def kill_one_rank():
        dist.barrier()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    # look so rarely that the tracebacks are there at the first look
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(1))
    with pytest.raises(RankError, match="ended without a traceback: rank 1 by SIGKILL"):
        run_on_ranks(kill_one_rank, 3)


def test_a_hanging_rank_is_named_after_the_timeout():
    started = time.monotonic()
    with pytest.raises(RankError, match=r"ranks \[1\] of 2 did not finish within 1 s"):
        run_on_ranks(lambda: time.sleep(60 * dist.get_rank()), 2, timeout=1)
    assert time.monotonic() - started < 20


def test_ranks_end_with_the_process_of_the_test(tmp_path):
    def write_pid():
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)

    killed = get_context("fork").Process(target=run_on_ranks, args=(write_pid, 2))
    killed.start()
    while len(os.listdir(tmp_path)) < 2:
        time.sleep(0.05)
    ranks = [psutil.Process(int(pid)) for pid in os.listdir(tmp_path)]
    killed.kill()
    killed.join()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive


def test_a_process_with_torch_distributed_cannot_start_ranks():
    def start_ranks():
        run_on_ranks(dist.get_rank, 1)

    with pytest.raises(RankError, match="must not have torch"):
        run_on_ranks(start_ranks, 1)
