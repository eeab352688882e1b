"""3. Score every image: ROC-AUC, a verdict from normal images alone, difference maps, a report.

    python evaluate.py                                        # the run trained last
    python evaluate.py --run-dir outputs/cifar10-automobile --alpha 0.01
    python evaluate.py --score anomaly_score                  # p_value and flagged by the paper's score
    python evaluate.py --images my/pictures --fdr 0.05        # your own pictures, after fit_latent.py --images

Writes scores.csv, metrics.json, report.html and five pictures to the run folder; with --images scores.csv, report.html,
heat maps and marked pictures to images-<name of the folder>/ in it. A high score means anomalous, for every score.
Scores that look at G(z) need fit_latent.py; the others also work on a run that was never searched.

Measured: `make demo` (digits, 1 is normal, seed 0): A(x) has a ROC-AUC of 0.994 [0.988, 0.998] in fp32, on one thread
of an AMD EPYC without AVX-512.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import util
from anogan import files, images, judge, masks, metrics, plots, report, runs, scores, scoring, verdicts
from anogan.scoring import ScoredSplit
from detectors import acae, baselines, cutpaste, f_anogan, pca, rotnet

# Every score, in the order of tables and figures. To add a detector, add its scores here
SCORES = (
    *scores.SEARCH,
    *f_anogan.SCORES,
    *acae.SCORES,
    *rotnet.SCORES,
    *pca.SCORES,
    *cutpaste.SCORES,
    scores.GAN_R,
    *baselines.SCORES,
    scores.COMBINED,
)


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    dataset: str | None = None  # where the pictures of the run lie now, if they were moved
    images: tuple[str, ...] | None = None  # pictures without labels, as given to fit_latent.py: a verdict on each
    score: str | None = None  # of the verdict, see docs/scores.md; with --images by default the one evaluated before
    alpha: float = 0.05  # share of normal pictures that may be flagged: those whose p_value is at most this
    fdr: float | None = None  # or flag so that at most this share of the flags is false (Benjamini-Hochberg)
    bootstrap: int = 1000  # resamples behind each 95% interval
    batch_size: int = 256  # images that go through the networks at once
    seed: int = 0  # of the bootstrap
    device: str = "auto"  # cuda, cuda:1, mps, cpu, ...; auto: the first there is of cuda, mps and cpu
    max_megapixels: float | None = None  # larger pictures are refused; by default as in training
    skip_unreadable: bool = False  # go on without the images that cannot be read, where nothing was searched


def main(config: Config) -> dict[str, Any]:
    """Score, judge and draw in the run folder; returns metrics.json; with --images a verdict by path.

    Raises InputError for bad input; for a mask that cannot be used when everything else is written.
    """
    started = time.monotonic()
    check(config)
    device = util.pick_device(config.device)
    run_dir = runs.find_run(config.run_dir)
    with runs.run_folder(run_dir), util.full_precision():
        gan = runs.load_gan(run_dir, device, config.dataset, config.max_megapixels)
        print(f"run: {run_dir}   normal class: {gan.normal_class}   epochs: {gan.epoch:.4g}   device: {device}")
        found = evaluate_splits(gan, config) if config.images is None else judge_pictures(gan, config)
        name = "evaluate" if config.images is None else "evaluate_images"
        facts = {} if config.images is None else {"pictures": len(found)}
        runs.record_run(run_dir, name, config, device, time.monotonic() - started, **facts)
    if config.images is None and "error" in found.get("pixels", {}):
        raise util.InputError(f"{found['pixels']['error']}; all but the pixel figures is written")
    return found


def check(config: Config) -> None:
    """Raise InputError, naming the flag, if a value cannot be used."""
    util.check_at_least(config, 1, "bootstrap", "batch_size", "max_megapixels")
    util.check_seed(config.seed)
    util.check_share(config, "alpha", "fdr")
    names = [score.name for score in scores.with_pools(SCORES)]
    if config.score is not None and config.score not in names:
        raise util.InputError(f"unknown score {config.score!r}: choose --score from {', '.join(names)}")


def evaluate_splits(gan: runs.TrainedGAN, config: Config) -> dict[str, Any]:
    """Scores, ROC-AUC, verdict and difference maps of the labelled splits, and the report; returns metrics.json."""
    run_dir, score = gan.run_dir, config.score or default_score(gan.run_dir)

    # Scores
    extra = [split for split in ("train", "train_anomalies") if scores.LATENTS.is_there(run_dir, [split])]
    image_sets = {split: runs.open_split(gan, split) for split in ("validation", "test", *extra)}
    has_test = len(image_sets["test"]) > 0
    if not has_test:
        del image_sets["test"]
    request = scoring.Request(score, config.score is not None, config.batch_size, config.skip_unreadable)
    scored = scoring.score_run(gan, image_sets, SCORES, request)
    validation = scored["validation"]
    scoring.keep_normals(validation)
    if not has_test:
        report.print_without_test(gan, validation)
        return {}
    test = scored["test"]
    check_both_kinds(test)

    # ROC-AUC
    measured = {"normal_class": gan.normal_class, "gan": gan.fingerprint, "files": scoring.fingerprints(scored)}
    measured |= {"search": test.search, "search_gan_r": scoring.search_of_gan_r(test)}
    protocols = {"test": [test]}
    if "train_anomalies" in scored:
        protocols["all_splits"] = [validation, test, scored["train_anomalies"]]
    for name, splits in protocols.items():
        measured[name] = metrics.protocol_metrics(splits, score, config.bootstrap, config.seed)

    # Verdict, from validation normals alone
    verdict = verdicts.decide(scored, validation.scores, score, config.alpha, config.fdr)
    measured["threshold"] = {
        "score": score,
        "parts": [name for name in test.declared[score].parts if name in test.declared],
        "alpha": config.alpha,
        "fdr": config.fdr,
        "value": verdict.threshold if math.isfinite(verdict.threshold) else None,
        "validation_images": len(validation.images),
        "test": verdicts.flag_metrics(verdict.flagged["test"], test.is_anomaly),
    }
    if test.map is not None and masks.has_masks(gan.dataset):
        try:
            measured["pixels"] = metrics.pixel_metrics(test, verdict.level, verdict.brightest / 2)
        except util.InputError as error:  # main raises it again, when all else is written
            measured["pixels"] = {"error": str(error)}
    files.write_json(run_dir / "metrics.json", measured)
    report.write_scores(run_dir / "scores.csv", scored, verdict)

    # Difference maps, and the other figures
    figures = plots.of_scores(test, verdict, measured["test"])
    if test.map is not None:
        figures.append(plots.difference_maps(test, verdict))
    report.write_run(test, verdict, measured, figures)
    return measured


def judge_pictures(gan: runs.TrainedGAN, config: Config) -> dict[str, dict[str, Any]]:
    """A verdict on each of the pictures without labels; returns score, p_value and flagged by path."""
    pictures = images.open_pictures(config.images)
    score, parts = score_of_verdict(gan, config.score)
    request = scoring.Request(score, True, config.batch_size, config.skip_unreadable)
    normals = scoring.scores_of_normals(gan, SCORES, request)
    check_parts(gan.run_dir, parts, normals.scores)
    scored = scoring.score_run(gan, {"images": pictures}, SCORES, request, normals)
    verdict = verdicts.decide(scored, normals.scores, score, config.alpha, config.fdr)
    judged = scored["images"]
    folder = judge.write(judged, normals.scores[score], verdict)
    judge.print_verdicts(judged, verdict, len(pictures) - len(judged.images))
    maps = "" if judged.map is None else " heat/ marked/"
    print(f"\nwrote {folder}/: scores.csv report.html scores.png{maps}")
    print(f"next: open {folder / 'report.html'} in a browser")
    rows = zip(judged.scores[score], verdict.p_value["images"], verdict.flagged["images"], strict=True)
    return {
        str(source): {score: float(value), "p_value": float(p_value), "flagged": bool(flagged)}
        for source, (value, p_value, flagged) in zip(judged.images.source, rows, strict=True)
    }


def score_of_verdict(gan: runs.TrainedGAN, asked_for: str | None) -> tuple[str, list[str] | None]:
    """The score that pictures without labels are judged by, and the parts that it must have; None if any will do.

    By default that which the test images were judged by, so that what was measured is what is used. Raises InputError
    if that is no score any more.
    """
    measured = files.read_json(gan.run_dir / "metrics.json").get("threshold", {})
    before = measured.get("score")
    if asked_for is not None or before is None:
        return asked_for or default_score(gan.run_dir), None
    if before not in (score.name for score in scores.declared_for(gan, SCORES)):
        raise util.InputError(
            f"{gan.run_dir} was last judged by {before}, which is no score any more: run evaluate.py again, or name "
            "one with --score"
        )
    return before, measured.get("parts", []) if before == scores.COMBINED.name else None


def default_score(run_dir: Path) -> str:
    """What a verdict rests on if no score is named: `combined` if two or more of its parts are there; the only one; or
    the paper's A(x) without any."""
    parts = [score for score in SCORES if score.name in scores.COMBINED.parts]
    there = [score.name for score in parts if score.source.is_there(run_dir, [])]
    return "combined" if len(there) > 1 else there[0] if there else "anomaly_score"


def check_parts(run_dir: Path, measured: list[str] | None, present: Iterable[str]) -> None:
    """Raise InputError unless `combined` has the parts that it had when it was measured."""
    now = [name for name in scores.COMBINED.parts if name in present]
    if measured not in (None, now):
        raise util.InputError(
            f"{run_dir} was last judged by combined of {', '.join(measured)}, and now there are {', '.join(now)}: run "
            "evaluate.py again, or name a score with --score"
        )


def check_both_kinds(test: ScoredSplit) -> None:
    """Raise InputError unless the test images are of both kinds."""
    if test.is_anomaly.all() or not test.is_anomaly.any():
        raise util.InputError(
            f"the scored test images are all {'anomalous' if test.is_anomaly.all() else 'normal'}, and ROC-AUC needs "
            f"both kinds: add images to {test.gan.dataset}/test (or raise --max-images of fit_latent.py), or judge "
            "pictures without labels with --images"
        )


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
