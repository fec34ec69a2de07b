"""Weights alone: of some modules, with names left over, and in a single file that other tools read."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from checkpoint_runs import COLOCATED, DISJOINT, data, every_step, fit, model, strategy
from lightning.pytorch import seed_everything
from tiny_runs import digits, make_trainer, read_weights

from mimo_strategy import MimoHeteroStrategy
from mimo_strategy.checkpoint import CheckpointError, export_weights, import_weights, save_weights
from mimo_strategy.testing import RankError, run_on_ranks
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

PREFIXES = {"images": "modality_submodules.images.", "language": "language_model."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights of a trained model as ``step=2.ckpt``, ``weights.safetensors`` and ``imported.ckpt``."""
    folder = tmp_path_factory.mktemp("weights")
    run_on_ranks(lambda: fit(strategy(COLOCATED), 2, callbacks=(every_step(folder),)), 4)

    def convert():
        dist.destroy_process_group()
        export_weights(folder / "step=2.ckpt", folder / "weights.safetensors")
        import_weights(folder / "weights.safetensors", folder / "imported.ckpt")
        assert not dist.is_initialized()

    run_on_ranks(convert, 1)
    return folder


@pytest.fixture(scope="module")
def trained(folder) -> dict[str, torch.Tensor]:
    weights = read_weights(folder / "step=2.ckpt")
    return {name: weight for name, weight in weights.items() if name.startswith(tuple(PREFIXES.values()))}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if left[name].dtype != right[name].dtype or not left[name].equal(right[name])] == []


def test_other_tools_read_the_exported_file(folder, trained):
    exported = safetensors.torch.load_file(folder / "weights.safetensors")
    assert_equal(exported, trained)
    assert "language_model.decoder.layers.2.mlp.experts.experts.3.linear_fc1.weight" in exported
    assert "modality_submodules.images.encoders.radio.radio_model.decoder.layers.1.mlp.linear_fc2.weight" in exported


def test_an_imported_file_is_a_checkpoint(folder, trained):
    assert_equal(read_weights(folder / "imported.ckpt"), trained)

    def validate(name):
        trainer = make_trainer(strategy(), limit_val_batches=2)
        return trainer.validate(model(), data(), ckpt_path=folder / name, verbose=False)[0]["val_loss"]

    losses = [run_on_ranks(validate, 2, name)[0] for name in ("step=2.ckpt", "imported.ckpt")]
    assert losses[0] == losses[1] < 4


def start(strategy, source: Path, modules: list[str] | None, end: Path) -> None:
    """Make a model that starts from ``source``, and write its weights before it is trained."""
    seed_everything(9, verbose=False)
    module = model()
    module.load_weights(source, modules=modules)
    make_trainer(strategy, max_steps=0).fit(module, data())
    save_weights(end, module.model)


CHECKPOINT, FILE = "step=2.ckpt", "weights.safetensors"


@pytest.mark.parametrize(
    ("source", "layout", "world_size", "modules"),
    [
        pytest.param(CHECKPOINT, DISJOINT, 3, ["images"], id="disjoint-images"),
        pytest.param(CHECKPOINT, DISJOINT, 3, ["language"], id="disjoint-language"),
        pytest.param(CHECKPOINT, "plain", 1, ["images", "language"], id="plain-all"),
        pytest.param(FILE, COLOCATED, 4, None, id="file-colocated-all"),
        pytest.param(FILE, "plain", 1, ["images"], id="file-plain-images"),
    ],
)
def test_modules_start_from_given_weights(folder, trained, tmp_path, source, layout, world_size, modules):
    used = "auto" if layout == "plain" else strategy(layout)
    run_on_ranks(start, world_size, used, folder / source, modules, tmp_path / "end")
    weights = read_weights(tmp_path / "end")
    assert weights.keys() == trained.keys()
    taken = tuple(PREFIXES[module] for module in modules or PREFIXES)
    same = {name for name in trained if weights[name].equal(trained[name])}
    assert {name for name in trained if name.startswith(taken)} <= same
    # of the other modules only what is initialised alike and cannot have been trained
    others = [name for name in trained if not name.startswith(taken) and trained[name].numel() > 4]
    assert not same & set(others)


def test_one_module_starts_from_a_model_whose_other_module_differs(folder):
    def run():
        module = model(hidden_size=32)
        module.load_weights(folder / "step=2.ckpt", modules=["images"], strict=False)
        make_trainer(strategy(), max_steps=0).fit(module, data())

    # the encoder's projection goes into the language model
    with pytest.raises(RankError, match=r"input_projections.0.encoder.weight: \[64, 256\] in the .*, \[32, 256\] in"):
        run_on_ranks(run, 1)

    def fits():
        module = model(pattern="M-")
        module.load_weights(folder / "step=2.ckpt", modules=["images"])
        make_trainer(strategy(), max_steps=0).fit(module, data())

    run_on_ranks(fits, 1)


