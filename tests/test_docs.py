"""What the documentation says is so: its code runs, and what it names exists: files, options, messages."""

import ast
import inspect
import os
import re
import runpy
import shlex
import sys

import docs_messages
import docs_shell
import pytest
from docs_code import PAGES, ROOT, Block, Program, all_blocks, blocks, programs
from lightning.pytorch import Trainer

import mimo_strategy
from mimo_strategy import Layout, LayoutError
from mimo_strategy import ModuleParallel as P
from mimo_strategy.cli.main import main
from mimo_strategy.testing import run_on_ranks
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

PACKAGE = ROOT / "mimo_strategy"
CONFIGS = ROOT / "examples/configs"
CHEAP = {
    "ACCELERATOR": "cpu",
    "ENABLE_PROGRESS_BAR": "False",
    "LIMIT_TRAIN_BATCHES": "1",
    "LIMIT_VAL_BATCHES": "1",
    "LIMIT_TEST_BATCHES": "1",
}
LANGUAGES = {"python", "bash", "console", "text", "yaml", "json", "{toctree}"}


def sizes(radio: RadioConfig, language: MambaMoEConfig):
    return NemotronVLM(radio, language, image_token_id=0, end_token_id=1).module_sizes()


# ---- code


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each page: what a program of it writes, a later one may read."""
    made = {}
    return lambda page: made.setdefault(page, tmp_path_factory.mktemp("page"))


@pytest.mark.parametrize("program", [program for page in PAGES for program in programs(page)], ids=lambda p: p.name)
def test_code_runs(program: Program, folders, monkeypatch):
    monkeypatch.chdir(folders(program.blocks[0].page))
    for name, value in CHEAP.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", value)
    if program.num_ranks:
        run_on_ranks(lambda: bool(program.run()), program.num_ranks)
    else:
        tests = [value for name, value in program.run().items() if name.startswith("test_")]
        for test in tests:
            test()


@pytest.mark.parametrize("block", all_blocks("python", "checked only: "), ids=str)
def test_code_that_takes_more_than_tests_have_fits_the_reference_model(block: Block):
    flags = inspect.signature(Trainer).parameters
    built = []

    def trainer(*, strategy, devices, num_nodes=1, **others):
        assert others.keys() <= flags.keys(), others
        modules = sizes(RadioConfig(), MambaMoEConfig())
        built.append(Layout.resolve(modules, devices * num_nodes, strategy._modules))

    strategy = mimo_strategy.MimoHeteroStrategy()
    exec(block.compile(), {**vars(mimo_strategy), "Trainer": trainer, "strategy": strategy})
    assert built


@pytest.mark.parametrize("block", all_blocks("python", "quoted from "), ids=str)
def test_quoted_code_is_in_its_file(block: Block):
    assert block.text in (ROOT / block.comment.removeprefix("quoted from ")).read_text()


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_configurations_are_read_and_their_layouts_fit(block: Block, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mimo"])
    # what a configuration names lies beside it
    for path in CONFIGS.iterdir():
        (tmp_path / path.name).symlink_to(path)
    written = tmp_path / "of-the-page.yaml"
    written.write_text(block.text)
    kind, _, overridden = block.comment.partition(" ")
    assert kind in ("", "over"), f"{block}: what does {block.comment!r} mean?"
    files = [ROOT / overridden, written] if overridden else [written]
    code = main(["layout", "--json", *(f"--config={file}" for file in files)])
    assert code == 0, capsys.readouterr()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_blocks_name_what_exists(page, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mimo"])
    monkeypatch.chdir(ROOT)
    for block in blocks(page):
        if block.language == "bash":
            docs_shell.check(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page):
    assert {block.language for block in blocks(page)} <= LANGUAGES
    outside = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"^\n    \S", outside, flags=re.MULTILINE), "an indented block of code: use a fence"


@pytest.mark.parametrize("block", all_blocks("console"), ids=str)
def test_what_a_command_prints_is_shown_as_it_is(block: Block, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mimo"])
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "92")
    command, *shown = block.text.splitlines()
    main(shlex.split(command)[2:])
    printed = capsys.readouterr().out.strip()
    assert [line.rstrip() for line in printed.splitlines()] == shown


def test_the_layout_error_is_shown_as_it_is():
    with pytest.raises(LayoutError) as error:
        modules = {"images": P(dp=4), "language": P(tp=4, ep=2)}
        Layout.resolve(sizes(RadioConfig.tiny(), MambaMoEConfig.tiny()), 4, modules)
    shown = [block.text for page in PAGES for block in blocks(page) if block.text.startswith("LayoutError")]
    assert shown and set(shown) == {f"LayoutError: {error.value}\n"}


# ---- what is named


def anchors(page) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_table_of_contents():
    index = ROOT / "docs/index.md"
    listed = {name for block in blocks(index) if block.language == "{toctree}" for name in block.text.split()}
    pages = {path.stem for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".rst")}
    assert pages - {"index"} <= listed


def test_messages_that_the_page_on_troubleshooting_quotes_exist():
    texts = docs_messages.texts()
    others = {
        "… does not match the world size",
        "CUDA out of memory",
        "IsADirectoryError: [Errno 21] Is a directory",
        "cannot import name … from 'modules'",
    }
    quotes = docs_messages.quoted(ROOT / "docs/troubleshooting.md")
    assert len(quotes) > 70
    gone = [quote for quote in quotes if quote not in others and not any(docs_messages.fits(quote, t) for t in texts)]
    assert not gone


def test_messages_for_users_are_on_the_page_on_troubleshooting():
    quotes = docs_messages.quoted(ROOT / "docs/troubleshooting.md")
    untold = [
        f"{file}: {message}"
        for file, message in docs_messages.raised()
        if not any(docs_messages.fits(quote, message) for quote in quotes)
    ]
    assert not untold, "\n".join(untold)


def test_the_map_of_files_is_complete():
    page = (ROOT / "docs/internals.md").read_text()
    section = page[page.index("\n## The map of files\n") : page.index("\n## Tests\n")]
    named = set(re.findall(r"^\| `(.+?)` \|", section, flags=re.MULTILINE))
    files = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    concerns = {name: ast.get_docstring(ast.parse(files[name].read_text())) for name in files.keys() - named}
    missing = [f"| `{name}` | {concern.splitlines()[0]} |" for name, concern in sorted(concerns.items())]
    assert not missing, "\n".join(missing)
    assert named == files.keys()


def imports_of(folder) -> set[tuple[str, str]]:
    """File and top package of every import statement."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {(path.name, name.split(".")[0]) for name in names}
    return found


def test_imports_run_the_way_that_the_page_says():
    assert ("model.py", "megatron") in imports_of(PACKAGE / "runtime")
    assert not [where for where in imports_of(PACKAGE) if where[1] in ("modules", "datamodules")]
    assert not [where for where in imports_of(PACKAGE / "runtime") if where[1] == "lightning"]


def test_pictures_are_what_the_code_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs/draw.py"), run_name="__main__")
    for drawn in sorted(os.listdir(tmp_path)):
        same = (tmp_path / drawn).read_bytes() == (ROOT / "docs/images" / drawn).read_bytes()
        assert same, f"{drawn} is not what python docs/draw.py draws"
