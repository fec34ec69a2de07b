"""Each module alone in one process: what it computes, and which sizes it takes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mimo_strategy.testing import run_on_ranks
from modules import (
    NEMOTRON_20_LAYERS,
    NEMOTRON_54_LAYERS,
    MambaMoE,
    MambaMoEConfig,
    NemotronVLM,
    Projector,
    ProjectorConfig,
    RadioConfig,
    RadioEncoder,
)

PATTERNS = ["M", "*", "-", "E", "MM", "*E", "M*-ME", "E-*M"]


def alone(function: Callable[[], Any]) -> Any:
    """What ``function`` returns in a process of its own, which its modules may initialise as they need."""
    return run_on_ranks(function, 1)[0]


def radio_config(**changes: Any) -> RadioConfig:
    return RadioConfig(
        **{
            "image_height": 16,
            "image_width": 24,
            "patch_size": 4,
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "ffn_hidden_size": 16,
            "class_tokens": 3,
            "max_image_size": 32,
        }
        | changes
    )


def built(module: RadioEncoder | Projector | MambaMoE | NemotronVLM):
    torch.manual_seed(0)
    module.configure_model()
    return module


def images(count: int, config: RadioConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, config.image_height, config.image_width, generator=generator)


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(2))


def gradients(module: torch.nn.Module, output: torch.Tensor) -> dict[str, float | None]:
    """Largest gradient of each parameter, for a loss that weighs all outputs differently."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * weights).sum().backward()
    return {
        name: None if parameter.grad is None else parameter.grad.abs().max().item()
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize("pixel_shuffle", [1, 2])
@pytest.mark.parametrize("class_tokens", [1, 3])
def test_radio_drops_class_tokens_and_shuffles_pixels(pixel_shuffle, class_tokens):
    config = radio_config(pixel_shuffle=pixel_shuffle, class_tokens=class_tokens)

    def run():
        encoder = built(RadioEncoder(config))
        patches = []
        encoder.model.radio_model.register_forward_hook(lambda module, args, output: patches.append(output))
        with torch.no_grad():
            return encoder(images(2, config)), *patches

    tokens, patches = alone(run)
    rows, columns = 16 // 4, 24 // 4
    assert patches.shape == (2, class_tokens + rows * columns, 8)
    expected = []
    for row in range(0, rows, pixel_shuffle):
        for column in range(0, columns, pixel_shuffle):
            square = [
                patches[:, class_tokens + (row + down) * columns + column + right]
                for down in range(pixel_shuffle)
                for right in range(pixel_shuffle)
            ]
            expected.append(torch.cat(square, dim=-1))
    assert torch.equal(tokens, torch.stack(expected, dim=1))
    assert tokens.shape == (2, config.tokens_per_image, config.output_size)


def test_radio_sees_every_pixel_and_tells_places_apart():
    config = radio_config()

    def run():
        encoder = built(RadioEncoder(config))
        pixels = images(1, config).requires_grad_()
        flat = encoder(torch.ones_like(pixels)).detach()
        encoder(pixels).square().sum().backward()
        return pixels.grad, flat

    gradient, flat = alone(run)
    assert (gradient != 0).all()
    assert not torch.allclose(flat[0, 0], flat[0, 1], atol=1e-3), "positions are not embedded"


def test_radio_position_crops_are_random_in_training_only_if_asked_for():
    def run(config):
        encoder = built(RadioEncoder(config)).train()
        return [encoder(images(1, config)).detach() for _ in range(2)]

    first, second = alone(lambda: run(radio_config()))
    assert torch.equal(first, second)
    first, second = alone(lambda: run(radio_config(random_position_crops=True)))
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("kind", ["affine", "mlp"])
def test_projector(kind):
    config = ProjectorConfig(input_size=12, output_size=8, kind=kind)

    def run():
        projector = built(Projector(config))
        tokens = torch.randn(2, 5, 12)
        with torch.no_grad():
            weights = list(projector.parameters())
            hidden = tokens @ weights[0].T
            if kind == "mlp":
                hidden = hidden.relu().square() @ weights[1].T
            return projector(tokens), hidden, [tuple(weight.shape) for weight in weights]

    projected, expected, shapes = alone(run)
    assert shapes == {"affine": [(8, 12)], "mlp": [(48, 12), (8, 48)]}[kind]
    torch.testing.assert_close(projected, expected)


@pytest.mark.parametrize(
    ("make", "make_input"),
    [
        pytest.param(lambda: RadioEncoder(radio_config()), lambda: images(2, radio_config()), id="RadioEncoder"),
        pytest.param(lambda: Projector(ProjectorConfig(8, 4)), lambda: torch.randn(2, 3, 8), id="Projector-affine"),
        pytest.param(lambda: Projector(ProjectorConfig(8, 4, "mlp")), lambda: torch.randn(2, 3, 8), id="Projector-mlp"),
        *(
            pytest.param(
                lambda pattern=pattern: MambaMoE(MambaMoEConfig.tiny(pattern=pattern)),
                # each word of the vocabulary, so that each of its embeddings has a gradient
                lambda: {"input_ids": torch.arange(64).expand(2, -1)},
                id=f"MambaMoE-{pattern}",
            )
            for pattern in PATTERNS
        ),
    ],
)
def test_gradients_reach_every_parameter(make, make_input):
    def run():
        module = built(make())
        return gradients(module, module(make_input()))

    found = alone(run)
    assert found
    assert {name: largest for name, largest in found.items() if not largest} == {}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_mamba_moe_is_causal(pattern):
    changed = 5

    def run():
        model = built(MambaMoE(MambaMoEConfig.tiny(pattern=pattern))).eval()
        tokens = random_tokens(2, 12)
        others = tokens.clone()
        others[:, changed] = (tokens[:, changed] + 1) % 64
        with torch.no_grad():
            return model({"input_ids": tokens}), model({"input_ids": others})

    left, right = alone(run)
    assert left.shape == (2, 12, 64)
    differs = (left - right).abs().amax(dim=(0, 2)) > 1e-5
    assert not differs[:changed].any(), "a token is seen before it comes"
    assert differs[changed]
    mixes = bool(set("M*") & set(pattern))
    assert differs[changed + 1 :].all() if mixes else not differs[changed + 1 :].any()


def test_mamba_moe_loss_is_the_cross_entropy_of_its_logits():
    def run():
        model = built(MambaMoE(MambaMoEConfig.tiny()))
        batch = {"input_ids": random_tokens(2, 8)}
        labels = batch["input_ids"].roll(-1, dims=1)
        with torch.no_grad():
            return model(batch, labels=labels), model(batch), labels

    losses, logits, labels = alone(run)
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(losses, expected)


def test_every_token_takes_the_experts_that_it_scores_highest():
    config = MambaMoEConfig.tiny(pattern="E", experts_per_token=3, num_experts=8)

    def run():
        router = built(MambaMoE(config)).model.language_model.decoder.layers[0].mlp.router
        hidden = torch.randn(6, 1, config.hidden_size)
        with torch.no_grad():
            weights, chosen = router(hidden)
            return weights, chosen, (hidden[:, 0] @ router.weight.T).sigmoid()

    weights, chosen, scores = alone(run)
    assert chosen.sum(dim=1).tolist() == [3] * 6
    best = torch.zeros_like(chosen).scatter(1, scores.topk(3).indices, True)
    assert torch.equal(chosen, best)
    normalised = torch.where(best, scores, 0) / torch.where(best, scores, 0).sum(dim=1, keepdim=True)
    torch.testing.assert_close(weights, normalised * config.router_scaling)


def test_images_take_the_places_of_their_tokens():
    """An image shows from its first token on, and only in its own sample."""
    radio = radio_config(image_width=16)

    def run():
        language = MambaMoEConfig.tiny(pattern="*")
        model = built(NemotronVLM(radio, language, image_token_id=2, end_token_id=1)).eval()
        tokens = random_tokens(2, 16)
        tokens[0, 1:5] = tokens[0, 7:11] = tokens[1, 3:7] = 2
        pixels = images(3, radio)
        with torch.no_grad():
            for index in range(3):
                others = pixels.clone()
                others[index] += 1
                left, right = (
                    model({"input_ids": tokens, "images": each, "num_images": torch.tensor([2, 1])})
                    for each in (pixels, others)
                )
                yield ((left - right).abs().amax(dim=-1) > 1e-6).tolist()

    first, second, third = alone(lambda: list(run()))
    unseen = [False] * 16
    assert first == [[False] * 1 + [True] * 15, unseen]
    assert second == [[False] * 7 + [True] * 9, unseen]
    assert third == [unseen, [False] * 3 + [True] * 13]


def num_parameters(module) -> int:
    return alone(lambda: sum(parameter.numel() for parameter in built(module).parameters()))


def test_reference_sizes_of_radio():
    config = RadioConfig()
    assert (config.num_layers, config.hidden_size, config.num_attention_heads) == (32, 1280, 16)
    assert (config.ffn_hidden_size, config.patch_size, config.class_tokens) == (5120, 16, 8)
    assert config.max_image_size == 2048
    assert (config.tokens_per_image, config.output_size) == (256, 5120)


def test_parameters_of_a_reference_radio_layer():
    width, inner = 1280, 5120
    one, two = (num_parameters(RadioEncoder(RadioConfig(num_layers=layers))) for layers in (1, 2))
    linear = 4 * width * width + 2 * width * inner
    assert two - one == linear + (3 + 1 + 1) * width + inner + 2 * 2 * width
    tables = (2048 // 16) ** 2 * width + 8 * width + 3 * 16 * 16 * width
    assert one - (two - one) == tables + 2 * width


@pytest.mark.parametrize(
    ("pattern", "mamba", "experts", "attention"),
    [
        pytest.param(NEMOTRON_20_LAYERS, 9, 8, 3, id="20-layers"),
        pytest.param(NEMOTRON_54_LAYERS, 23, 23, 8, id="54-layers"),
    ],
)
def test_reference_patterns(pattern, mamba, experts, attention):
    assert len(pattern) == mamba + experts + attention
    assert [pattern.count(symbol) for symbol in "ME*"] == [mamba, experts, attention]


WIDTH = 2688
REFERENCE_LAYERS = {
    # in (z, x, B, C, dt), convolution and its bias, dt_bias, A and D, norms and out
    "M": WIDTH * (2 * 4096 + 2 * 8 * 128 + 64)
    + (4 + 1) * (4096 + 2 * 8 * 128)
    + 3 * 64
    + (4096 + WIDTH)
    + 4096 * WIDTH,
    # query, key and value, out, norm
    "*": WIDTH * (32 + 2 * 8) * 128 + 32 * 128 * WIDTH + WIDTH,
    # two experts, the shared one, router, norm
    "E": 2 * 2 * WIDTH * 1856 + 2 * WIDTH * 3712 + 2 * WIDTH + WIDTH,
}


@pytest.mark.parametrize("symbol", REFERENCE_LAYERS)
def test_parameters_of_a_reference_language_layer(symbol):
    config = MambaMoEConfig(pattern=symbol, vocab_size=8, num_experts=2, experts_per_token=2)
    around = 2 * 8 * WIDTH + WIDTH
    assert num_parameters(MambaMoE(config)) == around + REFERENCE_LAYERS[symbol]


def test_reference_sizes_of_the_language_model():
    config = MambaMoEConfig()
    assert config.pattern == NEMOTRON_20_LAYERS
    assert (config.vocab_size, config.max_sequence_length, config.hidden_size) == (131_072, 8192, WIDTH)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (32, 8, 128)
    assert (config.mamba_num_heads, config.mamba_head_dim) == (64, 64)
    assert (config.mamba_num_groups, config.mamba_state_dim) == (8, 128)
    assert (config.num_experts, config.experts_per_token) == (128, 6)
    assert (config.expert_ffn_hidden_size, config.shared_expert_ffn_hidden_size) == (1856, 3712)


@pytest.mark.parametrize(
    ("pattern", "pp", "stages"),
    [
        ("M*-ME*", 1, "M*-ME*"),
        ("M*-ME*", 2, "M*-|ME*"),
        ("M*-ME*", 3, "M*|-M|E*"),
        ("M*|-ME*", 1, "M*-ME*"),
        ("M*|-ME*", 2, "M*|-ME*"),
    ],
)
def test_stages(pattern, pp, stages):
    assert MambaMoEConfig.tiny(pattern=pattern).stages(pp) == stages


@pytest.mark.parametrize(
    ("pattern", "possible"),
    [("M*-ME*", {1, 2, 3, 6}), ("M*-ME", {1, 5}), ("M*|-ME", {1, 2}), ("M|*|E", {1, 3})],
)
def test_possible_numbers_of_stages(pattern, possible):
    sizes = MambaMoE(MambaMoEConfig.tiny(pattern=pattern)).module_sizes()
    assert sizes["language"].pp_stages == possible


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda: RadioConfig(image_height=500),
            "image_height 500 is no multiple of patch_size 16 x pixel_shuffle 2 = 32; valid: 480 or 512",
            id="height",
        ),
        pytest.param(lambda: RadioConfig(image_width=31), "valid: 32", id="width-below-one-token"),
        pytest.param(
            lambda: RadioConfig(image_width=2080),
            "image_width 2080 exceeds max_image_size 2048",
            id="too-wide",
        ),
        pytest.param(lambda: ProjectorConfig(4, 4, kind="conv"), "'affine' or 'mlp', got 'conv'", id="projector"),
        pytest.param(lambda: MambaMoEConfig(pattern="MxE?"), "unknown: ? x", id="symbols"),
        pytest.param(lambda: MambaMoEConfig(pattern=""), "must be made of M * - E", id="no-layer"),
        pytest.param(lambda: MambaMoEConfig(pattern="|"), "must be made of M * - E", id="only-a-mark"),
        pytest.param(lambda: MambaMoEConfig(pattern="M||E"), "a stage without layers", id="empty-stage"),
        pytest.param(
            lambda: MambaMoEConfig(num_query_groups=5),
            "num_query_groups 5 does not divide num_attention_heads 32",
            id="query-groups",
        ),
        pytest.param(
            lambda: MambaMoEConfig(mamba_num_groups=7),
            "mamba_num_groups 7 does not divide mamba_num_heads 64",
            id="mamba-groups",
        ),
        pytest.param(
            lambda: MambaMoEConfig(num_experts=4),
            "experts_per_token 6 must be between 1 and num_experts 4",
            id="too-few-experts",
        ),
        pytest.param(
            lambda: MambaMoEConfig(experts_per_token=0),
            "must be between 1 and num_experts 128",
            id="no-expert",
        ),
        pytest.param(
            lambda: NemotronVLM(RadioConfig(), MambaMoEConfig(max_sequence_length=256), 511, 1),
            "512 x 512 pixels becomes 256 tokens, which leaves no room for text in a sequence of 256",
            id="image-fills-sequence",
        ),
        pytest.param(
            lambda: NemotronVLM(RadioConfig.tiny(), MambaMoEConfig.tiny(), 64, 1),
            "image_token_id 64 is not in the vocabulary of 64",
            id="image-token",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError) as refusal:
        make()
    assert message in str(refusal.value)


def test_experts_do_not_matter_without_a_layer_of_them():
    assert MambaMoEConfig(pattern="M*", num_experts=0).layers == "M*"


def test_a_part_says_that_it_must_be_built_first():
    with pytest.raises(RuntimeError, match="call configure_model"):
        Projector(ProjectorConfig(4, 4))(torch.zeros(1, 4))
