"""Where a picture differs from what G drew for it: heat maps, as the networks see it and at the picture's own size."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom
from torch.nn.functional import adaptive_max_pool2d, interpolate

from anogan import images
from anogan.decoding import View

FEWEST = 20  # normal pictures from which a deviation is known well enough
LARGEST = 4_000_000  # pixels of a picture for which what is usual is kept at each place


def difference(x: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """|x - G(z)| averaged over colours: (N, C, H, H) twice, in [-1, 1], to (N, 1, H, H) in [0, 1].

    1 is the whole range from black to white; of normalised images, 2 * `images.SPAN` standard deviations.
    """
    return (x - generated).abs().mean(1, keepdim=True) / 2


RELATIVE = (1.0, "deviations above what is usual at that place")  # the unit of a heat that is compared with the usual


def unit(normalise: bool) -> tuple[float, str]:
    """What a difference is told to a person in: how many of these units a heat of 1 is, and what they are."""
    return (2 * images.SPAN, "standard deviations") if normalise else (1.0, "of the range from black to white")


def smoothed(of_picture: torch.Tensor, side: int) -> np.ndarray:
    """The difference of a whole picture (height, width), seen in squares of this side, as a heat map of that shape.

    The Gaussian has a standard deviation of 1/32 of the side: it keeps a blot, and averages out the errors of single
    pixels.
    """
    return gaussian_filter(of_picture.numpy(), side / 32, mode="mirror", truncate=3)


@dataclass(frozen=True)
class Usual:
    """What G leaves of normal pictures at each place, where all have one size: an edge is never drawn to the pixel, and
    an even surface is."""

    side: int  # of the squares that the networks see
    count: int  # of normal pictures
    total: np.ndarray  # (height, width), the sum of their smoothed differences
    squares: np.ndarray  # (height, width), the sum of the squares

    def relative(self, heat: np.ndarray, is_among: bool = False) -> np.ndarray:
        """A smoothed difference (height, width) minus the mean of normal pictures there, over their deviation.

        Mean and deviation are smoothed by a Gaussian of 1/16 of the side that the networks see, so that a part may lie
        a little beside the others; a fifth of the mean deviation is added. A picture of another size takes those of
        the same place in proportion. One that `is_among` the normals is compared with the others.
        """
        mean, deviation, floor = self._without(heat.astype(np.float64)) if is_among else self._of_all
        mean, deviation = (_resized(each, heat.shape) for each in (mean, deviation))
        return ((heat - mean) / (deviation + floor)).astype(np.float32)

    @cached_property
    def _of_all(self) -> tuple[np.ndarray, np.ndarray, float]:
        """`_spread` of all normal pictures: the same for each picture that is not among them."""
        return self._spread(self.count, self.total, self.squares)

    def _without(self, heat: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """`_spread` of all normal pictures but this one."""
        return self._spread(self.count - 1, self.total - heat, self.squares - heat**2)

    def _spread(self, count: int, total: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Smoothed mean and deviation (height, width) of so many pictures, and what is added to the deviation."""
        mean = total / count
        deviation = np.sqrt((squares / count - mean**2).clip(min=0))
        floor = deviation.mean() / 5 or 1.0  # pictures that are all the same
        return *(gaussian_filter(each, self.side / 16) for each in (mean, deviation)), floor


def usual(heats: Iterable[np.ndarray], side: int) -> Usual | None:
    """`Usual` of these smoothed differences, seen in squares of this side.

    None if there are fewer than FEWEST, of several sizes, or large ones.
    """
    found = None
    for heat in heats:
        if heat.size > LARGEST or (found is not None and heat.shape != found.total.shape):
            return None
        heat = heat.astype(np.float64)
        if found is None:
            found = Usual(side, 1, heat, heat**2)
        else:
            found = Usual(side, found.count + 1, found.total + heat, found.squares + heat**2)
    return found if found is not None and found.count >= FEWEST else None


def _resized(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(height, width) at another shape."""
    if values.shape == shape:
        return values
    return zoom(values, np.divide(shape, values.shape), order=1, grid_mode=True, mode="nearest")


def at_own_size(heat: np.ndarray, size: tuple[int, int], view: View) -> np.ndarray:
    """A heat map of what the networks see of a picture, at the picture's own size: (height, width), NaN where they have
    not looked.

    `size` is its (width, height), turned as its EXIF tag says.
    """
    left, top, right, bottom = view.window(size)
    if heat.shape == size[::-1] and view.has_patches:
        return heat
    of_window = torch.from_numpy(heat)[None, None]
    enlarged = interpolate(of_window, (bottom - top, right - left), mode="bilinear", antialias=True)
    whole = np.full((size[1], size[0]), np.nan, np.float32)
    whole[top:bottom, left:right] = enlarged[0, 0].numpy()
    return whole


def coloured(heat: np.ndarray, brightest: float) -> np.ndarray:
    """A heat map (..., H, W) in colours, black at 0, `brightest` from that difference up: uint8 (..., H, W, 3).

    Grey where it is NaN.
    """
    colours = (255 * np.array(colormaps["inferno"].colors)).round().astype(np.uint8)  # 256 of them
    unseen = np.isnan(heat)
    found = colours[(np.where(unseen, 0, heat) * (255 / (brightest or 1))).clip(0, 255).astype(np.uint8)]
    found[unseen] = 128
    return found


def marked(picture: np.ndarray, heat: np.ndarray, level: float) -> np.ndarray:
    """A picture, uint8 (..., H, W, 3), with all in red whose heat (..., H, W) passes the level: the same shape."""
    found, hot = picture.copy(), heat > level
    found[hot] = 0.4 * picture[hot] + 0.6 * np.array([255, 0, 0])
    return found


def to_rgb(x: torch.Tensor) -> np.ndarray:
    """An image (1 or 3, H, W) in [-1, 1] to uint8 (H, W, 3)."""
    # channel by channel: a picture of 10,000 x 10,000 pixels takes 400 MB in float32
    levels = [(127.5 * (channel.numpy() + 1)).round().clip(0, 255).astype(np.uint8) for channel in x.cpu()]
    return np.stack(levels * (3 // len(levels)), -1)


def thumbnail(picture: np.ndarray, longest: int) -> np.ndarray:
    """A picture uint8 (H, W, 3), reduced where a side is longer than `longest`: uint8 (h, w, 3)."""
    reduced = Image.fromarray(picture)
    reduced.thumbnail((longest, longest))
    return np.asarray(reduced)


def panels(
    real: np.ndarray, generated: np.ndarray | None, heat: np.ndarray, level: float, brightest: float, longest: int
) -> list[np.ndarray]:
    """Real, generated if there is one, heat map and marked of a picture uint8 (H, W, 3) and its heat (H, W): three or
    four uint8 (h, w, 3).

    Where a side is longer than `longest` they are reduced to that. Of the heat the largest value of each place is kept,
    so that a thin defect is still seen.
    """
    height, width = (max(1, round(side * min(1, longest / max(heat.shape)))) for side in heat.shape)
    if (height, width) != heat.shape:
        real, generated = (
            None if each is None else np.asarray(Image.fromarray(each).resize((width, height)))
            for each in (real, generated)
        )
        heat = adaptive_max_pool2d(torch.from_numpy(heat)[None], (height, width))[0].numpy()
    pictures = [real] if generated is None else [real, generated]
    return [*pictures, coloured(heat, brightest), marked(real, heat, level)]
