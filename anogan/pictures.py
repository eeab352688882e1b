"""The training pictures: uint8 in memory or in a file, and the patches of them that a training sees."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from anogan import images, kept, loading, patches, processes
from anogan.decoding import View
from util import InputError

MEMORY = 2**30  # bytes of pictures that are held in memory; more of them lie in a file
FILE = "training-pictures.bin"  # in the run folder; an .npz of the same name says what it holds

Augment = Literal["flips", "turns"]


@dataclass(frozen=True)
class Pictures:
    """Training pictures as the networks see them, and how patches are drawn from them. A whole picture is one patch."""

    pixels: np.ndarray | Path  # uint8, one picture (C, height, width) after the other, flattened; or the file of them
    size: np.ndarray  # (N, 2) int64, the height and the width of each
    view: View
    augment: Augment | None = None  # how patches are turned at random

    def __len__(self) -> int:
        return len(self.size)

    @cached_property
    def turns(self) -> np.ndarray:
        """(M,) the picture of each patch of an epoch: as many of each as cover it once."""
        count = np.ones(len(self), np.int64)
        if self.view.has_patches:
            count = (self.size.prod(1) / self.view.size**2).round().astype(np.int64).clip(min=1)
        return np.repeat(np.arange(len(self)), count)

    @property
    def bytes(self) -> int:
        """How many bytes all pixels have."""
        return int(self.size.prod(1).sum()) * self.view.channels

    @cached_property
    def _first(self) -> np.ndarray:
        """(N + 1,) where each picture begins."""
        return np.append(0, np.cumsum(self.size.prod(1) * self.view.channels))

    def draw(self, rows: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        """A patch of each of these pictures (B,), at a random place: uint8 (B, C, side, side).

        A place may be drawn a quarter of a side beyond the edge, and then is at the edge: so the edge is seen as often
        as in the grid of a search.
        """
        side, channels = self.view.size, self.view.channels
        # the file is mapped anew each time, or all that was ever read of it would count as memory of this process
        pixels = np.memmap(self.pixels, np.uint8, "r") if isinstance(self.pixels, Path) else self.pixels
        size = self.size[rows]
        room = (size - side).clip(min=0)
        drawn = random.integers(-(side // 4), room + side // 4, endpoint=True).clip(0, room)
        corners = np.where(size > side, drawn, -((side - size) // 2))  # (B, 2)
        found = np.empty((len(rows), channels, side, side), np.uint8)
        for i, (first, (height, width)) in enumerate(zip(self._first[rows].tolist(), size.tolist(), strict=True)):
            picture = pixels[first : first + channels * height * width].reshape(channels, height, width)
            found[i] = patches.cut(picture, corners[i : i + 1], side)[0]
        return self._turned(torch.from_numpy(found), random)

    def _turned(self, x: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        """Patches (B, C, side, side), each mirrored or not on both axes; with `turns` also turned by 90 degrees."""
        if self.augment is None:
            return x
        across, down, swapped = torch.from_numpy(random.random((3, len(x), 1, 1, 1)) < 0.5)
        x = torch.where(across, x.flip(3), x)
        x = torch.where(down, x.flip(2), x)
        return torch.where(swapped, x.transpose(2, 3), x) if self.augment == "turns" else x

    def some(self, count: int) -> torch.Tensor:
        """At most `count` patches, spread evenly over the pictures, always the same: uint8 (count, C, side, side)."""
        return self.draw(self.turns[images.evenly_spaced(len(self.turns), count)], np.random.default_rng(0))


class _InColour(Exception):
    """A picture is not grey as those before it."""


def load(
    image_set: images.ImageSet,
    view: View,
    path: Path | None = None,
    skip_unreadable: bool = False,
    find_channels: bool = False,
) -> Pictures:
    """Decode a set. More than MEMORY bytes go to the file `path`, or are taken from it if it holds just these.

    With `find_channels` the pictures are grey if every one of them is. Without `path` all are held in memory; with it
    every process must call this. Raises InputError as `loading.image_batches` does, or if the file cannot be written,
    or is not there for another process than the one that wrote it.
    """
    key = kept.key_of(image_set.fingerprint(), replace(view, channels=0))

    def before() -> Pictures | None:
        """Those in the file, if it is there and just what is asked for: it serves train_gan.py and every detector."""
        about = kept.read_about(path)
        if about is None or about["key"].tobytes() != key or not (find_channels or about["channels"] == view.channels):
            return None
        found = Pictures(path, about["size"], replace(view, channels=int(about["channels"])))
        return found if skip_unreadable or len(found) == len(image_set) else None

    if path is not None:
        found = before()
        if not any(processes.largest(found is None)):
            return found
    seen = replace(view, channels=3) if find_channels else view
    try:
        found = _collect(image_set, seen, 1 if find_channels else view.channels, path, key, skip_unreadable)
    except _InColour:
        found = _collect(image_set, seen, 3, path, key, skip_unreadable)
    if found is not None and not isinstance(found.pixels, Path):
        return found
    if processes.rank() == 0:
        kept.write_about(path, key, size=found.size, channels=np.array(found.view.channels))
    processes.wait_for_all()
    if (after := before()) is None:
        raise InputError(f"{path} is not there for every process: every machine needs the same run folder")
    return after


def _collect(
    image_set: images.ImageSet, view: View, channels: int, path: Path | None, key: bytes, skip_unreadable: bool
) -> Pictures | None:
    """Decode a set, and keep so many channels of it in memory or in a file, which rank 0 writes: None for the others.

    Raises _InColour for a picture in colour of which one channel would be kept.
    """
    size, held, total = [], [], 0
    batches = loading.decode_batches(len(image_set), view)
    decoded = loading.image_batches(image_set, batches, view, skip_unreadable, quiet=processes.rank() > 0)

    def pictures() -> Iterator[np.ndarray]:
        """uint8 (channels, height, width) each."""
        for picture in chain.from_iterable(pictures for pictures, _ in loading.with_bar(decoded, len(batches))):
            if len(picture) > channels and (picture[:1] != picture[1:]).any():
                raise _InColour
            size.append(picture.shape[1:])
            yield picture[:channels].copy()  # or the other channels would stay in memory too

    one_by_one = pictures()
    for picture in one_by_one:
        held.append(picture.ravel())
        total += picture.size
        if path is not None and total > MEMORY:
            break
    else:
        flat = np.concatenate(held) if held else np.empty(0, np.uint8)
        return Pictures(flat, np.array(size, np.int64).reshape(-1, 2), replace(view, channels=channels))
    if processes.rank() > 0:
        return None
    kept.write_pixels(path, chain(held, one_by_one), key)
    return Pictures(path, np.array(size, np.int64), replace(view, channels=channels))
