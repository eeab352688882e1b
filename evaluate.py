"""3. Score every fitted image: ROC-AUC, a threshold from normal images alone, histograms and difference maps.

    python evaluate.py                                        # the run trained last
    python evaluate.py --run-dir outputs/cifar10-automobile --quantile 0.99
    python evaluate.py --score anomaly_score                  # p_value and flagged by the paper's score

Writes scores.csv, metrics.json and five pictures to the run folder. A high score means anomalous, for every score.
"""

import csv
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import nn

import datasets
import plots
import runs
import scores
import training
import util

MEMORY = 5000  # training images at most among which neighbours are looked for; at 64x64 with ndf 64 they take 250 MB
# The parts of `combined`, chosen on the development half of CIFAR-10's test split, see benchmarks/cifar10_table.py
COMBINED = ("rotation", "neighbours", "mahalanobis")


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    score: str | None = None  # what threshold and flags rest on; by default combined if it is there, or anomaly_score
    quantile: float = 0.95  # share of the validation normals that the threshold leaves unflagged
    bootstrap: int = 1000  # resamples behind each 95% interval
    batch_size: int = 256  # images that go through the networks at once
    seed: int = 0  # of the bootstrap
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda, cuda:1, cpu, ...


@dataclass(frozen=True)
class ScoredSplit:
    """The fitted images of one split and their scores, every array in the same order."""

    images: datasets.ImageSet
    z: np.ndarray  # (N, latent_dim)
    class_name: np.ndarray  # (N,) str
    is_anomaly: np.ndarray  # (N,) bool
    scores: dict[str, np.ndarray]  # by name: anomaly_score, residual, discrimination, p_d, ...; each (N,)
    seconds: dict[str, float]  # by name, for those that were computed here and not read


def p_values(score: np.ndarray, validation_score: np.ndarray) -> np.ndarray:
    """Share of the validation normals that score at least as high: scores (N,) to shares (N,) in [0, 1]."""
    below = np.searchsorted(np.sort(validation_score), score, side="left")
    return 1 - below / len(validation_score)


def bootstrap_interval(score: np.ndarray, is_anomaly: np.ndarray, resamples: int, seed: int) -> list[float]:
    """95% percentile interval of the ROC-AUC, normals and anomalies resampled each among themselves.

    The AUC is the share of (normal, anomaly) pairs in which the anomaly scores higher, ties counting half
    (Mann-Whitney), so a resample needs only counts over the distinct scores and no new sort.
    """
    rng = np.random.default_rng(seed)
    values, place = np.unique(score, return_inverse=True)
    normal, anomalous = place[~is_anomaly], place[is_anomaly]
    aucs = []
    for _ in range(resamples):
        normals = np.bincount(rng.choice(normal, len(normal)), minlength=len(values))  # how many score each value
        anomalies = np.bincount(rng.choice(anomalous, len(anomalous)), minlength=len(values))
        normals_below = np.cumsum(normals) - normals
        aucs.append(anomalies @ (normals_below + normals / 2) / (len(normal) * len(anomalous)))
    return np.quantile(aucs, [0.025, 0.975]).tolist()


def detection_metrics(score: np.ndarray, is_anomaly: np.ndarray, resamples: int, seed: int) -> dict[str, object]:
    """How well a score (N,) ranks anomalies above normals; an inverted score comes out below 0.5, never flipped."""
    fpr, tpr, _ = roc_curve(is_anomaly, score, drop_intermediate=False)
    return {
        "roc_auc": float(roc_auc_score(is_anomaly, score)),
        "roc_auc_95_interval": bootstrap_interval(score, is_anomaly, resamples, seed),
        "average_precision": float(average_precision_score(is_anomaly, score)),
        "fpr_at_95_tpr": float(fpr[np.argmax(tpr >= 0.95)]),  # false alarms when 95% of the anomalies are caught
        "n_normal": int((~is_anomaly).sum()),
        "n_anomalous": int(is_anomaly.sum()),
    }


