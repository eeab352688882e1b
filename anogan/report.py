"""What evaluate.py writes and prints of its figures: scores.csv, the table on the terminal, and report.html.

report.html is one file with the verdict, the figures and a gallery of every image, to look at in any browser.
"""

import base64
import csv
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from anogan import files, heatmaps, verdicts
from anogan.metrics import worst_classes
from anogan.runs import TrainedGAN
from anogan.scores import LATENTS
from anogan.scoring import ScoredSplit
from anogan.verdicts import Verdict
from util import printable, quoted

# Bytes of pictures at most, which base64 makes a third longer, so that a browser opens the file at once; the most
# anomalous come first. Each image adds a row of numbers too: the file stays under 60 MB up to 20,000 images
PICTURE_BYTES = 40_000_000
LONGEST = 256  # pixels of the longer side of a panel


@dataclass(frozen=True)
class Page:
    """What a report shows."""

    title: str
    sentences: list[str]  # that open it
    figures: list[Path]  # PNG files
    name: str  # of the split
    split: ScoredSplit
    verdict: Verdict
    metrics: dict[str, dict] = field(default_factory=dict)  # by score, as `metrics.detection_metrics` has them


def write(path: Path, page: Page, strips: Iterator[bytes]) -> None:
    """Write a report: its sentences, a row for each score, the figures and the gallery, most anomalous first.

    `strips` are the WebP files of the images in that order, as many as there is room for.
    """
    split, verdict = page.split, page.verdict
    names = split.in_figures(verdict.score)
    pictures: list[str | None] = []
    size = 0
    for strip in strips:
        size += len(strip)
        if size > PICTURE_BYTES:
            break
        pictures.append(base64.b64encode(strip).decode())
    classes = sorted({str(each) for each in split.class_name} - {""})
    number = {name: i for i, name in enumerate(classes)}
    rows = [
        [
            str(split.images.source[i]),
            number.get(str(split.class_name[i])),
            bool(verdict.flagged[page.name][i]),
            float(verdict.p_value[page.name][i]),
            *(float(split.scores[name][i]) for name in names),
            picture,
        ]
        for i, picture in zip(split.ranked(verdict.score), chain(pictures, repeat(None)), strict=False)
    ]
    panels = ["real"] if split.latents is None else ["real", "generated"]
    panels += [] if split.map is None else [split.map.label, "marked"]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    text = environment.get_template("report.template.html").render(
        title=page.title,
        sentences=page.sentences,
        metrics={name: page.metrics[name] for name in names} if page.metrics else {},
        labels={name: score.label for name, score in split.declared.items()},
        difference=difference,
        score=verdict.score,
        figures={each.stem.replace("_", " "): base64.b64encode(each.read_bytes()).decode() for each in page.figures},
        data={
            "scores": names,
            "verdict": verdict.score,
            "panels": panels,
            "classes": classes,
            "rows": rows,
        },
        without_picture=len(rows) - len(pictures),
        searched=split.latents is not None,
        has_map=split.map is not None,
        level=verdict.level_in_words if math.isfinite(verdict.level) else None,
    )
    with files.replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def strips(split: ScoredSplit, verdict: Verdict) -> Iterator[bytes]:
    """Each image's panels side by side, the most anomalous first, as the bytes of a WebP file."""
    for shown in split.shown(split.ranked(verdict.score)):
        if shown.heat is None:
            panels = [heatmaps.thumbnail(shown.real, LONGEST)]
        else:
            of = shown.real, shown.generated, shown.heat
            panels = heatmaps.panels(*of, verdict.level, verdict.brightest, LONGEST)
        content = io.BytesIO()
        Image.fromarray(np.concatenate(panels, 1)).save(content, "WEBP", quality=80)  # (H, W, 3 W or 4 W, 3)
        yield content.getvalue()


