"""Plain baselines beside AnoGAN, so that nobody fools themselves: no network, only the pixels of the train split.

    python fit_baselines.py                                   # the run trained last, its validation and test images
    python fit_baselines.py --splits validation test train_anomalies

One-class SVM, kernel density and isolation forest from scikit-learn, on the principal components of the pixels. Writes
baselines-<split>.npz to the run folder: their scores of every image, high where it is anomalous.
Next: python evaluate.py
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity
from sklearn.svm import OneClassSVM

import datasets
import runs
import util


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    splits: tuple[str, ...] = ("validation", "test")  # any of train, validation, test, train_anomalies
    variance: float = 0.95  # share of the pixels' variance that the principal components keep (Ruff et al. 2018)
    nu: float = 0.1  # one-class SVM: share of the training images that may lie outside
    trees: int = 100  # of the isolation forest
    seed: int = 0  # of the isolation forest, and of the folds that choose the density's bandwidth
    skip_unreadable: bool = False  # go on without the images that cannot be read


def to_vectors(images: torch.Tensor) -> np.ndarray:
    """uint8 images (N, C, H, W) to vectors (N, C * H * W) in [-1, 1]."""
    return datasets.to_model(images).flatten(1).numpy()


def choose_bandwidth(vectors: np.ndarray, seed: int) -> KernelDensity:
    """A Gaussian kernel density of vectors (N, D) with the bandwidth of the highest likelihood in five-fold validation.

    The candidates are fractions of the vectors' root mean square distance from their mean: no label has a say.
    """
    scale = np.sqrt((vectors - vectors.mean(0)).var(0).sum())
    some = np.random.default_rng(seed).permutation(vectors)[:1000]  # with all of them it would take a minute
    # In hundreds of dimensions the bounds of scikit-learn's tree cancel, and log-densities came out wrong by up to 400:
    # with all vectors in one leaf they are exact
    model = KernelDensity(leaf_size=len(vectors))
    search = GridSearchCV(model, {"bandwidth": scale * np.geomspace(0.02, 1, 12)}, cv=5).fit(some)
    return model.set_params(**search.best_params_).fit(vectors)


def fit_baseline(name: str, vectors: np.ndarray, config: Config) -> BaseEstimator:
    """A baseline fitted to the principal components (N, D) of normal images; `score_samples` is high where normal."""
    if name == "oc_svm":
        return OneClassSVM(nu=config.nu, gamma="scale").fit(vectors)
    if name == "kde":
        return choose_bandwidth(vectors, config.seed)
    return IsolationForest(n_estimators=config.trees, random_state=config.seed).fit(vectors)


def main(config: Config) -> None:
    """Fit every baseline to the train split, and write its scores of the others."""
    started = time.monotonic()
    util.check_at_least(config, 1, "trees")
    util.check_seed(config.seed)
    if config.seed >= 2**32:
        raise util.InputError(f"--seed must be below 2**32 for scikit-learn, not {config.seed}")
    for name in ("variance", "nu"):
        if not 0 < getattr(config, name) < 1:
            raise util.InputError(f"--{name} must lie between 0 and 1, not {getattr(config, name)}")
    datasets.check_splits(config.splits)
    run_dir = runs.find_run(config.run_dir)
    with runs.run_folder(run_dir):
        gan = runs.load_gan(run_dir, torch.device("cpu"))
        print(f"run: {run_dir}   normal class: {gan.normal_class}")

        def load(split: str) -> tuple[np.ndarray, datasets.ImageSet]:
            images = runs.open_split(gan, split)
            pixels, images = datasets.load_images(images, gan.image_size, gan.image_channels, config.skip_unreadable)
            if len(images) == 0:
                raise util.InputError(f"the split {split} of {gan.dataset} holds no image that can be read")
            return to_vectors(pixels), images

        vectors, _ = load("train")
        begun = time.monotonic()
        pca = PCA(config.variance, svd_solver="full").fit(vectors)
        vectors = pca.transform(vectors)  # (N, D)
        print(f"{len(vectors)} training images, {pca.n_components_} principal components")

        # Each needs the principal components: their seconds count for all three
        fit_seconds, score_seconds = (
            dict.fromkeys(runs.BASELINES, time.monotonic() - begun),
            dict.fromkeys(runs.BASELINES, 0.0),
        )
        models = {}
        for name in runs.BASELINES:
            begun = time.monotonic()
            models[name] = fit_baseline(name, vectors, config)
            fit_seconds[name] += time.monotonic() - begun
        count = 0
        for split in config.splits:
            pixels, images = load(split)
            begun = time.monotonic()
            components = pca.transform(pixels)
            score_seconds = {name: spent + time.monotonic() - begun for name, spent in score_seconds.items()}
            scores = {}
            for name, model in models.items():
                begun = time.monotonic()
                scores[name] = -model.score_samples(components)
                score_seconds[name] += time.monotonic() - begun
            count += len(images)
            with runs.replacing(run_dir / f"baselines-{split}.npz") as partial:
                np.savez(partial, **scores, index=images.index, source=images.source, split=split, gan=gan.fingerprint)
        seconds = {
            name: {"fit": round(fit_seconds[name], 2), "score_1000": round(1000 * score_seconds[name] / count, 3)}
            for name in models
        }
        bandwidth, components = float(models["kde"].bandwidth), int(pca.n_components_)
        runs.record_run(
            run_dir,
            "fit_baselines",
            config,
            torch.device("cpu"),
            time.monotonic() - started,
            bandwidth=bandwidth,
            principal_components=components,
            seconds_by_baseline=seconds,
        )
        for name, each in seconds.items():
            print(f"{name:<18} fitted in {each['fit']:.1f} s, scores 1,000 images in {each['score_1000']:.2f} s")
        print(f"wrote {run_dir}/: {' '.join(f'baselines-{split}.npz' for split in config.splits)} run.json")
        print(f"next: python evaluate.py --run-dir {util.quoted(run_dir)}")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
