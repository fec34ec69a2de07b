"""What is installed, and how `make setup` finds its way. No network is needed."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
BASH = shutil.which("bash")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]
TESTED = {
    canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
    for pin in [Requirement(line)]
}
COMPILED_BY_THE_USER = {"mamba-ssm", "causal-conv1d", "transformer-engine"}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_tested_version_is_within_the_range(requirement):
    if requirement.name not in COMPILED_BY_THE_USER:
        assert requirement.specifier.contains(TESTED[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_withdrawn_lightning_is_not_admitted(name, version):
    (requirement,) = (r for r in REQUIREMENTS if r.name == name)
    assert not requirement.specifier.contains(version, prereleases=True)


def run_script(name, home, **env):
    """Run a script with nothing on the PATH but `home/bin`."""
    env = {"HOME": str(home), "PATH": str(home / "bin")} | env
    return subprocess.run([BASH, ROOT / "scripts" / name], env=env, capture_output=True, text=True)


@pytest.fixture
def home(tmp_path):
    (tmp_path / "bin").mkdir()
    return tmp_path


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{BASH}\n{text}\n")
    path.chmod(0o755)


FAILS = "echo 'command not found' >&2; exit 127"
WORKS = f'exec "{sys.executable}" "$@"'


@pytest.mark.parametrize("working", ["bin/python3.13", "bin/python3", ".pyenv/versions/3.12.1/bin/python3"])
def test_a_shim_that_fails_is_passed_over(home, working):
    put(home / "bin/python3.12", FAILS)
    put(home / working, WORKS)
    result = run_script("find_python.sh", home)
    assert (result.returncode, result.stdout) == (0, sys.executable + "\n"), result.stderr


def test_without_a_python_the_user_is_told_what_to_install(home):
    put(home / "bin/python3", FAILS)
    result = run_script("find_python.sh", home)
    assert (result.returncode, result.stdout) == (1, "")
    assert all(way in result.stderr for way in ("apt-get install", "uv", "pyenv install", "PYTHON="))


def test_the_python_asked_for_is_the_only_candidate(home):
    put(home / "bin/python3.12", WORKS)
    put(home / "bin/mine", FAILS)
    result = run_script("find_python.sh", home, PYTHON="mine")
    assert result.returncode == 1
    assert "PYTHON=mine" in result.stderr


def test_setup_leaves_a_folder_alone_that_is_no_environment(tmp_path):
    (tmp_path / "thesis.tex").touch()
    result = run_script("setup.sh", tmp_path, PATH=os.environ["PATH"], VENV=str(tmp_path))
    assert result.returncode == 1
    assert "left alone" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def make(*arguments):
    return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("layout", ["non_colocated", "colocated"])
def test_train_takes_both_layouts(layout):
    result = make("train", f"LAYOUT={layout}")
    assert f"examples/train_digits.py --layout {layout}" in result.stdout, result.stderr


def test_train_names_the_layouts_when_given_another():
    result = make("train", "LAYOUT=wrong")
    assert result.returncode != 0
    assert "must be one of: non_colocated colocated" in result.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the built wheel, which sees the packages that this one has but not this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("mimo_strategy", "modules", "datamodules", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-index", "--no-deps"]
    run_in(folder, *pip, "wheel", *offline, "--no-build-isolation", "-w", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    run_in(folder, sys.executable, "-m", "venv", "--without-pip", str(environment))
    run_in(folder, *pip, "--python", str(environment / "bin/python"), "install", *offline, str(wheel))
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    shutil.rmtree(source)
    return environment


def run_in(folder, *command):
    """What a command prints, run in ``folder`` without the caller's PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_brings_the_command_and_configurations(installed, tmp_path):
    mimo = str(installed / "bin/mimo")
    assert "usage: mimo VERB" in run_in(tmp_path, mimo, "--help")
    configs = installed / "share/mimo-strategy/configs"
    of_the_checkout = ROOT / "examples/configs"
    files = {path.relative_to(of_the_checkout) for path in of_the_checkout.rglob("*.yaml")}
    assert {path.relative_to(configs) for path in configs.rglob("*.yaml")} == files
    printed = run_in(tmp_path, mimo, "fit", "--config", str(configs / "cpu-digits.yaml"), "--print_config")
    assert "class_path: modules.NemotronVLM" in printed and "rank_offset: 2" in printed


def test_the_wheel_holds_the_packages_and_nothing_else(installed):
    code = "import mimo_strategy, modules, datamodules; print(mimo_strategy.__file__)"
    assert run_in(installed, str(installed / "bin/python"), "-c", code).startswith(str(installed))
    (site_packages,) = installed.glob("lib/python*/site-packages")
    folders = {path.name for path in site_packages.iterdir() if path.is_dir()}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"mimo_strategy", "modules", "datamodules"}
