"""The search of AnoGAN: from a picture x to the latent z whose G(z) is closest, by Adam over z."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import adaptive_avg_pool2d
from torch.optim import Adam

import util
from network import Discriminator, Generator

Discrimination = Literal["features", "reference"]


@dataclass(frozen=True)
class Candidates:
    """Latents that a search may start from, and what G draws for them."""

    z: torch.Tensor  # (M, latent_dim)
    thumbnails: torch.Tensor  # (M, C * 16 * 16), of G(z)


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) averaged down to 16x16 and flattened: (N, C * 16 * 16)."""
    return adaptive_avg_pool2d(images, 16).flatten(1)


@torch.no_grad()
def draw_candidates(generator: Generator, latent_dim: int, count: int, seed: int) -> Candidates:
    """`count` latents z ~ N(0, I), which depend on the seed alone, and the thumbnails of G(z)."""
    device = next(generator.parameters()).device
    z = torch.randn(count, latent_dim, generator=torch.Generator().manual_seed(seed)).to(device)
    return Candidates(z, torch.cat([thumbnails(generator(batch)) for batch in z.split(64)]))


def nearest_candidates(x: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """The candidate z of the smallest residual between thumbnails, for each image (N, C, H, W): (N, latent_dim).

    Each distance is a sum of its own, so a start depends on seed, model and that image alone. On whole images and
    with the discrimination in it, the choice was 0.1% better and 30 times dearer (benchmarks/README.md).
    """
    return candidates.z[torch.cdist(thumbnails(x), candidates.thumbnails, p=1).argmin(1)]


def search_latents(
    generator: Generator,
    discriminator: Discriminator,
    x: torch.Tensor,
    z: torch.Tensor,
    steps: int,
    lr: float,
    discrimination_weight: float,
    precision: str = "fp32",
    discrimination: Discrimination = "features",
    after_step: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minimise (1 - λ) R(z) + λ D(z) over z by Adam (Schlegl et al. 2017, section 2.2); with D̂(z) for D(z) it is GAN_R.

    x (N, C, H, W) in [-1, 1] and starting z (N, latent_dim) to the z found (N, latent_dim), its residual (N,) and its
    discrimination (N,). G and D must be frozen and in eval mode. Then no image sees another: BatchNorm uses its stored
    statistics, Adam's moments belong to single coordinates, and the gradient of a sum is each image's own. So a batch
    is exactly N separate searches. With precision "bf16" the steps run in bf16; what is returned is measured in fp32.
    """
    autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16")
    z = z.clone().requires_grad_()
    optimizer = Adam([z], lr=lr, fused=True)
    with torch.no_grad():
        features = discriminator.features(x)  # f(x) stays the same throughout

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        generated = generator(z)
        residual = util.residual_loss(x, generated)
        if discrimination == "reference":
            return residual, util.reference_loss(discriminator(generated).to(x.dtype))
        return residual, util.discrimination_loss(features, discriminator.features(generated))

    for step in range(steps):
        # up from 0 over the first fifth of the steps, down to 0 over the last
        optimizer.param_groups[0]["lr"] = lr * min(1, 5 * (step + 1) / steps, 5 * (steps - step) / steps)
        optimizer.zero_grad()
        with autocast:
            loss = util.anomaly_score(*losses(), discrimination_weight).sum()
        loss.backward()
        optimizer.step()
        after_step()
    z = z.detach()
    with torch.no_grad():
        return z, *losses()
