"""The messages that the code raises, and those that the page on troubleshooting quotes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from docs_code import ROOT

PACKAGE = ROOT / "mimo_strategy"
GAP = "…"
# Where what a user did wrong is told. Messages of other files are for those who change the code.
_FOR_USERS = {
    *("agreement", "batch_checks", "checks", "dataloading", "generation", "launcher", "layout", "layout_checks"),
    *("metrics", "module", "module_layout", "precision", "step_batch", "strategy", "topology", "checkpoint", "runtime"),
    *("sample_order", "cpu/import_hook"),
}
# Parts of another message, or of a program that is wrong.
_NOT_TOLD = ("its checksum is wrong", "which no index needs", "it holds a", "is not of this checkpoint")
_SHORTEST = 12


def quoted(page: Path) -> list[str]:
    """What the items of a page's lists quote: each begins with a message, or says ``and `message```."""
    items = re.findall(r"^- `(.+?)` \\\n((?:  .*\n?)*)", page.read_text(), flags=re.MULTILINE)
    found = []
    for message, text in items:
        found.append(message)
        if text.strip().startswith("and `"):
            found += [also for also in re.findall(r"`([^`]+)`", text) if GAP in also]
    return found


def raised() -> Iterator[tuple[str, str]]:
    """File and message of every error that users are told; gaps stand for values."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE).with_suffix(""))
        if not any(name == known or name.startswith(f"{known}/") for known in _FOR_USERS):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            message = _flat(_text(_told_by(node)))
            is_message = len(message.replace(GAP, "").strip()) >= _SHORTEST
            if is_message and not any(part in message for part in _NOT_TOLD):
                yield str(path.relative_to(ROOT)), message


def texts() -> list[str]:
    """Every text in the code of the package that is long enough for a message."""
    found = {
        _flat(_text(node))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant)
    }
    return [text for text in found if len(text) >= _SHORTEST]


def fits(quote: str, message: str) -> bool:
    """Whether a quote is of a message: its words in their order, with anything in its gaps."""
    pattern = ".*".join(re.escape(part) for part in quote.split(GAP))
    return re.match(pattern, message) is not None


def _told_by(node: ast.AST) -> ast.expr | None:
    """What an error tells: raised, or collected to be raised with others."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        return node.exc.args[0]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "failures.append":
        return node.args[0]
    return node.value if isinstance(node, ast.Yield) and isinstance(node.value, ast.JoinedStr) else None


def _text(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return GAP


def _flat(text: str) -> str:
    return re.sub(f"{GAP}+", GAP, " ".join(text.split()))