def protocol_metrics(splits: list["ScoredSplit"], config: Config) -> dict[str, dict]:
    """`detection_metrics` of every score over these splits together: all anomalies, then each anomalous class."""
    class_name = np.concatenate([split.class_name for split in splits])
    is_anomaly = np.concatenate([split.is_anomaly for split in splits])
    metrics = {}
    for name in splits[0].scores:
        score = np.concatenate([split.scores[name] for split in splits])
        metrics[name] = detection_metrics(score, is_anomaly, config.bootstrap, config.seed)
        metrics[name]["per_class"] = {}
        for anomaly in np.unique(class_name[is_anomaly]):
            rows = ~is_anomaly | (class_name == anomaly)
            metrics[name]["per_class"][str(anomaly)] = detection_metrics(
                score[rows], is_anomaly[rows], config.bootstrap, config.seed
            )
    return metrics


def threshold_metrics(score: np.ndarray, is_anomaly: np.ndarray, threshold: float) -> dict[str, float | None]:
    """What a threshold gives: false-alarm rate over normals, detection rate over anomalies, precision of the flags."""
    flagged = score > threshold
    return {
        "false_alarm_rate": float(flagged[~is_anomaly].mean()),
        "detection_rate": float(flagged[is_anomaly].mean()),
        "precision": float(is_anomaly[flagged].mean()) if flagged.any() else None,  # nothing flagged, nothing to divide
    }


@torch.no_grad()
def remember_training(gan: runs.TrainedGAN, rotnet: nn.Module, config: Config) -> scores.NormalFeatures:
    """What RotNet makes of MEMORY training images, evenly spaced if there are more.

    Raises InputError if the training images have changed since.
    """
    images = training.images_of_gan(gan, skip_unreadable=True, processes=1)
    rows = np.unique(np.linspace(0, len(images) - 1, MEMORY).round().astype(np.int64))
    chunks = datasets.chunks(range(len(rows)), config.batch_size)
    return scores.normal_features(rotnet, (datasets.to_model(images[rows[part]], config.device) for part in chunks))


@torch.no_grad()
def score_split(
    run_dir: Path,
    gan: runs.TrainedGAN,
    split: str,
    latents: dict,
    reference: dict | None,
    by_name: dict[str, scores.Score],
    config: Config,
) -> ScoredSplit:
    """Every score that the run folder allows: A(x) and its parts R and D, those of `scores.by_name`, then A(x) of GAN_R
    and the baselines if they were fitted.

    Raises InputError if `reference`, the latents of GAN_R, are not of the same images.
    """
    image_set = runs.fitted_images(gan, split, latents)
    batches = datasets.chunks(range(len(image_set)), config.batch_size)
    decoded = datasets.image_batches(image_set, batches, gan.image_size, gan.image_channels)
    found, seconds = {name: [] for name in by_name}, dict.fromkeys(by_name, 0.0)
    for images, positions, _ in decoded:
        x = datasets.to_model(images, config.device).contiguous(memory_format=torch.channels_last)
        generated = gan.generator(torch.from_numpy(latents["z"][positions]).to(config.device))
        if x.is_cuda:
            torch.cuda.synchronize(x.device)  # or the first score would wait for what has been started
        for name, score in by_name.items():
            begun = time.monotonic()
            found[name].append(score(x, generated).cpu())
            seconds[name] += time.monotonic() - begun
    all_scores = {
        "anomaly_score": runs.fitted_score(latents),
        "residual": latents["residual"],
        "discrimination": latents["discrimination"],
        **{name: torch.cat(parts).numpy() for name, parts in found.items()},
    }
    if reference is not None:
        if not np.array_equal(reference["index"], latents["index"]):
            raise util.InputError(
                f"the two searches of {split} are not of the same images: run fit_latent.py with --discrimination "
                "features and with reference, and the same --max-images"
            )
        all_scores["gan_r"] = runs.fitted_score(reference)
    all_scores |= runs.read_baselines(run_dir, gan, split, image_set.index)
    return ScoredSplit(
        images=image_set,
        z=latents["z"],
        class_name=np.array(gan.classes)[image_set.label],
        is_anomaly=image_set.label != gan.classes.index(gan.normal_class),
        scores=all_scores,
        seconds=seconds,
    )


