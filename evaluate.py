"""3. Score every image: ROC-AUC, a verdict from normal images alone, difference maps, a report.

    python evaluate.py                                        # the run trained last
    python evaluate.py --run-dir outputs/cifar10-automobile --alpha 0.01
    python evaluate.py --score anomaly_score                  # p_value and flagged by the paper's score
    python evaluate.py --images my/pictures --fdr 0.05        # your own pictures, after fit_latent.py --images

Writes scores.csv, metrics.json, report.html and five pictures to the run folder; with --images scores.csv, report.html,
heat maps and marked pictures to images-<name of the folder>/ in it. A high score means anomalous, for every score. What
looks at G(z) needs a search; all else works on a run that was never searched.

RESULT
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import util
from anogan import files, heatmaps, images, judge, metrics, plots, report, runs, scores, verdicts
from anogan.scores import ScoredSplit
from anogan.verdicts import Verdict
from detectors import acae, baselines, f_anogan, rotnet

# Every score, in the order of tables and figures. To add a detector, add its scores here
SCORES = (
    *scores.SEARCH,
    *f_anogan.SCORES,
    *acae.SCORES,
    *rotnet.SCORES,
    scores.GAN_R,
    *baselines.SCORES,
    rotnet.COMBINED,
)


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
    skip_unreadable: bool = False  # go on without the images that cannot be read, where nothing was searched


def main(config: Config) -> dict[str, Any]:
    """Score, judge and draw in the run folder; returns metrics.json, with --images the rows of scores.csv by path."""
    started = time.monotonic()
    check(config)
    device = util.pick_device(config.device)
    run_dir = runs.find_run(config.run_dir)
    with runs.run_folder(run_dir):
        gan = runs.load_gan(run_dir, device)
        print(f"run: {run_dir}   normal class: {gan.normal_class}   epochs: {gan.epoch:.4g}   device: {device}")
        found = evaluate_splits(gan, config) if config.images is None else judge_pictures(gan, config)
        name = "evaluate" if config.images is None else "evaluate_images"
        runs.record_run(run_dir, name, config, device, time.monotonic() - started)
    return found


def check(config: Config) -> None:
    """Raise InputError, naming the flag, if a value cannot be used."""
    util.check_at_least(config, 1, "bootstrap", "batch_size")
    util.check_seed(config.seed)
    util.check_share(config, "alpha", "fdr")
    names = [score.name for score in SCORES]
    if config.score is not None and config.score not in names:
        raise util.InputError(f"unknown score {config.score!r}: choose --score from {', '.join(names)}")


def evaluate_splits(gan: runs.TrainedGAN, config: Config) -> dict[str, Any]:
    """Scores, ROC-AUC, verdict and difference maps of the labelled splits, and the report; returns metrics.json."""
    run_dir, wanted = gan.run_dir, config.score or scores.default_score(gan.run_dir)

    # Scores
    others = [split for split in ("train", "train_anomalies") if scores.LATENTS.is_there(run_dir, [split])]
    image_sets = {split: runs.open_split(gan, split) for split in ("validation", "test", *others)}
    scored = scores.score_run(gan, image_sets, SCORES, wanted, config.batch_size, config.skip_unreadable)
    validation, test = scored["validation"], scored["test"]
    check_both_kinds(gan, test)

    # ROC-AUC
    found = {"normal_class": gan.normal_class, "files": scores.fingerprints(scored), "search": test.search}
    protocols = {"test": [test]}
    if "train_anomalies" in scored:
        protocols["all_splits"] = [validation, test, scored["train_anomalies"]]
    for name, splits in protocols.items():
        found[name] = metrics.protocol_metrics(splits, config.bootstrap, config.seed)

    # Verdict, from validation normals alone
    verdict = verdicts.judge(scored, wanted, config.alpha, config.fdr)
    found["threshold"] = {
        "score": wanted,
        "alpha": config.alpha,
        "fdr": config.fdr,
        "value": verdict.threshold if math.isfinite(verdict.threshold) else None,
        "validation_images": len(validation.images),
        "test": verdicts.flag_metrics(verdict.flagged["test"], test.is_anomaly),
    }
    if test.z is not None and images.has_masks(gan.dataset):
        found["pixels"] = metrics.pixel_metrics(test, verdict.level)
    files.write_json(run_dir / "metrics.json", found)
    report.write_scores(run_dir / "scores.csv", scored, verdict)

    # Difference maps, and the other figures
    title = f"{run_dir.name}, test split"
    figures = draw_figures(test, verdict, found["test"], title)
    if test.z is not None:
        figures.append(draw_difference_maps(test, verdict, title))

    write_report(test, verdict, found, figures)
    return found


def judge_pictures(gan: runs.TrainedGAN, config: Config) -> dict[str, dict[str, Any]]:
    """A verdict on each of the pictures without labels; returns score, p_value and flagged by path."""
    pictures = images.open_pictures(config.images)
    # by default the score that the test images were judged by, so that what was measured is what is used
    measured = files.read_json(gan.run_dir / "metrics.json").get("threshold", {}).get("score")
    wanted = config.score or measured or scores.default_score(gan.run_dir)
    image_sets = {"validation": runs.open_split(gan, "validation"), "images": pictures}
    scored = scores.score_run(gan, image_sets, SCORES, wanted, config.batch_size, config.skip_unreadable)
    verdict = verdicts.judge(scored, wanted, config.alpha, config.fdr)
    folder = judge.write(gan.run_dir, scored, verdict)
    found = scored["images"]
    judge.print_verdicts(found, verdict, len(pictures) - len(found.images))
    maps = "" if found.z is None else " heat/ marked/"
    print(f"\nwrote {folder}/: scores.csv report.html scores.png{maps}")
    print(f"next: open {folder / 'report.html'} in a browser")
    rows = zip(found.scores[wanted], verdict.p_value["images"], verdict.flagged["images"], strict=True)
    return {
        str(source): {wanted: float(score), "p_value": float(p_value), "flagged": bool(flagged)}
        for source, (score, p_value, flagged) in zip(found.images.source, rows, strict=True)
    }


def write_report(test: ScoredSplit, verdict: Verdict, found: dict[str, Any], figures: list[Path]) -> None:
    """report.html, and what a person wants first on the terminal."""
    run_dir, normal_class = test.gan.run_dir, test.gan.normal_class
    at, means = found["threshold"]["test"], verdicts.meaning(verdict)
    flagged = f"flags {at['false_alarm_rate']:.1%} of the normal and {at['detection_rate']:.1%} of the anomalous images"
    page = report.Page(
        f"{run_dir.name}: {len(test.images)} test images, {normal_class} is normal",
        [f"On the test split it {flagged}.", f"{means[0].upper()}{means[1:]}."],
        figures[:3],
        "test",
        test,
        verdict,
        found["test"],
    )
    report.write(run_dir / "report.html", page, report.strips(test, verdict))
    report.print_table(found)
    print(f"\n{means}; on the test split it {flagged}")
    written = " ".join(path.name for path in figures)
    print(f"\nwrote {run_dir}/: scores.csv metrics.json report.html {written} run.json")
    print(
        f"next: open {run_dir / 'report.html'} in a browser, or judge your own pictures: "
        f"python fit_latent.py --run-dir {util.quoted(run_dir)} --images PATH"
    )


def check_both_kinds(gan: runs.TrainedGAN, test: ScoredSplit) -> None:
    """Raise InputError unless the test images are of both kinds."""
    if test.is_anomaly.all() or not test.is_anomaly.any():
        raise util.InputError(
            f"the scored test images are all {'anomalous' if test.is_anomaly.all() else 'normal'}, and ROC-AUC needs "
            f"both kinds: add images to {gan.dataset}/test (or raise --max-images of fit_latent.py), or judge pictures "
            "without labels with --images"
        )


def draw_figures(test: ScoredSplit, verdict: Verdict, found: dict[str, dict], title: str) -> list[Path]:
    """ROC curves, histograms, ROC-AUC by class and the ranking, to the run folder; returns their paths."""
    names = ("roc.png", "score_histograms.png", "per_class_auc.png", "ranking.png")
    paths = [test.gan.run_dir / name for name in names]
    label = test.declared[verdict.score].label
    plots.roc_curves(paths[0], test, found, title)
    by_label = {test.declared[name].label: values for name, values in test.scores.items()}
    plots.score_histograms(paths[1], by_label, test.is_anomaly, (label, verdict.threshold), title)
    plots.per_class_auc(paths[2], test, found, title)
    ranked, score = test.ranked(verdict.score), test.scores[verdict.score]
    groups = {
        f"most {kind}": (
            images.to_display(test.real_and_generated(rows)[0]),
            [f"{test.class_name[i]}\n{score[i]:.4g}" for i in rows],
            test.is_anomaly[rows],
        )
        for kind, rows in (("normal", ranked[::-1][:16]), ("anomalous", ranked[:16]))
    }
    plots.ranking(paths[3], groups, f"{title}, {label}")
    return paths


def draw_difference_maps(test: ScoredSplit, verdict: Verdict, title: str) -> Path:
    """Real, generated, difference and marked, of the first few normals and the first two of each anomalous class.

    They are not the best-looking ones. Returns the figure's path.
    """
    path = test.gan.run_dir / "difference_maps.png"
    anomalous = np.unique(test.class_name[test.is_anomaly])[:10]
    rows = [np.flatnonzero(~test.is_anomaly)[:4]]
    rows = np.concatenate(rows + [np.flatnonzero(test.class_name == name)[:2] for name in anomalous])
    x, generated = test.real_and_generated(rows)
    panels = heatmaps.panels(x, generated, heatmaps.difference(x, generated), verdict.level, verdict.brightest)
    score, p_value = test.scores["anomaly_score"], verdict.p_value["test"]
    captions = [[test.class_name[i], f"A = {score[i]:.0f}", f"p = {p_value[i]:.2g}"] for i in rows]
    is_marked = math.isfinite(verdict.level)
    red = f"red: differs by more than {verdict.level:.2f}" if is_marked else "too few normals to mark"
    plots.difference_maps(path, panels, captions, f"{title}, p of {test.declared[verdict.score].label}; {red}")
    return path


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
