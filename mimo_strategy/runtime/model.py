"""Build the MimoModel of a topology: on every rank, the modules that run there."""

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.enums import ModelType
from megatron.core.models.mimo.config.base_configs import MimoModelConfig
from megatron.core.models.mimo.config.role import ModuleLayout as RoleLayout
from megatron.core.models.mimo.config.role import RankRole
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.utils import unwrap_model

from mimo_strategy.layout import LANGUAGE, LayoutError, ModuleLayout
from mimo_strategy.runtime.colocated_bridge import ColocatedBridge
from mimo_strategy.runtime.seeding import ModuleRng
from mimo_strategy.step_batch import Batch, counts_key
from mimo_strategy.topology import Topology

_SEEDS_PER_MODULE = 10_000
_TIED = "share_embeddings_and_output_weights"


class DescribesModules(Protocol):
    """What a model must tell to be built; :class:`mimo_strategy.module.MimoModule` implements it."""

    special_token_ids: Mapping[str, int]

    def module_spec(
        self, name: str, layout: ModuleLayout, groups: ProcessGroupCollection | None, dtype: torch.dtype
    ) -> ModuleSpec: ...


class EncoderInputs(NamedTuple):
    """What the encoders of a rank are called with.

    Attributes:
        by_name: keyword arguments by encoder and by its parts.
        blank: the encoders whose inputs are blank; what they become is dropped.
    """

    by_name: Mapping[str, dict[str, dict[str, Any]]]
    blank: Collection[str]


