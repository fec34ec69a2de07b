"""What importing the package costs over importing Lightning and megatron-core, each in processes of its own.

    python benchmarks/imports.py

Of megatron-core that is its optimizer, schedules, checkpoints and models, which every user imports. Compares processor
seconds, which other processes of the machine hardly change; ends with 1 if their ratio is above the bar.
"""

import resource
import statistics
import subprocess
import sys

BAR = 1.3
REPEATS = 5
UPSTREAM = """
import lightning.pytorch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
"""
PACKAGE = "from mimo_strategy import MimoHeteroStrategy"


def seconds(code: str) -> float:
    """Processor time of a process that runs ``code``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    for code in (UPSTREAM, PACKAGE):
        seconds(code)  # writes bytecode
    pairs = [(seconds(PACKAGE), seconds(UPSTREAM)) for _ in range(REPEATS)]
    package, upstream = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    print(f"mimo_strategy {package:.2f} s  upstream {upstream:.2f} s  median of the ratios {ratio:.3f}  bar {BAR}")
    sys.exit(ratio > BAR)


if __name__ == "__main__":
    main()
