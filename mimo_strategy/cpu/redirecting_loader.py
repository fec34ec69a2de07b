"""Imports one of megatron-core's modules with the redirected ``torch``."""

import builtins
import importlib.machinery
from types import CodeType, ModuleType

from mimo_strategy.cpu import mamba_kernels, redirected_torch

_MAMBA = "megatron.core.ssm.mamba_mixer"

# megatron-core compares `tensor.type()` with these names, and moves tensors by `.cuda()`. A method of a tensor
# cannot be redirected for one caller only, so the few modules that do so are compiled from edited source.
_EDITS = ((b"'torch.cuda.", b"'torch."), (b".cuda()", b".cpu()"))


class RedirectingLoader(importlib.machinery.SourceFileLoader):
    """Of one module of megatron-core."""

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
