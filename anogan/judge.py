"""The verdict on pictures without labels: a table, a report, and each picture with what differs marked in red."""

import math
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from anogan import files, heatmaps, plots, processes, report, verdicts
from anogan.scoring import ScoredSplit
from anogan.verdicts import Verdict
from util import printable


def write(pictures: ScoredSplit, of_normals: np.ndarray, verdict: Verdict) -> Path:
    """All that is found of pictures, to a folder images-<name> in the run folder, which it returns.

    `of_normals` (V,) are the validation normals' values of the score that the verdict is by.

    Another set of pictures of the same name replaces what was there, once all is written.
    """
    run_dir = pictures.gan.run_dir
    folder = run_dir / f"images-{pictures.images.name}"
    partial = folder.with_name(f"{files.PARTIAL}{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    files.make_folder(partial)
    write_table(partial / "scores.csv", pictures, verdict)
    both = np.concatenate([of_normals, pictures.scores[verdict.score]])
    label = pictures.declared[verdict.score].label
    plots.score_histograms(
        partial / "scores.png",
        {label: both},
        np.arange(len(both)) >= len(of_normals),
        (label, verdict.threshold),
        "",
        kinds=("validation normals", "your pictures"),
    )
    flagged, means = verdict.flagged["images"], verdicts.meaning(verdict)
    page = report.Page(
        f"{run_dir.name}: {len(flagged)} pictures of {pictures.images.name}",
        [f"{flagged.sum()} of {len(flagged)} pictures flagged.", f"{means[0].upper()}{means[1:]}."],
        [partial / "scores.png"],
        "images",
        pictures,
        verdict,
    )
    report.write(partial / "report.html", page, report.strips(pictures, verdict))
    if pictures.map is not None:
        mark_pictures(partial, pictures, verdict)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def write_table(path: Path, pictures: ScoredSplit, verdict: Verdict) -> None:
    """scores.csv, a row a picture, the most anomalous first."""
    p_value, flagged = verdict.p_value["images"], verdict.flagged["images"]
    report.write_rows(
        path,
        ["path", *pictures.scores, "p_value", "flagged"],
        (
            [
                pictures.images.source[i],
                *(f"{values[i]:.9g}" for values in (*pictures.scores.values(), p_value)),
                int(flagged[i]),
            ]
            for i in pictures.ranked(verdict.score)
        ),
    )


def mark_pictures(folder: Path, pictures: ScoredSplit, verdict: Verdict) -> None:
    """Heat maps to heat/ and marked pictures to marked/ in a folder, at each picture's own size, as PNG files.

    They lie in folders like those that the pictures came from.
    """
    source = [Path(os.path.abspath(each)) for each in pictures.images.source]
    top = os.path.commonpath([each.parent for each in source])
    with processes.progress_bar(len(source), " pictures", desc="marking", leave=False) as bar:
        for row, heat in pictures.heats():
            picture = pictures.images.picture(row, pictures.gan.view)
            whole = heatmaps.at_own_size(heat, picture.size, pictures.gan.view)
            name = source[row].relative_to(top)
            _save(folder / "heat" / name, heatmaps.coloured(whole, verdict.brightest))
            _save(folder / "marked" / name, heatmaps.marked(np.asarray(picture), whole, verdict.level))
            bar.update()


def _save(path: Path, pixels: np.ndarray) -> None:
    """Write a picture, uint8 (H, W, 3), to this path with .png behind its name."""
    files.make_folder(path.parent)
    with files.writing(path):
        Image.fromarray(pixels).save(path.with_name(f"{path.name}.png"), "PNG")


def print_verdicts(pictures: ScoredSplit, verdict: Verdict, unsearched: int) -> None:
    """The twenty most anomalous pictures and what the flags mean; `unsearched` more pictures have no latents."""
    p_value, flagged, score = verdict.p_value["images"], verdict.flagged["images"], pictures.scores[verdict.score]
    ranked = pictures.ranked(verdict.score)
    width = max(13, len(verdict.score))
    print(f"\n{'p_value':>8}  {verdict.score:>{width}}  flagged  picture")
    for i in ranked[:20]:
        name = printable(pictures.images.source[i])
        print(f"{p_value[i]:8.3g}  {score[i]:{width}.5g}  {'yes' if flagged[i] else '':7}  {name}")
    if len(ranked) > 20:
        print(f"... and {len(ranked) - 20} less anomalous ones, in scores.csv")
    if unsearched and pictures.latents is None:
        print(f"\n{unsearched} more pictures there cannot be read")
    elif unsearched:
        print(
            f"\n{unsearched} more pictures there were not searched, new since then or unreadable: fit_latent.py does it"
        )
    print(f"\n{flagged.sum()} of {len(score)} pictures flagged; {verdicts.meaning(verdict)}")
    if pictures.map is not None and math.isinf(verdict.level):
        print(verdicts.too_few_to_mark(verdict.alpha, verdict.normals))
