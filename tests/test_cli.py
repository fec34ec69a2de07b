"""``mimo``: configurations, overrides, what is told of wrong ones, and runs from a shell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cli_data import TenDigits
from lightning.pytorch.cli import LightningCLI
from matplotlib.image import imread
from safetensors import safe_open

from datamodules import DigitsDataModule, MockImageDataModule
from mimo_strategy import DistributedDataParallelConfig, Layout, ModuleParallel
from mimo_strategy.callbacks.captions import written_positions
from mimo_strategy.cli.errors import UsageError
from mimo_strategy.cli.main import VERBS, main
from mimo_strategy.cli.run_config import read_run

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples/configs"
DIGITS = str(CONFIGS / "cpu-digits.yaml")
NAMES = [
    *["cpu-digits", "cpu-digits-colocated", "cpu-mock", "cpu-mock-colocated"],
    *["gpu-1", "gpu-2", "gpu-4", "gpu-8", "two-nodes", "reference"],
]


@pytest.fixture(autouse=True)
def command_line(monkeypatch):
    """Lightning's command line takes its arguments from the process."""
    monkeypatch.setattr(sys, "argv", ["mimo"])


def mimo(*arguments, folder):
    """Run ``mimo`` as a process in ``folder``; its ranks are processes too."""
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mimo_strategy", *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_no_configuration_is_left_out():
    assert sorted(NAMES) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_configuration_is_whole(name):
    path = CONFIGS / f"{name}.yaml"
    run = read_run(["--config", str(path)])
    layout = Layout.resolve(run.model.module_sizes(), run.world_size, run.modules)
    layout.check_batch(run.batch_size, run.num_microbatches)
    assert f"mimo fit --config examples/configs/{name}.yaml" in path.read_text()
    assert run.precision == ("32-true" if name.startswith("cpu") else "bf16-mixed")


def test_the_reference_has_its_sizes():
    run = read_run(["--config", str(CONFIGS / "reference.yaml")])
    radio, language = run.model.encoder.config, run.model.language.config
    assert (radio.tokens_per_image, radio.num_layers, radio.hidden_size) == (2048, 32, 1280)
    assert (language.layers, language.hidden_size, language.num_experts) == ("MEMEM*EMEMEM*EMEMEM*", 2688, 32)
    assert (language.vocab_size, language.max_sequence_length, run.batch_size) == (131_072, 4096, 8)


def test_overrides_reach_what_they_name():
    run = read_run(
        [
            *["--config", DIGITS, "--trainer.strategy.modules.language.tp=1", "--data.batch_size=8"],
            *["--trainer.strategy.modules.language.dp=2", "--trainer.strategy.num_microbatches=4"],
            *["--model.optimizer.lr=0.5", "--model.language.dropout=0.25", "--trainer.num_nodes=2"],
            *["--model.sampling.top_p=0.9", "--trainer.precision=bf16-true"],
        ]
    )
    assert run.modules == {"images": ModuleParallel(dp=2), "language": ModuleParallel(dp=2, ep=2, rank_offset=2)}
    assert (run.num_microbatches, run.batch_size, run.world_size, run.precision) == (4, 8, 8, "bf16-true")
    assert (run.model.optimizer_config.lr, run.model.language.config.dropout) == (0.5, 0.25)
    assert run.model.sampling.top_p == 0.9


def test_overrides_may_be_null():
    modules = "--trainer.strategy.modules"
    run = read_run(
        [
            *["--config", DIGITS, f"{modules}.images.dp=null", f"{modules}.images.num_ranks=2"],
            *[f"{modules}.language={{tp: 1, dp: null, rank_offset: 2}}"],
            *["--model.max_new_tokens=3", "--model.max_new_tokens=null"],
        ]
    )
    assert run.modules == {"images": ModuleParallel(num_ranks=2), "language": ModuleParallel(ep=2, rank_offset=2)}
    assert run.model.max_new_tokens is None


def test_settings_of_data_parallelism_are_for_all_modules_or_by_name(tmp_path, capsys):
    option = "--trainer.strategy.ddp"
    of_all = read_run(["--config", DIGITS, f"{option}.use_distributed_optimizer=true"]).ddp
    assert of_all == DistributedDataParallelConfig(use_distributed_optimizer=True)
    by_name = ["--config", DIGITS, f'{option}={{"images": {{"overlap_grad_reduce": true}}}}']
    assert read_run(by_name).ddp == {"images": DistributedDataParallelConfig(overlap_grad_reduce=True)}
    printed = tmp_path / "printed.yaml"
    printed.write_text(print_config(capsys, *by_name))
    changed = ["--config", str(printed), f"{option}.images.bucket_size=7"]
    assert read_run(changed).ddp == {"images": DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=7)}


