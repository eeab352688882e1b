"""The pixels of a set of images, batch by batch from worker processes, as a network sees them."""

import contextlib
import dataclasses
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import util
from anogan import decoding, processes
from anogan.decoding import View
from anogan.images import ImageSet
from util import InputError, printable


def load_images(image_set: ImageSet, view: View, skip_unreadable: bool = False) -> tuple[torch.Tensor, ImageSet]:
    """Decode a set of whole pictures to uint8 (N, C, size, size); also returns the set of those N images.

    See `image_batches`, which holds no more than a few batches.
    """
    decoded = image_batches(image_set, decode_batches(len(image_set), view), view, skip_unreadable)
    found, rows = [], [np.empty(0, np.int64)]
    for pictures, positions in decoded:
        found += pictures
        rows.append(positions)
    pixels = np.array(found, np.uint8).reshape(-1, view.channels, view.size, view.size)
    return torch.from_numpy(pixels), image_set.take(np.concatenate(rows))


def decode_batches(count: int, view: View) -> list[range]:
    """The rows of a set, as many together as a worker process decodes at once: one by one if they may be large."""
    return chunks(range(count), 1 if view.has_patches else 64)


def with_bar(batches: Iterable[Any], count: int, name: str = "reading") -> Iterable[Any]:
    """These batches with a bar, only on a terminal, and if it takes longer than a second; of several processes one
    shows it."""
    return tqdm(batches, name, count, leave=False, delay=1, disable=True if processes.rank() else None)


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
    batches = decode_batches(len(image_set), view)
    found = with_bar(_in_workers(partial(_spreads, image_set, view), batches), len(batches), "levels")
    return decoding.black_and_white(np.array([each for each in chain(*found) if each is not None]))


def _spreads(image_set: ImageSet, view: View, rows: range) -> list[tuple[float, float] | None]:
    """`decoding.spread` of those images that can be read."""
    found = []
    for row in rows:
        with _noting(image_set, row, []):
            found.append(decoding.spread(image_set.open(row), view))
    return found


def seen_sizes(image_set: ImageSet, view: View) -> np.ndarray:
    """The height and the width (N, 2) at which the networks see each picture of a set, 0 for one that they cannot see.

    Of pictures that are not kept, no pixels are read here, but those of DICOM files. So the two are swapped where an
    EXIF tag turns a PNG file: Pillow finds it behind the pixels.
    """
    if _is_kept(image_set, view):
        return np.array([image_set.kept.seen_size(number) for number in image_set.index], np.int64).reshape(-1, 2)
    batches = chunks(range(len(image_set)), 64)
    found = with_bar(_in_workers(partial(_sizes, image_set, view), batches), len(batches), "sizes")
    return np.array(list(chain(*found)), np.int64).reshape(-1, 2)


def _sizes(image_set: ImageSet, view: View, rows: range) -> list[tuple[int, int]]:
    """`View.seen_size` of these images, as (height, width)."""
    found = []
    for row in rows:
        size = 0, 0
        with _noting(image_set, row, []):
            image = image_set.open(row)
            decoding.check_size(image, view)
            size = view.seen_size(image.size)
        found.append(size[::-1])
    return found