@torch.no_grad()
def real_and_generated(
    gan: runs.TrainedGAN, split: ScoredSplit, rows: np.ndarray, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and G(z) of some rows of a split, each (N, C, H, W) in [0, 1] on the CPU."""
    images, _ = datasets.load_images(split.images.take(rows), gan.image_size, gan.image_channels)
    z = torch.from_numpy(split.z[rows]).to(config.device)
    generated = torch.cat([gan.generator(batch).cpu() for batch in z.split(config.batch_size)])
    return datasets.to_display(datasets.to_model(images)), datasets.to_display(generated)


def write_scores(path: Path, scored: dict[str, ScoredSplit], verdict: str, threshold: float) -> None:
    """scores.csv, a row an image; p_value and flagged are of the score named `verdict`."""
    validation_score = scored["validation"].scores[verdict]
    with runs.replacing(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        about = ["split", "index", "source", "label", "class_name", "is_anomaly"]
        writer.writerow([*about, *scored["test"].scores, "p_value", "flagged"])
        for name, split in scored.items():
            score = split.scores[verdict]
            p_value = p_values(score, validation_score)
            for i in range(len(split.images)):
                writer.writerow(
                    [name, split.images.index[i], split.images.source[i], split.images.label[i], split.class_name[i]]
                    + [int(split.is_anomaly[i])]
                    + [f"{values[i]:.9g}" for values in (*split.scores.values(), p_value)]
                    + [int(score[i] > threshold)]
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
    threshold = metrics["threshold"]
    print(
        f"\nthreshold of {threshold['score']}: {threshold['value']:.4g}, the {threshold['quantile']:g} quantile of "
        "validation normals: on test "
        f"it flags {threshold['test']['false_alarm_rate']:.1%} of the normal and "
        f"{threshold['test']['detection_rate']:.1%} of the anomalous images"
    )


def main(config: Config) -> None:
    """Check what was asked for, then score, measure and draw in the run folder."""
    util.check_at_least(config, 1, "bootstrap", "batch_size")
    util.check_seed(config.seed)
    if config.score is not None and config.score not in plots.LABELS:
        raise util.InputError(f"unknown score {config.score!r}: choose --score from {', '.join(plots.LABELS)}")
    if not 0 < config.quantile < 1:
        raise util.InputError(f"--quantile must lie between 0 and 1, not {config.quantile}")
    device = util.pick_device(config.device)
    run_dir = runs.find_run(config.run_dir)
    with runs.run_folder(run_dir):
        evaluate(config, run_dir, device)


def evaluate(config: Config, run_dir: Path, device: torch.device) -> None:
    """The scores, figures and pictures of a run folder."""
    started = time.monotonic()
    gan = runs.load_gan(run_dir, device)
    print(f"run: {run_dir}   normal class: {gan.normal_class}   trained for {gan.epoch:.4g} epochs   device: {device}")

    # Score every split that was fitted
    others = [split for split in ("train", "train_anomalies") if runs.latents_path(run_dir, split).is_file()]
    splits = ["validation", "test", *others]
    fits, references = runs.read_fits(run_dir, gan, splits), {}
    if any(runs.latents_path(run_dir, split, "reference").is_file() for split in splits):
        references = runs.read_fits(run_dir, gan, splits, "reference")
    encoder = runs.load_encoder(run_dir, gan, device) if (run_dir / "encoder.pt").is_file() else None
    acae = runs.load_acae(run_dir, gan, device) if (run_dir / "acae.pt").is_file() else None
    rotnet = runs.load_rotnet(run_dir, gan, device) if (run_dir / "rotnet.pt").is_file() else None
    normal = remember_training(gan, rotnet.network, config) if rotnet else None
    by_name = scores.by_name(gan, encoder, acae, rotnet, normal)
    scored = {
        split: score_split(run_dir, gan, split, fits[split], references.get(split), by_name, config) for split in splits
    }
    if len({tuple(split.scores) for split in scored.values()}) > 1:
        raise util.InputError(
            f"not every split has baselines: run fit_baselines.py --run-dir {run_dir} --splits {' '.join(splits)}"
        )
    validation, test = scored["validation"], scored["test"]
    if rotnet:
        of_validation = [validation.scores[name] for name in COMBINED]
        for split in scored.values():
            split.scores["combined"] = scores.combined([split.scores[name] for name in COMBINED], of_validation)
    verdict = config.score or ("combined" if rotnet else "anomaly_score")
    if verdict not in test.scores:
        raise util.InputError(
            f"--score {verdict} needs a script that has not been run on {run_dir}: it has {', '.join(test.scores)}"
        )
    if test.is_anomaly.all() or not test.is_anomaly.any():
        raise util.InputError(
            f"the fitted test images are all {'anomalous' if test.is_anomaly.all() else 'normal'}, and ROC-AUC needs "
            f"both kinds: add images to {gan.dataset}, or raise --max-images of fit_latent.py"
        )

    # A threshold from validation normals alone, and what it and each score give on test
    threshold = float(np.quantile(validation.scores[verdict], config.quantile))
    metrics = {
        "normal_class": gan.normal_class,
        "gan": gan.fingerprint,
        "search": fits["test"]["search"],
        "search_gan_r": references["test"]["search"] if references else None,
        "encoder": {"epoch": encoder.epoch, "kappa": encoder.kappa, "file": encoder.fingerprint} if encoder else None,
        "acae": {"epoch": acae.epoch, "file": acae.fingerprint} if acae else None,
        "rotnet": {"epoch": rotnet.epoch, "file": rotnet.fingerprint} if rotnet else None,
        "threshold": {
            "score": verdict,
            "quantile": config.quantile,
            "value": threshold,
            "test": threshold_metrics(test.scores[verdict], test.is_anomaly, threshold),
        },
        "test": protocol_metrics([test], config),
    }
    if "train_anomalies" in scored:
        metrics["all_splits"] = protocol_metrics([validation, test, scored["train_anomalies"]], config)
    runs.write_json(run_dir / "metrics.json", metrics)
    write_scores(run_dir / "scores.csv", scored, verdict, threshold)

    # Pictures
    title = f"{run_dir.name}, test split"
    plots.roc_curves(run_dir / "roc.png", test.scores, test.is_anomaly, metrics["test"], title)
    plots.score_histograms(run_dir / "score_histograms.png", test.scores, test.is_anomaly, verdict, threshold, title)
    plots.per_class_auc(run_dir / "per_class_auc.png", metrics["test"], title)

    score = test.scores[verdict]
    p_value = p_values(score, validation.scores[verdict])
    ranked = np.argsort(score, kind="stable")
    plots.ranking(
        run_dir / "ranking.png",
        {
            f"most {kind}": (
                real_and_generated(gan, test, rows, config)[0],
                [f"{test.class_name[i]}\n{score[i]:.4g}" for i in rows],
                test.is_anomaly[rows],
            )
            for kind, rows in (("normal", ranked[:16]), ("anomalous", ranked[::-1][:16]))
        },
        f"{title}, {plots.LABELS[verdict]}",
    )
    # The first few normals and the first two of each anomalous class, not the best-looking ones
    rows = [np.flatnonzero(~test.is_anomaly)[:4]]
    rows += [np.flatnonzero(test.class_name == name)[:2] for name in np.unique(test.class_name[test.is_anomaly])[:10]]
    rows = np.concatenate(rows)
    # Red marks differences larger than those that pixels of validation normals show
    real, generated = real_and_generated(gan, validation, np.arange(min(len(validation.images), 1000)), config)
    pixel_threshold = float(np.quantile((real - generated).abs().mean(1).numpy(), config.quantile))
    plots.difference_maps(
        run_dir / "difference_maps.png",
        *real_and_generated(gan, test, rows, config),
        [[test.class_name[i], f"A = {test.scores['anomaly_score'][i]:.0f}", f"p = {p_value[i]:.2f}"] for i in rows],
        pixel_threshold,
        f"{title}, p of {plots.LABELS[verdict]}",
    )

    score_1000 = {name: round(1000 * spent / len(test.images), 4) for name, spent in test.seconds.items()}
    runs.record_run(run_dir, "evaluate", config, device, time.monotonic() - started, seconds_to_score_1000=score_1000)
    print_table(metrics)
    print(
        f"\nwrote {run_dir}/: scores.csv metrics.json roc.png score_histograms.png per_class_auc.png "
        "difference_maps.png ranking.png run.json"
    )


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=__doc__))
