"""The methods that peers.py runs: PyOD's, anomalib's, PCA and smoothness, and how each sees a picture.

Each is a function of training pictures, and of the budget of its training, for those that need one.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.ndimage import uniform_filter
from sklearn.decomposition import PCA
from torch.utils.data import DataLoader

import detectors.pca
from anogan import patches
from anogan.decoding import View
from anogan.runs import TrainedGAN
from benchmarks.measure import timed

CPU = torch.device("cpu")
PATCH = 16  # side of a patch
PATCH_COMPONENTS = 16  # the best of 3 to 192 on the development half of magnetic tiles
BATCH_SIZE = 32  # the default of anomalib's data modules

Pictures = list[np.ndarray]  # uint8 (C, height, width) each


class Budget(NamedTuple):
    """What a training that names no end itself may use."""

    minutes: float
    device: torch.device


class Fitted(NamedTuple):
    """A method after its training."""

    score: Callable[[Pictures], np.ndarray]  # (N,), higher is more anomalous
    seconds: float  # of the training, without the import of its library
    size: str  # how many epochs it was trained for, or how many components it has


def vectors(pictures: Pictures) -> np.ndarray:
    """Pictures of one size to float32 (N, C * height * width) in [0, 1]."""
    return np.stack(pictures).reshape(len(pictures), -1).astype(np.float32) / 255


def fit_pyod(model: Any, pictures: Pictures) -> Fitted:
    """Train a detector of PyOD's on vectors of pixels."""
    seconds, _ = timed(lambda: model.fit(vectors(pictures)), CPU)
    size = f"epochs: {model.epochs}" if hasattr(model, "epochs") else ""
    return Fitted(lambda test: model.decision_function(vectors(test)), seconds, size)


def pyod_anogan(pictures: Pictures, budget: Budget) -> Fitted:
    """AnoGAN (Schlegl et al. 2017) of fully connected networks."""
    from pyod.models.anogan import AnoGAN

    return fit_pyod(AnoGAN(), pictures)


def pyod_deep_svdd(pictures: Pictures, budget: Budget) -> Fitted:
    """Deep SVDD (Ruff et al. 2018) of fully connected networks."""
    from pyod.models.deep_svdd import DeepSVDD

    return fit_pyod(DeepSVDD(pictures[0].size, verbose=0), pictures)


def pyod_knn(pictures: Pictures, budget: Budget) -> Fitted:
    """The distance to the fifth nearest training picture."""
    from pyod.models.knn import KNN

    return fit_pyod(KNN(), pictures)


def pyod_pca(pictures: Pictures, budget: Budget) -> Fitted:
    """The distances to all principal components, each over its share of the variance (Shyu et al. 2003)."""
    from pyod.models import pca

    return fit_pyod(pca.PCA(), pictures)


def fit_anomalib(model_class: Any, pictures: Pictures, budget: Budget, **settings: Any) -> Fitted:
    """Train a model of anomalib's on pictures of one size until its budget is spent.

    It has no post-processor, which would cut off its scores, and no evaluator, which would need labels.
    """
    from anomalib.data import ImageBatch
    from lightning.pytorch import Trainer

    def to_batch(some: Pictures) -> ImageBatch:
        return ImageBatch(image=torch.from_numpy(np.stack(some)).float() / 255)

    def score(test: Pictures) -> np.ndarray:
        batches = (to_batch(test[i : i + BATCH_SIZE]).image for i in range(0, len(test), BATCH_SIZE))
        with torch.inference_mode():
            found = torch.cat([model(x.to(budget.device)).pred_score.flatten() for x in batches])
        return found.cpu().numpy()

    settings |= dict.fromkeys(("post_processor", "evaluator", "visualizer"), False)
    model = model_class(pre_processor=model_class.configure_pre_processor(pictures[0].shape[1:]), **settings)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    on_gpu = budget.device.type == "cuda"
    where = {"accelerator": "gpu", "devices": [budget.device.index]} if on_gpu else {"accelerator": "cpu"}
    trainer = Trainer(**where, max_time=timedelta(minutes=budget.minutes), **quiet, **model.trainer_arguments)
    loader = DataLoader(pictures, BATCH_SIZE, shuffle=True, collate_fn=to_batch)
    seconds, _ = timed(lambda: trainer.fit(model, loader), budget.device)
    model.to(budget.device).eval()  # it comes back to the CPU
    count = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return Fitted(score, seconds, f"epochs: {count / len(loader):.2g}, batches: {count}")


def ganomaly(pictures: Pictures, budget: Budget) -> Fitted:
    """GANomaly (Akcay et al. 2018): how far the code of a picture's reconstruction is from its own."""
    from anomalib.models import Ganomaly

    return fit_anomalib(Ganomaly, pictures, budget)


