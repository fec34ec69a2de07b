"""Run colocated encoders once for several microbatches, and return their gradients once."""

from collections.abc import Callable

import torch

from mimo_strategy.runtime.model import EncoderInputs, HeteroMimoModel
from mimo_strategy.step_batch import Batch, Microbatch


class EncoderBatching:
    """The encoder passes of one step, each over the items of several microbatches.

    An encoder is launched, and its gradients are added up, once for ``size`` microbatches. In return its activations
    for all of them are kept until the last of these has run, beside the tokens and their gradients: ``size`` times the
    activations of one microbatch. The bridge and the language model run microbatch by microbatch, as without it.

    Passes begin with a microbatch that is not the last of a step, and the last one ends with :meth:`finish`: so
    gradient reductions that overlap with the backward see it as megatron-core's schedule means them to.

    Args:
        model: the wrapped model.
        microbatches: of the step; their number is a multiple of ``size``.
        size: microbatches of a pass, at least 2.
        encoder_inputs: makes the inputs from the items of all microbatches of a pass.
    """

    def __init__(
        self,
        model: HeteroMimoModel,
        microbatches: list[Microbatch],
        size: int,
        encoder_inputs: Callable[[Batch], EncoderInputs],
    ) -> None:
        self._model = model
        self._microbatches = microbatches
        self._size = size
        self._encoder_inputs = encoder_inputs
        self._position = 0
        # by encoder: what a pass returned, and the parts of it that microbatches were given
        self._pass: dict[str, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def next_tokens(self) -> dict[str, torch.Tensor]:
        """The tokens of this rank's encoder lanes for the next microbatch; runs the encoders where a pass begins."""
        offset = self._position % self._size
        if offset == 0:
            self.finish()
            self._encode(self._microbatches[self._position : self._position + self._size])
        self._position += 1
        return {name: parts[offset] for name, (_, parts) in self._pass.items()}

    def finish(self) -> None:
        """Return the gradients of the pass whose microbatches have run."""
        while self._pass:
            _, (tokens, parts) = self._pass.popitem()
            if tokens.requires_grad:
                gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
                tokens.backward(torch.cat(gradients))

    def _encode(self, microbatches: list[Microbatch]) -> None:
        names = self._model.modality_submodules
        items = {name: torch.cat([microbatch.batch[name] for microbatch in microbatches]) for name in names}
        for name, tokens in self._model.encode(self._encoder_inputs(items)).items():
            places = [self._model.num_encoder_tokens(name, microbatch.bridge_parts) for microbatch in microbatches]
            self._model.check_tokens(name, len(tokens), sum(places))
            parts = [part.detach().requires_grad_(tokens.requires_grad) for part in tokens.split(places)]
            self._pass[name] = tokens, parts
