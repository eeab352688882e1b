"""Masks: which file says where the defect of a test image is, and which of its pixels it marks."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from anogan import decoding, files, folders
from util import InputError

FEW_COLOURS = 32  # up to so many in a mask that is not grey are labels: the edge of a soft shape has more
FEW_LEVELS = 4  # up to so many levels beside the background are labels; more are the soft edge of a shape
DARK = 127  # nor are whole levels up to this one a soft edge: no shape is drawn that dark, but numbered defects are
NOISE = 1 / 16  # of the brightest level: so little can be what a JPEG left that was saved as PNG
LARGEST_SHARE = 0.5  # of a picture that a mask may mark: beyond, it is more likely inverted


def has_masks(dataset: str) -> bool:
    """Whether a data set comes with masks of its defects, in the layout of MVTec AD."""
    return (Path(dataset) / "ground_truth").is_dir()


def find_masks(dataset: str, sources: Iterable[str]) -> dict[str, Path]:
    """The mask file of each test image that has one, by the image's source.

    For test/<defect>/<name>.png it is ground_truth/<defect>/<name>_mask with the ending of any picture, else
    ground_truth/<defect>/<name>. The pages of a file share the mask file. Raises InputError if an image has several
    masks, or a mask is that of several images.
    """
    listed: dict[Path, dict[str, list[Path]]] = {}  # the pictures in a folder, by name without ending
    found: dict[str, Path] = {}
    owner: dict[Path, str] = {}
    for source in map(str, sources):
        file, _ = folders.split_page(source)
        name = Path(file).relative_to("test")
        folder = Path(dataset) / "ground_truth" / name.parent
        if folder not in listed:
            listed[folder] = _by_stem(folder)
        same = listed[folder].get(name.stem, [])
        own_name = [path for path in same if path.name == name.name]
        candidates = listed[folder].get(f"{name.stem}_mask") or own_name or same
        if len(candidates) > 1:
            raise InputError(f"{source} has several masks, {' and '.join(map(str, candidates))}: keep one")
        for path in candidates:
            if owner.setdefault(path, file) != file:
                raise InputError(
                    f"{path} is the mask of {owner[path]} and of {file}: rename one of these pictures, and its mask"
                )
            found[source] = path
    return found


def open_mask(path: Path, source: str, picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Where the defect of a picture is, (height, width) bool, as the picture is shown; docs/own-pictures.md has the
    rules.

    `source` is the picture's name, `picture` the file as Pillow opens it, and `size` its (width, height) once turned
    as its EXIF tag says. A mask without an EXIF tag is turned too, if it has the size of the picture as it is stored.
    Raises InputError, naming the mask, if it cannot be read or understood, has another size or other pages than the
    picture, marks more than half of it, or fits it turned as well as not turned.
    """
    page = folders.split_page(source)[1]
    pages = decoding.page_numbers(path)
    if (page is None) != (len(pages) == 1) or (page or 1) > len(pages):
        raise InputError(f"the mask {path} has {len(pages)} pages, not those of {source}: give it a page for each")
    try:
        with decoding.open_file(path, pages[(page or 1) - 1]) as file:
            has_exif = decoding.orientation(file) is not None
            levels = _levels(file)
            kind = _kind(file, levels)
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise InputError(f"the mask {path} of {source} cannot be read ({error}): replace it, or remove it") from error
    name = f"{path} of {source}"
    marked = _marked(levels, kind, name)
    if not has_exif:
        marked = _turned(marked, decoding.orientation(picture), size, name)
    if marked.shape != size[::-1]:
        raise InputError(f"the mask {path} has another size than {source}: they must be the same")
    if marked.mean() > LARGEST_SHARE:
        raise InputError(
            f"the mask {path} marks {marked.mean():.0%} of {source}, more than half: is it inverted? Draw the defect "
            "alone, in white on black, or remove the mask to leave the picture out of the pixel figures"
        )
    return marked


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    """The pictures in a folder, if there is one, by their names without ending."""
    found = defaultdict(list)
    if folder.is_dir():
        with files.reading(folder):
            for path in sorted(folder.iterdir()):
                if folders.is_picture(path):
                    found[path.stem].append(path)
    return found


