"""An image encoder and its projector as one module, for any language model."""

import torch
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec

from mimo_strategy.layout import ModuleLayout, ModuleSizes
from mimo_strategy.planning.cost import ModuleCost, Workload
from modules.projector import Projector
from modules.radio import RadioEncoder


def vision_sizes(encoder: RadioEncoder, projector: Projector) -> ModuleSizes:
    """The sizes that limit the layout of both together."""
    return ModuleSizes(tp_divides={**encoder.sizes().tp_divides, **projector.sizes().tp_divides})


def vision_spec(
    encoder: RadioEncoder,
    projector: Projector,
    layout: ModuleLayout,
    groups: ProcessGroupCollection | None,
    dtype: torch.dtype,
) -> ModuleSpec:
    """How megatron-core builds both; the arguments are those of ``MimoModule.module_spec``.

    ``MimoModule.encoder_inputs`` must give the encoder's inputs under the name ``radio``.
    """
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params={"pg_collection": groups},
        submodules={
            "encoders": {"radio": encoder.spec(layout, groups, dtype)},
            "input_projections": [projector.spec(layout, groups, dtype)],
        },
    )


def vision_cost(
    encoder: RadioEncoder, projector: Projector, layout: ModuleLayout, num_images: int, workload: Workload
) -> ModuleCost:
    """What both cost together for ``num_images`` of a lane's microbatch."""
    tokens = num_images * encoder.config.tokens_per_image
    layers = encoder.layers(layout, num_images, workload) + projector.layers(layout, tokens, workload)
    return ModuleCost(
        (layers,),
        sent=tokens * projector.config.output_size * workload.element_size,
        recompute=encoder.config.recompute_layers,
    )
