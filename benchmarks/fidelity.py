"""What bf16 and stopping early change in the scores: against a full search in fp32, on the same test images.

    python -m benchmarks.fidelity --run-dir outputs/cifar10-automobile

Prints one table and writes it to benchmarks/results/fidelity.json. The labels of the test images serve to report the
difference in ROC-AUC; no setting is chosen by them.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import fit_latent
import util
from anogan import files, images, loading, runs
from anogan.candidates import draw_candidates, nearest
from benchmarks import measure

OURS = fit_latent.Config()


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    images: int = 2000  # of the test split, every class in its proportion
    full_steps: int = 1000  # of the search that the others are compared with
    steps: tuple[int, ...] = (25, 50, OURS.steps, 200)  # of the others
    seed: int = 0  # of the candidates and of the choice of images
    device: str = OURS.device  # auto, cuda, cuda:1, mps, cpu, ...


def main(config: Config) -> None:
    """Search with every setting, compare, print, write the JSON file."""
    device = util.pick_device(config.device)
    run_dir = runs.find_run(config.run_dir)
    gan = runs.load_gan(run_dir, device)
    test = runs.open_split(gan, "test")
    test = test.take(images.stratified_subset(test.label, config.images, config.seed))
    pixels, _ = loading.load_images(test, gan.view)
    is_anomaly = test.class_name != gan.normal_class
    candidates = draw_candidates(gan.generator, gan.latent_dim, OURS.candidates, config.seed)

    def scores(steps: int, precision: str) -> np.ndarray:
        found, settings = [], replace(OURS, steps=steps, precision=precision)
        for batch in tqdm(pixels.split(measure.BATCH_SIZE), f"{precision}, {steps} steps", leave=False):
            x = images.to_model(batch, device).contiguous(memory_format=torch.channels_last)
            found.append(measure.search_loss(gan, x, nearest(x, candidates), settings).cpu())
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
    files.write_json(
        measure.RESULTS / "fidelity.json",
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
