"""fp8 without a GPU: what is refused, before ranks start or on all of them; ``test_gpu.py`` trains with it."""

from typing import Any

import pytest
from lightning.pytorch import Callback
from tiny_runs import digits, make_trainer, vision_language
from torch.utils.data import DataLoader

from datamodules import collate
from mimo_strategy import Layout, LayoutError, MimoHeteroStrategy
from mimo_strategy import ModuleParallel as P
from mimo_strategy.launcher import CheckingLauncher
from mimo_strategy.precision import MegatronPrecision
from mimo_strategy.runtime.data_parallel import module_config
from mimo_strategy.testing import run_on_ranks
from modules import MambaMoE, MambaMoEConfig, NemotronVLM, RadioConfig, RadioEncoder

COLOCATED = {"images": P(dp=2), "language": P(dp=2, ep=2)}
APART = {"images": P(dp=1), "language": P(dp=1, rank_offset=1)}
# of which a part of a Mamba projection on two ranks is a multiple of 16 too
LANGUAGE_SIZES = {"mamba_num_heads": 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_tokens": 2}, "16 patches [+] 2 class_tokens; class_tokens 16 would fit"),
        ({"class_tokens": 20, "image_height": 32}, "32 patches [+] 20 class_tokens; class_tokens 32 would fit"),
        ({"class_tokens": 16, "ffn_hidden_size": 136}, "multiples of 16, got ffn_hidden_size 136"),
        ({"class_tokens": 16, "hidden_size": 72}, "multiples of 16, got hidden_size 72"),
    ],
)
def test_sizes_of_an_encoder_are_checked(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RadioConfig.tiny(fp8=True, **changes)
    RadioConfig.tiny(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "width of the Mamba projection 328"),
        ({"pattern": "*", "hidden_size": 72}, "hidden_size 72"),
        ({"pattern": "*", "kv_channels": 6}, "got attention width 24$"),
        ({"pattern": "*", "num_query_groups": 1, "kv_channels": 20}, "width of queries, keys and values 120"),
        ({"pattern": "-", "ffn_hidden_size": 100}, "ffn_hidden_size 100"),
        ({"pattern": "E", "expert_ffn_hidden_size": 60}, "got expert_ffn_hidden_size 60"),
        ({"pattern": "E", "shared_expert_ffn_hidden_size": 8}, "shared_expert_ffn_hidden_size 8"),
    ],
)
def test_sizes_of_a_language_model_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MambaMoEConfig.tiny(fp8=True, **changes)
    MambaMoEConfig.tiny(**changes)


def test_the_reference_sizes_fit() -> None:
    MambaMoEConfig(fp8=True)
    RadioConfig(image_height=1024, image_width=2048, class_tokens=16, fp8=True)


@pytest.mark.parametrize(
    ("changes", "parallel", "message"),
    [
        ({"mamba_num_heads": 16}, P(tp=2), "tp 2 does not divide width of the Mamba projection / 16 [(]fp8[)] 37"),
        (
            {"pattern": "E", "expert_ffn_hidden_size": 16},
            P(tp=2, etp=2),
            "etp 2 does not divide expert_ffn_hidden_size / 16",
        ),
    ],
)
def test_parts_on_ranks_are_checked(changes: dict[str, Any], parallel: P, message: str) -> None:
    config = MambaMoEConfig.tiny(**changes)
    Layout.resolve(MambaMoE(config).module_sizes(), 2, {"language": parallel})
    in_fp8 = MambaMoE(MambaMoEConfig.tiny(fp8=True, **changes))
    with pytest.raises(LayoutError, match=message):
        Layout.resolve(in_fp8.module_sizes(), 2, {"language": parallel})


def test_parts_of_an_encoder_are_checked() -> None:
    encoder = RadioEncoder(RadioConfig.tiny(fp8=True, class_tokens=16, num_attention_heads=8))
    assert encoder.sizes().tp_divides["hidden_size / 16 (fp8)"] == 4
    with pytest.raises(LayoutError, match=r"tp 8 does not divide hidden_size / 16 [(]fp8[)] 4"):
        Layout.resolve({"language": encoder.sizes()}, 8, {"language": P(tp=8)})


