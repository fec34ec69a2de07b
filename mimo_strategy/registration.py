"""``Trainer(strategy="mimo_hetero")``: the name is known to Lightning as soon as both packages are imported."""

import importlib.machinery
import sys
from functools import partial
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

NAME = "mimo_hetero"
_REGISTRY = "lightning.pytorch.strategies"


def install() -> None:
    """Register the strategy now if Lightning is imported, otherwise as soon as it is."""
    if _REGISTRY in sys.modules:
        _register(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def _register(strategies: ModuleType) -> None:
    # override: a package imported twice, once as __main__, must not fail
    register = partial(strategies.StrategyRegistry.register, override=True)
    register(NAME, _make_strategy, description="megatron-core with a parallel layout per module")
    for method in ("spawn", "fork", "notebook"):
        register(f"{NAME}_{method}", _refuse_launcher, start_method=method)


def _make_strategy(**settings: Any) -> Any:
    from mimo_strategy.strategy import MimoHeteroStrategy

    return MimoHeteroStrategy(**settings)


def _refuse_launcher(start_method: str) -> None:
    from mimo_strategy.launcher import refuse_launcher

    refuse_launcher(start_method)


class _RegistryFinder(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != _REGISTRY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _RegisteringLoader(spec.loader.name, spec.loader.path)
        return spec


class _RegisteringLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register(module)
