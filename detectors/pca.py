"""PCA: what differs from the closest picture that a linear generator can draw. For parts that always lie the same way.

    python -m detectors.pca                                     # on the images of the run trained last
    python -m detectors.pca --run-dir outputs/washers-good

The principal components of the normal images are a generator: x̂ = mean + Σ z_i component_i. The z whose picture is
closest to x needs no search: it is a projection. From gan.pt it takes the data set, the normal class and the sizes, no
weights; nothing needs to be searched. Takes seconds. Writes pca.pt to the run folder, and adds to its run.json.
evaluate.py then has the scores `pca` and `pca_peak`, and a heat map; `pca_peak` is part of `combined`.
Next: python evaluate.py
"""

import time
from dataclasses import dataclass
from pathlib import Path

import sklearn.decomposition
import torch
import tyro
from torch import nn

import util
from anogan import heatmaps, runs
from anogan.scores import HeatMap, Score, Source, peak

COMMAND = "python -m detectors.pca"
MEMORY = 2000  # training images or patches at most that the components are of
COMPONENTS = 256  # the more the better, on every set that was tried: docs/experiments.md


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    dataset: str | None = None  # where the pictures of the run lie now, if they were moved
    skip_unreadable: bool = False  # go on without the images that cannot be read


class PCA(nn.Module):
    """An image to the closest one that the principal components can draw: (N, C, H, H) in [-1, 1] to about the same."""

    def __init__(self, image_size: int, image_channels: int) -> None:
        super().__init__()
        values = image_channels * image_size**2
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("components", torch.zeros(COMPONENTS, values))  # orthonormal, or 0 where there are fewer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = (x.flatten(1) - self.mean) @ self.components.T  # (N, COMPONENTS)
        return (self.mean + z @ self.components).view(x.shape)


def fit(pca: PCA, x: torch.Tensor) -> None:
    """Take the components of normal images (N, C, H, H) in [-1, 1], at most N - 1. Raises InputError if all are the
    same."""
    vectors = x.flatten(1).numpy()  # (N, C * H * H)
    if (vectors == vectors[0]).all():
        raise util.InputError(
            f"the {len(x)} training images or patches are all the same, and principal components need two that differ: "
            "add pictures"
        )
    # exact: the randomised solver was off by 2% where the spectrum falls slowly, and changed ranks
    found = sklearn.decomposition.PCA(min(COMPONENTS, len(x) - 1), svd_solver="full").fit(vectors)
    # where images are alike in all but a few directions, the other components are rounding errors: any would be drawn
    is_there = found.explained_variance_ > 1e-9 * found.explained_variance_[0]
    pca.mean.copy_(torch.from_numpy(found.mean_))
    pca.components[: is_there.sum()] = torch.from_numpy(found.components_[is_there])


def load(gan: runs.TrainedGAN) -> runs.Trained:
    """The components of pca.pt in the GAN's run folder. Raises InputError, see `runs.load_trained`."""
    empty = PCA(gan.image_size, gan.image_channels)
    return runs.load_trained(gan, "pca.pt", COMMAND, "pca", empty, runs.SAME_IMAGES)


LINEAR = Source("pca.pt", COMMAND, lambda gan, image_sets: load(gan).network)
DIFFERENCE = HeatMap(
    "linear_difference", LINEAR, lambda pca, x, generated: heatmaps.difference(x, pca(x)), heatmaps.unit
)
SCORES = (
    Score(
        "pca",
        "residual of principal components",
        LINEAR,
        lambda pca, batch: util.residual_loss(batch.x, pca(batch.x)),
        colour="goldenrod",
    ),
    Score(
        "pca_peak",
        "largest local residual of PCA",
        LINEAR,
        peak,
        colour="goldenrod",
        line=":",
        opacity=0.4,
        map=DIFFERENCE,
    ),
)


def main(config: Config) -> Path:
    """Fit the components to the GAN's images; returns the run folder."""
    started = time.monotonic()
    run_dir, device = runs.find_run(config.run_dir), torch.device("cpu")
    with runs.run_folder(run_dir):
        gan = runs.load_gan(run_dir, device, config.dataset)
        training = runs.images_of_gan(gan, config.skip_unreadable)
        x = gan.to_model(training.some(MEMORY))  # (N, C, H, H)
        pca = PCA(gan.image_size, gan.image_channels)
        fit(pca, x)
        of_images = {name: getattr(gan, name) for name in runs.SAME_IMAGES}
        runs.write_checkpoint(run_dir / "pca.pt", {"config": of_images, "pca": pca.state_dict()})
        runs.record_run(run_dir, "pca", config, device, time.monotonic() - started)
    print(f"wrote {run_dir}/: pca.pt run.json")
    print(f"next: python evaluate.py --run-dir {util.quoted(run_dir)}")
    return run_dir


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
