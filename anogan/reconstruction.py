"""How well G draws normal images that it has not seen: in a line, and in reconstructions.png."""

from typing import Any

import numpy as np
import torch

import util
from anogan import heatmaps, images, latents, loading, pictures, plots, runs

COUNT = 32  # images or patches that are compared


def check(gan: runs.TrainedGAN, training: images.ImageSet, validation: images.ImageSet, found: dict[str, Any]) -> None:
    """Say how well G draws normal images or patches that it has not seen, given their latents, and show some.

    What G leaves of them is compared with what the median of the training images leaves, the best that one picture for
    all can do.
    """
    some = latents.of_patches(found, images.evenly_spaced(len(found["z"]), COUNT))
    unseen = latents.fitted_images(validation, "validation", some)
    pairs = ((x, generated) for _, x, generated in latents.drawn(gan, unseen, some, COUNT))
    seen, generated = (torch.cat(each) for each in zip(*pairs, strict=True))  # (32, C, H, H) each
    # shares of the range of a pixel, from -1 to 1
    by_median = _median(gan, training)
    left, left_by_median = (
        float(util.residual_loss(seen, drawn).mean()) / seen[0].numel() / 2 for drawn in (generated, by_median)
    )
    explained = 1 - left / left_by_median if left_by_median > 0 else 0.0
    path = gan.run_dir / "reconstructions.png"
    grids = (plots.grid(images.to_display(each)) for each in (seen, generated))
    plots.samples(path, *grids, f"{plots.shown(gan.run_dir.name)}: normal {gan.sees} that G has not seen")
    one, several = ("patch", "patches") if gan.view.has_patches else ("picture", "normals")
    factor, unit = heatmaps.unit(gan.view.normalise)
    print(
        f"reconstruction check: G(z) leaves {factor * left:.3f} {unit} in {len(seen)} validation "
        f"{several}, the median {one} leaves {factor * left_by_median:.3f}: "
        f"G explains {explained:.0%}, see {path}"
    )
    if explained <= 0:
        print("G is not good enough: one picture for all would explain more. See docs/own-pictures.md")


def _median(gan: runs.TrainedGAN, training: images.ImageSet) -> torch.Tensor:
    """The median of 2,000 training images, or of 20 patches of each of 100 pictures: (1, C, H, H) in [-1, 1]."""
    count, each = (100, 20) if gan.view.has_patches else (2000, 1)
    some = training.take(images.evenly_spaced(len(training), count))
    decoded = loading.image_batches(some, loading.decode_batches(len(some), gan.view), gan.view, True, quiet=True)
    random, found = np.random.default_rng(0), []
    for _, picture in latents.one_by_one(decoded):  # no more than one is held: each may be large
        one = pictures.Pictures(picture.ravel(), np.array([picture.shape[1:]]), gan.view)
        found.append(one.draw(np.zeros(each, np.int64), random))
    return gan.to_model(torch.cat(found)).median(0, keepdim=True).values
