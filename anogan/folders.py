"""Picture files on disk: which of them count, the class folders of a data set, and what is in each file."""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from anogan import decoding, files, processes
from util import InputError, printable, quoted

# Folders that file managers, NAS boxes and archives leave behind, besides those with a leading dot
LEFT_BEHIND = ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found")
FLAT_CLASS = "good"  # what the class is called if pictures lie straight in train/


def pictures_below(folder: str | Path) -> list[str]:
    """The pictures in a folder, of any depth, in a fixed order, each once, with the folder's path in front.

    Hidden files and folders do not count, nor those of LEFT_BEHIND. Links are followed, but not to what was listed
    before. Says once how many files of which ending are passed over.
    """
    pictures, seen, others = [], set(), Counter()
    for here, inner, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(here)
        inner[:] = [] if real in seen else sorted(name for name in inner if not is_hidden(name))
        for name in sorted(names) if real not in seen else ():
            path = os.path.join(here, name)
            target = os.path.realpath(path) if os.path.islink(path) else os.path.join(real, name)
            if is_picture(name) and target not in seen:
                pictures.append(path)
            elif not is_picture(name) and not is_hidden(name):
                others[Path(name).suffix.lower()] += 1
            seen.add(target)
        seen.add(real)
    _say_passed_over(str(folder), tuple(sorted(others.items())))
    return pictures


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be listed ({error.strerror}): allow it, or move the folder") from error


@cache
def _say_passed_over(folder: str, count_by_ending: tuple[tuple[str, int], ...]) -> None:
    """Once for each folder and process, though every script opens a folder several times."""
    if count_by_ending and processes.rank() == 0:
        kinds = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in count_by_ending)
        print(f"passed over in {printable(folder)}: {kinds}, which Pillow does not read; convert what is a picture")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the person's own."""
    return name.startswith(".") or name in LEFT_BEHIND


def is_picture(path: str | Path) -> bool:
    """Whether a file has the ending of a picture and is not hidden."""
    return not is_hidden(Path(path).name) and Path(path).suffix.lower() in _endings()


@cache
def _endings() -> set[str]:
    of_pillow = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return of_pillow | {decoding.DICOM_ENDING}


def class_folders(root: Path, part: str) -> dict[str, Path]:
    """The class folders of a part of a data set (train, validation or test) by name; none if there is no such part.

    If pictures lie straight in train/ or validation/, and no folders, they are of one class, which is called `good`.
    Says once how many pictures are in no class.
    """
    with files.reading(root / part):
        if not (root / part).is_dir():
            return {}
        entries = sorted((root / part).iterdir())
    found = {path.name: path for path in entries if path.is_dir() and not is_hidden(path.name)}
    files_here = [path for path in entries if not path.is_dir() and not is_hidden(path.name)]
    straight = sum(map(is_picture, files_here))
    if not found:
        others = Counter(path.suffix.lower() for path in files_here if not is_picture(path))
        _say_passed_over(str(root / part), tuple(sorted(others.items())))
    if straight and not found and part != "test":
        return {FLAT_CLASS: root / part}
    if straight:
        _say_in_no_class(root / part, straight)
    return found


@cache
def _say_in_no_class(folder: Path, count: int) -> None:
    if processes.rank() == 0:
        print(
            f"passed over in {printable(str(folder))}: {count} pictures in no class folder. Sort them into "
            f"{FLAT_CLASS}/ and the like there, or judge them with --images {quoted(folder)}"
        )


def check_class_names(names: list[str], root: Path) -> None:
    """Raise InputError, naming both, if two class folders have names that differ in capital letters only."""
    by_folded: dict[str, str] = {}
    for name in names:
        other = by_folded.setdefault(name.casefold(), name)
        if other != name:
            raise InputError(f"{root} has class folders {other!r} and {name!r}: give both the same name")


# ---- pages ----------------------------------------------------------------------------------------------------------


def page_name(name: str, page: int, pages: list[int]) -> str:
    """What a page of a file is called: stack.tif#3 for the third page, and as the file itself if it has one alone."""
    return name if pages == [0] else f"{name}#{page + 1}"


def file_and_page(root: Path, source: str) -> tuple[Path, int]:
    """The file and the page (from 0) that `page_name` has named."""
    name, page = split_page(source)
    return (root / source, 0) if page is None or (root / source).exists() else (root / name, page - 1)


def split_page(source: str) -> tuple[str, int | None]:
    """What `page_name` has put together: the file, and the page from 1; None where a file is one picture."""
    name, mark, number = source.rpartition("#")
    return (name, int(number)) if mark and number.isdecimal() else (source, None)


def read_pages(paths: list[Path]) -> tuple[list[list[int]], list[bytes]]:
    """The pages of each file, see `decoding.page_numbers`, and the SHA-256 of its bytes, b"" if it cannot be read.

    Raises InputError for a DICOM file if pydicom is not installed.
    """

    def read(path: Path) -> tuple[list[int], bytes]:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except OSError:  # a link to nothing, or no right to read: the decoder names it
            return [0], b""
        return decoding.page_numbers(path), content

    bar = {"leave": False, "delay": 1, "disable": True if processes.rank() else None}
    with ThreadPoolExecutor(8) as pool, decoding.without_limit():
        found = list(tqdm(pool.map(read, paths), "reading files", len(paths), **bar))
    return [pages for pages, _ in found], [content for _, content in found]


def content_number(content: bytes, page: int, source: str) -> int:
    """63 bits of a checksum over a file's bytes and the page; over its name if it could not be read."""
    about = content or os.fsencode(source)
    return int.from_bytes(hashlib.sha256(about + page.to_bytes(4)).digest()[:8]) >> 1


def in_validation(groups: list[str]) -> np.ndarray:
    """Which pictures validate, about a fifth of them, (N,) bool, given what group each belongs to.

    A hash of the group's name decides, so groups are spread whatever the names are, pictures of one group stay
    together, and a picture stays where it is when others are added. Raises InputError for one group alone.
    """
    shares = np.array([int.from_bytes(hashlib.sha256(os.fsencode(each)).digest()[:8]) / 2**64 for each in groups])
    if shares.min() == shares.max():
        raise InputError("--group-by puts all pictures into one group: there is none for validation")
    chosen = shares < 0.2
    # of few groups it may be none or all of them
    return chosen if chosen.any() and not chosen.all() else shares == shares.min()
