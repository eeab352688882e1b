"""Where a picture differs from what G drew for it: heat maps, at the network's size and at the picture's own."""

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms.functional import gaussian_blur


def difference(x: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """|x - G(z)| averaged over colours and smoothed: (N, C, H, H) twice, in [-1, 1], to (N, H, H) in [0, 1].

    1 is the whole range from black to white. The Gaussian has a deviation of 1/32 of the side: it spares a scratch or
    a blot, and evens out what single pixels are off.
    """
    sigma = x.shape[-1] / 32
    size = 2 * int(np.ceil(3 * sigma)) + 1
    return gaussian_blur((x - generated).abs().mean(1, keepdim=True) / 2, size, sigma)[:, 0]


def window(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """What the network sees of an upright picture of this (width, height): the square (left, top, right, bottom) in
    its middle, as `datasets` cuts it out."""
    width, height = size
    side = min(size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return left, top, left + side, top + side


def at_own_size(heat: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """A heat map (H, H) enlarged to a picture of this (width, height): (height, width), NaN where G has not looked."""
    left, top, right, bottom = window(size)
    enlarged = interpolate(heat[None, None].cpu(), (bottom - top, right - left), mode="bilinear", antialias=True)
    whole = np.full((size[1], size[0]), np.nan, np.float32)
    whole[top:bottom, left:right] = enlarged[0, 0].numpy()
    return whole


def coloured(heat: np.ndarray, brightest: float) -> np.ndarray:
    """A heat map (..., H, W) in colours, black at 0 and `brightest` from that difference up: (..., H, W, 3) in [0, 1].

    Grey where it is NaN.
    """
    colours = colormaps["inferno"].with_extremes(bad="grey")
    return colours(np.ma.masked_invalid(heat) / (brightest or 1))[..., :3].astype(np.float32)


def marked(picture: np.ndarray, heat: np.ndarray, level: float) -> np.ndarray:
    """A picture (..., H, W, 3) in [0, 1] with all in red whose heat (..., H, W) passes the level, the same shape."""
    red = np.array([1, 0, 0], np.float32)
    return np.where((heat > level)[..., None], 0.4 * picture + 0.6 * red, picture)


def to_picture(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) in [0, 1] to a picture of 8 bits."""
    return Image.fromarray((255 * pixels).round().astype(np.uint8))
