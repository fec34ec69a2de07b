"""Hand megatron-core's modules the redirected ``torch`` while they are imported."""

import builtins
import importlib.abc
import importlib.machinery
import sys
from types import CodeType, ModuleType

import torch

from mimo_strategy.cpu import mamba_kernels, redirected_torch

_PACKAGE = "megatron.core"
_MAMBA = "megatron.core.ssm.mamba_mixer"

# megatron-core compares `tensor.type()` with these names, and moves tensors by `.cuda()`. A method of a tensor
# cannot be redirected for one caller only, so the few modules that do so are compiled from edited source.
_EDITS = ((b"'torch.cuda.", b"'torch."), (b".cuda()", b".cpu()"))


def install() -> None:
    """Redirect every later import of megatron-core to the CPU; does nothing where CUDA is available.

    Raises:
        ImportError: if megatron-core was imported before, and so holds the real ``torch``.
    """
    if torch.cuda.is_available() or any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return
    if _PACKAGE in sys.modules:
        raise ImportError(
            "without a GPU, import mimo_strategy before megatron.core: megatron-core must be redirected to the "
            "CPU while it is imported"
        )
    sys.meta_path.insert(0, _MegatronFinder())


class _MegatronFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != _PACKAGE and not fullname.startswith(f"{_PACKAGE}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _RedirectingLoader(spec.loader.name, spec.loader.path)
        return spec


class _RedirectingLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = _BUILTINS
        super().exec_module(module)
        if module.__name__ == _MAMBA:
            mamba_kernels.bind(module)

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        edited = source
        for upstream, here in _EDITS:
            edited = edited.replace(upstream, here)
        # the bytecode cache must keep the unedited module for runs with a GPU
        return super().get_code(fullname) if edited == source else self.source_to_code(edited, path)


def _import(name, globals=None, locals=None, fromlist=(), level=0):
    module = builtins.__import__(name, globals, locals, fromlist, level)
    return redirected_torch.REDIRECTED.get(module, module)


_BUILTINS = {**vars(builtins), "__import__": _import}
