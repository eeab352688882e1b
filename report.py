"""report.html: one file with the verdict, the figures and a gallery of every image, to look at in any browser."""

import base64
import math
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader

import plots
import runs
from scoring import ScoredSplit, Verdicts

# Bytes of pictures at most, which base64 makes a third longer, so that a browser opens the file at once; the most
# anomalous come first. Each image adds a row of numbers too: the file stays under 60 MB up to 20,000 images
PICTURE_BYTES = 40_000_000


def write(
    path: Path,
    title: str,
    sentences: list[str],
    metrics: dict[str, dict],
    figures: list[Path],
    name: str,
    split: ScoredSplit,
    ranked: np.ndarray,
    verdict: Verdicts,
    strips: Iterator[bytes],
) -> None:
    """Write the report of the split of this name.

    `sentences` open it, then come a row for each score of `metrics`, as `measures.detection_metrics` has them, the
    `figures`, which are PNG files, and the gallery, most anomalous first as in `ranked` (N,). `strips` are the WebP
    files of the images in that order, as many as there is room for.
    """
    pictures: list[str | None] = []
    size = 0
    for strip in strips:
        size += len(strip)
        if size > PICTURE_BYTES:
            break
        pictures.append(base64.b64encode(strip).decode())
    rows = [
        [
            str(split.images.source[i]),
            str(split.class_name[i]),
            bool(verdict.flagged[name][i]),
            float(verdict.p_value[name][i]),
            *(float(values[i]) for values in split.scores.values()),
            picture,
        ]
        for i, picture in zip(ranked, chain(pictures, repeat(None)), strict=False)
    ]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    page = environment.get_template("report.template.html").render(
        title=title,
        sentences=sentences,
        metrics=metrics,
        labels=plots.LABELS,
        score=verdict.score,
        figures={each.stem.replace("_", " "): base64.b64encode(each.read_bytes()).decode() for each in figures},
        data={"scores": list(split.scores), "verdict": verdict.score, "rows": rows},
        classes=sorted({str(each) for each in split.class_name} - {""}),
        without_picture=len(rows) - len(pictures),
        level=verdict.level if math.isfinite(verdict.level) else None,
    )
    with runs.replacing(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")
