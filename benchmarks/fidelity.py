"""What bf16 and stopping early change in the scores: against a full search in fp32, on the same test images.

    python -m benchmarks.fidelity --run-dir outputs/cifar10-automobile

Prints one table and writes it to benchmarks/results/fidelity.json. The labels of the test images serve to report the
difference in ROC-AUC; no setting is chosen by them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import datasets
import fit_latent
import runs
import search
import util
from benchmarks import measure

OURS = fit_latent.Config()
BATCH_SIZE = 64


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    images: int = 2000  # of the test split, every class in its proportion
    full_steps: int = 1000  # of the search that the others are compared with
    steps: tuple[int, ...] = (25, 50, OURS.steps, 200)  # of the others
    seed: int = 0  # of the candidates and of the choice of images
    device: str = OURS.device  # cuda, cuda:1, cpu, ...


def main(config: Config) -> None:
    """Search with every setting, compare, print, write the JSON file."""
    device = util.pick_device(config.device)
    run_dir = runs.find_run(config.run_dir)
    gan = runs.load_gan(run_dir, device)
    test = datasets.open_split(gan.dataset, "test", gan.normal_class)
    test = test.take(fit_latent.stratified_subset(test.label, config.images, config.seed))
    images, _ = datasets.load_images(test, gan.image_size, gan.image_channels)
    is_anomaly = test.label != gan.classes.index(gan.normal_class)
    candidates = search.draw_candidates(gan.generator, gan.latent_dim, OURS.candidates, config.seed)

    def scores(steps: int, precision: str) -> np.ndarray:
        found = []
        for batch in tqdm(images.split(BATCH_SIZE), f"{precision}, {steps} steps", leave=False):
            x = datasets.to_model(batch, device).contiguous(memory_format=torch.channels_last)
            z = search.nearest_candidates(x, candidates)
            _, *losses = search.search_latents(
                gan.generator, gan.discriminator, x, z, steps, OURS.lr, OURS.discrimination_weight, precision
            )
            found.append(util.anomaly_score(*losses, OURS.discrimination_weight).cpu())
        return torch.cat(found).numpy()

    full = scores(config.full_steps, "fp32")
    rows = {f"fp32, {config.full_steps} steps": full}
    rows |= {
        f"{precision}, {steps} steps": scores(steps, precision)
        for steps in config.steps
        for precision in measure.DTYPES
    }
    full_auc = roc_auc_score(is_anomaly, full)
    table = {}
    print(
        f"{run_dir}: {len(test)} test images, {is_anomaly.sum()} of them anomalous, {measure.about(device)['hardware']}"
    )
    print("search               mean score  median change  ROC-AUC  difference")
    for name, score in rows.items():
        auc = roc_auc_score(is_anomaly, score)
        table[name] = {
            "mean_score": float(score.mean()),
            "median_relative_change": float(np.median(np.abs(score / full - 1))),
            "roc_auc": float(auc),
            "roc_auc_difference": float(auc - full_auc),
        }
        print(
            f"{name:<20} {score.mean():>10.1f} {table[name]['median_relative_change']:>14.1%} "
            f"{auc:>8.4f} {auc - full_auc:>+11.4f}"
        )
    runs.write_json(
        Path(__file__).parent / "results/fidelity.json",
        {
            **measure.about_gan(gan),
            "images": len(test),
            "seed": config.seed,
            **measure.about(device),
            "searches": table,
        },
    )


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
