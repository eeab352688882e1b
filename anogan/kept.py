"""Decoded pictures in a file of a run folder: uint8, one after the other, memory-mapped, whole or not at all.

NAME.bin holds the pixels and ends with a key, a checksum of what was decoded and how. NAME.npz has the key too, and
what there is to know of each picture.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from anogan import files
from anogan.decoding import Seen, View

VERSION = 1  # raised where the same bytes are decoded to other pixels: those that a run folder keeps are made anew


def key_of(which: str, view: View) -> bytes:
    """A checksum of which pictures these are, and of all that decides their pixels."""
    return hashlib.sha256(f"{VERSION} {which} {replace(view, normalise=False)}".encode()).digest()


def write_pixels(path: Path, pictures: Iterable[np.ndarray], key: bytes) -> None:
    """Write uint8 pictures, one after the other, whole or not at all."""
    with files.replacing(path) as partial, partial.open("wb") as file:
        for picture in pictures:
            file.write(np.ascontiguousarray(picture))
        file.write(key)


def write_about(path: Path, key: bytes, **about: np.ndarray) -> None:
    """Write what there is to know of the pictures in `path`: `size` (N, 2), `channels` and more."""
    files.write_arrays(path.with_suffix(".npz"), key=np.frombuffer(key, np.uint8), **about)


def read_about(path: Path) -> dict[str, np.ndarray] | None:
    """What `write_about` wrote; None unless both files are there, whole and of one key."""
    try:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
            about = {name: file[name] for name in file.files}
        with path.open("rb") as file:
            file.seek(int(about["size"].prod(1).sum()) * int(about["channels"]))
            # the pixels end with the key too: after a kill between the two files they are not taken for others
            return about if file.read() == about["key"].tobytes() else None
    except Exception:  # numpy raises almost anything on damaged bytes: both are made again
        return None


@dataclass(frozen=True)
class Kept:
    """The pictures of a split as the networks see them, by their `ImageSet.index`."""

    path: Path
    state: tuple[int, int]  # of the file when it was read: another one of that name holds other pictures
    view: View  # that they were decoded for
    asked_for: np.ndarray  # (M,) int64, those that were to be kept; of these some may be unreadable
    index: np.ndarray  # (N,) int64, ascending: those that are kept
    size: np.ndarray  # (N, 2) int64, the height and the width of each
    first: np.ndarray  # (N,) int64, where each begins in the file
    outside: np.ndarray  # (N,) and the next two: see `decoding.Seen`
    lost_colour: np.ndarray  # (N,) bool
    enlarged: np.ndarray  # (N,) bool

    def covers(self, index: np.ndarray) -> bool:
        """Whether all pictures with these numbers were to be kept."""
        return bool(np.isin(index, self.asked_for).all())

    def is_of(self, view: View) -> bool:
        """Whether these are the pixels that are seen in this way."""
        return replace(view, normalise=False) == replace(self.view, normalise=False)

    def _place(self, index: int) -> int | None:
        at = int(np.searchsorted(self.index, index))
        return at if at < len(self.index) and self.index[at] == index else None

    def seen_size(self, index: int) -> tuple[int, int]:
        """The height and the width of a picture, 0 and 0 if it is not among them."""
        at = self._place(index)
        return (0, 0) if at is None else tuple(self.size[at].tolist())

    def seen(self, index: int) -> Seen | None:
        """What the networks see of a picture; None if it is not among them, or the file is no longer that of then."""
        at = self._place(index)
        if at is None or _state(self.path) != self.state:
            return None
        shape = (self.view.channels, *self.size[at].tolist())
        # mapped anew each time, or all that was ever read of it would count as memory of this process
        pixels = np.array(np.memmap(self.path, np.uint8, "r", int(self.first[at]), shape))
        return Seen(pixels, float(self.outside[at]), bool(self.lost_colour[at]), bool(self.enlarged[at]))


def _state(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one of its name; None if there is none."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def read(path: Path, gan: str, view: View) -> Kept | None:
    """The pictures of a split that `write` wrote; None unless they are there, whole and of this GAN and view."""
    state, about = _state(path), read_about(path)
    if about is None or about["made_for"].tobytes() != key_of(gan, view):
        return None
    first = np.append(0, np.cumsum(about["size"].prod(1) * view.channels))[:-1]
    order = np.argsort(about["index"])
    names = ("outside", "lost_colour", "enlarged")
    arrays = (about["index"], about["size"], first, *(about[name] for name in names))
    return Kept(path, state, view, about["asked_for"], *(each[order] for each in arrays))


def write(path: Path, gan: str, view: View, asked_for: np.ndarray, seen: Iterable[tuple[int, Seen]]) -> None:
    """Keep the pictures of a split, each with its number: those of the numbers asked for (M,) that can be read.

    `gan` is the fingerprint of the GAN that they are for. Pictures of one number are the same, and kept once.
    """
    key = key_of(f"{gan} {hashlib.sha256(asked_for.tobytes()).hexdigest()}", view)
    about: dict[int, tuple] = {}  # by number, in the order of the file

    def pixels() -> Iterator[np.ndarray]:
        for number, one in seen:
            if number not in about:
                about[number] = (*one.pixels.shape[1:], one.outside, one.lost_colour, one.enlarged)
                yield one.pixels

    write_pixels(path, pixels(), key)
    height, width, outside, lost_colour, enlarged = np.array(list(about.values()), np.float64).reshape(-1, 5).T
    write_about(
        path,
        key,
        channels=np.array(view.channels),
        made_for=np.frombuffer(key_of(gan, view), np.uint8),
        asked_for=asked_for,
        index=np.array(list(about), np.int64),
        size=np.stack([height, width], 1).astype(np.int64),
        outside=outside,
        lost_colour=lost_colour > 0,
        enlarged=enlarged > 0,
    )
