"""Patches: the grid that covers a picture, cutting it, and stitching what was found to a map of the whole picture.

A whole picture in one square is the same with one patch, which reaches beyond the picture where that is padded.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

Corners = np.ndarray  # (P, 2) int64: the top and the left of P patches; outside the picture where it is padded


@dataclass(frozen=True)
class Patches:
    """Some patches of some pictures, in order: those of one picture, then those of the next."""

    row: np.ndarray  # (N,) the position of each one's picture in its set
    number: np.ndarray  # (N,) which patch of its picture it is
    corners: Corners  # (N, 2)
    pixels: torch.Tensor  # uint8 (N, C, side, side)
    size: np.ndarray  # (N, 2) the height and the width of its picture
    of: np.ndarray  # (N,) how many patches its picture has

    def __len__(self) -> int:
        return len(self.row)


def places(length: int, side: int, stride: int | None) -> np.ndarray:
    """Where patches of this side begin along an axis, so that each pixel lies in one: every `stride` pixels, and at the
    end. One patch, centred, for an axis that is no longer than the patch, as all are of whole pictures, whose stride is
    None."""
    if length <= side:
        return np.array([-((side - length) // 2)])
    return np.append(np.arange(0, length - side, stride), length - side)


def grid(size: tuple[int, int], side: int, stride: int | None) -> Corners:
    """The corners (P, 2) of the patches that cover a picture of this (height, width), row by row."""
    tops, lefts = (places(length, side, stride) for length in size)
    return np.stack(np.meshgrid(tops, lefts, indexing="ij"), -1).reshape(-1, 2)


def cut(picture: np.ndarray, corners: Corners, side: int) -> np.ndarray:
    """The patches (P, C, side, side) at these corners of a picture uint8 (C, height, width), black beyond its edges."""
    found = np.zeros((len(corners), len(picture), side, side), np.uint8)
    for patch, (top, left) in zip(found, corners.tolist(), strict=True):
        part = picture[:, max(0, top) : top + side, max(0, left) : left + side]
        patch[:, max(0, -top) :, max(0, -left) :][:, : part.shape[1], : part.shape[2]] = part
    return found


def _overlap(size: tuple[int, ...], corner: np.ndarray, side: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The rows and columns that a patch shares with a picture of this (height, width): in the picture, in the patch."""
    ranges = [(max(0, at), min(length, at + side), at) for at, length in zip(corner.tolist(), size, strict=True)]
    return tuple(slice(i, j) for i, j, _ in ranges), tuple(slice(i - at, j - at) for i, j, at in ranges)


def batches(
    pictures: Iterable[tuple[int, np.ndarray]],
    corners_of: Callable[[int, tuple[int, int]], Corners],
    side: int,
    batch_size: int,
) -> Iterator[Patches]:
    """The patches of pictures, each a position and uint8 (C, height, width), in batches; the last may be smaller.

    `corners_of` says where they lie in a picture, given its position and its (height, width). No more than a picture
    and a batch are held.
    """
    waiting: list[Patches] = []
    held = 0
    for row, picture in pictures:
        size = picture.shape[1:]
        corners, done = corners_of(row, size), 0
        while done < len(corners):
            some = corners[done : done + batch_size - held]
            count = len(some)
            waiting.append(
                Patches(
                    row=np.full(count, row),
                    number=np.arange(done, done + count),
                    corners=some,
                    pixels=torch.from_numpy(cut(picture, some, side)),
                    size=np.tile(size, (count, 1)),
                    of=np.full(count, len(corners)),
                )
            )
            done, held = done + count, held + count
            if held == batch_size:
                yield _together(waiting)
                waiting, held = [], 0
    if waiting:
        yield _together(waiting)


def _together(parts: list[Patches]) -> Patches:
    arrays = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    return Patches(**{name: (torch.cat if name == "pixels" else np.concatenate)(each) for name, each in arrays.items()})


def falling(side: int) -> torch.Tensor:
    """The weight of a patch's pixels in a map, (side, side): 1 in its middle, falling to nearly 0 at its edge.

    With a stride of half a side the weights of all patches add up to the same everywhere, and no seam shows.
    """
    of_axis = torch.sin(torch.pi * (torch.arange(side) + 0.5) / side).square()
    return of_axis[:, None] * of_axis


class Stitching:
    """Maps of whole pictures from those of their patches, which overlap: the mean, weighted by `falling`."""

    def __init__(self) -> None:
        self._row: int | None = None  # of the picture that is being stitched
        self._sum = self._weight = torch.empty(0)  # (K, height, width) and (height, width)

    def add(self, patches: Patches, maps: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Take the maps (N, K, side, side) of these patches. Yields the position and the map (K, height, width) of each
        picture that is complete, on the CPU. All patches of a picture must come in their order."""
        maps = maps.cpu().float()
        side = maps.shape[-1]
        window = falling(side)
        for i, row in enumerate(patches.row.tolist()):
            size = tuple(patches.size[i].tolist())
            of_picture, of_patch = _overlap(size, patches.corners[i], side)
            if patches.of[i] == 1:
                yield row, maps[i][:, *of_patch]
                continue
            if row != self._row:
                self._row, self._sum, self._weight = row, torch.zeros(len(maps[i]), *size), torch.zeros(size)
            self._sum[:, *of_picture] += (window * maps[i])[:, *of_patch]
            self._weight[of_picture] += window[of_patch]
            if patches.number[i] == patches.of[i] - 1:
                whole = self._sum.div_(self._weight)
                self._row, self._sum, self._weight = None, torch.empty(0), torch.empty(0)  # they may be large
                yield row, whole
