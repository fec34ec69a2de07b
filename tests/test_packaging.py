"""What is installed, and how `make setup` finds its way. No network is needed."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
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


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert (citation["title"], citation["version"]) == (PROJECT["name"], PROJECT["version"])
    assert citation["license"] == PROJECT["license"]
    newest = re.search(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert PROJECT["version"] in newest.groups()


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


def test_the_documentation_installs_what_it_needs_by_itself():
    result = make("docs")
    assert ".[docs]" in result.stdout and "sphinx -W" in result.stdout, result.stderr


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
