"""Scores, each a small function from images and what the networks make of them to one number an image.

High means anomalous, for every score. A(x), R and D stand in util.py, where the search minimises them, and so does the
loss of f-AnoGAN's encoder.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

import heatmaps
import runs
import util

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of x and G(z), (N, C, H, W) in [-1, 1] each, to (N,)


def peak(x: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """The largest smoothed difference of x and G(z), see `heatmaps.difference`: (N, C, H, H) twice to (N,) in [0, 1].

    For what is small and local: a scratch hardly changes the sum R, which every pixel of the picture is part of.
    """
    return heatmaps.difference(x, generated).amax((1, 2))


def turned(x: torch.Tensor) -> list[torch.Tensor]:
    """Images (N, C, H, H) turned by 0, 90, 180 and 270 degrees, each (N, C, H, H)."""
    return [x.rot90(turn, (2, 3)).contiguous(memory_format=torch.channels_last) for turn in range(4)]


def p_d(discriminator: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """P_D = 1 - D(x), the discriminator's probability that x is not real: (N, C, H, W) to float64 (N,) in [0, 1]."""
    # 1 - sigmoid(l) = sigmoid(-l); in float64, or a confident D would make ties at 0 and 1
    return discriminator(x).cpu().double().neg().sigmoid()


def rotation(rotnet: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Σ -log p(k | x turned by k) over the four turns k, RotNet's own loss on x: (N, C, H, H) to float64 (N,).

    The score of Golan and El-Yaniv 2018 and Hendrycks et al. 2019 with turns as the only transformations.
    """
    # in float64, or a confident network would make ties at 0
    return sum(-rotnet(images).cpu().double().log_softmax(1)[:, turn] for turn, images in enumerate(turned(x)))


def directions(rotnet: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RotNet's features of images (N, C, H, W) as vectors of length 1: (N, F).

    Those of its last two rungs, what an object is and what its parts look like, averaged to 4x4 and of equal weight.
    """
    rungs = [normalize(adaptive_avg_pool2d(rung, 4).flatten(1)) for rung in rotnet.features(x)[-2:]]
    return normalize(torch.cat(rungs, 1))


def channel_means(rotnet: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RotNet's channels, those of every rung, averaged over the image: (N, C, H, W) to (N, K)."""
    return torch.cat([rung.mean((2, 3)) for rung in rotnet.features(x)], 1)


@dataclass(frozen=True)
class NormalFeatures:
    """What RotNet makes of the training images, for `neighbours` and `mahalanobis`."""

    directions: torch.Tensor  # (M, F)
    means: torch.Tensor  # (4, K), of the `channel_means` of the images in each turn
    precisions: torch.Tensor  # (4, K, K), the inverse of their covariance


def normal_features(rotnet: nn.Module, batches: Iterable[torch.Tensor]) -> NormalFeatures:
    """What the scores need to know of the training images, batches of (N, C, H, H) in [-1, 1].

    The covariance is shrunk towards a multiple of the identity (Ledoit and Wolf 2004): there may be fewer images than
    channels.
    """
    lengths_of_1, channels = [], []
    for x in batches:
        lengths_of_1.append(directions(rotnet, x))
        channels.append(torch.stack([channel_means(rotnet, images) for images in turned(x)]))  # (4, N, K)
    fits = [LedoitWolf().fit(of_turn.cpu().double().numpy()) for of_turn in torch.cat(channels, 1)]
    means, precisions = (
        torch.from_numpy(np.stack([getattr(fit, name) for fit in fits])).to(lengths_of_1[0])
        for name in ("location_", "precision_")
    )
    return NormalFeatures(torch.cat(lengths_of_1), means, precisions)


def neighbours(rotnet: nn.Module, x: torch.Tensor, normal: NormalFeatures, count: int = 5) -> torch.Tensor:
    """Mean cosine distance of x's features to those of the nearest training images: (N, C, H, W) to (N,) in [0, 2].

    `count` of the training images, or all if there are fewer, are averaged. An image that is among them finds itself,
    at distance 0: on the split `train` this score means little.
    """
    similarity = directions(rotnet, x) @ normal.directions.T  # (N, M)
    return 1 - similarity.topk(min(count, len(normal.directions)), 1).values.mean(1)


def mahalanobis(rotnet: nn.Module, x: torch.Tensor, normal: NormalFeatures) -> torch.Tensor:
    """Σ (c - μ)ᵀ Σ⁻¹ (c - μ) over the four turns of x, where c are its `channel_means`: (N, C, H, H) to (N,).

    The squared distance from the training images' mean, in their own covariance (Lee et al. 2018, with one class).
    """
    distance = 0
    for images, mean, precision in zip(turned(x), normal.means, normal.precisions, strict=True):
        away = channel_means(rotnet, images) - mean  # (N, K)
        distance = distance + (away @ precision * away).sum(1)
    return distance


def combined(parts: list[np.ndarray], of_validation: list[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted sum of some scores' logarithms (N,), each less its mean over validation normals (V,), in their
    standard deviations.

    The logarithm, or the score with the longest tail would drown the others. Scores are distances or losses, from 0 up;
    those under 1e-6, which rounding can bring about, count as 1e-6. A part that is the same for all validation
    normals, or of which there is but one, is not scaled.
    """
    total = np.zeros(len(parts[0]))
    for part, normal, weight in zip(parts, of_validation, weights, strict=True):
        part, normal = (np.log(np.maximum(values, 1e-6, dtype=np.float64)) for values in (part, normal))
        total += weight * (part - normal.mean()) / (normal.std() or 1.0)
    return total


def by_name(
    gan: runs.TrainedGAN,
    encoder: runs.TrainedEncoder | None,
    acae: runs.TrainedBeside | None,
    rotnet: runs.TrainedBeside | None,
    normal: NormalFeatures | None,
) -> dict[str, Score]:
    """The scores that are worked out from x and G(z), of those networks that were trained.

    `normal` is what RotNet makes of the training images, if there is one. The aCAE's score is Σ|x - x̂| over an image's
    pixels, where x̂ is its reconstruction; f-AnoGAN's is A_R + κ A_D, see `util.izi_f_loss`.
    """
    scores = {
        "peak": peak,
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
        scores["neighbours"] = lambda x, generated: neighbours(rotnet.network, x, normal)
        scores["mahalanobis"] = lambda x, generated: mahalanobis(rotnet.network, x, normal)
    return scores
