"""The list of a checkpoint's files with their sizes and checksums, written last: what it lists is all there."""

import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimo_strategy.checkpoint.errors import CheckpointError

MANIFEST = "manifest.json"
_CHUNK = 1 << 20

# name of a file to {"bytes": its size, "crc32": its checksum}
Files = dict[str, dict[str, int]]


class ChecksummedFile:
    """A file being written, whose size and checksum are kept; durable once closed without an error.

    ``torch.save`` hides what goes wrong while it writes; leaving the context raises it.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=_CHUNK)
        self._path = path
        self._error: OSError | None = None
        self._size = self._checksum = 0

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        self._checksum = zlib.crc32(data, self._checksum)
        self._size += len(data)
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Leaving the context flushes."""

    def close(self) -> None:
        """The context closes it."""

    def __enter__(self) -> "ChecksummedFile":
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            with self._file:
                if self._error is not None:
                    raise self._error
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    @property
    def entry(self) -> dict[str, int]:
        """What the manifest says of the file."""
        return {"bytes": self._size, "crc32": self._checksum}


def write_file(path: Path, write: Callable[[ChecksummedFile], Any]) -> Files:
    """Write a durable file and return its entry."""
    with ChecksummedFile(path) as file:
        write(file)
    return {path.name: file.entry}


def write_manifest(directory: Path, files: Files) -> None:
    """Write the manifest of ``files``; with it the checkpoint is whole."""
    content = {"saved": time.time_ns(), "files": files}
    text = json.dumps(content | {"crc32": _checksum_of(content)}, indent=1)
    write_file(directory / MANIFEST, lambda file: file.write(text.encode()))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: ``files``, and when it was ``saved`` in nanoseconds.

    Raises:
        CheckpointError: if there is none or it is damaged.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        checksum = manifest.pop("crc32")
        if checksum != _checksum_of(manifest):
            raise ValueError("its checksum is wrong")
    except FileNotFoundError:
        if not directory.exists():
            raise CheckpointError(f"there is no {directory}") from None
        raise CheckpointError(f"{directory} is no checkpoint of MimoHeteroStrategy: it has no {MANIFEST}") from None
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return manifest


def is_whole(directory: Path) -> bool:
    """Whether all files are there in their sizes. Their contents are checked when they are loaded."""
    try:
        files = read_manifest(directory)["files"]
        return all((directory / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (CheckpointError, OSError):
        return False


def damage(directory: Path, files: Files) -> list[str]:
    """Read files and say which are missing or are not what was written."""
    found = []
    for name, entry in files.items():
        try:
            size, checksum = _measure(directory / name)
        except OSError as error:
            found.append(f"{name}: {error.strerror}")
            continue
        if size != entry["bytes"]:
            found.append(f"{name}: {size} bytes where {entry['bytes']} were written")
        elif checksum != entry["crc32"]:
            found.append(f"{name}: its content is not what was written")
    return found


def _measure(path: Path) -> tuple[int, int]:
    size = checksum = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, checksum


def _checksum_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