def draem(pictures: Pictures, budget: Budget) -> Fitted:
    """DRAEM (Zavrtanik et al. 2021), with defects of Perlin noise alone.

    anomalib downloads pictures of textures if their folder is missing; of an empty one it takes noise.
    """
    from anomalib.models import Draem

    with tempfile.TemporaryDirectory() as empty:
        return fit_anomalib(Draem, pictures, budget, dtd_dir=empty)


def residual(pca: PCA, x: np.ndarray) -> np.ndarray:
    """What the components leave of vectors (N, F): (N,)."""
    return np.linalg.norm(x - pca.inverse_transform(pca.transform(x)), axis=1)


def whole_pca(pictures: Pictures, budget: Budget) -> Fitted:
    """What principal components of whole pictures leave of a picture; as many as `detectors.pca` keeps."""
    pca = PCA(min(detectors.pca.COMPONENTS, len(pictures) - 1), svd_solver="full")
    seconds, _ = timed(lambda: pca.fit(vectors(pictures)), CPU)
    return Fitted(lambda test: residual(pca, vectors(test)), seconds, f"components: {pca.n_components_}")


def smoothness(pictures: Pictures, budget: Budget) -> Fitted:
    """How little fine detail a picture has: minus the mean square of what a mean of 3x3 pixels leaves. No training."""

    def score(picture: np.ndarray) -> float:
        levels = picture / 255
        return -float(np.square(levels - uniform_filter(levels, (1, 3, 3))).mean())

    return Fitted(lambda test: np.array([score(each) for each in test]), 0, "")


def patch_vectors(picture: np.ndarray, stride: int) -> np.ndarray:
    """The patches that cover a picture (C, height, width): float32 (P, C * PATCH * PATCH) in [0, 1]."""
    return vectors(patches.cut(picture, patches.grid(picture.shape[1:], PATCH, stride), PATCH))


def patch_pca(pictures: Pictures, budget: Budget) -> Fitted:
    """What principal components of patches leave of a picture's: its 99% quantile."""
    pca = PCA(PATCH_COMPONENTS, svd_solver="full")
    seconds, _ = timed(lambda: pca.fit(np.concatenate([patch_vectors(each, PATCH) for each in pictures])), CPU)

    def score(picture: np.ndarray) -> float:
        return float(np.quantile(residual(pca, patch_vectors(picture, PATCH // 2)), 0.99))

    return Fitted(lambda test: np.array([score(each) for each in test]), seconds, f"components: {pca.n_components_}")


# ---- how each sees a picture ----------------------------------------------------------------------------------------


def at_most(gan: TrainedGAN, side: int) -> int:
    """This side, or that of the whole pictures that a GAN sees if it is smaller."""
    return side if gan.view.has_patches else min(side, gan.image_size)


def square_view(gan: TrainedGAN, side: int, channels: int) -> View:
    """All of a picture in a square."""
    size = at_most(gan, side)
    return replace(gan.view, size=size, channels=channels, fit="stretch", picture_size=None, normalise=False)


def whole_view(gan: TrainedGAN) -> View:
    """Grey or in colour, as the GAN sees it."""
    return square_view(gan, 64, gan.image_channels)


def anomalib_view(gan: TrainedGAN) -> View:
    """In colour, since the networks take nothing else."""
    return square_view(gan, 128, 3)


def patch_view(gan: TrainedGAN) -> View:
    """Grey or in colour, as the GAN sees it, in its own shape."""
    return replace(gan.view, size=PATCH, picture_size=at_most(gan, 128), normalise=False)


class Method(NamedTuple):
    """A method, declared once."""

    fit: Callable[[Pictures, Budget], Fitted]
    view: Callable[[TrainedGAN], View]
    package: str
    has_budget: bool = False  # whether its training ends with --minutes, on --device; the others run on the CPU


METHODS = {
    "pyod_anogan": Method(pyod_anogan, whole_view, "pyod"),
    "pyod_deep_svdd": Method(pyod_deep_svdd, whole_view, "pyod"),
    "pyod_knn": Method(pyod_knn, whole_view, "pyod"),
    "pyod_pca": Method(pyod_pca, whole_view, "pyod"),
    "whole_pca": Method(whole_pca, whole_view, "scikit-learn"),
    "smoothness": Method(smoothness, whole_view, "scipy"),
    "patch_pca": Method(patch_pca, patch_view, "scikit-learn"),
    "ganomaly": Method(ganomaly, anomalib_view, "anomalib", has_budget=True),
    "draem": Method(draem, anomalib_view, "anomalib", has_budget=True),
}
