"""What the layers of the RADIO encoder cost: weights, operations, kept activations, traffic.

Its sequences are not cut by tensor parallelism: ranks keep all of what is between its linear layers.
"""

from typing import TYPE_CHECKING

from mimo_strategy.layout import ModuleLayout
from mimo_strategy.planning.cost import Layer, Transfer, Weight, Work, Workload

if TYPE_CHECKING:
    from modules.radio import RadioConfig

_FLOAT = 4


def embedding_work(config: "RadioConfig") -> Work:
    """Operations that make the patches of one image."""
    return Work(matmul=2 * config.patches * 3 * config.patch_size**2 * config.hidden_size)


def layer_work(config: "RadioConfig") -> Work:
    """Operations of one layer's forward pass for one image."""
    width, tokens = config.hidden_size, config.patches + config.class_tokens
    linear = 4 * width * width + 2 * width * config.ffn_hidden_size
    return Work(matmul=2 * tokens * linear, attention=4 * tokens * tokens * width)


def encoder_layers(config: "RadioConfig", layout: ModuleLayout, images: int, workload: Workload) -> tuple[Layer, ...]:
    """Cost of the encoder for ``images``."""
    width, ffn, size, tp = config.hidden_size, config.ffn_hidden_size, workload.element_size, layout.tp
    length = config.patches + config.class_tokens
    tokens = images * length
    hidden = tokens * width * size
    reduce = (Transfer("tp", "all_reduce", hidden),) if tp > 1 else ()
    pixels = 3 * config.patch_size**2
    embedding = Layer(
        "patches",
        (
            Weight(config.class_tokens * width),
            Weight((config.max_image_size // config.patch_size) ** 2 * width),
            Weight(width * pixels, "tp"),
        ),
        work=embedding_work(config).times(images),
        kept=images * config.patches * pixels * size,
        forward=reduce,
        backward=reduce,
        operations=9,
    )
    scores = config.num_attention_heads
    if not workload.fused:
        scores *= length * (_FLOAT + (size if size < _FLOAT else 0)) / _FLOAT
    layer = Layer(
        "attention and mlp",
        (
            *_norm(width),
            Weight(width * width, "tp"),
            Weight(width),
            Weight(3 * width * width, "tp"),
            Weight(3 * width, "tp"),
            *_norm(width),
            Weight(ffn * width, "tp"),
            Weight(ffn, "tp"),
            Weight(ffn * width, "tp"),
            Weight(width),
        ),
        work=layer_work(config).times(images),
        # in and out of both norms; of attention and MLP what lies between their linear layers
        kept=tokens * (4 * width * size + 4 * _FLOAT + ((4 * width + 2 * ffn) * size + scores * _FLOAT) / tp),
        kept_input=hidden,
        forward=2 * reduce,
        backward=2 * reduce,
        operations=19,
    )
    output = Layer("norm", _norm(width), kept=hidden + tokens * 2 * _FLOAT, operations=5)
    return (embedding, *(layer for _ in range(config.num_layers)), output)


def _norm(width: int) -> tuple[Weight, Weight]:
    return Weight(width), Weight(width)
