"""How fast a machine is: rates and latencies that estimates are made with, built in or measured by ``mimo profile``."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mimo_strategy.planning.cost import Transfer

_OPERATIONS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}
"""How often each byte crosses a rank's link, times (group - 1) / group."""


@dataclass(frozen=True)
class Machine:
    """Rates that training reaches, not those of a data sheet.

    Args:
        name: what it is.
        memory: bytes of a device.
        matmul: operations per second of dense matrix products.
        attention: of attention, forward and backward together.
        scan: of scans and convolutions.
        memory_bandwidth: bytes per second that a device reads and writes.
        bandwidth: bytes per second of a rank's link to ranks of the same node.
        node_bandwidth: the same to ranks of other nodes.
        latency: seconds of a collective, for each doubling of its ranks.
        dispatch: seconds that the host needs for one operation.
        ranks_per_node: ranks that share a node.
        runs_ahead: whether the host dispatches operations while the device still runs others; as on GPUs, layers are
            then Transformer Engine's.
        processors: ranks of a node that compute at the same time; ``None`` is all.
    """

    name: str
    memory: float
    matmul: float
    attention: float
    scan: float
    memory_bandwidth: float
    bandwidth: float
    node_bandwidth: float
    latency: float
    dispatch: float
    ranks_per_node: int = 8
    runs_ahead: bool = True
    processors: int | None = None

    def seconds(self, transfer: Transfer, size: int, stride: int) -> float:
        """Time of a collective over ``size`` ranks, of which any two neighbours are ``stride`` ranks apart."""
        if size == 1:
            return 0.0
        per_link = _OPERATIONS[transfer.operation] * transfer.bytes * (size - 1) / size
        latency = self.latency * math.log2(size)
        if size * stride <= self.ranks_per_node:
            return latency + per_link / self.bandwidth
        # ranks of the group on one node
        neighbours = max(1, self.ranks_per_node // stride)
        if transfer.operation == "all_to_all":
            leaving = transfer.bytes * (1 - neighbours / size)
            return latency + max(leaving / self.node_bandwidth, per_link / self.bandwidth)
        # a ring over all of them enters and leaves a node once for each of its links
        return latency + per_link / min(self.bandwidth, neighbours * self.node_bandwidth)

    def send_seconds(self, size: float, distance: int) -> float:
        """Time to send ``size`` bytes to a rank that is ``distance`` ranks away."""
        return self.latency + size / (self.bandwidth if distance < self.ranks_per_node else self.node_bandwidth)


# Measured on 4 H200s on 2026-11-22, training the reference model with Transformer Engine in bfloat16, see
# docs/planning.md: matrix products of 8192**3, attention and collectives of a profiled step, and as ``dispatch`` what
# makes one microbatch more as long as it was.
_H200 = Machine(
    name="h200",
    memory=141e9,
    matmul=800e12,
    attention=300e12,
    scan=20e12,
    memory_bandwidth=4.0e12,
    bandwidth=130e9,
    node_bandwidth=40e9,
    latency=20e-6,
    dispatch=80e-6,
)

MACHINES: Mapping[str, Machine] = {
    "h200": _H200,
    # the same processor with slower memory
    "h100": replace(_H200, name="h100", memory=80e9, memory_bandwidth=2.8e12),
    # one core a rank, float32, gloo; `mimo profile` measures the machine at hand
    "cpu": Machine(
        name="cpu",
        memory=8e9,
        matmul=5e10,
        attention=2e10,
        scan=5e9,
        memory_bandwidth=5e9,
        bandwidth=1e9,
        node_bandwidth=1e9,
        latency=200e-6,
        dispatch=12e-6,
        ranks_per_node=64,
        runs_ahead=False,
    ),
}


def read_machine(path: Path) -> Machine:
    """Read what ``mimo profile`` wrote.

    Raises:
        ValueError: if the file is no profile; names what is wrong.
    """
    try:
        values: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the profile {path}: {error}") from error
    known = {field.name for field in fields(Machine)}
    if not isinstance(values, dict) or values.keys() - known or not {"name", "matmul"} <= values.keys():
        raise ValueError(f"{path} is no profile that `mimo profile` wrote; it must hold {', '.join(sorted(known))}")
    wrong = [
        name
        for name, value in values.items()
        if name not in ("name", "runs_ahead", "processors") and not (isinstance(value, int | float) and value > 0)
    ]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} must be positive numbers")
    try:
        return Machine(**values)
    except TypeError as error:
        raise ValueError(f"{path} is no whole profile: {error}") from error


def write_machine(machine: Machine, path: Path) -> None:
    """Write a profile."""
    path.write_text(json.dumps(asdict(machine), indent=2) + "\n")
