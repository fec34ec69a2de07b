"""Hand megatron-core's modules the redirected ``torch`` while they are imported.

Without importing torch: whether there is a GPU is looked up when megatron-core is.
"""

import importlib.abc
import importlib.machinery
import sys
from functools import cache

PACKAGE = "megatron.core"


def install() -> None:
    """Redirect every later import of megatron-core to the CPU, unless CUDA is available.

    Raises:
        ImportError: if megatron-core was imported before and, without CUDA, so holds the real ``torch``.
    """
    if any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return
    if PACKAGE in sys.modules and _redirects():
        raise ImportError(
            "without a GPU, import mimo_strategy before megatron.core: megatron-core must be redirected to the "
            "CPU while it is imported"
        )
    sys.meta_path.insert(0, _MegatronFinder())


@cache
def _redirects() -> bool:
    import torch

    from mimo_strategy import upstream_noise

    upstream_noise.silence()
    return not torch.cuda.is_available()


class _MegatronFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != PACKAGE and not fullname.startswith(f"{PACKAGE}."):
            return None
        if not _redirects():
            return None
        from mimo_strategy.cpu.redirecting_loader import RedirectingLoader

        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = RedirectingLoader(spec.loader.name, spec.loader.path)
        return spec
