"""``mimo layout``, ``mimo plan`` and ``mimo profile``: what they print, and what they refuse."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mimo_strategy import Layout, ModuleParallel
from mimo_strategy.cli.job import memory_size
from mimo_strategy.cli.layout_view import show_layout
from mimo_strategy.cli.main import main
from mimo_strategy.cli.run_config import read_run
from mimo_strategy.layout import ModuleSizes
from mimo_strategy.planning.estimate import Job
from mimo_strategy.planning.machine import MACHINES, read_machine
from mimo_strategy.planning.memory import Training
from mimo_strategy.planning.report import LayoutReport
from mimo_strategy.testing import rates

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples/configs"
DIGITS = str(CONFIGS / "cpu-digits.yaml")
MODULES = "--trainer.strategy.init_args.modules"
DDP = "--trainer.strategy.init_args.ddp"


@pytest.fixture(autouse=True)
def command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's command line takes its arguments from the process; a terminal has a width."""
    monkeypatch.setattr(sys, "argv", ["mimo"])
    monkeypatch.setenv("COLUMNS", "100")


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(arguments)
    return code, capsys.readouterr().out


def test_layout_tells_what_runs_where(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "pictures/map.svg"
    code, text = told(capsys, "layout", "--config", DIGITS, "--machine", "cpu", "--output", str(picture))
    assert code == 0
    assert "Non-colocated, world size 4" in text
    assert "every check passed" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    # two lanes of the encoder, one of the language model on two ranks
    assert "rank 0 1 2 3" in rows
    assert "images 0 1 \N{MIDDLE DOT} \N{MIDDLE DOT}" in rows
    assert "language \N{MIDDLE DOT} \N{MIDDLE DOT} 0 0" in rows
    assert "0-1 0-1 -> 0 2-3" in rows
    assert "images 2 1 16 32 1/2" in rows
    assert "2 language tp 0 etp 0 ep 0 edp 0 tp 2-3 ep 2-3" in rows
    assert "<svg" in picture.read_text()


def test_layout_as_json_has_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = told(capsys, "layout", "--config", DIGITS, "--machine", "cpu", "--json")
    report = json.loads(text)
    assert code == 0 and report["fits"]
    run = read_run(["--config", DIGITS])
    layout = Layout.resolve(run.model.module_sizes(), 4, run.modules)
    for rank, modules in enumerate(report["ranks"]):
        assert modules.keys() == {name for name, module in layout.modules.items() if rank in module.ranks}
        for name, of_rank in modules.items():
            assert of_rank["coordinates"] == layout.modules[name].coordinates(rank)
            assert of_rank["bytes"]["total"] > of_rank["bytes"]["parameters"] > 0
    assert report["bridges"] == {"images": [{"from": [0, 1], "to": [0]}]}


def test_every_check_that_fails_is_listed_with_a_layout_that_passes(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [f"{MODULES}.language.tp=3", f"{MODULES}.language.ep=3", f"{MODULES}.images.tp=3"]
    code, text = told(capsys, "layout", "--config", DIGITS, "--world-size", "9", "--json", *wrong)
    report = json.loads(text)
    assert code == 1 and not report["fits"]
    for failure in (
        "images: tp 3 does not divide num_attention_heads 4",
        "language: tp 3 does not divide num_query_groups 2",
        "language: ep 3 does not divide its 4 experts",
        "the modules leave a gap",
    ):
        assert any(failure in one for one in report["failures"]), failure
    suggested = eval(report["suggestion"].split("modules=")[1], {"ModuleParallel": ModuleParallel})
    Layout.resolve(read_run(["--config", DIGITS]).model.module_sizes(), 9, suggested)
    code, text = told(capsys, "layout", "--config", DIGITS, "--world-size", "9", *wrong)
    assert code == 1
    assert f"{len(report['failures'])} check(s) failed" in text


def test_a_batch_that_cannot_be_cut_fails_the_layout(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = told(capsys, "layout", "--config", DIGITS, "--batch-size", "7")
    assert code == 1
    assert "the step batch of 7 samples must be a multiple" in text
    # the map is there all the same
    assert "Non-colocated" in text


def test_layout_counts_the_bytes_of_modules_with_settings_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    def optimizer_bytes(ddp: str) -> dict[str, int]:
        code, text = told(capsys, "layout", "--config", DIGITS, "--machine", "cpu", "--json", f"{DDP}={ddp}")
        assert code == 0
        rank = {"images": 0, "language": 2}
        ranks = json.loads(text)["ranks"]
        return {name: ranks[at][name]["bytes"]["optimizer"] for name, at in rank.items()}

    sharded = optimizer_bytes("null")
    whole = optimizer_bytes('{"use_distributed_optimizer": false}')
    mixed = optimizer_bytes('{"images": {"use_distributed_optimizer": false}}')
    # the encoder has two lanes
    assert whole["images"] > 1.9 * sharded["images"]
    assert mixed == {"images": whole["images"], "language": sharded["language"]}


def test_an_encoder_whose_experts_are_cut_by_etp_alone_has_factors_of_experts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = {"images": ModuleSizes(num_experts=2), "language": ModuleSizes()}
    layout = Layout.resolve(sizes, 2, {"images": ModuleParallel(etp=2), "language": ModuleParallel()})
    job = Job(None, 0, 1, {}, Training(), MACHINES["cpu"])
    show_layout(Console(), LayoutReport(job, 1, layout, (), "", None, ""), [])
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "1 images dp 1 etp 1 ep 0 edp 0 dp 0-1 etp 0-1" in rows


def test_layout_of_very_many_ranks_is_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    apart = [f"{MODULES}.images.dp=8192", f"{MODULES}.language.dp=4096", f"{MODULES}.language.rank_offset=8192"]
    options = ["--world-size", "16384", "--batch-size", "16384", "--rank", "12345"]
    code, text = told(capsys, "layout", "--config", DIGITS, *options, *apart)
    assert code == 0
    assert "8,186 more lanes of 1 rank(s)" in text
    assert len(text.splitlines()) < 80
    assert "tp 12344-12345" in " ".join(text.split())


def test_plan_ranks_layouts_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", str(CONFIGS / "reference.yaml"), "--world-size", "32", "--batch-size", "64"]
    code, text = told(capsys, "plan", *options)
    assert code == 0
    for words in ("What limits it", "The next best is", "num_microbatches:", "compute"):
        assert words in text
    code, text = told(capsys, "plan", *options, "--json", "--best", "3", "--memory", "141GB")
    plan = json.loads(text)
    times = [layout["step_seconds"] for layout in plan["best"]]
    assert code == 0 and times[:3] == sorted(times[:3])
    assert plan["limit_bytes"] == 0.9 * 141e9
    for layout in plan["best"]:
        assert sum(layout["seconds"].values()) == pytest.approx(layout["step_seconds"])
        assert layout["peak_bytes"] < plan["limit_bytes"]


def test_plan_keeps_its_numbers_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    code, text = told(capsys, "plan", "--config", str(CONFIGS / "gpu-8.yaml"), "--best", "3")
    assert code == 0 and max(map(len, text.splitlines())) <= 60
    table = text[: text.index("mb: microbatches")]
    assert "\N{HORIZONTAL ELLIPSIS}" not in table
    # number, images, microbatches, time, first cause, memory
    rows = re.findall(r"^\d images: .+? \d+ +\d+\.\d{3} s \w+ .*\d+\.\d GiB *$", table, flags=re.MULTILINE)
    assert len(rows) >= 3
    # a bar without colours would say nothing
    assert "\N{FULL BLOCK}" not in table


def test_what_is_printed_for_scripts_may_be_read_in_part() -> None:
    run = [sys.executable, "-W", "ignore", "-m", "mimo_strategy", "layout", "--json", "--config", DIGITS]
    many = ["--world-size=4096", "--batch-size=8192", f"{MODULES}.images.dp=2048", f"{MODULES}.language.dp=1024"]
    many.append(f"{MODULES}.language.rank_offset=2048")
    with subprocess.Popen([*run, *many], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(8) == b'{"fits":'
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_plan_without_a_layout_that_fits_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = told(capsys, "plan", "--config", DIGITS, "--memory", "100KB")
    assert code == 1
    assert "no layout fits" in text
    assert "recompute_layers" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layout", "--world-size", "0"], "--world-size must be at least 1"),
        (["layout", "--rank", "4"], "--rank 4 is not among the 4 ranks"),
        (["layout", "--output", "map.bmp"], "must end in .png, .svg, .pdf"),
        (["layout", f'{DDP}={{"imagse": {{}}}}'], "ddp has settings for imagse, but the modules are images, language"),
        (["plan", "--best", "0"], "--best must be at least 1"),
        (["plan", "--profile", "nowhere.json"], "cannot read the profile nowhere.json"),
        (["layout", "--world-sise", "8"], "no option 'world-sise'; did you mean 'world-size'?"),
        (["layout", "--sequence-length", "65"], "--sequence-length 65 is more than the 64 tokens"),
        (["layout", "--trainer.precision=64"], "trainer.precision '64-true' is not supported"),
        (["layout", "--trainer.strategy=ddp"], "trainer.strategy is not MimoHeteroStrategy"),
        (["layout", "--trainer.strategy.num_microbatches=0"], "num_microbatches must be at least 1, got 0"),
        (["layout", "--output", f"{DIGITS}/map.png"], f"cannot write {DIGITS}/map.png: "),
    ],
)
def test_wrong_options_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--config", DIGITS]) == 2
    assert message in capsys.readouterr().err


def test_a_size_of_memory_needs_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--config", DIGITS, "--memory", "much"])
    assert "'much' is no size such as 141GB or 80GiB" in capsys.readouterr().err


def test_profile_of_a_gpu_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--accelerator", "gpu"]) == 2
    assert "this machine has no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "argument", "failure"),
    [
        (
            "cpu-digits.yaml",
            "encoder_batching=2",
            "encoder_batching 2 is for encoders that share the ranks of language: leave it 1",
        ),
        (
            "cpu-digits-colocated.yaml",
            "encoder_ahead=2",
            "encoder_ahead 2 is for encoders on other ranks than language: leave it 0",
        ),
        (
            "cpu-digits-colocated.yaml",
            "cuda_graphs=true",
            "cuda_graphs=True replays layers of language that do not talk to other ranks, but it has tp 2; make each 1 "
            "or leave cuda_graphs False",
        ),
    ],
)
def test_what_the_strategy_refuses_fails_the_layout(
    config: str, argument: str, failure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = told(capsys, "layout", "--config", str(CONFIGS / config), f"--trainer.strategy.{argument}", "--json")
    assert code == 1
    assert json.loads(text)["failures"] == [failure]


def test_plan_finds_layouts_whose_layers_can_be_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--config", DIGITS, "--json", "--best", "1000", "--trainer.strategy.cuda_graphs=true"]
    code, text = told(capsys, *arguments)
    layouts = [one["modules"] for one in json.loads(text)["best"]]
    assert code == 0
    assert all((layout["language"]["tp"], layout["language"]["pp"]) == (1, 1) for layout in layouts)
    assert any(layout["images"]["tp"] > 1 for layout in layouts)
    gathered_late = '{"use_distributed_optimizer": true, "overlap_grad_reduce": true, "overlap_param_gather": true}'
    assert main([*arguments, f"{DDP}={gathered_late}"]) == 2
    assert "leave overlap_param_gather False in the ddp settings of language" in capsys.readouterr().err


def test_the_configuration_s_encoder_batching_is_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    colocated = ["--config", str(CONFIGS / "cpu-digits-colocated.yaml"), "--trainer.strategy.num_microbatches=4"]
    kept = []
    for at_once in (1, 4):
        code, text = told(capsys, "layout", *colocated, f"--trainer.strategy.encoder_batching={at_once}", "--json")
        report = json.loads(text)
        assert report["encoder_batching"] == at_once
        kept.append(report["ranks"][0]["images"]["bytes"]["activations"])
        assert code == 0
    assert kept[1] == pytest.approx(4 * kept[0])
    code, text = told(capsys, "plan", *colocated, "--trainer.strategy.encoder_batching=4", "--json", "--best", "1000")
    plan = json.loads(text)
    assert {layout["encoder_batching"] for layout in plan["best"] if layout["placement"] == "colocated"} == {1, 2, 4}
    assert {layout["encoder_batching"] for layout in plan["best"] if layout["placement"] != "colocated"} == {1}


@pytest.mark.parametrize(
    ("size", "bytes_"), [("141GB", 141e9), ("80GiB", 80 * 2**30), ("1.5 tb", 1.5e12), ("8G", 8e9), ("64B", 64)]
)
def test_a_size_of_memory_has_a_unit(size: str, bytes_: float) -> None:
    assert memory_size(size) == bytes_
    with pytest.raises(argparse.ArgumentTypeError, match="is no size such as"):
        memory_size("80")


@pytest.mark.exhaustive
def test_profile_measures_and_plan_takes_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rates, "_LEAST_SECONDS", 0.01)
    path = tmp_path / "profile.json"
    code, text = told(capsys, "profile", "--ranks", "2", "--accelerator", "cpu", "--output", str(path))
    machine = read_machine(path)
    assert code == 0 and "dispatch" in text
    assert machine.bandwidth != MACHINES["cpu"].bandwidth
    code, text = told(capsys, "plan", "--config", DIGITS, "--profile", str(path), "--json")
    assert code == 0
    assert json.loads(text)["machine"] == machine.name
