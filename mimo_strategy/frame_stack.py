"""Room for Python's frames, so that calls in a training loop do not map and unmap memory."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

# Python doubles a piece of 16 KiB until such a frame fits, and half of the 1 MiB remains for the frames of callees.
_SLOTS = 2**16


def _call(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


call_with_room = FunctionType(_call.__code__.replace(co_stacksize=_SLOTS), globals(), "call_with_room")
"""Call a function with room for the frames of some thousand calls within it.

CPython 3.12 keeps frames in pieces of 16 KiB, and gives a piece back to the system as soon as its first frame returns
(https://github.com/python/cpython/issues/142183; later releases of 3.13 keep one). A call from the last frame of a
piece thus maps memory each time that it is made; at a Trainer's depth such calls were those of a model's layers, 200 a
step, some 25 microseconds each. This function's own frame is so large that a piece with room to spare is taken for it.
"""
