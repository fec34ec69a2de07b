"""How far a training on many ranks is from the same training on one process, and where."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

_SHOWN = 5


@dataclass(frozen=True)
class Tolerances:
    """Largest differences that count as rounding of float32 sums in another order.

    Args:
        loss: of a step's loss, relative to it.
        agreement: between what ranks see as loss and gradient norm of the same step, relative to it.
        gradient: norm of the difference of a tensor's gradient, relative to the gradient's.
        grad_norm: of a step's gradient norm before clipping, relative to it.
        weight: norm of the difference of a tensor after a step, relative to the tensor's.
        update: the same, relative to how far training has moved the tensor from its start. Adam divides by the
            gradient's own size, so that noise in elements with almost no gradient is not small here.
    """

    loss: float = 1e-5
    agreement: float = 0.0
    gradient: float = 2e-5
    grad_norm: float = 1e-5
    weight: float = 2e-5
    update: float = 1e-3


CHECKS = tuple(field.name for field in fields(Tolerances))


class Quantity(NamedTuple):
    """What is compared: ``loss``, ``grad_norm``, ``gradient`` or ``weight`` of a step, and the tensor's name."""

    check: str
    step: int
    name: str


class Size(NamedTuple):
    """Norm and number of elements of a quantity in the reference."""

    norm: float
    num_elements: int


class Difference(NamedTuple):
    """How a rank's shard of a quantity differs from the reference.

    Attributes:
        quantity: what was compared.
        shard: its place in the whole tensor, as one would index it.
        num_elements: of the shard.
        amount: norm of the difference; of a single number, the difference with its sign.
    """

    quantity: Quantity
    shard: str
    num_elements: int
    amount: float


class Deviation(NamedTuple):
    """A relative difference, and the rank and shard that have most of it; steps count from 1."""

    check: str
    step: int
    name: str
    amount: float
    rank: int | None
    shard: str

    def __str__(self) -> str:
        where = f"{self.name}{self.shard}"
        rank = "no rank has all of it" if self.rank is None else f"rank {self.rank}"
        return f"step {self.step}, {self.check}{' of ' if where else ''}{where}: {self.amount:.1e} ({rank})"


@dataclass(frozen=True)
class Comparison:
    """Every quantity's deviation from the reference."""

    deviations: Sequence[Deviation]

    @classmethod
    def merge(
        cls,
        every_rank: Sequence[Sequence[Difference]],
        sizes: Mapping[Quantity, Size],
        update_norms: Mapping[Quantity, float],
    ) -> "Comparison":
        """Put together what all ranks found.

        Args:
            every_rank: differences by rank.
            sizes: of everything that the ranks should have compared.
            update_norms: of weights, how far training had moved them.
        """
        found: dict[Quantity, dict[str, list[tuple[int, Difference]]]] = {quantity: {} for quantity in sizes}
        for rank, differences in enumerate(every_rank):
            for difference in differences:
                shards = found.setdefault(difference.quantity, {})
                shards.setdefault(difference.shard, []).append((rank, difference))
        deviations = []
        for quantity, shards in found.items():
            # of ranks that hold the same shard, the worst
            worst = [max(holders, key=lambda holder: _at_most(abs(holder[1].amount))) for holders in shards.values()]
            size = sizes.get(quantity)
            if size is None or sum(difference.num_elements for _, difference in worst) != size.num_elements:
                deviations.append(Deviation(*quantity, math.inf, None, "" if size else " (not in the reference)"))
                continue
            amount = math.hypot(*(difference.amount for _, difference in worst))
            rank, difference = max(worst, key=lambda holder: _at_most(abs(holder[1].amount)))
            deviations.append(Deviation(*quantity, _relative(amount, size.norm), rank, difference.shard))
            if quantity in update_norms:
                moved = _relative(amount, update_norms[quantity])
                deviations.append(Deviation("update", quantity.step, quantity.name, moved, rank, difference.shard))
            if quantity.check in ("loss", "grad_norm"):
                amounts = [difference.amount for _, difference in shards[""]]
                spread = _relative(max(amounts) - min(amounts), size.norm)
                deviations.append(Deviation("agreement", quantity.step, quantity.check, spread, rank, ""))
        return cls(deviations)

    def largest(self, check: str) -> Deviation:
        """The largest deviation of one of :data:`CHECKS`."""
        return max(
            (deviation for deviation in self.deviations if deviation.check == check),
            key=lambda deviation: _at_most(deviation.amount),
        )

    def beyond(self, tolerances: Tolerances) -> list[Deviation]:
        """What exceeds its tolerance: earlier steps first, of a step what it computes first, then the largest."""
        exceeding = [
            deviation for deviation in self.deviations if not deviation.amount <= getattr(tolerances, deviation.check)
        ]
        return sorted(
            exceeding,
            key=lambda deviation: (deviation.step, CHECKS.index(deviation.check), -_at_most(deviation.amount)),
        )

    def check(self, tolerances: Tolerances) -> None:
        """Check that nothing exceeds its tolerance.

        Raises:
            AssertionError: otherwise, with a report.
        """
        exceeding = self.beyond(tolerances)
        if exceeding:
            raise AssertionError("\n".join(self._report(exceeding, tolerances)))

    def _report(self, exceeding: list[Deviation], tolerances: Tolerances) -> Iterator[str]:
        yield f"training differs from one process in {len(exceeding)} of {len(self.deviations)} quantities"
        first_step = exceeding[0].step
        for check in CHECKS:
            found = [deviation for deviation in exceeding if (deviation.step, deviation.check) == (first_step, check)]
            yield from (f"  {deviation}" for deviation in found[:_SHOWN])
            if len(found) > _SHOWN:
                yield f"    and {len(found) - _SHOWN} more of this kind in step {first_step}"
        later = sum(deviation.step > first_step for deviation in exceeding)
        if later:
            yield f"  and {later} in later steps"
        yield "largest of each kind, and what is tolerated:"
        yield from (f"  {self.largest(check)}; tolerated {getattr(tolerances, check):.0e}" for check in CHECKS)


def _relative(amount: float, size: float) -> float:
    if not math.isfinite(amount):
        return math.inf
    if size == 0:
        return 0.0 if amount == 0 else math.inf
    return amount / size


def _at_most(amount: float) -> float:
    """For comparisons, in which a number that is none would be lost."""
    return math.inf if math.isnan(amount) else amount
