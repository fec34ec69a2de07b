"""Repairs of megatron-core's distributed optimizer where torch's Adam is the inner optimizer."""

from typing import Any

import torch
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer


class TorchAdamDistributedOptimizer(DistributedOptimizer):
    """``DistributedOptimizer`` that can be saved and loaded when neither Apex nor Transformer Engine is installed.

    With torch's Adam, whose state holds a ``step`` tensor per parameter, megatron-core 0.19.2

    - asserts in ``state_dict`` that some parameter has state, which is wrong before the first step and on a
      pipeline stage without experts;
    - in ``load_state_dict`` makes all parameters share one ``step``, so that each update counts it up once per
      parameter;
    - in ``_set_main_param_and_optimizer_states`` asks loaded tensors for ``step``, and writes to parameters that
      need gradients.
    """

    def allocate_state(self) -> None:
        """Make the state that the first step would make, so that it can be saved or loaded into."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }

    def state_dict(self) -> dict[str, Any]:
        if self.optimizer.state:
            return super().state_dict()
        inner = {key: value for key, value in self.optimizer.state_dict().items() if key != "state"}
        for group in inner["param_groups"]:
            del group["params"]
        return {"optimizer": inner}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(self, model_param, tensors) -> None:
        # the step comes with the parameter groups
        super()._set_main_param_and_optimizer_states(model_param, tensors | {"step": None})


def distributed_optimizer_class() -> type[DistributedOptimizer]:
    """The class to build distributed optimizers of."""
    return DistributedOptimizer if HAVE_APEX_OR_TE else TorchAdamDistributedOptimizer


def distributed_parts(optimizer: MimoOptimizer) -> dict[str, DistributedOptimizer]:
    """The distributed optimizers of this rank's modules, by ``module/position``, ready to be saved or loaded.

    Raises:
        TypeError: if a module's optimizer is not distributed.
    """
    parts = {}
    for name, info in optimizer.module_infos.items():
        if info.optimizer is None:
            continue
        for position, part in enumerate(getattr(info.optimizer, "chained_optimizers", [info.optimizer])):
            if not isinstance(part, DistributedOptimizer):
                raise TypeError(
                    f"the optimizer of {name} is a {type(part).__name__}; only distributed optimizers can be saved "
                    "(DistributedDataParallelConfig(use_distributed_optimizer=True))"
                )
            if isinstance(part, TorchAdamDistributedOptimizer):
                part.allocate_state()
            parts[f"{name}/{position}"] = part
    return parts
