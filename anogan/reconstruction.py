"""How well G draws normal images that it has not seen: in a line, and in reconstructions.png."""

from typing import Any

import torch

import util
from anogan import images, latents, pictures, plots, runs

COUNT = 32  # images or patches that are compared


def check(
    gan: runs.TrainedGAN, training: images.ImageSet, validation: images.ImageSet, found: dict[str, Any]
) -> None:
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
    print(
        f"reconstruction check: G(z) leaves {left:.3f} of the range from black to white in {len(seen)} validation "
        f"{several}, the median {one} leaves {left_by_median:.3f}: "
        f"G explains {explained:.0%}, see {path}"
    )
    if explained <= 0:
        print("G is not good enough: one picture for all would explain more. See docs/own-pictures.md")


def _median(gan: runs.TrainedGAN, training: images.ImageSet) -> torch.Tensor:
    """The median of 2,000 training images or patches, (1, C, H, H) in [-1, 1]."""
    some = training.take(images.evenly_spaced(len(training), 100 if gan.view.has_patches else 2000))
    x = gan.to_model(pictures.load(some, gan.view, skip_unreadable=True).some(2000))
    return x.median(0, keepdim=True).values
