"""Plain baselines to compare AnoGAN with: no network, only the pixels of the training images. Need a gan.pt.

    python -m detectors.baselines                             # the run trained last, its validation and test images
    python -m detectors.baselines --splits validation test train_anomalies

One-class SVM, kernel density and isolation forest from scikit-learn, on the principal components of the pixels. Writes
baselines-<split>.npz to the run folder: their scores of every image. evaluate.py then has the scores `oc_svm`, `kde`
and `isolation_forest`. Next: python evaluate.py
"""

import time
from dataclasses import dataclass
from functools import partial
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

import util
from anogan import files, images, latents, runs
from anogan.scores import Batch, ImageSets, Score, Source, pooled

COMMAND = "python -m detectors.baselines"
LABELS = {
    "oc_svm": "one-class SVM on pixels",
    "kde": "kernel density of pixels",
    "isolation_forest": "isolation forest on pixels",
}
PATCHES = 5000  # that they learn from, of a GAN of patches: the one-class SVM takes the square of their number
Stored = dict[str, dict[str, np.ndarray]]  # by split and name: the scores of its images (N,)


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    dataset: str | None = None  # where the pictures of the run lie now, if they were moved
    splits: tuple[str, ...] = ("validation", "test")  # any of train, validation, test, train_anomalies
    variance: float = 0.95  # share of the pixels' variance that the principal components keep (Ruff et al. 2018)
    nu: float = 0.1  # one-class SVM: share of the training images that may lie outside
    trees: int = 100  # of the isolation forest
    seed: int = 0  # of the isolation forest, and of the folds that choose the density's bandwidth
    skip_unreadable: bool = False  # go on without the images that cannot be read


def to_vectors(x: torch.Tensor) -> np.ndarray:
    """Images or patches (N, C, H, W) to vectors (N, C * H * W)."""
    return x.flatten(1).numpy()


def choose_bandwidth(vectors: np.ndarray, seed: int) -> KernelDensity:
    """A Gaussian kernel density of vectors (N, D) with the bandwidth of the highest likelihood in five-fold validation.

    Fewer than five vectors are a fold each; they must not all be the same. The candidates are fractions of their root
    mean square distance from their mean: no label has a say.
    """
    scale = np.sqrt((vectors - vectors.mean(0)).var(0).sum())
    some = np.random.default_rng(seed).permutation(vectors)[:1000]  # with all of them it would take a minute
    # In hundreds of dimensions the bounds of scikit-learn's tree cancel, and log-densities came out wrong by up to 400:
    # with all vectors in one leaf they are exact
    model = KernelDensity(leaf_size=len(vectors))
    search = GridSearchCV(model, {"bandwidth": scale * np.geomspace(0.02, 1, 12)}, cv=min(5, len(some))).fit(some)
    return model.set_params(**search.best_params_).fit(vectors)


def fit_baseline(name: str, vectors: np.ndarray, config: Config) -> BaseEstimator:
    """A baseline fitted to the principal components (N, D) of normal images; `score_samples` is high where normal."""
    if name == "oc_svm":
        return OneClassSVM(nu=config.nu, gamma="scale").fit(vectors)
    if name == "kde":
        return choose_bandwidth(vectors, config.seed)
    return IsolationForest(n_estimators=config.trees, random_state=config.seed).fit(vectors)


def training_vectors(gan: runs.TrainedGAN, skip_unreadable: bool) -> np.ndarray:
    """The training images, or PATCHES of them, as vectors (N, D)."""
    training = runs.images_of_gan(gan, skip_unreadable)
    return to_vectors(gan.to_model(training.some(PATCHES if gan.view.has_patches else len(training))))


def scores_of_split(
    gan: runs.TrainedGAN, split: str, models: dict[str, BaseEstimator], pca: PCA, skip_unreadable: bool
) -> tuple[dict[str, np.ndarray], images.ImageSet]:
    """The scores (N,) of a split's pictures, of several patches pooled; and which pictures they are.

    Raises InputError if none can be read.
    """
    image_set = runs.open_split(gan, split)
    of_patches, rows = {name: [] for name in models}, []
    for some, x, _ in latents.drawn(gan, image_set, latents.stride_of(gan), 1024, skip_unreadable, quiet=False):
        components = pca.transform(to_vectors(x))
        rows.append(some.row)
        for name, model in models.items():
            of_patches[name].append(-model.score_samples(components))
    if not rows:
        raise util.InputError(f"the split {split} of {gan.dataset} holds no image that can be read")
    row = np.concatenate(rows)
    found = {name: pooled(np.concatenate(values), row, Score.pool) for name, values in of_patches.items()}
    return found, image_set.take(np.unique(row))


