"""What a run finds and what it misses: of each anomalous class the pictures with the highest and the lowest score.

    python -m benchmarks.found_and_missed --run-dir outputs/magnetic-tile-good --out docs/magnetic-tiles-found.png

Draws each picture, its heat map, what is marked in it, and the mask of its defect, if the data set has masks. Nothing
is chosen by eye. The run folder must have been evaluated; its score is the one of the verdict.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

import util
from anogan import heatmaps, masks, plots, runs, verdicts
from anogan.decoding import upright
from anogan.scoring import ScoredSplit
from benchmarks import measure


@dataclass
class Config:
    out: Path  # where to draw, a PNG file
    run_dir: Path | None = None  # an evaluated run folder; by default the one trained last
    each: int = 2  # pictures with the highest score of a class, and as many with the lowest
    alpha: float = 0.05  # share of validation pictures in which something may be marked


def chosen(test: ScoredSplit, score: str, each: int) -> tuple[np.ndarray, list[str]]:
    """The rows of the pictures to draw, and whether each is among the highest or the lowest of its class."""
    rows, words = [], []
    for name in np.unique(test.class_name[test.is_anomaly]):
        ranked = test.ranked(score)
        ranked = ranked[test.class_name[ranked] == name]
        highest, rest = ranked[:each], ranked[each:]
        lowest = rest[len(rest) - min(each, len(rest)) :]
        rows += [*highest, *lowest]
        words += ["highest"] * len(highest) + ["lowest"] * len(lowest)
    return np.array(rows), words


def mask_panel(test: ScoredSplit, row: int, path: Path | None, shape: tuple[int, ...]) -> np.ndarray:
    """The mask of a picture where the networks look, as a panel of this shape, uint8 (H, W, 3); grey without one."""
    height, width = shape[:2]
    if path is None:
        return np.full((height, width, 3), 128, np.uint8)
    picture = test.images.open(row)
    size = upright(picture).size
    mask = masks.open_mask(path, test.images.source[row], picture, size)
    whole = Image.fromarray((255 * mask).astype(np.uint8)).convert("RGB")
    return np.asarray(whole.crop(test.gan.view.window(size)).resize((width, height)))


def main(config: Config) -> None:
    """Score the test pictures, choose, draw."""
    util.check_at_least(config, 1, "each")
    util.check_share(config, "alpha")
    gan = runs.load_gan(runs.find_run(config.run_dir), torch.device("cpu"))
    score = measure.read_verdict(gan.run_dir)["score"]
    with util.full_precision():
        scored = measure.score_again(gan, score, skip_unreadable=False)
        test = scored["test"]
        verdict = verdicts.decide(scored, scored["validation"].scores, score, config.alpha, None)
        rows, words = chosen(test, score, config.each)
        by = verdict.level, verdict.brightest, plots.LONGEST
        found = list(test.shown(rows))
    panels = [heatmaps.panels(each.real, None, each.heat, *by) for each in found]
    headers = ["picture", "heat map", "marked"]
    if masks.has_masks(gan.dataset):
        paths = masks.find_masks(gan.dataset, test.images.source[rows])
        for of_picture, row in zip(panels, rows, strict=True):
            of_picture.append(mask_panel(test, row, paths.get(test.images.source[row]), of_picture[0].shape))
        headers.append("mask")
    p_value = verdict.p_value["test"]
    captions = [
        [plots.shown(test.class_name[i], 16), word, f"p = {p_value[i]:.2g}"]
        for i, word in zip(rows, words, strict=True)
    ]
    title = f"{plots.shown(gan.run_dir.name)}: of each class the highest and the lowest {score}"
    plots.panels_of_images(config.out, panels, headers, captions, title)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
