"""The fenced blocks of the Markdown pages, and what the comments before them say of how they are checked.

``<!-- code: 4 ranks -->`` or ``<!-- code: one process -->`` begins a program: the Python blocks that follow run one
after another. ``, after`` and lines of code within the comment run first. ``<!-- checked only: WHY -->`` is for a block
that takes what tests do not have: its layout must fit the reference model, and the Trainer must know its flags.
``<!-- quoted from FILE -->`` is for one block that must be in the file, word by word.

YAML blocks are whole configurations, as in ``examples/configs``; after ``<!-- over FILE -->`` one overrides that file.
Console blocks are a ``mimo`` command and what it prints.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]

_FENCE = re.compile(r"^( *)```(\S*) *$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the comment right before it."""

    page: Path
    line: int
    language: str
    text: str
    comment: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def compile(self):
        return compile("\n" * self.line + self.text, str(self.page), "exec")


@dataclass
class Program:
    """Python blocks of a page that run one after another on ``num_ranks``; 0 is the process of the tests."""

    name: str
    num_ranks: int
    before: str
    blocks: list[Block] = field(default_factory=list)

    def run(self) -> dict:
        namespace = {"__name__": "page"}
        exec(self.before, namespace)
        for block in self.blocks:
            exec(block.compile(), namespace)
        return namespace


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page in their order."""
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        if opening:
            end = next(end for end in range(number + 1, len(lines)) if lines[end].strip() == "```")
            text = "\n".join(line.removeprefix(opening[1]) for line in lines[number + 1 : end]) + "\n"
            yield Block(page, number + 1, opening[2], text, _comment_at_the_end("\n".join(lines[:number])))
            number = end
        number += 1


def _comment_at_the_end(text: str) -> str:
    before, ends, after = text.rstrip().rpartition("-->")
    return before.rpartition("<!--")[2].strip() if ends and not after else ""


def all_blocks(language: str, kind: str = "") -> list[Block]:
    """Those of all pages whose comment begins with ``kind``."""
    return [
        block
        for page in PAGES
        for block in blocks(page)
        if block.language == language and block.comment.startswith(kind)
    ]


def programs(page: Path) -> list[Program]:
    """The programs of a page.

    Raises:
        ValueError: for Python blocks that belong to none, or a comment that says nothing known.
    """
    found: list[Program] = []
    for block in blocks(page):
        if block.language != "python" or block.comment.startswith(("checked only: ", "quoted from ")):
            continue
        if block.comment:
            says = re.fullmatch(r"code: (?:(\d+) ranks|one process)(?:, after\n(.*))?", block.comment, re.DOTALL)
            if says is None:
                raise ValueError(f"{block}: what does {block.comment!r} mean?")
            found.append(Program(str(block), int(says[1] or 0), says[2] or ""))
        if not found:
            raise ValueError(f"{block}: no comment says how it is checked")
        found[-1].blocks.append(block)
    return found
