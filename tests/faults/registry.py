"""Changes to the running code, after which training must not be that of one process any more."""

from collections.abc import Callable
from dataclasses import dataclass

from proof.cells import Cell
from pytest import MonkeyPatch


@dataclass(frozen=True)
class Change:
    """A change, a cell that then cannot train rightly, and what must be said of it (a regular expression)."""

    make: Callable[[MonkeyPatch], None]
    cell: Cell
    report: str


class Registry(dict[str, Change]):
    """Changes, each by the name of the function that makes it."""

    def register(self, cell: Cell, report: str) -> Callable[[Callable[[MonkeyPatch], None]], Callable]:
        """A decorator that registers a function that makes a change."""

        def add(make: Callable[[MonkeyPatch], None]) -> Callable[[MonkeyPatch], None]:
            self[make.__name__] = Change(make, cell, report)
            return make

        return add
