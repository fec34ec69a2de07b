"""Checkpoints on disk: written under a temporary name, published by renaming, found again after a run was killed.

A run that is killed leaves, beside whole checkpoints,

- ``.unfinished/<name>``: one that was being written or removed;
- ``.replaced/<name>``: a whole one that was being replaced. It counts as ``<name>`` as long as that does not exist.

No lookup takes these for checkpoints, not even Lightning's own, which look for parts of names; and the next save to the
folder cleans them up.
"""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mimo_strategy.checkpoint.errors import SaveError
from mimo_strategy.checkpoint.manifest import MANIFEST, is_whole, read_manifest

_UNFINISHED = ".unfinished"
_REPLACED = ".replaced"
_SUFFIX = ".ckpt"


def unfinished(directory: Path) -> Path:
    """Where a checkpoint is written to before it is published."""
    return directory.parent / _UNFINISHED / directory.name


def begin(directory: Path, run_began: float) -> None:
    """Make the folder that a checkpoint is written to; cleans up what killed runs left.

    Args:
        directory: the checkpoint.
        run_began: when the run that writes it did, in seconds since the epoch.

    Raises:
        SaveError: if something else has its name.
    """
    if not (directory.is_symlink() or _may_be_replaced(directory)):
        raise SaveError("something that is no checkpoint has this name, and would be lost; choose another one")
    _clean_up(directory.parent, run_began)
    abandon(directory)
    unfinished(directory).mkdir(parents=True)


def publish(directory: Path) -> None:
    """Make a finished checkpoint appear under its name, in place of one that was there."""
    _make_durable(unfinished(directory))
    replaced = _replaced(directory)
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        replaced.parent.mkdir(exist_ok=True)
        directory.rename(replaced)
    unfinished(directory).rename(directory)
    _make_durable(directory.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    _remove_empty_folders(directory.parent)


def abandon(directory: Path) -> None:
    """Remove what was written of a checkpoint that will not be published."""
    if unfinished(directory).exists():
        shutil.rmtree(unfinished(directory))
    _remove_empty_folders(directory.parent)


def remove(directory: Path) -> None:
    """Remove a checkpoint, or a link to one, at once: when killed it is either there or gone."""
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        abandon(directory)
        unfinished(directory).parent.mkdir(exist_ok=True)
        directory.rename(unfinished(directory))
        abandon(directory)


def located(directory: Path) -> Path:
    """Where a checkpoint of this name is to be read, also if a run was killed while it was being replaced."""
    replaced = _replaced(directory)
    return replaced if replaced.exists() and not directory.exists() else directory


def newest_whole(patterns: Iterable[Path]) -> Path | None:
    """The checkpoint that was saved last, among those that are whole and whose names match: ``folder/*.ckpt``."""
    found = {
        located(pattern.parent / path.name)
        for pattern in patterns
        for path in (*pattern.parent.glob(pattern.name), *_replaced(pattern).parent.glob(pattern.name))
    }
    return max(filter(is_whole, found), key=lambda path: read_manifest(path)["saved"], default=None)


def _may_be_replaced(directory: Path) -> bool:
    """Whether there is a checkpoint, be it damaged, an empty folder, or nothing."""
    if directory.is_dir():
        return directory.suffix == _SUFFIX or (directory / MANIFEST).exists() or not any(directory.iterdir())
    return not directory.exists()


def _replaced(directory: Path) -> Path:
    return directory.parent / _REPLACED / directory.name


def _clean_up(folder: Path, run_began: float) -> None:
    """Give whole checkpoints that were being replaced their names back; remove what else killed runs left."""
    for replaced in folder.glob(f"{_REPLACED}/*"):
        directory = folder / replaced.name
        if located(directory) == replaced:
            replaced.rename(directory)
        else:
            shutil.rmtree(replaced)
    # what was touched since may be of another run that is still going on
    for leftover in folder.glob(f"{_UNFINISHED}/*"):
        with suppress(FileNotFoundError):
            if leftover.stat().st_mtime < run_began:
                shutil.rmtree(leftover)


def _remove_empty_folders(folder: Path) -> None:
    for name in (_UNFINISHED, _REPLACED):
        # not there, or in use for another checkpoint
        with suppress(OSError):
            (folder / name).rmdir()


def _make_durable(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