class HeteroMimoModel(MimoModel):
    """``MimoModel`` whose modules draw from random streams of their own, and whose lanes may differ in items.

    Every lane runs its encoders in every microbatch, on a blank item where it has none. megatron-core 0.19.2 leaves
    them out then, although the other lanes wait for this one: in the bridge, in a gradient reduction or parameter
    gathering that overlaps with computation, in the collectives of the encoder itself. No item at all is more than
    its attention can take.

    Attributes:
        bridge_parts: of the microbatch that is run next, the tokens to cross the bridge from each encoder of this
            rank, see :meth:`.StepShare.bridge_parts`; ``None`` without a runtime.
        encoded: the tokens of that microbatch, by encoder, where a pass over several microbatches has made them.
    """

    def __init__(self, config: MimoModelConfig, topology: Topology, seed: int) -> None:
        self.bridge_parts: Mapping[str, list[int]] | None = None
        self._places: Mapping[str, int] = {}
        self._sample_ids: torch.Tensor | None = None
        self.encoded: Mapping[str, torch.Tensor] | None = None
        self._pipelined_alone = not config.modality_submodules_spec and topology.layout.modules[LANGUAGE].pp > 1
        self.rngs = {
            name: ModuleRng(seed + _SEEDS_PER_MODULE * (position + 1), topology.groups[name])
            for position, name in enumerate(topology.layout.modules)
            if topology.runs(name)
        }
        language = topology.groups.get(LANGUAGE)
        super().__init__(config, cp_group=language.cp if language else None, tp_group=language.tp if language else None)
        # megatron-core's schedules ask every model for it
        self.model_type = ModelType.encoder_or_decoder
        self._share_tracker()

    def _initialize_submodules(self) -> None:
        if self._pipelined_alone:
            # Upstream takes grids of equal span, here the only one, for colocated and so for unpipelined.
            self.role = RankRole._from_grid_map(self.mimo_config.module_to_grid_map)
        for name, spec in self.mimo_config.modality_submodules_spec.items():
            if name in self.role.modules:
                stage = self.role.modules[name]
                with self.rngs[name].building():
                    self.modality_submodules[name] = spec.module.from_spec(
                        spec, is_first_stage=stage.is_first_stage, is_last_stage=stage.is_last_stage
                    )

    def _initialize_language_model(self) -> None:
        self.language_model = None
        if self.role.has_language_module:
            with self.rngs[LANGUAGE].building():
                self.language_model = build_module(self.mimo_config.language_model_spec)

    def _build_colocated_communicators(self) -> None:
        grids = self.mimo_config.module_to_grid_map
        for name in self.mimo_config.modality_submodules_spec:
            # The encoder's output is flat, [tokens, hidden].
            self.colocated_comms[name] = ColocatedBridge(
                grids[name], grids[LANGUAGE], name, LANGUAGE, dim_mapping={"b": 0, "h": 1}
            )

    def expect(self, microbatch: Batch, bridge_parts: Mapping[str, list[int]]) -> None:
        """Tell how many tokens of the encoders are to come, before :meth:`forward`.

        Args:
            microbatch: the one that is run next, with its items counted.
            bridge_parts: its tokens to cross the bridge, see :meth:`.StepShare.bridge_parts`.
        """
        self.bridge_parts = bridge_parts
        self._sample_ids = microbatch.get("sample_id")
        if self.language_model is not None:
            counts = {name: microbatch[counts_key(name)] for name in self.special_token_ids}
            self._places = {name: counted.sum(0).tolist()[1] for name, counted in counts.items()}

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        modality_inputs: EncoderInputs | None = None,
    ) -> tuple[Any, None]:
        """Run the modules of this rank on one microbatch.

        Args:
            input_ids: ``[samples, sequence]``.
            position_ids: ``[samples, sequence]``.
            labels: ``[samples, sequence]``; without them the last stage returns logits.
            modality_inputs: of this rank's encoders, unless ``encoded`` is set.

        Returns:
            Output of the language model's stage, or by encoder the tokens ``[tokens, hidden]``; and ``None``.

        Raises:
            ValueError: if an encoder's items do not become as many tokens as the samples have places for.
        """
        encoded = self.encode(modality_inputs) if self.encoded is None else self.encoded
        tokens = {name: self._towards_language(name, own) for name, own in encoded.items()}
        if self.language_model is None:
            return tokens, None
        if self.role.mode is RoleLayout.NON_COLOCATED:
            tokens = self.input_tensors
        return self._forward_language_module(input_ids, position_ids, None, None, labels, tokens)

    def encode(self, inputs: EncoderInputs) -> dict[str, torch.Tensor]:
        """The tokens ``[tokens, hidden]`` by encoder of this rank, none where inputs are blank."""
        tokens = {
            name: encoder(encoder_inputs=inputs.by_name[name]) for name, encoder in self.modality_submodules.items()
        }
        # still part of the graph: the encoder's gradients are zero, and not missing
        return {name: own[:0] if name in inputs.blank else own for name, own in tokens.items()}

    def num_encoder_tokens(self, name: str, bridge_parts: Mapping[str, list[int]]) -> int:
        """How many of the tokens that cross the bridge are those of this rank's encoder lane."""
        bridge = self.colocated_comms.get(name)
        return bridge.num_encoder_tokens(bridge_parts[name]) if bridge else sum(bridge_parts[name])

    def check_tokens(self, name: str, num_tokens: int, num_places: int, sample_ids: torch.Tensor | None = None) -> None:
        """Check that the items of this rank's lane became as many tokens as there are places.

        Args:
            name: of the encoder.
            num_tokens: that they became.
            num_places: in the samples' ``input_ids``.
            sample_ids: of these samples, if they are known.

        Raises:
            ValueError: if they did not.
        """
        if num_tokens != num_places:
            samples = "" if sample_ids is None else f"; its samples are {sample_ids.tolist()}"
            raise ValueError(
                f"the {name} of a microbatch became {num_tokens} tokens, but its input_ids have {num_places} places "
                f"for them (token {self.special_token_ids[name]}){samples}"
            )

    def _towards_language(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens of the lane of the language model, where that runs here too; otherwise ready to be sent."""
        if self.bridge_parts is None:
            return tokens
        # beside the language model a rank's lane of the encoder may be another one than that of its samples
        sample_ids = self._sample_ids if self.language_model is None else None
        self.check_tokens(name, len(tokens), self.num_encoder_tokens(name, self.bridge_parts), sample_ids)
        parts = self.bridge_parts[name]
        return self.colocated_comms[name].communicate(tokens, parts) if name in self.colocated_comms else tokens

    def get_text_embeddings(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, special_token_ids: Mapping[str, int]
    ) -> torch.Tensor:
        """Embeddings of text tokens; where counts are known, of all positions, so that none must be searched for."""
        if self.bridge_parts is None:
            return super().get_text_embeddings(input_ids, position_ids, special_token_ids)
        embedding = unwrap_model(self.language_model).embedding
        return embedding(input_ids=input_ids.reshape(1, -1), position_ids=position_ids.reshape(1, -1)).squeeze(1)

    def align_embeddings_by_token_positions(
        self,
        modality_embeddings: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        special_token_ids: Mapping[str, int],
    ) -> torch.Tensor:
        """Put the encoders' tokens in their places among the text; where counts are known, without reading values.

        megatron-core waits for the device twice for each encoder and once for the text: the device then runs dry.
        """
        if self.bridge_parts is None:
            return super().align_embeddings_by_token_positions(modality_embeddings, input_ids, special_token_ids)
        combined = modality_embeddings["text"]
        for name, special_token_id in special_token_ids.items():
            tokens = modality_embeddings[name]
            self.check_tokens(name, len(tokens), self._places[name], self._sample_ids)
            places = torch.nonzero_static(input_ids.flatten() == special_token_id, size=len(tokens)).squeeze(1)
            combined = combined.index_copy(0, places, tokens)
        return combined.unflatten(0, input_ids.shape).transpose(0, 1).contiguous()

    def set_is_first_microbatch(self) -> None:
        """Let layers in fp8 quantize their weights anew, which they otherwise keep from the microbatch before.

        megatron-core 0.19.2 asks the language model's config alone whether there are any, so that an encoder would go
        on with the weights that it began with.
        """
        for layer in self._fp8_layers:
            layer.is_first_microbatch = True

    @cached_property
    def _fp8_layers(self) -> list[torch.nn.Module]:
        return [layer for layer in self.modules() if hasattr(layer, "is_first_microbatch") and layer.config.fp8]

    def destroy(self) -> None:
        """Nothing: groups of bridges are the topology's, and may be those of modules and of the world."""

    def own_modules(self) -> dict[str, torch.nn.Module]:
        """The modules that run on this rank, by name, wrapped if they are."""
        modules = dict(self.modality_submodules.items())
        return modules if self.language_model is None else modules | {LANGUAGE: self.language_model}

    def trainable_parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        """This rank's trainable parameters, by module."""
        return {
            name: [parameter for parameter in module.parameters() if parameter.requires_grad]
            for name, module in self.own_modules().items()
        }

    def _share_tracker(self) -> None:
        """The language model's streams are current, each encoder switches to its own in its forward."""
        for name, submodule in self.modality_submodules.items():
            self.rngs[name].activate_in_forward(submodule)
        if LANGUAGE in self.rngs:
            self.rngs[LANGUAGE].make_current()


def build_model(
    description: DescribesModules, topology: Topology, *, dtype: torch.dtype, device: torch.device, seed: int
) -> HeteroMimoModel:
    """Build this rank's part of the model on ``device``, unwrapped.

    Args:
        description: names and specs of the modules.
        topology: grids and groups; collective where colocated modules differ in dp.
        dtype: dtype of the parameters.
        device: device of the parameters.
        seed: the same on every rank.

    Raises:
        LayoutError: if stages of a pipeline would have to share weights.
    """
    specs = {
        name: description.module_spec(name, layout, topology.groups.get(name), dtype)
        for name, layout in topology.layout.modules.items()
    }
    pp = topology.layout.modules[LANGUAGE].pp
    if pp > 1 and specs[LANGUAGE].params.get(_TIED):
        raise LayoutError(
            f"{LANGUAGE} has {_TIED}=True, but with pp {pp} they are on different ranks: make it False, or pp 1"
        )
    config = MimoModelConfig(
        language_model_spec=specs.pop(LANGUAGE),
        modality_submodules_spec=specs,
        special_token_ids=dict(description.special_token_ids),
        module_to_grid_map=topology.grids,
    )
    return HeteroMimoModel(config, topology, seed).to(device)
