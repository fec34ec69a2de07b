"""Checkpoints on disk: written under a temporary name, published by renaming, found again after a run was killed.

A run that is killed leaves, beside whole checkpoints,

- ``.unfinished-<name>``: one that was being written or removed;
- ``.replaced-<name>``: a whole one that was being replaced. It counts as ``<name>`` as long as that does not exist.

No lookup takes these names for checkpoints, and the next save to the folder cleans them up.
"""

import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mimo_strategy.checkpoint.manifest import is_whole, read_manifest

_UNFINISHED = ".unfinished-"
_REPLACED = ".replaced-"
_SUFFIX = ".ckpt"

# What was touched before is of an earlier run; what was touched later may be of another one that is still going on.
_STARTED = time.time()


def unfinished(directory: Path) -> Path:
    """Where a checkpoint is written to before it is published."""
    return directory.with_name(_UNFINISHED + directory.name)


def begin(directory: Path) -> None:
    """Make the folder that a checkpoint is written to; cleans up what killed runs left."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(directory.parent)
    abandon(directory)
    unfinished(directory).mkdir()


def publish(directory: Path) -> None:
    """Make a finished checkpoint appear under its name, in place of one that was there."""
    _make_durable(unfinished(directory))
    replaced = None
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        replaced = directory.with_name(_REPLACED + directory.name)
        directory.rename(replaced)
    unfinished(directory).rename(directory)
    _make_durable(directory.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def abandon(directory: Path) -> None:
    """Remove what was written of a checkpoint that will not be published."""
    if unfinished(directory).exists():
        shutil.rmtree(unfinished(directory))


def remove(directory: Path) -> None:
    """Remove a checkpoint, or a link to one, at once: when killed it is either there or gone."""
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        abandon(directory)
        directory.rename(unfinished(directory))
        abandon(directory)


def located(directory: Path) -> Path:
    """Where a checkpoint of this name is to be read, also if a run was killed while it was being replaced."""
    replaced = directory.with_name(_REPLACED + directory.name)
    return replaced if replaced.exists() and not directory.exists() else directory


def newest_whole(folders: Iterable[Path]) -> Path | None:
    """The checkpoint that was saved last, among those in the folders that are whole."""
    found = {
        located(folder / path.name.removeprefix(_REPLACED))
        for folder in folders
        for path in folder.glob(f"*{_SUFFIX}")
        if not path.name.startswith(_UNFINISHED)
    }
    return max(filter(is_whole, found), key=lambda path: read_manifest(path)["saved"], default=None)


def _clean_up(folder: Path) -> None:
    """Give whole checkpoints that were being replaced their names back; remove what else killed runs left."""
    for replaced in folder.glob(f"{_REPLACED}*"):
        directory = folder / replaced.name.removeprefix(_REPLACED)
        if located(directory) == replaced:
            replaced.rename(directory)
        else:
            shutil.rmtree(replaced)
    for leftover in folder.glob(f"{_UNFINISHED}*"):
        with suppress(FileNotFoundError):
            if leftover.stat().st_mtime < _STARTED:
                shutil.rmtree(leftover)


def _make_durable(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
