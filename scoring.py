"""From the latents and networks of a run folder to the scores of every image, for evaluate.py."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import datasets
import measures
import runs
import scores
import training
import util

MEMORY = 5000  # training images at most that RotNet's scores compare with; at 64x64 with ndf 64 they take 250 MB
# The parts of `combined` and their weights: RotNet's verdict, and two distances in its features that share a weight.
# Chosen on the development half of CIFAR-10's test split, see benchmarks/cifar10_table.py
COMBINED = {"rotation": 1.0, "neighbours": 0.5, "mahalanobis": 0.5}


@dataclass(frozen=True)
class ScoredSplit:
    """The fitted images of one split and their scores, every array in the same order."""

    images: datasets.ImageSet
    z: np.ndarray  # (N, latent_dim)
    class_name: np.ndarray  # (N,) str, "" for pictures without labels
    is_anomaly: np.ndarray  # (N,) bool, False for pictures without labels
    scores: dict[str, np.ndarray]  # by name: anomaly_score, residual, discrimination, peak, ...; each (N,)
    seconds: dict[str, float]  # by name, for those that were computed here and not read


@torch.no_grad()
def remember_training(
    gan: runs.TrainedGAN, rotnet: nn.Module, batch_size: int, device: torch.device
) -> scores.NormalFeatures:
    """What RotNet makes of MEMORY training images, evenly spaced if there are more.

    Raises InputError if the training images have changed since.
    """
    images = training.images_of_gan(gan, skip_unreadable=True, processes=1)
    rows = np.unique(np.linspace(0, len(images) - 1, MEMORY).round().astype(np.int64))
    chunks = datasets.chunks(range(len(rows)), batch_size)
    return scores.normal_features(rotnet, (datasets.to_model(images[rows[part]], device) for part in chunks))


@torch.no_grad()
def drawn(
    gan: runs.TrainedGAN, image_set: datasets.ImageSet, z: np.ndarray, batch_size: int, device: torch.device
) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """A set's images with what G draws from their z (M, latent_dim), batch by batch.

    Yields positions in the set (N,), x and G(z), each (N, C, H, W) in [-1, 1], on the device.
    """
    batches = datasets.chunks(range(len(image_set)), batch_size)
    for images, positions, _ in datasets.image_batches(image_set, batches, gan.image_size, gan.image_channels):
        x = datasets.to_model(images, device).contiguous(memory_format=torch.channels_last)
        yield positions, x, gan.generator(torch.from_numpy(z[positions]).to(device))


@torch.no_grad()
def score_split(
    gan: runs.TrainedGAN,
    image_set: datasets.ImageSet,
    latents: dict,
    by_name: dict[str, scores.Score],
    batch_size: int,
    device: torch.device,
) -> ScoredSplit:
    """A(x) and its parts R and D as the search left them, and the scores `by_name`, of a set's images."""
    found, seconds = {name: [] for name in by_name}, dict.fromkeys(by_name, 0.0)
    for _, x, generated in drawn(gan, image_set, latents["z"], batch_size, device):
        if x.is_cuda:
            torch.cuda.synchronize(x.device)  # or the first score would wait for what has been started
        for name, score in by_name.items():
            begun = time.monotonic()
            found[name].append(score(x, generated).cpu())
            seconds[name] += time.monotonic() - begun
    is_labelled = image_set.label >= 0
    return ScoredSplit(
        images=image_set,
        z=latents["z"],
        class_name=np.where(is_labelled, np.array(gan.classes)[image_set.label], ""),
        is_anomaly=is_labelled & (image_set.label != gan.classes.index(gan.normal_class)),
        scores={
            "anomaly_score": runs.fitted_score(latents),
            "residual": latents["residual"],
            "discrimination": latents["discrimination"],
            **{name: torch.cat(parts).numpy() for name, parts in found.items()},
        },
        seconds=seconds,
    )


