"""Scores, each a small function from images and what the networks make of them to one number an image.

High means anomalous, for every score. A(x), R and D stand in util.py, where the search minimises them, and so does the
loss of f-AnoGAN's encoder.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, normalize

import runs
import util

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of x and G(z), (N, C, H, W) in [-1, 1] each, to (N,)


def contrast(x: torch.Tensor) -> torch.Tensor:
    """Σ|x - mean of x| over an image's pixels and channels: (N, C, H, W) to (N,)."""
    return (x - x.mean((1, 2, 3), keepdim=True)).abs().sum((1, 2, 3))


def relative_residual(x: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """R over the image's own contrast, Σ|x - G(z)| / Σ|x - mean of x|: (N, C, H, W) twice to (N,).

    It is 1 where G(z) is as far from x as x's own mean is. The contrast is at least that of one level in 8 bits, or a
    blank image would divide by 0.
    """
    return util.residual_loss(x, generated) / contrast(x).clamp(min=x[0].numel() * 2 / 255)


def dissimilarity(x: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """1 - SSIM(x, G(z)) (Wang et al. 2004, equation 13): (N, C, H, W) twice, in [-1, 1], to (N,) in [0, 2].

    Of pixels in [0, 1], where means are not negative. Means, variances and covariance are those of 7x7 windows, and the
    SSIM is averaged over windows and channels; C1 = 0.01² and C2 = 0.03².
    """
    x, generated = (x + 1) / 2, (generated + 1) / 2

    def mean(images: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(images, 7, stride=1)

    c1, c2 = 0.01**2, 0.03**2
    a, b = mean(x), mean(generated)
    var_a, var_b, covariance = mean(x * x) - a * a, mean(generated * generated) - b * b, mean(x * generated) - a * b
    ssim = (2 * a * b + c1) * (2 * covariance + c2) / ((a * a + b * b + c1) * (var_a + var_b + c2))
    return 1 - ssim.mean((1, 2, 3))


def p_d(discriminator: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """P_D = 1 - D(x), the discriminator's probability that x is not real: (N, C, H, W) to float64 (N,) in [0, 1]."""
    # 1 - sigmoid(l) = sigmoid(-l); in float64, or a confident D would make ties at 0 and 1
    return discriminator(x).cpu().double().neg().sigmoid()


def rotation(rotnet: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Σ -log p(k | x turned by k) over the four turns k, RotNet's own loss on x: (N, C, H, H) to float64 (N,).

    The score of Golan and El-Yaniv 2018 and Hendrycks et al. 2019 with turns as the only transformations.
    """
    loss = 0
    for turn in range(4):
        images = x.rot90(turn, (2, 3)).contiguous(memory_format=torch.channels_last)
        # in float64, or a confident network would make ties at 0
        loss = loss - rotnet(images).cpu().double().log_softmax(1)[:, turn]
    return loss


def directions(rotnet: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RotNet's features of images (N, C, H, W) as vectors of length 1: (N, F).

    Those of its last two rungs, what an object is and what its parts look like, averaged to 4x4 and of equal weight.
    """
    rungs = [normalize(adaptive_avg_pool2d(rung, 4).flatten(1)) for rung in rotnet.features(x)[-2:]]
    return normalize(torch.cat(rungs, 1))


def neighbours(rotnet: nn.Module, x: torch.Tensor, memory: torch.Tensor, count: int = 5) -> torch.Tensor:
    """Mean cosine distance of x's features to those of the nearest training images: (N, C, H, W) to (N,) in [0, 2].

    `memory` are the training images' `directions` (M, F); `count` of them, or all if there are fewer, are averaged. An
    image that is among them finds itself, at distance 0: on the split `train` this score means little.
    """
    similarity = directions(rotnet, x) @ memory.T  # (N, M)
    return 1 - similarity.topk(min(count, len(memory)), 1).values.mean(1)


def combined(parts: list[np.ndarray], of_validation: list[np.ndarray]) -> np.ndarray:
    """The sum of some scores (N,), each less its mean over validation normals (V,), in their standard deviations.

    A part that is the same for all of them, or of which there is but one, is not scaled.
    """
    total = np.zeros(len(parts[0]))
    for part, normal in zip(parts, of_validation, strict=True):
        mean, deviation = normal.mean(dtype=np.float64), normal.std(dtype=np.float64)
        total += (part - mean) / (deviation or 1.0)
    return total


def by_name(
    gan: runs.TrainedGAN,
    encoder: runs.TrainedEncoder | None,
    acae: runs.TrainedBeside | None,
    rotnet: runs.TrainedBeside | None,
    memory: torch.Tensor | None,
) -> dict[str, Score]:
    """The scores that are worked out from x and G(z), of those networks that were trained.

    `memory` are the training images' `directions`, if there is a RotNet. The aCAE's score is Σ|x - x̂| over an image's
    pixels, where x̂ is its reconstruction; f-AnoGAN's is A_R + κ A_D, see `util.izi_f_loss`.
    """
    scores = {
        "relative_residual": relative_residual,
        "dissimilarity": dissimilarity,
        "p_d": lambda x, generated: p_d(gan.discriminator, x),
    }
    if encoder is not None:

        def f_anogan(x: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
            residual, discrimination = util.izi_f_loss(encoder.encoder, gan.generator, gan.discriminator, x)
            return residual + encoder.kappa * discrimination

        scores["f_anogan"] = f_anogan
    if acae is not None:
        scores["acae"] = lambda x, generated: util.residual_loss(x, acae.network(x))
    if rotnet is not None:
        scores["rotation"] = lambda x, generated: rotation(rotnet.network, x)
        scores["neighbours"] = lambda x, generated: neighbours(rotnet.network, x, memory)
    return scores