def write_rows(path: Path, header: list[str], rows: Iterable[list]) -> None:
    """A CSV file, whole or not at all."""
    with (
        files.replacing(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_scores(path: Path, scored: dict[str, ScoredSplit], verdict: Verdict) -> None:
    """scores.csv, a row an image; p_value and flagged are of the score `verdict.score`."""
    about = ["split", "index", "source", "label", "class_name", "is_anomaly"]
    write_rows(
        path,
        [*about, *scored["validation"].scores, "p_value", "flagged"],
        (
            [name, split.images.index[i], split.images.source[i], split.images.label[i], split.class_name[i]]
            + [int(split.is_anomaly[i])]
            + [f"{values[i]:.9g}" for values in (*split.scores.values(), verdict.p_value[name])]
            + [int(verdict.flagged[name][i])]
            for name, split in scored.items()
            for i in range(len(split.images))
        ),
    )


def difference(of: dict[str, Any]) -> str:
    """By how much a score's ROC-AUC is above that of the score that is judged by, with its interval."""
    return "{:+z.3f} [{:+z.3f}, {:+z.3f}]".format(of["roc_auc_minus_judged"], *of["roc_auc_minus_judged_95_interval"])


def print_table(found: dict, names: list[str]) -> None:
    """The figures of metrics.json that a person wants first, of the scores of these names."""
    judged = found["threshold"]["score"]

    def row(name: str, of: dict, against: str = "") -> str:
        low, high = of["roc_auc_95_interval"]
        below = "  below chance" if high < 0.5 else ""
        return (
            f"{name:<20} {of['roc_auc']:.3f} [{low:.3f}, {high:.3f}]  {of['average_precision']:>8.3f}"
            f"  {of['fpr_at_95_tpr']:>8.3f}  {against:<24}{below}"
        ).rstrip()

    for protocol in ("test", "all_splits"):
        if protocol not in found:
            continue
        headline = found[protocol][judged]
        normals = f"{headline['n_normal']} normal ({printable(found['normal_class'])})"
        print(f"\n{protocol}: {normals}, {headline['n_anomalous']} anomalous images")
        print(f"{'score':<20} ROC-AUC [95% interval]  avg.prec.  FPR at 95% TPR  AUC minus {judged}'s [95% interval]")
        for name in names:
            of = found[protocol][name]
            print(row(name, of, "" if name == judged else difference(of)))
        shown = worst_classes(headline["per_class"])
        more = len(headline["per_class"]) - len(shown)
        print(
            f"{judged} by anomalous class" + (f", the {len(shown)} worst; metrics.json has {more} more" if more else "")
        )
        for name in shown:
            print(row(f"  {printable(name)}", headline["per_class"][name]))
    if "with_mask" in found.get("pixels", {}):
        print(f"\n{pixel_sentences(found)}")


def pixel_sentences(found: dict) -> str:
    """The pixel-level figures of metrics.json in lines: of which masks they are, and what the network does not see."""
    of, by = found["pixels"], found["threshold"]
    lines = []
    if of["with_mask"]:
        lines.append(
            f"heat maps against the masks of {of['with_mask']} images: pixel-level ROC-AUC {of['pixel_roc_auc']:.3f}, "
            f"AUPRO {of['aupro']:.3f} (false alarms up to 30%)"
        )
        if of["regions_found"] is None:
            lines.append(verdicts.too_few_to_mark(by["alpha"], by["validation_images"]))
        else:
            lines.append(f"something is marked in {of['regions_found']} of their {of['regions']} regions")
    else:
        lines.append("no pixel-level figures: no anomalous image has a mask that marks something")
    if of["without_mask"]:
        classes = ", ".join(f"{count} of {printable(name)}" for name, count in of["without_mask"].items())
        lines.append(
            f"left out for lack of a mask: {classes}; that of test/CLASS/000.png is ground_truth/CLASS/000_mask.png, "
            "or 000.png, with any picture's ending"
        )
    if of["empty_masks"]:
        more = ", ..." if len(of["empty_masks"]) > 3 else ""
        names = ", ".join(map(printable, of["empty_masks"][:3]))
        lines.append(f"left out for an empty mask: {len(of['empty_masks'])} ({names}{more})")
    if of["marked_unseen"]:
        lines.append(
            f"{of['marked_unseen']:.1%} of the marked pixels, and {of['masks_unseen']} masks entirely, lie outside the "
            "centre square, which is all that the networks see: train with --fit stretch or pad, or --picture-size own"
        )
    return "\n".join(lines)


def print_without_test(gan: TrainedGAN, validation: ScoredSplit) -> None:
    """What a run without test pictures is told: nothing is measured, and pictures can be judged."""
    script = "evaluate.py" if validation.latents is None else "fit_latent.py"
    print(
        f"{gan.dataset} has no test pictures, so nothing is measured; the scores of {len(validation.images)} "
        f"validation normals are in {gan.run_dir}\nnext: judge your own pictures: "
        f"python {script} --run-dir {quoted(gan.run_dir)} --images PATH, and name the score of the verdict with --score"
    )


def write_run(test: ScoredSplit, verdict: Verdict, found: dict[str, Any], figures: list[Path]) -> None:
    """report.html, and what a person wants first on the terminal."""
    run_dir, normal_class = test.gan.run_dir, test.gan.normal_class
    at, means = found["threshold"]["test"], verdicts.meaning(verdict)
    advice = verdicts.advice(test, verdict, found["test"])
    flagged = f"flags {at['false_alarm_rate']:.1%} of the normal and {at['detection_rate']:.1%} of the anomalous images"
    page = Page(
        f"{run_dir.name}: {len(test.images)} test images, {normal_class} is normal",
        [f"On the test split it {flagged}.", f"{means[0].upper()}{means[1:]}.", *advice],
        figures[:3],
        "test",
        test,
        verdict,
        found["test"],
    )
    write(run_dir / "report.html", page, strips(test, verdict))
    print_table(found, test.in_figures(verdict.score))
    print(f"\n{means}; on the test split it {flagged}")
    written = " ".join(path.name for path in figures)
    print(f"\nwrote {run_dir}/: scores.csv metrics.json report.html {written} run.json")
    script = "fit_latent.py" if test.declared[verdict.score].source is LATENTS else "evaluate.py"
    print(
        f"next: open {run_dir / 'report.html'} in a browser, or judge your own pictures: "
        f"python {script} --run-dir {quoted(run_dir)} --images PATH"
    )
    if advice:
        print("\n" + "\n".join(advice))