def score_run(
    run_dir: Path, gan: runs.TrainedGAN, image_sets: dict[str, datasets.ImageSet], batch_size: int, device: torch.device
) -> tuple[dict[str, ScoredSplit], dict[str, Any]]:
    """Every score that the run folder allows, of these sets' images that were searched; and what they rest on.

    `image_sets` are by split, `validation` among them. Unless one of them is `images`, the pictures without labels,
    the scores of GAN_R and of the baselines are there too if these were run. Raises InputError if a file is missing,
    damaged or of something else.
    """
    splits = list(image_sets)
    is_labelled = "images" not in splits
    fits, references = runs.read_fits(run_dir, gan, splits), {}
    if is_labelled and any(runs.latents_path(run_dir, split, "reference").is_file() for split in splits):
        references = runs.read_fits(run_dir, gan, splits, "reference")
    encoder = runs.load_encoder(run_dir, gan, device) if (run_dir / "encoder.pt").is_file() else None
    acae = runs.load_acae(run_dir, gan, device) if (run_dir / "acae.pt").is_file() else None
    rotnet = runs.load_rotnet(run_dir, gan, device) if (run_dir / "rotnet.pt").is_file() else None
    normal = remember_training(gan, rotnet.network, batch_size, device) if rotnet else None
    by_name = scores.by_name(gan, encoder, acae, rotnet, normal)

    scored = {}
    for split, image_set in image_sets.items():
        fitted = runs.fitted_images(image_set, split, fits[split])
        scored[split] = score_split(gan, fitted, fits[split], by_name, batch_size, device)
        if references:
            if not np.array_equal(references[split]["index"], fits[split]["index"]):
                raise util.InputError(
                    f"the two searches of {split} are not of the same images: run fit_latent.py with --discrimination "
                    "features and with reference, and the same --max-images"
                )
            scored[split].scores["gan_r"] = runs.fitted_score(references[split])
        if is_labelled:
            scored[split].scores.update(runs.read_baselines(run_dir, gan, split, fitted.index))
    if len({tuple(split.scores) for split in scored.values()}) > 1:
        raise util.InputError(
            f"not every split has baselines: run fit_baselines.py --run-dir {util.quoted(run_dir)} --splits "
            f"{' '.join(splits)}"
        )
    if rotnet:
        of_validation = [scored["validation"].scores[name] for name in COMBINED]
        for split in scored.values():
            split.scores["combined"] = scores.combined(
                [split.scores[name] for name in COMBINED], of_validation, list(COMBINED.values())
            )
    return scored, {
        "normal_class": gan.normal_class,
        "gan": gan.fingerprint,
        "search": fits["validation"]["search"],
        "search_gan_r": references["validation"]["search"] if references else None,
        "encoder": {"epoch": encoder.epoch, "kappa": encoder.kappa, "file": encoder.fingerprint} if encoder else None,
        "acae": {"epoch": acae.epoch, "file": acae.fingerprint} if acae else None,
        "rotnet": {"epoch": rotnet.epoch, "file": rotnet.fingerprint} if rotnet else None,
    }


@dataclass(frozen=True)
class Verdicts:
    """What one score says of every image, by split, and from where on a difference is marked."""

    score: str
    threshold: float  # above which images are flagged; infinite if there are too few normals for it, or with an fdr
    p_value: dict[str, np.ndarray]  # (N,) each
    flagged: dict[str, np.ndarray]  # (N,) bool each
    level: float  # of heatmaps.difference: at most a share alpha of normals has a pixel that passes it
    brightest: float  # the largest difference among validation normals


def verdicts(scored: dict[str, ScoredSplit], score: str | None, alpha: float, fdr: float | None) -> Verdicts:
    """P-values and flags of a score, by default `combined` if it is there; all from validation normals alone.

    Flags are those of `measures.flags`; with `fdr` no threshold belongs to them.

    Raises InputError if there is no such score.
    """
    normals = scored["validation"].scores
    score = score or ("combined" if "combined" in normals else "anomaly_score")
    if score not in normals:
        raise util.InputError(
            f"there is no score {score} here, but {', '.join(normals)}: run the script that it needs, see README.md; "
            "GAN_R and the baselines score no pictures without labels"
        )
    p_value = {name: measures.p_values(split.scores[score], normals[score]) for name, split in scored.items()}
    return Verdicts(
        score=score,
        threshold=measures.threshold(normals[score], alpha) if fdr is None else math.inf,
        p_value=p_value,
        flagged={name: measures.flags(values, alpha, fdr) for name, values in p_value.items()},
        level=measures.threshold(normals["peak"], alpha),
        brightest=float(normals["peak"].max()),
    )


def real_and_generated(
    gan: runs.TrainedGAN, split: ScoredSplit, rows: np.ndarray, batch_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and G(z) of some rows of a split, each (N, C, H, W) in [-1, 1], on the CPU."""
    parts = [
        (x.cpu(), generated.cpu())
        for _, x, generated in drawn(gan, split.images.take(rows), split.z[rows], batch_size, device)
    ]
    real, generated = (torch.cat(each) for each in zip(*parts, strict=True))
    return real, generated
