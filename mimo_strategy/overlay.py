"""A stand-in for a module that shows some of its names replaced."""

from types import ModuleType


class Overlay(ModuleType):
    """Shows the names of ``real``, the ``replaced`` ones instead of its own; ``real`` itself is left as it is."""

    def __init__(self, real: ModuleType, **replaced):
        super().__init__(real.__name__, real.__doc__)
        self.__dict__.update(replaced, _real=real)

    def __getattr__(self, name):
        return getattr(self.__dict__["_real"], name)