def _levels(mask: Image.Image) -> np.ndarray:
    """What a mask is drawn in, (height, width, channels) float32: its opacity, where that varies, else its colours.

    Raises ValueError for levels that are no colours.
    """
    levels = decoding.levels_of(mask)  # with more than 8 bits
    if levels is not None:
        if levels.min() < 0:
            raise ValueError("its levels must be numbers from 0 up")
        return np.stack([np.asarray(channel) for channel in decoding.upright_channels(mask, levels)], 2)
    mask = decoding.upright(mask)
    if mask.has_transparency_data:
        opacity = np.asarray(mask.convert("RGBA"))[..., 3:]
        if np.ptp(opacity) or not opacity.any():
            return opacity.astype(np.float32)
    colours = np.asarray(mask.convert("L" if mask.mode in ("1", "L", "LA") else "RGB"))
    return np.atleast_3d(colours).astype(np.float32)


def _kind(mask: Image.Image, levels: np.ndarray) -> Literal["labels", "soft"] | None:
    """Whether a mask can only be labels (a palette, or few colours), or soft (a JPEG); None if its levels decide."""
    if mask.format in ("JPEG", "MPO"):
        return "soft"
    if levels.shape[2] == 1 or (levels == levels[..., :1]).all():  # grey
        return None
    is_few = len(np.unique(levels.reshape(-1, 3), axis=0)) <= FEW_COLOURS
    return "labels" if mask.mode == "P" or is_few else None


def _marked(levels: np.ndarray, kind: Literal["labels", "soft"] | None, name: str) -> np.ndarray:
    """Which pixels of a mask (H, W, C) are no background, (H, W) bool.

    The background is black or, where a mask has several colours and no black, the commonest colour along its border.
    Of labels every one counts, of a soft shape what differs from the background by half as much as its core, or more.
    Raises InputError where the two cannot be told apart.
    """
    if (levels == 0).all(-1).any() or (levels == levels[0, 0]).all():
        background = np.zeros(levels.shape[-1], np.float32)
    else:
        border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
        colours, counts = np.unique(border, axis=0, return_counts=True)
        background = colours[counts.argmax()]
    difference = np.abs(levels - background).max(-1)
    drawn = difference[difference > 0]
    brightest = drawn.max(initial=0)
    is_dark = brightest <= DARK and (drawn % 1 == 0).all()
    if kind == "labels":
        return difference > 0
    if kind == "soft" or not (is_dark or len(np.unique(drawn)) <= FEW_LEVELS):
        return (difference > 0) & (difference >= brightest / 2)
    if not is_dark and (drawn <= NOISE * brightest).any():
        raise InputError(
            f"the mask {name} has levels next to the background ({drawn.min():g}) beside others ({brightest:g}): they "
            "can be labels, or noise that JPEG left; draw the defect in white on black, without other levels"
        )
    return difference > 0


def _turned(marked: np.ndarray, orientation: int | None, size: tuple[int, int], name: str) -> np.ndarray:
    """Marked pixels (H, W) as a picture with this EXIF orientation is shown, at `size`, (width, height).

    They are turned if they have the size of the picture as it is stored. Raises InputError if that is `size` too, so
    that nothing tells which of the two they were drawn on.
    """
    if orientation not in range(2, 9):
        return marked
    stored = size if orientation < 5 else size[::-1]  # the first are mirrored or upside down
    if marked.shape != stored[::-1]:
        return marked
    if stored == size:
        raise InputError(
            f"the mask {name}: the picture is turned by its EXIF tag, and nothing tells whether the mask was drawn on "
            "it as it is shown: save the picture with its pixels turned, without the tag, and the mask to match"
        )
    return np.asarray(decoding.turned(Image.fromarray(marked), orientation))