def read(gan: runs.TrainedGAN, image_sets: ImageSets) -> Stored:
    """The baselines' scores of these splits by name, each (N,), NaN for images that they have not seen.

    Raises InputError if a file is missing, not what its name says, or of other images.
    """
    stored = {}
    for split, image_set in image_sets.items():
        path = gan.run_dir / f"baselines-{split}.npz"
        again = f"run {COMMAND} --run-dir {util.quoted(gan.run_dir)} --splits {' '.join(image_sets)}"
        try:
            of_split = latents.read_arrays(path, COMMAND, split, gan, dict.fromkeys(LABELS, ()))
        except util.InputError as error:
            raise util.InputError(f"{error}: {again}, or remove the baselines-*.npz") from error
        if gan.view.has_patches and str(of_split.get("pool")) != Score.pool:
            raise util.InputError(f"{path} is of an older version, which judged pictures by other patches: {again}")
        _, here, there = np.intersect1d(image_set.source, of_split["source"], return_indices=True)
        # on either side there may be more: some were not searched, or could not be read; on both, some were renamed
        is_renamed = len(here) < len(image_set) and len(there) < len(of_split["source"])
        if is_renamed or not np.array_equal(image_set.index[here], of_split["index"][there]):
            raise util.InputError(f"{path} is of other images than those that are scored: {again}")
        stored[split] = {name: np.full(len(image_set), np.nan) for name in LABELS}
        for name, values in stored[split].items():
            values[here] = of_split[name][there]
    return stored


def stored_score(name: str, stored: Stored, batch: Batch) -> np.ndarray:
    """What a baseline said of the images of a batch (N,). Raises InputError if it has not seen one of them."""
    values = stored[batch.split][name][batch.rows]
    if np.isnan(values).any():
        raise util.InputError(
            f"baselines-{batch.split}.npz lacks some of the images that are scored: run {COMMAND} with --splits "
            f"{' '.join(stored)} again"
        )
    return values


BASELINES = Source("baselines-{split}.npz", COMMAND, read, scores_unlabelled=False)
SCORES = tuple(
    Score(name, label, BASELINES, partial(stored_score, name), colour, of="picture")
    for (name, label), colour in zip(LABELS.items(), ("tab:brown", "tab:pink", "tab:gray"), strict=True)
)


def main(config: Config) -> Path:
    """Fit every baseline to the train split, and write its scores of the others; returns the run folder."""
    started = time.monotonic()
    util.check_at_least(config, 1, "trees")
    util.check_seed(config.seed)
    if config.seed >= 2**32:
        raise util.InputError(f"--seed must be below 2**32 for scikit-learn, not {config.seed}")
    util.check_share(config, "variance", "nu")
    images.check_splits(config.splits)
    run_dir = runs.find_run(config.run_dir)
    with runs.run_folder(run_dir):
        gan = runs.load_gan(run_dir, torch.device("cpu"), config.dataset)
        print(f"run: {run_dir}   normal class: {gan.normal_class}")
        vectors = training_vectors(gan, config.skip_unreadable)
        if (vectors == vectors[0]).all():
            raise util.InputError(
                f"the {len(vectors)} training images that can be read are all the same, and the baselines need two "
                "that differ: add pictures, or go on without the baselines"
            )
        pca = PCA(config.variance, svd_solver="full").fit(vectors)
        components = pca.transform(vectors)  # (N, D)
        print(f"{len(components)} training images, {pca.n_components_} principal components")
        models = {name: fit_baseline(name, components, config) for name in LABELS}
        for split in config.splits:
            scores, image_set = scores_of_split(gan, split, models, pca, config.skip_unreadable)
            about = {"index": image_set.index, "source": image_set.source, "split": split, "gan": gan.fingerprint}
            about["pool"] = Score.pool
            files.write_arrays(run_dir / f"baselines-{split}.npz", **scores, **about)
        facts = {"bandwidth": float(models["kde"].bandwidth), "principal_components": int(pca.n_components_)}
        seconds = time.monotonic() - started
        runs.record_run(run_dir, "baselines", config, torch.device("cpu"), seconds, **facts)
        print(f"wrote {run_dir}/: {' '.join(f'baselines-{split}.npz' for split in config.splits)} run.json")
        print(f"next: python evaluate.py --run-dir {util.quoted(run_dir)}")
        return run_dir


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
