"""Scores: how one is declared, how a picture's is made of its patches', and those of the paper and `peak`.

A high score means anomalous, for every score. Most are of what the networks see: a whole picture, or patches of it, of
which a picture's score is then made. The losses that R, D and A(x) are made of stand in util.py, where the
search takes them from. Each detector declares its own scores. scoring.py works them out for a run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from anogan import heatmaps, images, latents, patches, runs
from util import InputError, anomaly_score

ImageSets = dict[str, images.ImageSet]  # by split; `images` are pictures without labels


@dataclass(frozen=True)
class Source:
    """What a score rests on: a file in the run folder. Where it is missing, the score is left out."""

    file: str  # its name; with {split} in it there is one for each split
    command: str  # that makes it
    load: Callable[[runs.TrainedGAN, ImageSets], Any]
    scores_unlabelled: bool = True  # whether it has scores for pictures without labels too
    version: int = 1  # raised where its scores change, so that those that a run folder keeps are made anew

    def is_there(self, run_dir: Path, splits: Sequence[str]) -> bool:
        """Whether one of its files for these splits is in the run folder."""
        if "images" in splits and not self.scores_unlabelled:
            return False
        names = {self.file.format(split=split) for split in splits} if "{split}" in self.file else {self.file}
        return any((run_dir / name).is_file() for name in names)


@dataclass(frozen=True)
class Batch:
    """Some images or patches of a split, as a score sees them."""

    split: str
    patches: patches.Patches  # which they are
    x: torch.Tensor  # (N, C, H, H) in [-1, 1]
    generated: torch.Tensor | None  # G(z), the same shape; None where nothing was searched

    @property
    def rows(self) -> np.ndarray:
        """(N,) the position in the split of each one's picture."""
        return self.patches.row


@dataclass(frozen=True)
class HeatMap:
    """A map of where pictures are unusual, declared once: what it is called, what it needs, how it is worked out.

    `function` takes what `source.load` returned, x (N, C, H, H) and G(z), which is None where nothing was searched, to
    (N, 1, H, H), from 0 up. The maps of a picture's patches are stitched and smoothed, and compared with what is usual
    at each place, see `heatmaps`.
    """

    name: str
    source: Source
    function: Callable[[Any, torch.Tensor, torch.Tensor | None], torch.Tensor]
    unit: Callable[[bool], tuple[float, str]]  # how many of which units a heat of 1 is, given if images are normalised

    @property
    def label(self) -> str:
        """The name as it stands above pictures."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Score:
    """A score, declared once: what it is called, what it needs, how it is worked out and drawn in figures.

    `function` takes what `source.load` returned and a Batch to (N,), from which `pool` makes one for each picture. With
    a `map` it takes a picture's heat map (height, width) alone to a number. With `parts` the score is made of others,
    of those that there are: it takes those of a split and those of validation, each a dict of (N,) by name.
    """

    name: str
    label: str
    source: Source | None  # None with parts: what these rest on
    function: Callable[..., torch.Tensor | np.ndarray | float]
    colour: str
    line: str = "-"
    opacity: float = 1.0  # of its bars
    parts: tuple[str, ...] = ()
    map: HeatMap | None = None
    of: Literal["patch", "picture"] = "patch"  # of a picture: the same for all of its patches
    pool: str = "tenth"  # one of POOLS
    pooled_of: str | None = None  # the score whose patches it pools in another way; figures show it if it is judged by


# ---- from patches to pictures ---------------------------------------------------------------------------------------


def worst_tenth(of_patches: np.ndarray) -> float:
    """The mean of the highest tenth of some patches' scores (P,), of one at least."""
    return float(np.sort(of_patches)[-max(1, round(len(of_patches) / 10)) :].mean())


# How a picture's score is made of those of its patches, and what figures call it
POOLS = {"worst": (np.max, "worst patch"), "tenth": (worst_tenth, "worst tenth"), "mean": (np.mean, "mean of patches")}
POOLED = "tab:cyan"  # of a score that figures show next to that of the worst tenth


def pooled(of_patches: np.ndarray, rows: np.ndarray, pool: str) -> np.ndarray:
    """A score of patches (P,) to one of their pictures (N,), given the picture of each (P,), in ascending order."""
    first = np.flatnonzero(np.diff(rows, prepend=-1))
    if len(first) == len(rows):  # whole pictures
        return of_patches
    return np.array([POOLS[pool][0](part) for part in np.split(of_patches, first[1:])])


def with_pools(declared: Sequence[Score]) -> list[Score]:
    """The scores of a GAN of patches: after each also those that pool its patches in the other ways."""
    found = []
    for score in declared:
        found.append(score)
        if score.of == "patch" and not score.parts and score.map is None:
            found += [
                replace(
                    score,
                    name=f"{score.name}_{pool}",
                    label=f"{score.label}, {words}",
                    colour=POOLED,
                    pool=pool,
                    pooled_of=score.name,
                )
                for pool, (_, words) in POOLS.items()
                if pool != score.pool
            ]
    return found


def declared_for(gan: runs.TrainedGAN, declared: Sequence[Score]) -> Sequence[Score]:
    """The scores that a GAN can have: of one that sees patches, with all pools."""
    return with_pools(declared) if gan.view.has_patches else declared


def sources_of(name: str, declared: Sequence[Score]) -> set[Source]:
    """What a declared score rests on: its own source, or those of all its parts."""
    parts = next(score.parts or (name,) for score in declared if score.name == name)
    return {score.source for score in declared if score.name in parts}