def image_batches(
    image_set: ImageSet, batches: Sequence[range], view: View, skip_unreadable: bool = False, quiet: bool = False
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Decode these rows of a set, in order, in worker processes that run a few batches ahead; or read them in this one,
    if they were kept.

    Yields for each batch the pictures, uint8 (C, height, width), as the networks see them, see `decoding.as_seen`, and
    their positions in the set (N,). Raises InputError for an image that cannot be read, unless `skip_unreadable` leaves
    it out. Unless `quiet`, it names on stderr those left out, and says at the end what else was lost.
    """
    lost = _Lost()
    for seen in seen_batches(image_set, batches, view, skip_unreadable, quiet):
        lost.add(seen)
        yield [each.pixels for each in seen.values()], np.array(list(seen), np.int64)
    if not quiet:
        _say_what_is_lost(image_set, view, lost, sum(map(len, batches)))


def seen_batches(
    image_set: ImageSet, batches: Sequence[range], view: View, skip_unreadable: bool = False, quiet: bool = False
) -> Iterator[dict[int, decoding.Seen]]:
    """What `image_batches` yields, by position in the set, with what was lost of each picture."""
    decode = partial(_decode, image_set, view, skip_unreadable)
    for seen, faults in map(decode, batches) if _is_kept(image_set, view) else _in_workers(decode, batches):
        if faults and not skip_unreadable:
            raise InputError(f"cannot read the image {faults[0]}: replace it, or use --skip-unreadable")
        for fault in faults if not quiet else ():
            tqdm.write(f"skipped, cannot be read: {fault}", file=sys.stderr)
        yield seen


@dataclasses.dataclass
class _Lost:
    """What the networks do not see of pictures as they are, by position in the set."""

    outside: dict[int, float] = dataclasses.field(default_factory=dict)  # share of pixels beyond black and white
    in_colour: list[int] = dataclasses.field(default_factory=list)  # those that were made grey
    enlarged: list[int] = dataclasses.field(default_factory=list)

    def add(self, seen: dict[int, decoding.Seen]) -> None:
        """Note what was lost of these pictures."""
        self.outside |= {row: each.outside for row, each in seen.items() if each.outside > 0}
        self.in_colour += [row for row, each in seen.items() if each.lost_colour]
        self.enlarged += [row for row, each in seen.items() if each.enlarged]


def _say_what_is_lost(image_set: ImageSet, view: View, lost: _Lost, count: int) -> None:
    """Colour in some of `count` pictures for a grey GAN, levels beyond its black and white points, and pictures that
    are smaller than those that patches are cut from."""
    if lost.in_colour:
        tqdm.write(
            f"{len(lost.in_colour)} of {count} pictures are in colour, such as "
            f"{printable(image_set.source[lost.in_colour[0]])}, and are judged in grey, as the training pictures are: "
            "what differs in colour alone is not seen"
        )
    if lost.enlarged:
        tqdm.write(
            f"{len(lost.enlarged)} of {count} pictures are enlarged to a shorter side of {view.picture_size}, such as "
            f"{printable(image_set.source[lost.enlarged[0]])}: their details are blurred compared with those of others"
        )
    outside = lost.outside
    if outside:
        row = max(outside, key=outside.get)
        black, white = view.levels
        tqdm.write(
            f"{len(outside)} of {count} pictures have pixels outside the levels {black:.6g} (black) to {white:.6g} "
            f"(white): {sum(outside.values()) / count:.2%} of all pixels, most in {printable(image_set.source[row])} "
            f"({outside[row]:.1%}). They are seen as black or white: check the exposure"
        )


def _decode(
    image_set: ImageSet, view: View, skip_unreadable: bool, rows: range
) -> tuple[dict[int, decoding.Seen], list[str]]:
    """What is seen of the images that can be read, by position; and what is wrong with the others."""
    seen, faults = {}, []
    kept = image_set.kept if _is_kept(image_set, view) else None
    for row in rows:
        with _noting(image_set, row, faults):
            found = None if kept is None else kept.seen(image_set.index[row])
            seen[row] = decoding.as_seen(image_set.open(row), view) if found is None else found
        if faults and not skip_unreadable:
            break
    return seen, faults


def _is_kept(image_set: ImageSet, view: View) -> bool:
    return image_set.kept is not None and image_set.kept.is_of(view)


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
    workers = max(0, min(8, util.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), len(batches) - 1))
    ahead = 1 if len(batches) > 0 and len(batches[0]) == 1 else 2  # for each worker: single pictures may be large
    yield from DataLoader(
        _Rows(function),
        batch_size=None,
        sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=ahead if workers > 0 else None,
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
