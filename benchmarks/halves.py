"""ROC-AUC of each score on both halves of the test pictures, the mean and deviation over runs that differ in a seed.

    python -m benchmarks.halves outputs/tiles-0 outputs/tiles-1 outputs/tiles-2 --scores cutpaste cutpaste_peak --pixels

Settings and weights were chosen on the development half, so that figures are of the other, the report half. Prints a
table in Markdown, from the scores.csv of the runs. With --pixels also figures of the heat map that a run's verdict
shows: it makes the maps anew, as evaluate.py does, and the data set must have masks. Writes no figures.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

import evaluate
import util
from anogan import masks, metrics, runs, verdicts
from benchmarks import measure


@dataclass
class Config:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # evaluated runs of the same pictures
    scores: tuple[str, ...] = ()  # by name; by default those that all runs have
    pixels: bool = False  # also the pixel-level figures


def pixels_of_halves(run_dir: Path, sources: list[str], in_report: np.ndarray) -> dict[str, tuple[float, float]]:
    """Pixel-level ROC-AUC and AUPRO of a run's heat map on the report half and on the other, given the sources of its
    test pictures (N,) and which are in the report half (N,) bool.

    Raises InputError without masks or a map, for a mask that cannot be used, and if other pictures are there now.
    """
    gan = runs.load_gan(run_dir, util.pick_device("auto"))
    if not masks.has_masks(gan.dataset):
        raise util.InputError(f"{gan.dataset} has no masks: leave out --pixels")
    before = measure.read_verdict(run_dir)
    score, parts = evaluate.score_of_verdict(gan, None)
    with runs.run_folder(run_dir), util.full_precision():
        scored = measure.score_again(gan, score, skip_unreadable=True)
        test, normals = scored["test"], scored["validation"].scores
        if list(test.images.source) != sources:
            raise util.InputError(f"{run_dir} has other test pictures than before: run evaluate.py again")
        evaluate.check_parts(run_dir, parts, normals)
        verdict = verdicts.decide(scored, normals, score, before["alpha"], before["fdr"])
        level, middle = verdict.level, verdict.brightest / 2
        found = [metrics.pixel_metrics(test, level, middle, half) for half in (in_report, ~in_report)]
    keys = {f"pixel-level ROC-AUC, {test.map.name}": "pixel_roc_auc", f"AUPRO, {test.map.name}": "aupro"}
    return {name: tuple(math.nan if of[key] is None else of[key] for of in found) for name, key in keys.items()}


def main(config: Config) -> None:
    """Read, average, print."""
    if not config.run_dirs:
        raise util.InputError("name one or more evaluated run folders")
    tables = [measure.test_rows(run_dir) for run_dir in config.run_dirs]
    pictures = [[row["source"] for row in rows] for rows, _ in tables]
    if any(each != pictures[0] for each in pictures):
        raise util.InputError("the runs were evaluated on different test pictures: name runs of the same ones")
    group_by = runs.load_gan(config.run_dirs[0], torch.device("cpu")).group_by
    in_report = measure.report_half(tables[0][0], group_by)  # the same pictures, so the same half of each run
    found = [measure.aucs_of_halves(*table, in_report) for table in tables]
    common = [name for name in found[0] if all(name in of for of in found)]
    if unknown := set(config.scores) - set(common):
        raise util.InputError(f"not every run has the score {min(unknown)}: choose --scores from {', '.join(common)}")
    found = [{f"`{name}`": of[name] for name in config.scores or common} for of in found]
    if config.pixels:
        of_pixels = [pixels_of_halves(run_dir, pictures[0], in_report) for run_dir in config.run_dirs]
        if any(of.keys() != of_pixels[0].keys() for of in of_pixels):
            raise util.InputError("the runs show different heat maps: run evaluate.py with the same --score for all")
        found = [of | pixels for of, pixels in zip(found, of_pixels, strict=True)]
    print("| score | report half | development half |\n|---|---|---|")
    for name in found[0]:
        cells = []
        for half in np.array([of[name] for of in found]).T:  # (2, runs)
            deviation = f" ± {half.std(ddof=1):.3f}" if len(half) > 1 else ""
            cells.append(f"{half.mean():.3f}{deviation}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
