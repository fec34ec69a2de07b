"""Short forms of jsonargparse's error messages: the place, what is wrong there, and the closest valid key.

jsonargparse reports what every member of a union said, with the whole value, in nested paragraphs. The complaint that
lies deepest is the one that came closest to a valid value. Wordings are those of jsonargparse 4.53; of a message that
none of them matches, what the value was is left out.
"""

import difflib
import inspect
import pkgutil
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from jsonargparse import ArgumentParser

_PLACE = re.compile(r"""Parser key "(?P<key>[^"]+)":|Problem with given class_path '(?P<path>[^']+)':""")
_UNKNOWN = re.compile(
    r"Option '(?P<option>[^']+)' is not accepted"
    r"|(?:Group|Subcommand) '(?P<group>[^']+)' does not accept option '(?P<of_group>[^']+)'"
    r"|unrecognized arguments: --(?P<argument>[^\s=]+)"
)
_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\S+)")
_TYPE = re.compile(
    r"(?:Expected a|Not a valid subclass of) (?P<expected>.+?)\.? Got value: (?P<value>.+)|Expected a (?P<only>.+)"
)
_MISSING = re.compile(r"the following arguments are required: (?P<keys>.+)")
_STRAY = re.compile(r"unrecognized arguments: (?P<word>[^-]\S*)")
_GIVEN = re.compile(r"Given value: (?:NestedArg\(key='[^']*', val=(?P<part>.*)\)|(?P<whole>.*))")
_VERB = re.compile(r"\b(?:fit|validate|test|predict)\.")
_NO_PROBLEM = (
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Given value",
    "Subtypes:",
    "Errors:",
    "Does not validate",
    "Subclass types expect one of",
    "a class path (str)",
    "a dict with",
)


class _Complaint(NamedTuple):
    text: str
    keys: tuple[str, ...]
    class_path: str | None


def shorten(message: str, parser: ArgumentParser, classes: Collection[str]) -> str:
    """One or two lines for an error message of ``parser``.

    Args:
        message: jsonargparse's.
        parser: the one that the arguments were for.
        classes: names that a class may be given by.
    """
    complaints = list(_complaints(message))
    if not complaints:
        return message.strip()
    deepest = max(len(complaint.keys) + bool(complaint.class_path) for complaint in complaints)
    complaints = [one for one in complaints if len(one.keys) + bool(one.class_path) == deepest]
    for complaint in complaints:
        if match := _UNKNOWN.search(complaint.text):
            return _unknown_key(match, complaint, parser)
        if match := _CLASS.search(complaint.text):
            name = match["name"]
            if name in classes:
                return f"{_place(complaint.keys)}the class {name} is not of the kind that is wanted here"
            return f"{_place(complaint.keys)}no class {name!r}{suggest(name.rpartition('.')[2], classes)}"
        if match := _MISSING.search(complaint.text):
            return f"{_place(complaint.keys)}missing: {_VERB.sub('', match['keys'])}"
        if match := _STRAY.search(complaint.text):
            hint = f"; did you mean --config {match['word']}?" if Path(match["word"]).is_file() else ""
            return f"{match['word']!r} belongs to no option{hint}"
    types = [match for complaint in complaints if (match := _TYPE.match(complaint.text))]
    if len(types) == len(complaints):
        expected = " or ".join(dict.fromkeys(_type_name(match["expected"] or match["only"]) for match in types))
        given = next((match["value"] for match in types if match["value"]), _given(message))
        return f"{_place(complaints[0].keys)}expected {expected}, got {given}"
    told = next(complaint for complaint in complaints if not _TYPE.match(complaint.text))
    return f"{_place(told.keys)}{told.text}"


def _complaints(message: str) -> Iterator[_Complaint]:
    """The innermost lines of a message, with the keys and the class that they are about."""
    above: list[tuple[int, re.Match]] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        if not text:
            continue
        indent = len(line) - len(line.lstrip()) + 2 * line.strip().startswith("- ")
        above = [(column, match) for column, match in above if column < indent]
        place = _PLACE.match(text)
        if place:
            above.append((indent, place))
            text = text[place.end() :].strip()
        if not text or text.startswith(_NO_PROBLEM):
            continue
        keys = tuple(match["key"] for _, match in above if match["key"])
        yield _Complaint(text, keys, above[-1][1]["path"] if above else None)


def _unknown_key(match: re.Match, complaint: _Complaint, parser: ArgumentParser) -> str:
    name = match["option"] or match["of_group"] or match["argument"]
    if name == "class_path":
        return f"{_place(complaint.keys)}what is beside class_path belongs below init_args"
    valid = _options(parser)
    place = _place(complaint.keys)
    if complaint.class_path is not None:
        of_class = pkgutil.resolve_name(complaint.class_path)
        valid = parameters(of_class)
        group, _, name = name.rpartition(".") if match["argument"] else (match["group"], "", name)
        if group:
            valid = _parameters_of_group(of_class, group)
            place = _place((*complaint.keys, group))
    return f"{place}no option {name!r}{suggest(name, valid)}"


def _options(parser: ArgumentParser) -> list[str]:
    """Of the parser and of its verbs."""
    options = []
    for action in parser._actions:
        verbs = action.choices.values() if isinstance(action.choices, Mapping) else ()
        options += [action.dest, *(option for verb in verbs for option in _options(verb))]
    return options


def parameters(of: Any) -> list[str]:
    """Names of what a class is made with."""
    return [field.name for field in fields(of)] if is_dataclass(of) else list(inspect.signature(of).parameters)


def parameter_types(of: Any) -> dict[str, Any]:
    """Types of what a class is made with, where they are told."""
    return get_type_hints(of if is_dataclass(of) else of.__init__)


def _parameters_of_group(of_class: type, group: str) -> list[str]:
    of: Any = of_class
    for name in group.split("."):
        hint = parameter_types(of).get(name)
        of = next((each for each in (hint, *get_args(hint)) if is_dataclass(each)), None)
        if of is None:
            return []
    return parameters(of)


def suggest(name: str, valid: Collection[str]) -> str:
    """The end of a message about a wrong ``name``: the closest of the valid ones, if any is close."""
    close = difflib.get_close_matches(name, valid, 1)
    if not close and "." in name:
        close = difflib.get_close_matches(name.partition(".")[0], {key.partition(".")[0] for key in valid}, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _place(keys: tuple[str, ...]) -> str:
    return f"{'.'.join(keys)}: " if keys else ""


def _type_name(described: str) -> str:
    if described.startswith("<class '"):
        return described.removeprefix("<class '").partition("'")[0].rpartition(".")[2]
    return described.removeprefix("typing.Literal")


def _given(message: str) -> str:
    """The innermost value."""
    match = _GIVEN.search(message)
    return match["whole"] or match["part"] if match else "another value"
