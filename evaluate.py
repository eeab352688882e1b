"""3. Score every fitted image: ROC-AUC, a verdict from normal images alone, heat maps of the differences, a report.

    python evaluate.py                                        # the run trained last
    python evaluate.py --run-dir outputs/cifar10-automobile --alpha 0.01
    python evaluate.py --score anomaly_score                  # p_value and flagged by the paper's score
    python evaluate.py --images my/pictures --fdr 0.05        # your own pictures, after fit_latent.py --images

Writes scores.csv, metrics.json, report.html and five pictures to the run folder; with --images scores.csv, report.html,
heat maps and marked pictures to images-<name of the folder>/ in it. A high score means anomalous, for every score.
"""

import csv
import io
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

import datasets
import heatmaps
import measures
import plots
import report
import runs
import scoring
import util
from scoring import ScoredSplit, Verdicts


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    images: tuple[str, ...] | None = None  # pictures without labels, as given to fit_latent.py: a verdict on each
    score: str | None = None  # p_value and flagged rest on it: combined, else anomaly_score; with --images the last one
    alpha: float = 0.05  # share of normal pictures that may be flagged: those whose p_value is at most this
    fdr: float | None = None  # or flag so that of those flagged this share at most is normal (Benjamini-Hochberg)
    bootstrap: int = 1000  # resamples behind each 95% interval
    batch_size: int = 256  # images that go through the networks at once
    seed: int = 0  # of the bootstrap
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda, cuda:1, cpu, ...


def protocol_metrics(splits: list[ScoredSplit], config: Config) -> dict[str, dict]:
    """`detection_metrics` of every score over these splits together: all anomalies, then each anomalous class."""
    class_name = np.concatenate([split.class_name for split in splits])
    is_anomaly = np.concatenate([split.is_anomaly for split in splits])
    metrics = {}
    for name in splits[0].scores:
        score = np.concatenate([split.scores[name] for split in splits])
        metrics[name] = measures.detection_metrics(score, is_anomaly, config.bootstrap, config.seed)
        metrics[name]["per_class"] = {}
        for anomaly in np.unique(class_name[is_anomaly]):
            rows = ~is_anomaly | (class_name == anomaly)
            metrics[name]["per_class"][str(anomaly)] = measures.detection_metrics(
                score[rows], is_anomaly[rows], config.bootstrap, config.seed
            )
    return metrics


def pixel_metrics(
    gan: runs.TrainedGAN, test: ScoredSplit, level: float, batch_size: int, device: torch.device
) -> dict[str, float | int]:
    """How well the heat maps of the test images find the defects, at the pictures' own size, by the data set's masks.

    Raises InputError if an anomalous image has no mask.
    """

    def heat_and_mask() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows, x, generated in scoring.drawn(gan, test.images, test.z, batch_size, device):
            for row, heat in zip(rows, heatmaps.difference(x, generated), strict=True):
                size = test.images.picture(row).size
                mask = np.zeros(size[::-1], bool)
                if test.is_anomaly[row]:
                    mask = datasets.open_mask(gan.dataset, test.images.source[row], size)
                yield heatmaps.at_own_size(heat, size), mask

    return measures.pixel_metrics(heat_and_mask(), level)


def strips(
    gan: runs.TrainedGAN,
    split: ScoredSplit,
    order: np.ndarray,
    verdict: Verdicts,
    batch_size: int,
    device: torch.device,
) -> Iterator[bytes]:
    """For report.html, in this order: each image's four panels side by side, as the bytes of a WebP file."""
    for _, x, generated in scoring.drawn(gan, split.images.take(order), split.z[order], batch_size, device):
        heat = heatmaps.difference(x, generated)
        panels = heatmaps.panels(x, generated, heat, verdict.level, verdict.brightest)
        for strip in np.concatenate(panels, 2):  # (H, 4 W, 3)
            content = io.BytesIO()
            Image.fromarray(strip).save(content, "WEBP", quality=80)
            yield content.getvalue()


