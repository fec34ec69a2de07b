"""That megatron-core's global parallel state holds no group, before, during and after training steps."""

import re

from lightning.pytorch import Callback
from megatron.core import parallel_state


def assert_no_global_groups() -> None:
    """Check every global of ``parallel_state`` that is a group or holds some."""
    groups = {
        name: value for name, value in vars(parallel_state).items() if re.fullmatch(r"_[A-Z_]+_GROUPS?(_.*)?", name)
    }
    assert len(groups) > 20
    held = {name: value for name, value in groups.items() if value not in (None, {})}
    assert not held, f"global groups: {held}"
    assert not parallel_state.model_parallel_is_initialized()


class NoGlobalGroups(Callback):
    """Checks before training, within every forward pass, before the update and after every step."""

    def __init__(self) -> None:
        self._forward_passes = 0

    def setup(self, trainer, module, stage):
        assert_no_global_groups()

    def on_train_start(self, trainer, module):
        assert_no_global_groups()
        module.model.register_forward_hook(self._check_forward)

    def _check_forward(self, model, args, output):
        assert_no_global_groups()
        self._forward_passes += 1

    def on_before_optimizer_step(self, trainer, module, optimizer):
        assert_no_global_groups()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        assert_no_global_groups()

    def on_train_end(self, trainer, module):
        assert_no_global_groups()
        assert self._forward_passes >= trainer.global_step > 0
