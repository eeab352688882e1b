"""Files that are written whole or not at all, and JSON."""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from util import InputError

PARTIAL = ".partial-"  # how the names of half-written files begin


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise InputError, naming the path, where the block cannot write: disk full, read-only, no permission."""
    try:
        yield
    except OSError as error:  # some of these do not name the file themselves
        raise InputError(f"cannot write {path} ({error.strerror or error}); no earlier file was changed") from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise InputError, naming the path, where the block cannot read: no permission, a name that is too long."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror or error})") from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, next to `path`. It becomes `path` when the block ends, and is removed if that fails.

    Raises InputError if `path` is there already.
    """
    if path.exists():
        raise InputError(f"{path} is there already: remove it, or name another with --folder")
    partial = path.with_name(f"{PARTIAL}{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to. It becomes `path` when the block ends, and is removed if the block fails.

    `path` is whole at any moment, after a power cut too. Raises InputError if it cannot be written.
    """
    # the ending stays as it is, because np.savez and savefig go by it
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        with writing(path):
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())  # the content must be on the disk before the name is
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # what a read-only folder refuses to remove was never written
            partial.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        # some network file systems cannot: there the new name reaches the disk later
        with contextlib.suppress(OSError):
            os.fsync(folder)
        os.close(folder)


def write_arrays(path: Path, **arrays: np.ndarray | str) -> None:
    """Write arrays to an .npz file, whole or not at all."""
    content = io.BytesIO()  # np.savez to a path leaves its open file behind when the disk is full
    np.savez(content, **arrays)
    with replacing(path) as partial:
        partial.write_bytes(content.getbuffer())


def make_folder(path: Path) -> None:
    """Make a folder and its parents unless they exist. Raises InputError if it cannot be made."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def fingerprint(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote, {} if there is no such file. Raises InputError if it is damaged."""
    try:
        with reading(path):
            content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): remove it and run again") from error
    return content