def mark_pictures(
    folder: Path,
    gan: runs.TrainedGAN,
    pictures: ScoredSplit,
    verdict: Verdicts,
    batch_size: int,
    device: torch.device,
) -> None:
    """Heat maps to heat/ and marked pictures to marked/ in a folder, at each picture's own size, as PNG files.

    They lie in folders like those that the pictures came from.
    """
    source = [Path(os.path.abspath(each)) for each in pictures.images.source]
    top = os.path.commonpath([each.parent for each in source])
    with util.progress_bar(len(source), " pictures", desc="marking", leave=False) as bar:
        for rows, x, generated in scoring.drawn(gan, pictures.images, pictures.z, batch_size, device):
            for row, heat in zip(rows, heatmaps.difference(x, generated), strict=True):
                picture = pictures.images.picture(row)
                whole = heatmaps.at_own_size(heat, picture.size)
                for kind, pixels in (
                    ("heat", heatmaps.coloured(whole, verdict.brightest)),
                    ("marked", heatmaps.marked(np.asarray(picture), whole, verdict.level)),
                ):
                    path = folder / kind / source[row].relative_to(top)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path.with_name(f"{path.name}.png"), "PNG")
                bar.update()


def write_rows(path: Path, header: list[str], rows: Iterable[list]) -> None:
    """A CSV file, whole or not at all."""
    with runs.replacing(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_scores(path: Path, scored: dict[str, ScoredSplit], verdict: Verdicts) -> None:
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


def print_table(metrics: dict) -> None:
    """The figures of metrics.json that a person wants first."""

    def row(name: str, of: dict) -> str:
        low, high = of["roc_auc_95_interval"]
        below = "  below chance" if high < 0.5 else ""
        return (
            f"{name:<20} {of['roc_auc']:.3f} [{low:.3f}, {high:.3f}]  {of['average_precision']:>8.3f}"
            f"  {of['fpr_at_95_tpr']:>8.3f}{below}"
        )

    for protocol in ("test", "all_splits"):
        if protocol not in metrics:
            continue
        headline = metrics[protocol][metrics["threshold"]["score"]]
        normals = f"{headline['n_normal']} normal ({metrics['normal_class']})"
        print(f"\n{protocol}: {normals}, {headline['n_anomalous']} anomalous images")
        print(f"{'score':<20} ROC-AUC [95% interval]  avg.prec.  FPR at 95% TPR")
        for name, of in metrics[protocol].items():
            print(row(name, of))
        print(f"{metrics['threshold']['score']} by anomalous class")
        for name, of in headline["per_class"].items():
            print(row(f"  {name}", of))
    if "pixels" in metrics:
        of = metrics["pixels"]
        print(
            f"\nheat maps against the masks: pixel-level ROC-AUC {of['pixel_roc_auc']:.3f}, AUPRO {of['aupro']:.3f} "
            f"(false alarms up to 30%); something is marked in {of['regions_found']} of their {of['regions']} regions"
        )


def how_flagged(verdict: Verdicts, normals: int, config: Config) -> str:
    """A sentence on what flags of this run mean."""
    smallest = 1 / (normals + 1)
    if config.fdr is not None:
        return (
            f"flagged by {verdict.score} at a false discovery rate of {config.fdr:g}: of what is flagged, on average "
            f"at most {config.fdr:.1%} is normal ({normals} validation normals, smallest p_value {smallest:.2g})"
        )
    if math.isinf(verdict.threshold):
        return (
            f"nothing can be flagged at --alpha {config.alpha:g}: with {normals} validation normals no p_value is "
            f"under {smallest:.2g}; train on more pictures, or raise --alpha"
        )
    bound = measures.false_alarm_bound(config.alpha, normals)
    return (
        f"flagged where {verdict.score} passes {verdict.threshold:.4g}, p_value at most {config.alpha:g}: on average "
        f"this flags at most {config.alpha:.1%} of normal pictures, and with these {normals} validation normals hardly "
        f"more than {bound:.1%}"
    )


def main(config: Config) -> None:
    """Check what was asked for, then score, judge and draw in the run folder."""
    util.check_at_least(config, 1, "bootstrap", "batch_size")
    util.check_seed(config.seed)
    if config.score is not None and config.score not in plots.LABELS:
        raise util.InputError(f"unknown score {config.score!r}: choose --score from {', '.join(plots.LABELS)}")
    for name in ("alpha", "fdr"):
        if (share := getattr(config, name)) is not None and not 0 < share < 1:
            raise util.InputError(f"--{name} must lie between 0 and 1, not {share}")
    device = util.pick_device(config.device)
    run_dir = runs.find_run(config.run_dir)
    with runs.run_folder(run_dir):
        gan = runs.load_gan(run_dir, device)
        print(f"run: {run_dir}   normal class: {gan.normal_class}   epochs: {gan.epoch:.4g}   device: {device}")
        (evaluate_splits if config.images is None else judge_pictures)(config, run_dir, gan, device)


def evaluate_splits(config: Config, run_dir: Path, gan: runs.TrainedGAN, device: torch.device) -> None:
    """Scores, figures, pictures and the report of the run folder's labelled splits."""
    started = time.monotonic()
    others = [split for split in ("train", "train_anomalies") if runs.latents_path(run_dir, split).is_file()]
    image_sets = {split: runs.open_split(gan, split) for split in ("validation", "test", *others)}
    scored, facts = scoring.score_run(run_dir, gan, image_sets, config.batch_size, device)
    validation, test = scored["validation"], scored["test"]
    if test.is_anomaly.all() or not test.is_anomaly.any():
        raise util.InputError(
            f"the fitted test images are all {'anomalous' if test.is_anomaly.all() else 'normal'}, and ROC-AUC needs "
            f"both kinds: add images to {gan.dataset}/test (or raise --max-images of fit_latent.py), or judge pictures "
            "without labels with --images"
        )
    verdict = scoring.verdicts(scored, config.score, config.alpha, config.fdr)
    metrics = facts | {
        "threshold": {
            "score": verdict.score,
            "alpha": config.alpha,
            "fdr": config.fdr,
            "value": verdict.threshold if math.isfinite(verdict.threshold) else None,
            "validation_images": len(validation.images),
            "test": measures.flag_metrics(verdict.flagged["test"], test.is_anomaly),
        },
        "test": protocol_metrics([test], config),
    }
    if "train_anomalies" in scored:
        metrics["all_splits"] = protocol_metrics([validation, test, scored["train_anomalies"]], config)
    if datasets.has_masks(gan.dataset):
        metrics["pixels"] = pixel_metrics(gan, test, verdict.level, config.batch_size, device)
    runs.write_json(run_dir / "metrics.json", metrics)
    write_scores(run_dir / "scores.csv", scored, verdict)

    # Pictures
    score, p_value, title = test.scores[verdict.score], verdict.p_value["test"], f"{run_dir.name}, test split"
    plots.roc_curves(run_dir / "roc.png", test.scores, test.is_anomaly, metrics["test"], title)
    plots.score_histograms(
        run_dir / "score_histograms.png", test.scores, test.is_anomaly, verdict.score, verdict.threshold, title
    )
    plots.per_class_auc(run_dir / "per_class_auc.png", metrics["test"], title)
    ranked = np.argsort(-score, kind="stable")  # the most anomalous first
    plots.ranking(
        run_dir / "ranking.png",
        {
            f"most {kind}": (
                datasets.to_display(scoring.real_and_generated(gan, test, rows, config.batch_size, device)[0]),
                [f"{test.class_name[i]}\n{score[i]:.4g}" for i in rows],
                test.is_anomaly[rows],
            )
            for kind, rows in (("normal", ranked[::-1][:16]), ("anomalous", ranked[:16]))
        },
        f"{title}, {plots.LABELS[verdict.score]}",
    )
    # The first few normals and the first two of each anomalous class, not the best-looking ones
    rows = [np.flatnonzero(~test.is_anomaly)[:4]]
    rows += [np.flatnonzero(test.class_name == name)[:2] for name in np.unique(test.class_name[test.is_anomaly])[:10]]
    rows = np.concatenate(rows)
    x, generated = scoring.real_and_generated(gan, test, rows, config.batch_size, device)
    heat = heatmaps.difference(x, generated)
    plots.difference_maps(
        run_dir / "difference_maps.png",
        heatmaps.panels(x, generated, heat, verdict.level, verdict.brightest),
        [[test.class_name[i], f"A = {test.scores['anomaly_score'][i]:.0f}", f"p = {p_value[i]:.2g}"] for i in rows],
        f"{title}, p of {plots.LABELS[verdict.score]}; "
        + (
            f"red: differs by more than {verdict.level:.2f}"
            if math.isfinite(verdict.level)
            else "too few normals to mark"
        ),
    )

    at, means = metrics["threshold"]["test"], how_flagged(verdict, len(validation.images), config)
    flagged = f"flags {at['false_alarm_rate']:.1%} of the normal and {at['detection_rate']:.1%} of the anomalous images"
    report.write(
        run_dir / "report.html",
        f"{run_dir.name}: {len(test.images)} test images, {gan.normal_class} is normal",
        [f"On the test split it {flagged}.", f"{means[0].upper()}{means[1:]}."],
        metrics["test"],
        [run_dir / name for name in ("roc.png", "score_histograms.png", "per_class_auc.png")],
        "test",
        test,
        ranked,
        verdict,
        strips(gan, test, ranked, verdict, config.batch_size, device),
    )
    score_1000 = {name: round(1000 * spent / len(test.images), 4) for name, spent in test.seconds.items()}
    runs.record_run(run_dir, "evaluate", config, device, time.monotonic() - started, seconds_to_score_1000=score_1000)
    print_table(metrics)
    print(f"\n{means}; on the test split it {flagged}")
    print(
        f"\nwrote {run_dir}/: scores.csv metrics.json report.html roc.png score_histograms.png per_class_auc.png "
        "difference_maps.png ranking.png run.json"
        f"\nnext: open {run_dir / 'report.html'} in a browser, or judge your own pictures: "
        f"python fit_latent.py --run-dir {util.quoted(run_dir)} --images PATH"
    )


def judge_pictures(config: Config, run_dir: Path, gan: runs.TrainedGAN, device: torch.device) -> None:
    """A verdict on each of the pictures without labels, where it differs, and the report."""
    started = time.monotonic()
    image_sets = {
        "validation": runs.open_split(gan, "validation"),
        "images": datasets.open_pictures(config.images),
    }
    scored, _ = scoring.score_run(run_dir, gan, image_sets, config.batch_size, device)
    # By default the score that the test images were judged by, so that what was measured is what is used
    metrics = runs.read_json(run_dir / "metrics.json")
    score = config.score or metrics.get("threshold", {}).get("score")
    verdict = scoring.verdicts(scored, score, config.alpha, config.fdr)
    validation, pictures = scored["validation"], scored["images"]
    score, p_value, flagged = pictures.scores[verdict.score], verdict.p_value["images"], verdict.flagged["images"]
    ranked = np.argsort(-score, kind="stable")  # the most anomalous first
    means = how_flagged(verdict, len(validation.images), config)

    # All in a folder beside the one of this name, which it then replaces
    folder = run_dir / f"images-{pictures.images.name}"
    partial = folder.with_name(f"{runs.PARTIAL}{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_rows(
        partial / "scores.csv",
        ["path", *pictures.scores, "p_value", "flagged"],
        (
            [
                pictures.images.source[i],
                *(f"{values[i]:.9g}" for values in (*pictures.scores.values(), p_value)),
                int(flagged[i]),
            ]
            for i in ranked
        ),
    )
    plots.score_histograms(
        partial / "scores.png",
        {verdict.score: np.concatenate([validation.scores[verdict.score], score])},
        np.arange(len(validation.images) + len(score)) >= len(validation.images),
        verdict.score,
        verdict.threshold,
        "",
        kinds=("validation normals", "your pictures"),
    )
    report.write(
        partial / "report.html",
        f"{run_dir.name}: {len(score)} pictures of {pictures.images.name}",
        [f"{flagged.sum()} of {len(score)} pictures are flagged.", f"{means[0].upper()}{means[1:]}."],
        {},
        [partial / "scores.png"],
        "images",
        pictures,
        ranked,
        verdict,
        strips(gan, pictures, ranked, verdict, config.batch_size, device),
    )
    mark_pictures(partial, gan, pictures, verdict, config.batch_size, device)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    seconds = time.monotonic() - started
    runs.record_run(run_dir, "evaluate_images", config, device, seconds, pictures=len(score))

    print(f"\n{'p_value':>8}  {verdict.score:>13}  flagged  picture")
    for i in ranked[:20]:
        name = "".join(letter if letter.isprintable() else "?" for letter in pictures.images.source[i])
        print(f"{p_value[i]:8.3g}  {score[i]:13.5g}  {'yes' if flagged[i] else '':7}  {name}")
    if len(ranked) > 20:
        print(f"... and {len(ranked) - 20} less anomalous ones, in scores.csv")
    if missing := len(image_sets["images"]) - len(score):
        print(
            f"\n{missing} more pictures there were not searched, new since then or unreadable: fit_latent.py does them"
        )
    print(f"\n{flagged.sum()} of {len(score)} pictures are flagged; {means}")
    print(f"\nwrote {folder}/: scores.csv report.html scores.png heat/ marked/")
    print(f"next: open {folder / 'report.html'} in a browser")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