def in_fp8(images: bool, language: bool) -> NemotronVLM:
    return NemotronVLM(
        RadioConfig.tiny(class_tokens=16, fp8=images),
        MambaMoEConfig.tiny(fp8=language, **LANGUAGE_SIZES),
        image_token_id=2,
        end_token_id=1,
    )


@pytest.mark.parametrize(("images", "language"), [(True, False), (False, True)])
@pytest.mark.parametrize(
    ("precision", "message"),
    [("bf16-mixed", "needs a GPU and Transformer Engine"), ("32-true", "bf16-mixed and bf16-true, .* torch.float32")],
)
def test_a_machine_without_it_is_refused_before_another_rank_starts(
    images: bool, language: bool, precision: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckingLauncher, "_call_children_scripts", lambda self: pytest.fail("another rank starts"))
    trainer = make_trainer(MimoHeteroStrategy(COLOCATED), devices=2, precision=precision, max_steps=1)
    with pytest.raises(ValueError, match=message):
        trainer.fit(in_fp8(images, language), DataLoader(digits().train_dataset, 8, collate_fn=collate))


def test_a_part_alone_is_refused_too() -> None:
    def refusal() -> str:
        with pytest.raises(ValueError, match="fp8=True is for the precisions") as error:
            RadioEncoder(RadioConfig.tiny(class_tokens=16, fp8=True)).configure_model()
        return str(error.value)

    assert run_on_ranks(refusal, 1)


@pytest.mark.parametrize("precision", ["transformer-engine", "transformer-engine-float16"])
def test_the_precision_of_lightning_names_the_settings(precision: str) -> None:
    with pytest.raises(ValueError, match=r"RadioConfig\(fp8=True\) and MambaMoEConfig\(fp8=True\)"):
        MegatronPrecision(precision)


class SaysFp8(Callback):
    """Lets configs say fp8 once the modules are built, which then run as before: without a GPU there is none."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def on_train_start(self, trainer: Any, module: Any) -> None:
        model = module.runtime.model
        self.layers = {}
        for name, part in model.own_modules().items():
            config = module_config(part)
            config.fp8 = "hybrid" if name in self._names else None
            self.layers[name] = next(layer for layer in part.modules() if getattr(layer, "config", None) is config)
            # as Transformer Engine's are after a forward pass
            self.layers[name].is_first_microbatch = False
        if "language" in self._names:
            model.config.fp8, model.config.fp8_recipe = "hybrid", "tensorwise"


@pytest.mark.parametrize("modules", [COLOCATED, APART], ids=["colocated", "non-colocated"])
def test_tokens_that_do_not_fit_are_refused_on_every_rank(modules: dict[str, P]) -> None:
    def refusal() -> str:
        samples = 2 * modules["language"].dp
        trainer = make_trainer(MimoHeteroStrategy(modules, 2), max_steps=1, callbacks=[SaysFp8("language")])
        with pytest.raises(ValueError, match="multiples of 16 tokens") as error:
            trainer.fit(vision_language(), DataLoader(digits().train_dataset, samples, collate_fn=collate))
        return str(error.value)

    told = run_on_ranks(refusal, 2)
    assert told[0] == told[1]
    assert told[0].endswith("a microbatch of language has 1 sample(s) of 24 tokens, over tp 1; pad them to 32")


@pytest.mark.parametrize("name", ["images", "language"])
def test_weights_are_quantized_anew_in_each_step(name: str) -> None:
    def flags() -> dict[str, bool]:
        says = SaysFp8(name)
        trainer = make_trainer(MimoHeteroStrategy(COLOCATED, 2), max_steps=1, callbacks=[says])
        trainer.fit(vision_language(), DataLoader(digits().train_dataset, 8, collate_fn=collate))
        return {of: layer.is_first_microbatch for of, layer in says.layers.items()}

    for of_rank in run_on_ranks(flags, 2):
        assert of_rank == {"images": name == "images", "language": name == "language"}
