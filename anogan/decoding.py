"""One picture file to what a network sees: pages, DICOM, orientation, and more than 8 bits brought to 8."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms.functional import resize

from util import InputError

DICOM_ENDING = ".dcm"
# Their further pages are no pictures of their own: a preview, or the layers of one picture
ONE_PICTURE = ("MPO", "PSD")
PHOTOMETRIC = 262  # TIFF; 0: the smallest level is white, which Pillow minds in files of 8 bits alone
ORIENTATION = 0x0112  # EXIF
BITS_PER_SAMPLE, SAMPLE_FORMAT, SIGNED = 258, 339, 2  # TIFF
SUBFILE_TYPE = 254  # TIFF; bit 0: a smaller copy of another page, bit 2: a transparency mask
# Levels by which the channels of a picture in colour differ somewhere; JPEG makes those of a grey one differ by fewer
COLOUR = 16


@dataclasses.dataclass(frozen=True)
class View:
    """How the networks see a picture: as a whole in one square, or in patches of it; in 8 bits."""

    size: int  # side in pixels of the square, or of a patch
    channels: int  # 1 for grey, 3 for RGB
    # what is black and what is white, for pictures with more than 8 bits; None if they have 8
    levels: tuple[float, float] | None = None
    max_megapixels: float = 179.0  # a larger picture is refused, since it may be a file made to fill the memory
    # how a whole picture becomes a square: its middle, squeezed, or all of it with black on both sides
    fit: Literal["crop", "stretch", "pad"] = "crop"
    # shorter side in pixels of the picture that patches are cut from; "own": not resized; None: no patches
    picture_size: int | Literal["own"] | None = None
    normalise: bool = False  # whether each square or patch is brought to the same mean and contrast, see `to_model`

    @property
    def has_patches(self) -> bool:
        """Whether a picture is seen in patches."""
        return self.picture_size is not None

    def seen_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size that a picture of this (width, height), turned as its EXIF tag says, has before the networks.

        With `pad` it is the picture without the black. Raises ValueError for a picture smaller than a patch.
        """
        if self.picture_size == "own":
            if min(size) < self.size:
                width, height = size
                raise ValueError(
                    f"it has {width}x{height} pixels, smaller than a patch of {self.size}x{self.size}: leave it out, "
                    f"or train with --picture-size {self.size}, to which smaller pictures are enlarged"
                )
            return size
        if not self.has_patches and self.fit != "pad":
            return self.size, self.size
        scale = self.size / max(size) if self.picture_size is None else self.picture_size / min(size)
        width, height = (max(1, int(side * scale + 1e-6)) for side in size)
        return width, height

    def window(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """What the networks see of a picture of this (width, height): (left, top, right, bottom), the square in its
        middle, or all of it."""
        width, height = size
        if self.has_patches or self.fit != "crop":
            return 0, 0, width, height
        side = min(size)
        left, top = round((width - side) / 2), round((height - side) / 2)
        return left, top, left + side, top + side


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the networks see of one picture."""

    pixels: np.ndarray  # uint8 (C, height, width)
    outside: float  # share of these pixels that were blacker than black or whiter than white, 0 with 8 bits
    lost_colour: bool  # whether a picture in colour was made grey
    enlarged: bool  # whether patches are cut from it at more than its own size


# ---- files ----------------------------------------------------------------------------------------------------------


def page_numbers(path: Path) -> list[int]:
    """The pages of a file that are pictures of their own, from 0; [0] for a file that cannot be read.

    Raises InputError for a DICOM file if pydicom is not installed.
    """
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:  # the decoder names it
        return [0]
    if start.startswith(b"\xff\xd8"):  # JPEG, by far the most frequent: no need to open it
        return [0]
    if _is_dicom(path, start):
        pydicom = _pydicom(path)
        try:
            header = pydicom.dcmread(path, specific_tags=["NumberOfFrames"], stop_before_pixels=True)
            return list(range(int(header.get("NumberOfFrames") or 1)))
        except Exception:  # a damaged file can make a decoder raise anything; `open_file` raises it again
            return [0]
    try:
        with without_limit(), Image.open(path) as image:
            count = 1 if image.format in ONE_PICTURE else getattr(image, "n_frames", 1)
            return [page for page in range(count) if count == 1 or not _is_copy(image, page)] or list(range(count))
    except Exception:  # as above; of a stack that is cut short, `open_file` reads the number of pages too
        return [0]


def _is_copy(image: Image.Image, page: int) -> bool:
    """Whether a page of a TIFF is a smaller copy or a mask of another page."""
    if image.format != "TIFF":
        return False
    image.seek(page)
    return bool(image.tag_v2.get(SUBFILE_TYPE, 0) & 0b101)


def open_file(path: Path, page: int = 0) -> Image.Image:
    """A page of a file, not yet decoded, whatever its size. Raises InputError for DICOM without pydicom; and whatever
    Pillow or pydicom raise on a damaged file."""
    with path.open("rb") as file:
        start = file.read(132)
    if _is_dicom(path, start):
        return _open_dicom(path, page)
    with without_limit():
        image = Image.open(path)
        pages = getattr(image, "n_frames", 1)  # raises where the file is cut short, though the first page can be read
        if image.format == "GIF" and pages > 1 and not _ends_with(path, b";"):
            raise ValueError("it is cut short: some of its pages are missing")
        if page:
            image.seek(page)
    # Without a name Pillow does not map the file into memory, where Pillow 13 scrambles a TIFF that is to be turned
    image.filename = ""
    return image


@contextlib.contextmanager
def without_limit() -> Iterator[None]:
    """Let Pillow open pictures of any size, whose limit of 179 megapixels cannot be explained; `View` has ours."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _ends_with(path: Path, mark: bytes) -> bool:
    """Whether a file ends with these bytes, and zeros at most after them."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 64), 2)
        return file.read().rstrip(b"\0").endswith(mark)


def _is_dicom(path: Path, start: bytes) -> bool:
    return start[128:132] == b"DICM" or path.suffix.lower() == DICOM_ENDING


def _pydicom(path: Path):
    try:
        import pydicom.pixels
    except ImportError as error:
        raise InputError(f"{path} is a DICOM file, and reading it needs pydicom: pip install pydicom") from error
    return pydicom


def _open_dicom(path: Path, page: int) -> Image.Image:
    """A frame in its modality's units (mode F), or with 8 bits (L or RGB). Black is the lowest value, in MONOCHROME1
    too, and padding around the picture has its lowest value."""
    pydicom = _pydicom(path)
    data = pydicom.dcmread(path)
    values = pydicom.pixels.pixel_array(data, index=page)  # (H, W), or (H, W, 3), in RGB whatever the file has
    if data.PhotometricInterpretation == "PALETTE COLOR":
        values = pydicom.pixels.apply_color_lut(values, data)
        values = values if values.dtype == np.uint8 else (values >> 8).astype(np.uint8)
    if values.ndim == 3:
        if values.dtype != np.uint8:
            raise ValueError("a DICOM file in colour with more than 8 bits: convert it to 8")
        return Image.fromarray(values[..., :3])
    is_padding = values == data["PixelPaddingValue"].value if "PixelPaddingValue" in data else np.zeros(1, bool)
    units = _units(data, page)
    rescale = float(units.get("RescaleSlope") or 1), float(units.get("RescaleIntercept") or 0)
    is_plain = rescale == (1, 0) and "ModalityLUTSequence" not in units
    has_8_bits = values.dtype == np.uint8 and data.BitsStored == 8 and is_plain
    if not has_8_bits:
        values = pydicom.pixels.apply_modality_lut(values, units).astype(np.float32)
    if data.PhotometricInterpretation == "MONOCHROME1":
        values = 255 - values if has_8_bits else -values
    if is_padding.any() and not is_padding.all():
        values[is_padding] = values[~is_padding].min()
    return Image.fromarray(values)


def _units(data: Any, page: int) -> Any:
    """The part of a DICOM data set that says how stored values become those of the modality: in files of several
    frames it can be another one for each."""
    of_frames = data.get("PerFrameFunctionalGroupsSequence")
    of_frame = [of_frames[page]] if of_frames else []
    for group in (*of_frame, *(data.get("SharedFunctionalGroupsSequence") or [])):
        if "PixelValueTransformationSequence" in group:
            return group.PixelValueTransformationSequence[0]
    return data


# ---- pixels ---------------------------------------------------------------------------------------------------------


def levels_of(image: Image.Image) -> np.ndarray | None:
    """The levels of a picture with more than 8 bits, float32 (H, W, 1 or 3), higher is brighter; None if it has 8.

    Raises ValueError if they cannot be compared: not finite, or partly transparent.
    """
    raw_mode, tags = _raw_mode(image), getattr(image, "tag_v2", {})
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)[..., None]
    elif ";16" in raw_mode:
        values = _both_bytes(image, raw_mode)
    elif _is_cut_to_8_bits(image):
        raise ValueError(f"more than 8 bits are not read from this kind of {image.format}: save it as PNG")
    elif image.mode == "L" and tags.get(SAMPLE_FORMAT) == (SIGNED,):
        values = np.asarray(image).view(np.int8).astype(np.float32)[..., None]
    else:
        return None
    if tags.get(PHOTOMETRIC) == 0:
        values = (65535 if image.mode.startswith("I;16") else 0) - values
    if not np.isfinite(values).all():
        raise ValueError("some of its pixels are not finite numbers: write a level in their place")
    return values


def _is_cut_to_8_bits(image: Image.Image) -> bool:
    """Whether the file has more than 8 bits a channel, of which Pillow would silently keep 8."""
    decoder, _, _, arguments = image.tile[0] if getattr(image, "tile", None) else ("", None, 0, ())
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) > 8
    if image.format == "PPM":
        return isinstance(arguments, tuple) and max(each for each in arguments if isinstance(each, int)) > 255
    return decoder == "SGI16"


def _raw_mode(image: Image.Image) -> str:
    """How the pixels lie in the file, such as RGB;16B; "" if they are in memory already."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _both_bytes(image: Image.Image, raw_mode: str) -> np.ndarray:
    """The 16-bit levels of a picture in colour, float32 (H, W, 3).

    Pillow keeps the upper byte of each level, and the lower one if it is told that the two come the other way round.
    """
    if raw_mode.split(";")[0] not in ("RGB", "RGBX"):
        raise ValueError(f"16-bit pixels of the kind {raw_mode}, with transparency, are not read: save it without")
    other = raw_mode[:-1] + ("L" if raw_mode.endswith("B") else "B")
    again = open_file(Path(image.fp.name), image.tell())
    again.tile = [_with_raw_mode(tile, other) for tile in again.tile]
    upper, lower = (np.asarray(each)[..., :3].astype(np.float32) for each in (image, again))
    return 256 * upper + lower


def _with_raw_mode(tile: tuple, raw_mode: str) -> tuple:
    """A tile of Pillow's, (decoder, extents, offset, arguments), with another raw mode among its arguments."""
    arguments = (raw_mode, *tile[3][1:]) if isinstance(tile[3], tuple) else raw_mode
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF tag says; as it is if the tag cannot be read."""
    return ImageOps.exif_transpose(image) if orientation(image) else image


def orientation(image: Image.Image) -> int | None:
    """How a picture is to be turned, 1 to 8 as the EXIF standard has it; None without a tag that can be read."""
    try:
        return image.getexif().get(ORIENTATION)
    except SyntaxError:  # what Pillow raises on a PNG or WebP with a broken EXIF block, whose pixels are sound
        return None


def _on_white(image: Image.Image) -> Image.Image:
    """A picture of 8 bits without transparency: in its place there is white."""
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


def check_size(image: Image.Image, view: View) -> None:
    """Raise ValueError if a picture is too large or smaller than a patch, before its pixels are read."""
    seen = view.seen_size(image.size)
    for (width, height), resized in ((image.size, ""), (seen, f" once its shorter side has {min(seen)} pixels")):
        megapixels = width * height / 1e6
        if megapixels > view.max_megapixels:
            raise ValueError(
                f"it has {megapixels:.0f} megapixels{resized}, more than {view.max_megapixels:g}: raise "
                "--max-megapixels if it is meant to be so large"
            )


def _check_depth(has_8_bits: bool, view: View) -> None:
    """Raise ValueError if a picture has another depth than the training pictures."""
    if has_8_bits and view.levels is not None:
        raise ValueError("it has 8 bits, and the training pictures have more: save it like those")
    if not has_8_bits and view.levels is None:
        raise ValueError("it has more than 8 bits, and the training pictures have 8: save it like those")


def upright_channels(image: Image.Image, levels: np.ndarray) -> list[Image.Image]:
    """The levels (H, W, C) of an image as C pictures of mode F, turned as its EXIF tag says."""
    return [turned(Image.fromarray(channel), orientation(image)) for channel in np.moveaxis(levels, 2, 0)]


def turned(image: Image.Image, orientation: int | None) -> Image.Image:
    """A picture without a tag of its own, turned as this `orientation` says; None: not at all."""
    image.getexif()[ORIENTATION] = orientation or 1
    return ImageOps.exif_transpose(image)


def _to_channels(channels: np.ndarray, count: int) -> np.ndarray:
    """Levels (1 or 3, H, W) to `count` channels, grey by the weights that Pillow has for it (ITU-R 601-2)."""
    if len(channels) == count:
        return channels
    if count == 3:
        return channels.repeat(3, 0)
    return np.tensordot(np.float32([0.299, 0.587, 0.114]), channels, 1)[None]


def _in_8_bits(channels: np.ndarray, levels: tuple[float, float]) -> np.ndarray:
    """Levels to uint8: black to 0, white to 255."""
    black, white = levels
    return ((channels - black) * (255 / (white - black))).round().clip(0, 255).astype(np.uint8)


def as_seen(image: Image.Image, view: View) -> Seen:
    """What the networks see of a picture: resized (antialiased bilinear) and cut as the view says; more than 8 bits are
    brought to 8 after that.

    Raises ValueError for a picture that they cannot see, and whatever Pillow raises on a damaged file.
    """
    with without_limit():  # a TIFF is checked again when its pixels are read
        check_size(image, view)
        levels = levels_of(image)
        _check_depth(levels is None, view)
        enlarged = isinstance(view.picture_size, int) and min(image.size) < view.picture_size
        if levels is None:
            fitted = _fitted(_on_white(upright(image)).convert("L" if view.channels == 1 else "RGB"), view)
            pixels = np.asarray(fitted).reshape(fitted.height, fitted.width, view.channels).transpose(2, 0, 1)
            return Seen(pixels, 0.0, view.channels == 1 and _is_in_colour(image, view), enlarged)
    seen = _seen_levels(image, levels, view)
    black, white = view.levels
    outside = float(((seen < black) | (seen > white)).mean())
    pixels = _in_8_bits(_to_channels(seen, view.channels), view.levels)
    return Seen(pixels, outside, view.channels == 1 and len(seen) == 3, enlarged)


def _fitted(image: Image.Image, view: View) -> Image.Image:
    """A picture, turned as its EXIF tag says, at the size that the networks see, and cut as they do."""
    width, height = view.seen_size(image.size)
    if (window := view.window(image.size)) != (0, 0, *image.size):
        image = image.crop(window)  # before it is resized: then heat maps lie on the picture to the pixel
    return image if (width, height) == image.size else resize(image, [height, width])


def _seen_levels(image: Image.Image, levels: np.ndarray, view: View) -> np.ndarray:
    """The levels (H, W, C) of an image as the networks see them: float32 (C, height, width)."""
    return np.stack([np.asarray(_fitted(channel, view)) for channel in upright_channels(image, levels)])


def _is_in_colour(image: Image.Image, view: View) -> bool:
    if image.mode in ("1", "L", "LA"):
        return False
    return bool(np.ptp(np.asarray(_fitted(image.convert("RGB"), view)), 2).max() > COLOUR)


def at_own_size(image: Image.Image, view: View) -> Image.Image:
    """A picture in RGB with 8 bits at its own size, turned as its EXIF tag says, in the levels of a view.

    Raises as `as_seen` does.
    """
    with without_limit():
        check_size(image, view)
        levels = levels_of(image)
        _check_depth(levels is None, view)
        if levels is None:
            return _on_white(upright(image)).convert("RGB")
    channels = np.stack([np.asarray(channel) for channel in upright_channels(image, levels)])
    return Image.fromarray(np.moveaxis(_in_8_bits(_to_channels(channels, 3), view.levels), 0, 2).copy())


# ---- black and white points -----------------------------------------------------------------------------------------


def spread(image: Image.Image, view: View) -> tuple[float, float] | None:
    """The levels that 0.5% of what a network sees of a picture lie below and above; None if the picture has 8 bits.

    Raises as `as_seen` does, but for the levels of the view, which are still to be found.
    """
    with without_limit():
        check_size(image, view)
        levels = levels_of(image)
        if levels is None:
            return None
    return tuple(np.quantile(_seen_levels(image, levels, view), [0.005, 0.995]).tolist())


def black_and_white(spreads: np.ndarray) -> tuple[float, float]:
    """The black and the white point for pictures like these, given the `spread` of each, (N, 2).

    The 5% quantile of the lower levels and the 95% quantile of the upper ones: neither hot pixels nor an odd picture
    decide. A quarter of that range is added on both sides, so that what is darker or brighter than any normal picture
    still differs from it.
    """
    low, high = np.quantile(spreads[:, 0], 0.05), np.quantile(spreads[:, 1], 0.95)
    margin = (high - low) / 4 or 1.0  # pictures of a single level
    return float(low - margin), float(high + margin)
