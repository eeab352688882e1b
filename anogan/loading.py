"""The pixels of a set of images, batch by batch from worker processes, as a network sees them."""

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from anogan import decoding, processes
from anogan.decoding import View
from anogan.images import ImageSet
from util import InputError, printable


def load_images(image_set: ImageSet, view: View, skip_unreadable: bool = False) -> tuple[torch.Tensor, ImageSet]:
    """Decode a whole set to uint8 (N, C, size, size); also returns the set of those N images.

    See `image_batches`, which holds no more than a few batches.
    """
    batches = chunks(range(len(image_set)), 64)
    decoded = image_batches(image_set, batches, view, skip_unreadable, quiet=processes.rank() > 0)
    pixels = torch.empty(len(image_set), view.channels, view.size, view.size, dtype=torch.uint8)
    count, readable = 0, [np.empty(0, np.int64)]
    for batch, positions in tqdm(decoded, "reading", len(batches), **_bar()):
        pixels[count : count + len(batch)] = batch
        count += len(batch)
        readable.append(positions)
    return pixels[:count], image_set.take(np.concatenate(readable))


def _bar() -> dict[str, Any]:
    """Only on a terminal, and if it takes longer than a second; of several processes one shows it."""
    return {"leave": False, "delay": 1, "disable": True if processes.rank() else None}


def chunks(rows: range, size: int) -> list[range]:
    """These rows in consecutive ranges of `size`, the last one shorter if need be."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def find_levels(image_set: ImageSet, view: View) -> tuple[float, float] | None:
    """The black and the white point for pictures with more than 8 bits, see `decoding.black_and_white`.

    None if the first picture that can be read has 8 bits: then all must have them.
    """
    one_by_one = (_spreads(image_set, view, range(row, row + 1)) for row in range(len(image_set)))
    if next(chain.from_iterable(one_by_one), None) is None:
        return None
    batches = chunks(range(len(image_set)), 64)
    found = tqdm(_in_workers(partial(_spreads, image_set, view), batches), "levels", len(batches), **_bar())
    return decoding.black_and_white(np.array([each for each in chain(*found) if each is not None]))


def _spreads(image_set: ImageSet, view: View, rows: range) -> list[tuple[float, float] | None]:
    """`decoding.spread` of those images that can be read."""
    found = []
    for row in rows:
        with _noting(image_set, row, []):
            found.append(decoding.spread(image_set.open(row), view))
    return found


def image_batches(
    image_set: ImageSet, batches: Sequence[range], view: View, skip_unreadable: bool = False, quiet: bool = False
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Decode these rows of a set, in order, in worker processes that run a few batches ahead.

    Yields for each the uint8 (N, C, size, size) as a network sees it, see `decoding.as_seen`, and the images' positions
    in the set (N,). Raises InputError for an image that cannot be read, unless `skip_unreadable` leaves it out. Unless
    `quiet`, it names on stderr those left out, and says at the end what else was lost.
    """
    outside: dict[int, float] = {}
    in_colour: list[int] = []
    for seen, faults in _in_workers(partial(_decode, image_set, view, skip_unreadable), batches):
        if faults and not skip_unreadable:
            raise InputError(f"cannot read the image {faults[0]}: replace it, or use --skip-unreadable")
        for fault in faults if not quiet else ():
            tqdm.write(f"skipped, cannot be read: {fault}", file=sys.stderr)
        pixels, positions, shares, lost_colour = seen
        outside |= {row: share for row, share in zip(positions.tolist(), shares.tolist(), strict=True) if share > 0}
        in_colour += positions[lost_colour].tolist()
        yield torch.from_numpy(pixels), positions
    if not quiet:
        _say_what_is_lost(image_set, view, outside, in_colour, sum(map(len, batches)))


def _say_what_is_lost(
    image_set: ImageSet, view: View, outside: dict[int, float], in_colour: list[int], count: int
) -> None:
    """Colour in some of `count` pictures for a grey GAN, and levels beyond its black and white points."""
    if in_colour:
        tqdm.write(
            f"{len(in_colour)} of {count} pictures are in colour, such as {printable(image_set.source[in_colour[0]])}, "
            "and are judged in grey, as the training pictures are: what differs in colour alone is not seen"
        )
    if outside:
        row = max(outside, key=outside.get)
        black, white = view.levels
        tqdm.write(
            f"{len(outside)} of {count} pictures have pixels outside the levels {black:.6g} (black) to {white:.6g} "
            f"(white): {sum(outside.values()) / count:.2%} of all pixels, most in {printable(image_set.source[row])} "
            f"({outside[row]:.1%}). They are seen as black or white: check the exposure"
        )


Decoded = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _decode(image_set: ImageSet, view: View, skip_unreadable: bool, rows: range) -> tuple[Decoded, list[str]]:
    """Pixels (N, C, H, W), positions, shares outside the levels and lost colours (N,) of the images that can be read;
    and what is wrong with the others."""
    seen, positions, faults = [], [], []
    for row in rows:
        with _noting(image_set, row, faults):
            seen.append(decoding.as_seen(image_set.open(row), view))
            positions.append(row)
        if faults and not skip_unreadable:
            break
    pixels = np.array([each.pixels for each in seen], np.uint8).reshape(-1, view.channels, view.size, view.size)
    outside = np.array([each.outside for each in seen], np.float64)
    lost_colour = np.array([each.lost_colour for each in seen], bool)
    return (pixels, np.array(positions, np.int64), outside, lost_colour), faults


@contextlib.contextmanager
def _noting(image_set: ImageSet, row: int, faults: list[str]) -> Iterator[None]:
    """Add to `faults` what the block raises on an image that it cannot read."""
    try:
        yield
    except NameError:  # a fault of ours
        raise
    except Exception as error:  # a damaged file can make a decoder raise anything
        faults.append(f"{image_set.source[row]} ({error})")


class _Rows:
    """What DataLoader calls a data set: a function of some rows, which any process can call."""

    def __init__(self, function: Callable[[range], Any]) -> None:
        self._function = function

    def __getitem__(self, rows: range) -> Any:
        return self._function(rows)


def _in_workers(function: Callable[[range], Any], batches: Sequence[range]) -> Iterator[Any]:
    """A function of each batch of rows, in order, in worker processes that run a few batches ahead.

    Arrays come through pipes: tensors would take /dev/shm, of which a container may have next to nothing.
    """
    workers = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), len(batches) - 1)
    yield from DataLoader(
        _Rows(function),
        batch_size=None,
        sampler=batches,
        collate_fn=_as_it_is,
        num_workers=max(0, workers),
        worker_init_fn=_end_with_parent,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _end_with_parent(worker: int) -> None:
    """Let a worker end with the process that started it, even if that one is killed.

    DataLoader's own watch does not help a worker that is writing into a pipe that nobody reads any more.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
