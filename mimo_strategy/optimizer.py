"""The optimizer that Lightning, schedulers and callbacks see, in front of megatron-core's."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig

from mimo_strategy.runtime.optimizer import HeteroOptimizer

_SCHEDULED = "learning rates follow torch's schedulers, one of each module"
# Settings of megatron-core that would change nothing: the values that are let be, and why no other.
_WITHOUT_EFFECT = {
    "optimizer": (("adam",), "modules are trained with Adam"),
    "clip_grad": ((0.0, OptimizerConfig.clip_grad), "Trainer(gradient_clip_val=...) clips, by the norm of all modules"),
    "min_lr": ((None,), _SCHEDULED),
    "decoupled_lr": ((None,), _SCHEDULED),
    "decoupled_min_lr": ((None,), _SCHEDULED),
}


def check_optimizer_config(name: str, config: Any) -> None:
    """Check the settings of a module's optimizer.

    Raises:
        TypeError: if they are no ``OptimizerConfig``.
        ValueError: for a learning rate that is none, and for settings that would not be heeded.
    """
    if not isinstance(config, OptimizerConfig):
        raise TypeError(f"the optimizer settings of {name} must be an OptimizerConfig, got {config!r}")
    if config.lr is None or not 0 <= config.lr < math.inf:
        raise ValueError(f"OptimizerConfig.lr of {name} must be a finite number of at least 0, got {config.lr}")
    for setting, (valid, why) in _WITHOUT_EFFECT.items():
        value = getattr(config, setting)
        if value not in valid:
            raise ValueError(f"OptimizerConfig.{setting}={value!r} of {name} would not be heeded: {why}")


class ModuleOptimizer(torch.optim.Optimizer):
    """One parameter group per module on every rank, named after it, in front of a ``HeteroOptimizer``.

    What a scheduler sets in a group (``lr``, ``weight_decay``) reaches megatron-core's groups of that module at the
    next step, times the multipliers that these have. Groups of modules that run elsewhere have no parameters.

    Args:
        optimizer: megatron-core's.
        configs: settings by module, in the order of the groups.
        parameters: this rank's trainable parameters by module.
        on_step: called when a step has been launched.

    Attributes:
        clip_grad: largest norm over all modules' gradients; 0 does not clip.
        num_updates: steps that were not skipped.
        num_skipped: steps that were skipped, as gradients overflowed.
    """

    def __init__(
        self,
        optimizer: HeteroOptimizer,
        configs: Mapping[str, OptimizerConfig],
        parameters: Mapping[str, list[torch.nn.Parameter]],
        on_step: Callable[[], None],
    ) -> None:
        groups = [
            {
                "name": name,
                "params": parameters.get(name, []),
                "lr": config.lr,
                "weight_decay": config.weight_decay,
            }
            for name, config in configs.items()
        ]
        first = next(iter(configs.values()))
        super().__init__(groups, defaults={"lr": first.lr, "weight_decay": first.weight_decay})
        self.megatron_optimizer = optimizer
        self._on_step = on_step
        self.clip_grad = 0.0
        self._grad_norm: float | torch.Tensor | None = None
        self.num_updates = 0
        self.num_skipped = 0

    @property
    def grad_norm(self) -> float | None:
        """Norm over all modules' gradients at the last step, ``None`` if that was skipped; waits for the device."""
        return None if self._grad_norm is None else float(self._grad_norm)

    def step(self, closure=None):
        """Run ``closure``, which computes the gradients, then let megatron-core update; collective over the world."""
        with torch.enable_grad() if closure else nullcontext():
            loss = closure() if closure else None
        self._push_settings()
        updated, self._grad_norm, _ = self.megatron_optimizer.step()
        self.num_updates += updated
        self.num_skipped += not updated
        self._on_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: Lightning calls it after the step that has already computed the gradients.

        The runtime clears gradients before each step.
        """

    def settings(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the sharded state: the groups without their parameters, and counts."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        settings = {"param_groups": groups, "num_updates": self.num_updates, "num_skipped": self.num_skipped}
        if self.megatron_optimizer.grad_scaler is not None:
            settings["grad_scaler"] = self.megatron_optimizer.grad_scaler.state_dict()
        return settings

    def load_settings(self, settings: dict[str, Any]) -> None:
        """Take over what :meth:`settings` returned."""
        for group, saved in zip(self.param_groups, settings["param_groups"], strict=True):
            group.update(saved)
        self.num_updates = settings["num_updates"]
        self.num_skipped = settings["num_skipped"]
        if self.megatron_optimizer.grad_scaler is not None and "grad_scaler" in settings:
            self.megatron_optimizer.grad_scaler.load_state_dict(settings["grad_scaler"])

    def last_step(self) -> dict[str, float | torch.Tensor]:
        """What to log of the last step: the norm of all gradients, and that of each module's.

        Under float16 also the loss scale and the number of skipped steps so far.
        """
        logged: dict[str, float | torch.Tensor] = {}
        if self._grad_norm is not None:
            logged["grad_norm"] = self._grad_norm
            norms = self.megatron_optimizer.module_norms
            logged.update((f"grad_norm/{name}", norm) for name, norm in norms.items())
        if self.megatron_optimizer.grad_scaler is not None:
            logged["loss_scale"] = self.megatron_optimizer.get_loss_scale().squeeze()
            logged["skipped_steps"] = float(self.num_skipped)
        return logged

    def _push_settings(self) -> None:
        for group in self.param_groups:
            optimizer = self.megatron_optimizer.module_infos[group["name"]].optimizer
            if optimizer is None:
                continue
            optimizer.config.clip_grad = self.clip_grad
            for inner in optimizer.param_groups:
                inner["lr"] = group["lr"] * inner.get("lr_mult", 1.0)
                inner["weight_decay"] = group["weight_decay"] * inner.get("wd_mult", 1.0)


def plain_adamw(
    parameters: Mapping[str, list[tuple[str, torch.nn.Parameter]]], configs: Mapping[str, OptimizerConfig]
) -> torch.optim.AdamW:
    """The same optimizer on one device: torch's AdamW, no weight decay for biases and one-dimensional parameters.

    Args:
        parameters: trainable (name, parameter) pairs by module.
        configs: settings by module.
    """
    groups = []
    for name, config in configs.items():
        for decayed in (True, False):
            members = [
                parameter
                for parameter_name, parameter in parameters[name]
                if (parameter.ndim > 1 and not parameter_name.endswith(".bias")) is decayed
            ]
            if members:
                groups.append(
                    {
                        "name": name if decayed else f"{name}/no_weight_decay",
                        "params": members,
                        "lr": config.lr,
                        "weight_decay": config.weight_decay if decayed else 0.0,
                        "betas": (config.adam_beta1, config.adam_beta2),
                        "eps": config.adam_eps,
                    }
                )
    return torch.optim.AdamW(groups)
