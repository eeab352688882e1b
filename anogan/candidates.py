"""Where a search starts: latents drawn at random, and what G draws for them, small, to be compared with pictures."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from anogan import files, processes, runs
from network import Generator

FILE = "candidates.npz"  # in the run folder


@dataclass(frozen=True)
class Candidates:
    """Latents that a search may start from, and what G draws for them."""

    z: torch.Tensor  # (M, latent_dim)
    thumbnails: torch.Tensor  # (M, C * 16 * 16), of G(z)


def thumbnails(x: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) averaged down to 16x16 and flattened: (N, C * 16 * 16)."""
    return adaptive_avg_pool2d(x, 16).flatten(1)


def draw_latents(latent_dim: int, count: int, seed: int) -> torch.Tensor:
    """z ~ N(0, I), which depend on the seed alone: (count, latent_dim), on the CPU."""
    return torch.randn(count, latent_dim, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def draw_candidates(generator: Generator, latent_dim: int, count: int, seed: int) -> Candidates:
    """`count` latents z ~ N(0, I), which depend on the seed alone, and the thumbnails of G(z)."""
    z = draw_latents(latent_dim, count, seed).to(next(generator.parameters()).device)
    return Candidates(z, torch.cat([thumbnails(generator(batch)) for batch in z.split(64)]))


def nearest(x: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """The candidate z of the smallest residual between thumbnails, for each image (N, C, H, W): (N, latent_dim).

    Each distance is a sum of its own, so a start depends on seed, model and that image alone. On whole images and
    with the discrimination in it, the choice was 0.1% better and took 30 times as long (docs/experiments.md).
    """
    return candidates.z[torch.cdist(thumbnails(x), candidates.thumbnails, p=1).argmin(1)]


def candidates_of(gan: runs.TrainedGAN, count: int, seed: int, keep: bool = True) -> Candidates:
    """The candidates of a run, as they were kept in its folder, or drawn, and kept now for the next search."""
    found = _read(gan, count, seed)
    if found is None:
        found = draw_candidates(gan.generator, gan.latent_dim, count, seed)
        if keep and processes.rank() == 0:
            about = {"gan": gan.fingerprint, "seed": np.array(seed)}
            files.write_arrays(gan.run_dir / FILE, thumbnails=found.thumbnails.cpu().numpy(), **about)
    return found


def _read(gan: runs.TrainedGAN, count: int, seed: int) -> Candidates | None:
    """Those that were kept; None if there are none, or others, or the file is damaged."""
    try:
        with np.load(gan.run_dir / FILE, allow_pickle=False) as file:
            small = torch.from_numpy(file["thumbnails"])
            if (str(file["gan"]), int(file["seed"]), len(small)) != (gan.fingerprint, seed, count):
                return None
    except Exception:  # numpy raises almost anything on damaged bytes: they are drawn again
        return None
    return Candidates(draw_latents(gan.latent_dim, count, seed).to(gan.device), small.to(gan.device))