# ---- the scores of the search and of the GAN ------------------------------------------------------------------------


def peak(heat: np.ndarray) -> float:
    """The largest value of a heat map (height, width).

    For what is small and local: a blot changes the sum R, over every pixel of the picture, by next to nothing.
    """
    return float(heat.max())


def p_d(discriminator: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """P_D = 1 - D(x), the discriminator's probability that x is not real: (N, C, H, W) to float64 (N,) in [0, 1]."""
    # 1 - sigmoid(l) = sigmoid(-l); in float64, or a confident D would make ties at 0 and 1
    return discriminator(x).cpu().double().neg().sigmoid()


def _fitted(name: str, fits: dict[str, dict[str, Any]], batch: Batch) -> np.ndarray:
    """What the search left of each image of a batch (N,)."""
    of_split = fits[batch.split]
    first = np.searchsorted(of_split["picture"], batch.rows)  # of these pictures alone: a split may have a million
    return of_split[name][first + batch.patches.number]


def _fitted_score(fits: dict[str, dict[str, Any]], batch: Batch) -> np.ndarray:
    """A(x) as the search left it (N,)."""
    parts = (_fitted(name, fits, batch) for name in ("residual", "discrimination"))
    return anomaly_score(*parts, fits[batch.split]["search"]["discrimination_weight"])


def _read_reference(gan: runs.TrainedGAN, image_sets: ImageSets) -> dict[str, dict[str, Any]]:
    """The latents of GAN_R for these images. Raises InputError if they are of others."""
    references = latents.read_fits(gan, list(image_sets), "reference")
    for split, image_set in image_sets.items():
        for name in ("index", "source"):
            if not np.array_equal(references[split][name], getattr(image_set, name)):
                raise InputError(
                    f"the two searches of {split} are not of the same images (other {name}): run fit_latent.py with "
                    "--discrimination features and with reference, and the same --max-images"
                )
    return references


GAN = Source("gan.pt", "train_gan.py", lambda gan, image_sets: gan)
LATENTS = Source(
    "latents-{split}.npz", "fit_latent.py", lambda gan, image_sets: latents.read_fits(gan, list(image_sets))
)
REFERENCE = Source(
    "latents-{split}-reference.npz",
    "fit_latent.py --discrimination reference",
    _read_reference,
    scores_unlabelled=False,
)

DIFFERENCE = HeatMap("difference", LATENTS, lambda fits, x, generated: heatmaps.difference(x, generated), heatmaps.unit)

# What needs G(z) is of the source LATENTS
SEARCH = (
    Score(
        "anomaly_score",
        "A(x), AnoGAN's anomaly score",
        LATENTS,
        _fitted_score,
        "tab:blue",
    ),
    Score(
        "residual",
        "R, residual",
        LATENTS,
        partial(_fitted, "residual"),
        colour="tab:blue",
        line="--",
        opacity=0.6,
    ),
    Score(
        "discrimination",
        "D, discrimination",
        LATENTS,
        partial(_fitted, "discrimination"),
        colour="tab:blue",
        line=":",
        opacity=0.4,
    ),
    Score(
        "peak",
        "peak, largest local difference",
        LATENTS,
        peak,
        colour="tab:blue",
        line="-.",
        opacity=0.25,
        map=DIFFERENCE,
    ),
    Score("p_d", "P_D, discriminator alone", GAN, lambda gan, batch: p_d(gan.discriminator, batch.x), "tab:orange"),
)
GAN_R = Score(
    "gan_r",
    "A(x) of GAN_R, reference loss",
    REFERENCE,
    _fitted_score,
    "tab:purple",
)


# ---- several scores in one ------------------------------------------------------------------------------------------


def combined(
    weights: dict[str, float], of_split: dict[str, np.ndarray], of_validation: dict[str, np.ndarray]
) -> np.ndarray:
    """The weighted sum of the logarithms of several scores, of those with a weight that validation has: (N,).

    Takes the scores of a split and of validation by name, (N,) and (V,). Each logarithm counts minus its mean over
    validation normals, over their standard deviation; without the logarithm the score with the longest tail would drown
    the others. Most scores are distances or losses, from 0 up; those under 1e-6, which rounding can bring about, count
    as 1e-6. Of the peaks of a heat map, which lie around 0 where it is relative to what is usual, it is log(1 + v), and
    those below 0 count as 0. A part that is the same for all validation normals, or of which there is only one, is not
    scaled.
    """
    names = [name for name in weights if name in of_validation]
    total = np.zeros(len(of_split[names[0]]))
    for name in names:
        part, normal = (of[name].astype(np.float64) for of in (of_split, of_validation))
        part, normal = (
            np.log1p(np.maximum(v, 0)) if name in PEAKS else np.log(np.maximum(v, 1e-6)) for v in (part, normal)
        )
        total += weights[name] * (part - normal.mean()) / (normal.std() or 1.0)
    return total


PEAKS = ("pca_peak",)  # parts of `combined` that are the largest value of a heat map
# The parts of `combined` and their weights: what was trained to suit the pictures. A(x) and `peak` are not among them:
# on natural pictures they follow contrast, see docs/experiments.md#combined
WEIGHTS = {"rotation": 1.0, "neighbours": 0.5, "mahalanobis": 0.5, "cutpaste": 1.0, "pca_peak": 0.5}
COMBINED = Score("combined", "combined", None, partial(combined, WEIGHTS), "black", parts=tuple(WEIGHTS))
