"""Where a picture differs from what G drew for it: heat maps, at the network's size and at the picture's own."""

import numpy as np
import torch
from matplotlib import colormaps
from torch.nn.functional import interpolate
from torchvision.transforms.functional import gaussian_blur


def difference(x: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """|x - G(z)| averaged over colours and smoothed: (N, C, H, H) twice, in [-1, 1], to (N, H, H) in [0, 1].

    1 is the whole range from black to white. The Gaussian has a standard deviation of 1/32 of the side: it keeps
    a blot, and averages out the errors of single pixels.
    """
    sigma = x.shape[-1] / 32
    size = 2 * int(np.ceil(3 * sigma)) + 1
    return gaussian_blur((x - generated).abs().mean(1, keepdim=True) / 2, size, sigma)[:, 0]


def window(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """What the network sees of a picture of this (width, height), turned as its EXIF tag says: the square (left, top,
    right, bottom) in its middle, as `images` cuts it out."""
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
    """Images (N, 1 or 3, H, W) in [-1, 1] to uint8 (N, H, W, 3)."""
    return (127.5 * (x.cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy() + 1)).round().astype(np.uint8)


def panels(
    x: torch.Tensor, generated: torch.Tensor, heat: torch.Tensor, level: float, brightest: float
) -> list[np.ndarray]:
    """Real, generated, heat map and marked: images (N, C, H, H) in [-1, 1] and heat (N, H, H) to four uint8
    (N, H, H, 3)."""
    real, drawn, heat = to_rgb(x), to_rgb(generated), heat.cpu().numpy()
    return [real, drawn, coloured(heat, brightest), marked(real, heat, level)]
