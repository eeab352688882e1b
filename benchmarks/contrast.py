"""Why the plain score fails where it fails: it follows an image's contrast, not its strangeness.

    python -m benchmarks.contrast --run-dir outputs/table/automobile-0-32-32-45

Draws A(x) and the combined score of the test images against their contrast, Σ|x - mean of x|, to docs/contrast.png, and
prints the rank correlations. Nothing is chosen here.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

import evaluate
import util
from anogan import images, loading, plots, runs
from benchmarks import measure

LABELS = {score.name: score.label for score in evaluate.SCORES}


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
        raise util.InputError(
            f"{run_dir}/scores.csv has no combined score: run python -m detectors.rotnet, then evaluate.py"
        )
    test = runs.open_split(gan, "test")
    test = test.take(np.isin(test.index, [int(row["index"]) for row in rows]))
    pixels, _ = loading.load_images(test, gan.view)
    x = images.to_model(pixels)
    contrast = (x - x.mean((1, 2, 3), keepdim=True)).abs().sum((1, 2, 3)).numpy()
    rng = np.random.default_rng(config.seed)
    kinds = {"normal": (~is_anomaly, "tab:green"), "anomalous": (is_anomaly, "tab:red")}
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, ("anomaly_score", "combined"), strict=True):
        score = np.array([float(row[name]) for row in rows])
        ranks = [values.argsort().argsort() for values in (contrast, score)]
        correlation = np.corrcoef(*ranks)[0, 1]  # Spearman's
        print(f"{name}: rank correlation with contrast {correlation:.2f}")
        for kind, (mask, colour) in kinds.items():
            shown = rng.permutation(np.flatnonzero(mask))[: config.each]
            axes.scatter(contrast[shown], score[shown], 6, color=colour, alpha=0.5, linewidths=0, label=kind)
        axes.set(xlabel="contrast of x: Σ|x - mean of x|", ylabel=LABELS[name])
        axes.set_title(f"rank correlation {correlation:.2f}")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(f"{plots.shown(run_dir.name)}: test images, {plots.shown(gan.normal_class)} is normal")
    plots.save(figure, measure.DOCS / "contrast.png")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
