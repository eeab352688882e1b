"""Why the plain score fails where it fails: it follows an image's contrast, not its strangeness.

    python -m benchmarks.contrast --run-dir outputs/table/automobile-0-32-32-45

Draws A(x) and the combined score of the test images against their contrast, Σ|x - mean of x|, to docs/contrast.png, and
prints the rank correlations. Nothing is chosen here.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

import datasets
import plots
import runs
import util
from benchmarks import measure


@dataclass
class Config:
    run_dir: Path | None = None  # a finished run with a rotnet.pt; by default the one trained last
    each: int = 700  # images of each kind that are drawn
    seed: int = 0  # of the choice of images


def main(config: Config) -> None:
    """Read the scores, measure the contrast of the same images, draw."""
    util.check_at_least(config, 1, "each")
    util.check_seed(config.seed)
    run_dir = runs.find_run(config.run_dir)
    gan = runs.load_gan(run_dir, torch.device("cpu"))
    rows, is_anomaly = measure.test_rows(run_dir)
    if "combined" not in rows[0]:
        raise util.InputError(f"{run_dir}/scores.csv has no combined score: run train_rotnet.py, then evaluate.py")
    images = datasets.open_split(gan.dataset, "test", gan.normal_class)
    images = images.take(np.isin(images.index, [int(row["index"]) for row in rows]))
    pixels, _ = datasets.load_images(images, gan.image_size, gan.image_channels)
    x = datasets.to_model(pixels)
    contrast = (x - x.mean((1, 2, 3), keepdim=True)).abs().sum((1, 2, 3)).numpy()
    rng = np.random.default_rng(config.seed)
    kinds = {"normal": (~is_anomaly, "tab:green"), "anomalous": (is_anomaly, "tab:red")}
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axes, name in zip(panels, ("anomaly_score", "combined"), strict=True):
        score = np.array([float(row[name]) for row in rows])
        ranks = [values.argsort().argsort() for values in (contrast, score)]
        correlation = np.corrcoef(*ranks)[0, 1]  # Spearman's
        print(f"{name}: rank correlation with contrast {correlation:.2f}")
        for kind, (mask, colour) in kinds.items():
            shown = rng.permutation(np.flatnonzero(mask))[: config.each]
            axes.scatter(contrast[shown], score[shown], 6, color=colour, alpha=0.5, linewidths=0, label=kind)
        axes.set(xlabel="contrast of x: Σ|x - mean of x|", ylabel=plots.LABELS[name])
        axes.set_title(f"rank correlation {correlation:.2f}")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(f"{run_dir.name}: test images, {gan.normal_class} is normal")
    plots.save(figure, Path(__file__).parents[1] / "docs/contrast.png")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