@pytest.mark.parametrize("file", ["mimo_hetero", {"class_path": "mimo_strategy.MimoHeteroStrategy"}, None])
def test_the_strategy_is_named_in_any_way(file, tmp_path):
    config = yaml.safe_load(Path(DIGITS).read_text())
    config["trainer"]["strategy"] = file
    if file is None:
        del config["trainer"]["strategy"]
    config["model"] = str(CONFIGS / config["model"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert read_run(["--config", str(path)]).modules is None
    overridden = read_run(["--config", str(path), "--trainer.strategy.num_microbatches=2"])
    assert overridden.num_microbatches == 2


def test_the_strategy_is_named_on_the_command_line():
    overrides = ["--trainer.strategy", "mimo_hetero", "--trainer.strategy.num_microbatches=8"]
    assert read_run(["--config", DIGITS, *overrides]).num_microbatches == 8


@pytest.mark.parametrize("name", ["cpu-digits", "cpu-mock"])
def test_the_model_is_told_what_the_data_know(name):
    model = read_run(["--config", str(CONFIGS / f"{name}.yaml")]).model
    known = {
        "cpu-digits": lambda: DigitsDataModule(batch_size=8),
        "cpu-mock": lambda: MockImageDataModule(
            image_size=16, tokens_per_image=4, seq_length=32, vocab_size=64, image_token_id=2, batch_size=8
        ),
    }
    data = known[name]()
    assert model.language.config.vocab_size == data.vocab_size
    assert model.special_token_ids == {"images": data.image_token_id}
    assert model.end_token_id == data.end_token_id


SAYS_ITSELF = ["--model.image_token_id=5", "--model.end_token_id=6", "--model.language.vocab_size=64"]


def print_config(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments, "--print_config"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides", [[], ["--data=cli_data.SilentData", *SAYS_ITSELF]], ids=["told-by-data", "told-by-user"]
)
def test_printed_configuration_is_the_same_again(overrides, tmp_path, capsys):
    printed = print_config(capsys, "--config", DIGITS, *overrides)
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert print_config(capsys, "--config", str(path)) == printed
    first, second = read_run(["--config", DIGITS, *overrides]), read_run(["--config", str(path)])
    assert first.modules == second.modules
    assert first.model.encoder.config == second.model.encoder.config
    assert first.model.language.config == second.model.language.config
    assert first.model.special_token_ids == second.model.special_token_ids == {"images": 5 if overrides else 2}


def nested(path, value):
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


WRONG_FILES = {
    "trianer.devices": (2, "no option 'trianer.devices'", "did you mean 'trainer.devices'?"),
    "trainer.max_step": (3, "no option 'trainer.max_step'", "did you mean 'trainer.max_steps'?"),
    "trainer.max_steps": ("many", "trainer.max_steps: expected int, got many"),
    "trainer.precision": ("bf17", "trainer.precision: expected", "'bf16-mixed'", "got bf17"),
    "trainer.strategy": ("mimo_heter", "no strategy 'mimo_heter'", "did you mean 'mimo_hetero'?"),
    "trainer.strategy.num_microbatches": (0, "num_microbatches must be at least 1, got 0"),
    "trainer.strategy.init_args.encoder_batching": (3, "encoder_batching 3 does not divide num_microbatches 2"),
    "trainer.strategy.init_args.modules": (["images"], "trainer.strategy.modules: expected Mapping, got ['images']"),
    "trainer.strategy.init_args.modules.images": (4, "trainer.strategy.modules: expected ModuleParallel, got 4"),
    "trainer.strategy.init_args.num_microbatch": (2, "trainer.strategy: no", "did you mean 'num_microbatches'?"),
    "trainer.strategy.init_args.modules.language.ttp": (2, "no option 'ttp'", "did you mean 'tp'?"),
    "trainer.strategy.init_args.modules.language.tp": ("two", "trainer.strategy.modules.tp: expected int, got two"),
    "trainer.strategy.init_args.modules.langage": ({"tp": 2}, "unknown: ['langage']", "A layout that fits"),
    "trainer.callbacks": (["LearningRateMonitr"], "did you mean 'LearningRateMonitor'?"),
    "model": ("NemotronVML", "no class 'NemotronVML'; did you mean 'NemotronVLM'?"),
    "data": ("DigitDataModule", "no class 'DigitDataModule'; did you mean 'DigitsDataModule'?"),
    "data.init_args.batch_sise": (8, "data: no option 'batch_sise'; did you mean 'batch_size'?"),
    "data.init_args.batch_size": (7, "the step batch of 7 samples", "valid: 4 or 8"),
    "data.init_args.tokens_per_image": (9, "seq_length >= "),
    "trainer.accumulate_grad_batches": (2, "accumulate_grad_batches is 2", "num_microbatches"),
}


@pytest.mark.parametrize("key", WRONG_FILES)
def test_a_wrong_configuration_is_told_in_few_lines(key, tmp_path, capsys):
    value, *told = WRONG_FILES[key]
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(nested(key, value)))
    assert main(["fit", "--config", DIGITS, "--config", str(path)]) == 2
    check_told(capsys, told)


def check_told(capsys, told):
    captured = capsys.readouterr()
    assert all(part in captured.err for part in told), captured.err
    message = captured.err[captured.err.index("mimo fit: ") :]
    # a layout is told all checks that failed, a line each
    lines = [line for line in message.splitlines() if not line.startswith("language: ")]
    assert len(lines) <= 3 and "Traceback" not in message


WRONG_ARGUMENTS = {
    "--trainer.max_step=3": ["no option 'trainer.max_step'; did you mean 'trainer.max_steps'?"],
    "--tariner.max_steps=3": ["did you mean 'trainer.max_steps'?"],
    "--model.radio.image_hight=3": ["model.radio: no option 'image_hight'; did you mean 'image_height'?"],
    "--model.radio.image_height=33": ["image_height 33 is no multiple", "valid: 32 or 40"],
    "--model.optimizer.lr=abc": ["model.optimizer.lr: expected float, got abc"],
    "--model.optimizer.lrr=1": ["did you mean 'lr'?"],
    "--model.sampling.top_p=2": ["top_p must be above 0 and at most 1"],
    "--trainer.strategy.modules.language.tp=3": ["tp 3", "A layout that fits 4 rank(s)"],
    "--trainer.strategy.modules.language.tp=x": ["expected int, got x"],
    "--config=nowhere.yaml": ["nowhere.yaml"],
    "--ckpt_path=nowhere.ckpt": ["ckpt_path: there is no nowhere.ckpt"],
    f"--ckpt_path={DIGITS}": ["is no checkpoint, which is a folder with a manifest.json"],
    f"--ckpt_path={CONFIGS}": ["is no checkpoint, which is a folder with a manifest.json"],
    "--model=NoModel": ["model: no class 'NoModel'"],
    "--model=RadioEncoder": ["model: the class RadioEncoder is not of the kind"],
    DIGITS: ["belongs to no option; did you mean --config "],
}


@pytest.mark.parametrize("argument", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_told_in_few_lines(argument, capsys):
    assert main(["fit", "--config", DIGITS, argument]) == 2
    check_told(capsys, WRONG_ARGUMENTS[argument])


NO_CONFIGURATIONS = {
    "trainer: {devices: 4\nmodel: x\n": "wrong.yaml, line 2, column 6: expected ',' or '}'",
    "- trainer\n": "wrong.yaml holds no settings",
    "": "wrong.yaml holds no settings",
    "\1": "wrong.yaml is no YAML",
    "trainer: {strategy: {class_path: MimoHeteroStrategy, num_microbatches: 2}}": "belongs below init_args",
    "model: NemotronVLM": "missing: data",
}


@pytest.mark.parametrize("text", NO_CONFIGURATIONS)
def test_a_file_that_is_no_configuration_is_told(text, tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert main(["fit", "--config", str(path)]) == 2
    check_told(capsys, [NO_CONFIGURATIONS[text]])


def test_verbs_without_a_trainer_are_told_the_same():
    with pytest.raises(UsageError, match=r"^image_height 33 is no multiple of [^\n]*$"):
        read_run(["--config", DIGITS, "--model.radio.image_height=33"])


def test_weights_that_no_run_has_made_are_warned_of(monkeypatch):
    # the Trainer's own part, which would start ranks
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, verb: None)
    with pytest.warns(match="no --ckpt_path is given"):
        assert main(["predict", "--config", DIGITS]) == 0


def test_a_wrong_verb_names_the_closest(capsys):
    assert main(["preddict"]) == 2
    assert "no verb 'preddict'; did you mean 'predict'?" in capsys.readouterr().err


def test_ids_that_neither_data_nor_user_tell_are_asked_for(capsys):
    assert main(["fit", "--config", DIGITS, "--data=cli_data.SilentData", "--data.batch_size=8"]) == 2
    check_told(capsys, ["image_token_id, end_token_id", "--model.image_token_id="])


def test_help_and_version_are_where_they_are_looked_for(capsys):
    assert main(["help", "fit"]) == main(["--version"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: mimo fit") and told.endswith("mimo-strategy 0.1.0\n")


def test_of_ranks_that_a_launcher_started_one_tells(capsys, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert main(["preddict"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verb", [None, "fit", "validate", "test", "predict"])
def test_help_fits_a_screen(verb, capsys):
    assert main([verb, "--help"] if verb else ["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    if verb is None:
        assert all(any(line.split()[:1] == [name] for line in lines) for name in VERBS)


ANSWERS_WITHOUT_TORCH = """
import sys
from mimo_strategy.cli.main import main
assert main(["--help"]) == main(["fit", "--help"]) == 0
assert "torch" not in sys.modules and "lightning" not in sys.modules
from lightning.pytorch.strategies import StrategyRegistry
assert "mimo_hetero" in StrategyRegistry and "megatron.core" not in sys.modules
assert type(StrategyRegistry.get("mimo_hetero")).__name__ == "MimoHeteroStrategy"
"""


def test_help_comes_without_torch_and_the_name_with_lightning():
    run = [sys.executable, "-W", "ignore", "-c", ANSWERS_WITHOUT_TORCH]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr


COMPLETED = {
    "mimo f": ["fit"],
    "mimo fit --trainer.max_s": ["--trainer.max_steps"],
    "mimo fit --model N": ["NemotronVLM"],
    "mimo fit --model.radio.image_h": ["--model.radio.image_height"],
    "mimo predict --trainer.strategy.modules.language.rank": ["--trainer.strategy.modules.language.rank_offset"],
    "mimo fit --trainer.strategy.on_save_failure ": ["raise", "warn"],
    "mimo layout --world": ["--world-size"],
    "mimo layout --trainer.dev": ["--trainer.devices"],
    "mimo layout --config sc": ["script"],
    "mimo layout --r": ["--rank"],
    "mimo layout --output sc": ["script"],
    "mimo plan --machine ": ["h200", "h100", "cpu"],
    "mimo plan --profile sc": ["script"],
    "mimo plan --be": ["--best"],
    "mimo profile --accelerator ": ["auto", "cpu", "gpu"],
    "mimo profile --j": ["--json"],
    "mimo export sc": ["script"],
    "mimo completion ba": ["bash"],
}


def test_a_shell_completes_verbs_options_and_classes(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    for line, completed in COMPLETED.items():
        words = line.split(" ")
        ask = f"""source ./script; COMP_WORDS=("$@"); COMP_CWORD={len(words) - 1}
        _shtab_mimo mimo "${{@: -1}}" "${{@: -2:1}}"; echo "${{COMPREPLY[*]}}" """
        result = subprocess.run(["bash", "-c", ask, "bash", *words], cwd=tmp_path, capture_output=True, text=True)
        assert result.stdout.split() == completed, line


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize(
    ("images", "language"),
    [
        (ModuleParallel(dp=4), ModuleParallel(tp=2, dp=2)),
        (ModuleParallel(tp=2, dp=2), ModuleParallel(dp=4)),
        (ModuleParallel(dp=2), ModuleParallel(tp=2, dp=1, rank_offset=2)),
        (ModuleParallel(dp=1, tp=2), ModuleParallel(dp=2, rank_offset=2)),
    ],
    ids=str,
)
def test_every_sample_is_written_by_one_rank(images, language, num_microbatches):
    sizes = read_run(["--config", DIGITS]).model.module_sizes()
    layout = Layout.resolve(sizes, 4, {"images": images, "language": language})
    written = [written_positions(layout, "images", rank, num_microbatches, 16) for rank in range(4)]
    assert all(rank in layout.modules["images"].ranks for rank, positions in enumerate(written) if positions)
    assert sorted(position for positions in written for position in positions) == list(range(16))


def test_a_run_is_trained_written_and_exported(tmp_path, capsys):
    two_ranks = ["--trainer.devices=2", "--trainer.strategy.modules.images.dp=1", "--data.batch_size=6"]
    language = ["tp=1", "ep=1", "rank_offset=1"]
    mimo(
        *["fit", "--config", DIGITS, *two_ranks, "--trainer.max_steps=2", "--trainer.enable_progress_bar=false"],
        *[f"--trainer.strategy.modules.language.{factor}" for factor in language],
        folder=tmp_path,
    )
    run = tmp_path / "runs/cpu-digits/version_0"
    checkpoint = run / "checkpoints/last.ckpt"
    assert checkpoint.is_dir()
    steps = (run / "metrics.csv").read_text().splitlines()
    assert len(steps) >= 3

    # the last step batch is not full
    mimo(
        *["predict", "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)],
        *["--data=cli_data.TenDigits", "--trainer.enable_progress_bar=false"],
        folder=tmp_path,
    )
    written = run.with_name("version_1") / "predictions"
    records = [json.loads(line) for line in (written / "predictions.jsonl").read_text().splitlines()]
    data = TenDigits(6)
    assert [record["sample_id"] for record in records] == list(range(10))
    for record, sample in zip(records, data.predict_dataloader().dataset, strict=True):
        prompt = sample["input_ids"][: sample["prompt_length"]]
        assert record["prompt"] == data.vocabulary.decode(prompt[prompt != data.image_token_id].tolist())
        assert record["truth"] == data.vocabulary.decode(sample["labels"][sample["loss_mask"] > 0].tolist())
        (file,) = record["images"]
        image = torch.from_numpy(imread(written / file)[..., :3]).permute(2, 0, 1)
        torch.testing.assert_close(image, (sample["images"][0] + 1) / 2, atol=1 / 255, rtol=0)
    assert (written / "captions.png").stat().st_size > 0
    assert (run / "metrics.csv").read_text().splitlines() == steps

    file, imported = tmp_path / "weights.safetensors", tmp_path / "imported.ckpt"
    assert main(["export", str(checkpoint), str(file)]) == 0
    assert main(["import", str(file), str(imported)]) == 0
    assert imported.is_dir()
    with safe_open(file, "pt") as weights:
        assert any(name.startswith("language_model.") for name in weights.keys())  # noqa: SIM118
    capsys.readouterr()
    assert main(["export", str(tmp_path / "none.ckpt"), str(file)]) == 2
    assert "mimo export: there is no" in capsys.readouterr().err
    assert main(["export", str(checkpoint), str(tmp_path / "none" / "weights.safetensors")]) == 2
    assert "mimo export: [Errno 2] No such file" in capsys.readouterr().err
    assert main(["import", str(file), str(tmp_path)]) == 2
    assert "that is no checkpoint has this name" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("cpu")])
def test_configuration_trains(name, tmp_path):
    path = str(CONFIGS / f"{name}.yaml")
    mimo("fit", "--config", path, "--trainer.max_steps=2", "--trainer.enable_progress_bar=false", folder=tmp_path)
    assert (tmp_path / f"runs/{name}/version_0/checkpoints/last.ckpt").is_dir()


def test_classes_of_the_current_folder_are_found(tmp_path):
    """By the script that is installed, for which Python does not look there; their batch size among them."""
    (tmp_path / "own_data.py").write_text(
        "from lightning.pytorch import LightningDataModule\n"
        "class OwnData(LightningDataModule):\n"
        "    image_token_id, end_token_id, vocab_size, tokens_per_image = 2, 1, 64, 16\n"
        "    def __init__(self, batch_size: int):\n"
        "        super().__init__()\n"
        "        self.save_hyperparameters()\n"
    )
    script = "import sys; from mimo_strategy.cli.main import main; sys.exit(main())"
    config = ["--config", str(CONFIGS / "cpu-digits.yaml"), "--data", "own_data.OwnData", "--data.batch_size=9"]
    result = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", script, "layout", *config],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1, result.stderr
    assert "the step batch of 9 samples must be a multiple" in result.stdout