def test_what_is_missing_or_unexpected_is_listed_exactly(folder, recwarn):
    def run(strict):
        module = model(pattern="M*E-*")
        module.load_weights(folder / "step=2.ckpt", strict=strict)
        make_trainer(strategy(), max_steps=0).fit(module, data())
        return [str(warning.message) for warning in recwarn if "Loaded" in str(warning.message)]

    prefix = "language_model.decoder.layers.4."
    names = ("input_layernorm.weight", "self_attention.linear_proj.weight", "self_attention.linear_qkv.weight")
    missing = "".join(f"\n  {prefix}{name}: not in the checkpoint" for name in names)
    assert run_on_ranks(run, 1, False) == [[f"Loaded {folder / 'step=2.ckpt'} without{missing}"]]
    with pytest.raises(RankError, match="does not fit the model:" + missing.replace("[", r"\[")):
        run_on_ranks(run, 1, True)


def test_a_trainer_that_is_not_strict_goes_on_without_what_is_missing(folder, recwarn):
    def run():
        module = model(pattern="M*E")
        module.strict_loading = False
        trainer = make_trainer(strategy(), limit_val_batches=1)
        trainer.validate(module, data(), ckpt_path=folder / "step=2.ckpt", verbose=False)
        return [str(warning.message) for warning in recwarn if "Loaded" in str(warning.message)]

    ((message,),) = run_on_ranks(run, 1)
    assert "language_model.decoder.layers.3.mlp.linear_fc1.weight: not in the model" in message
    assert message.count("\n") == 3


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 64], ids=["empty", "other", "noise"])
def test_what_is_no_file_of_weights_is_refused_and_named(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)

    def run():
        module = model()
        module.load_weights(path)
        make_trainer(strategy(), max_steps=0).fit(module, data())

    with pytest.raises(RankError, match=r"CheckpointError: .*weights\.safetensors"):
        run_on_ranks(run, 1)


def test_an_unknown_module_is_refused():
    def run():
        module = model()
        module.load_weights("anything", modules=["sounds"])
        make_trainer(strategy(), max_steps=0).fit(module, data())

    with pytest.raises(RankError, match=r"modules are \['images', 'language'\], cannot load \['sounds'\]"):
        run_on_ranks(run, 1)


def test_a_damaged_checkpoint_is_not_exported(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no .*step=9\.ckpt"):
        export_weights(folder / "step=9.ckpt", tmp_path / "weights.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_half_precision_reads_what_single_precision_wrote_and_back(folder, tmp_path):
    def go_on(start, last, precision):
        return fit(strategy(), last, start, callbacks=(every_step(tmp_path),), precision=precision).losses

    (single,) = run_on_ranks(go_on, 1, folder / "step=2.ckpt", 4, "32-true")
    (half,) = run_on_ranks(go_on, 1, folder / "step=2.ckpt", 3, "bf16-mixed")
    (back,) = run_on_ranks(go_on, 1, tmp_path / "step=3-v1.ckpt", 4, "32-true")
    assert half == pytest.approx(single[:1], rel=0.02)
    assert half != single[:1]
    assert back == pytest.approx(single[1:], rel=0.02)


class Sized(NemotronVLM):
    """Keeps its arguments in checkpoints."""

    def __init__(self, hidden_size: int, label: str) -> None:
        vocabulary = digits().vocabulary
        language = MambaMoEConfig.tiny(pattern="*E", hidden_size=hidden_size)
        super().__init__(RadioConfig.tiny(), language, vocabulary.image_token_id, vocabulary.end_token_id)
        self.save_hyperparameters()
        self.label = label


def test_a_model_is_made_from_its_checkpoint(tmp_path):
    path = tmp_path / "sized.ckpt"

    def validate(modules, module):
        trainer = make_trainer(MimoHeteroStrategy(modules), limit_val_batches=2)
        (metrics,) = trainer.validate(module, data(), verbose=False)
        trainer.save_checkpoint(path)
        return module.label, module.hparams["hidden_size"], metrics["val_loss"]

    label, hidden_size, loss = run_on_ranks(lambda: validate(COLOCATED, Sized(32, label="first")), 4)[0]
    assert (label, hidden_size) == ("first", 32)
    again = run_on_ranks(lambda: validate(DISJOINT, Sized.load_from_checkpoint(path, label="second")), 3)[0]
    assert again == ("second", 32, pytest.approx(loss, rel=1e-5))


def test_a_model_is_not_made_from_any_folder(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        Sized.load_from_checkpoint(tmp_path, hidden_size=32, label="")
