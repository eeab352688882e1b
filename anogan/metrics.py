"""From scores to figures: ROC-AUC and its interval, and how well heat maps find defects (pixel ROC-AUC, AUPRO)."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from scipy.ndimage import label
from sklearn.metrics import auc, average_precision_score, roc_auc_score, roc_curve

from anogan import heatmaps, masks
from anogan.scores import ScoredSplit


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


def protocol_metrics(splits: list[ScoredSplit], resamples: int, seed: int) -> dict[str, dict]:
    """`detection_metrics` of every score over these splits together: all anomalies, then each anomalous class."""
    class_name = np.concatenate([split.class_name for split in splits])
    is_anomaly = np.concatenate([split.is_anomaly for split in splits])
    metrics = {}
    for name in splits[0].scores:
        score = np.concatenate([split.scores[name] for split in splits])
        metrics[name] = detection_metrics(score, is_anomaly, resamples, seed) | {"per_class": {}}
        for anomaly in np.unique(class_name[is_anomaly]):
            rows = ~is_anomaly | (class_name == anomaly)
            of_class = detection_metrics(score[rows], is_anomaly[rows], resamples, seed)
            metrics[name]["per_class"][str(anomaly)] = of_class
    return metrics


# ---- pixels ---------------------------------------------------------------------------------------------------------

BINS = 4096  # steps of difference between 0 and 1 that the pixel-level figures tell apart
PRO_LIMIT = 0.3  # false-alarm rate up to which the overlap with regions is integrated, as in MVTec's figures


def pixel_figures(pictures: Iterable[tuple[np.ndarray, np.ndarray]], level: float) -> dict[str, float | int | None]:
    """How well heat maps find defects: pairs of a heat (H, W) in [0, 1] and a mask (H, W), True where the defect is.

    `pixel_roc_auc` ranks all pixels of all pictures together. `aupro` (Bergmann et al. 2021) gives each connected
    region of the masks the same weight, whatever its size: the mean share of a region that is found, averaged over the
    false-alarm rates of pixels from 0 to 0.3. Both are None unless there are pixels inside the masks and outside.
    `regions_found` are those with a pixel above the level, None if it is infinite. Differences are told apart in steps
    of 1 / 4096. A pixel that G has not looked at, NaN, counts as 0; `masks_unseen` have no other, and
    `marked_unseen` is the share of these pixels in all masks.
    """
    normal, anomalous, regions = np.zeros(BINS), np.zeros(BINS), []
    found = unseen_masks = unseen_pixels = 0

    def counts(values: np.ndarray) -> np.ndarray:
        return np.bincount(np.minimum(values * BINS, BINS - 1).astype(np.int64), minlength=BINS)

    for heat, mask in pictures:
        unseen, heat = np.isnan(heat), np.nan_to_num(heat, nan=0)
        normal += counts(heat[~mask])
        anomalous += counts(heat[mask])
        unseen_pixels += int(unseen[mask].sum())
        unseen_masks += bool(mask.any() and unseen[mask].all())
        numbered, count = label(mask, np.ones((3, 3)))  # corners touch
        for number in range(1, count + 1):
            of_region = numbered == number
            regions.append(counts(heat[of_region]))
            found += bool((heat[of_region] > level).any())
    found_by_level = {
        "regions": len(regions),
        "regions_found": found if math.isfinite(level) else None,
        "masks_unseen": unseen_masks,
        "marked_unseen": unseen_pixels / max(int(anomalous.sum()), 1),
    }
    if not normal.any() or not anomalous.any():
        return {"pixel_roc_auc": None, "aupro": None} | found_by_level

    def shares_above(of: np.ndarray) -> np.ndarray:
        """Counts (..., BINS) to the share from each threshold up, from the highest down: (..., BINS + 1), 0 to 1."""
        below = np.cumsum(of[..., ::-1], -1) / of.sum(-1, keepdims=True)
        return np.concatenate([np.zeros_like(below[..., :1]), below], -1)

    fpr, overlap = shares_above(normal), shares_above(np.array(regions)).mean(0)
    below = fpr < PRO_LIMIT
    up_to = np.append(fpr[below], PRO_LIMIT)
    return {
        "pixel_roc_auc": float(auc(fpr, shares_above(anomalous))),
        "aupro": float(auc(up_to, np.append(overlap[below], np.interp(PRO_LIMIT, fpr, overlap))) / PRO_LIMIT),
    } | found_by_level


def pixel_metrics(test: ScoredSplit, level: float) -> dict[str, Any]:
    """`pixel_figures` of the test images' heat maps, at the pictures' own size, by the data set's masks.

    Anomalous images without a mask, or with an empty one, are left out: `with_mask` is the number of the others,
    `without_mask` the number of those without by class, and `empty_masks` names the empty ones. Raises InputError for
    a mask that cannot be used.
    """
    paths = masks.find_masks(test.gan.dataset, test.images.source[test.is_anomaly])
    has_file = np.array([source in paths for source in test.images.source])
    empty: list[str] = []

    def heat_and_mask() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows, x, generated in test.drawn(np.flatnonzero(has_file | ~test.is_anomaly)):
            for row, heat in zip(rows, heatmaps.difference(x, generated), strict=True):
                size = test.images.picture(row, test.gan.view).size
                mask = np.zeros(size[::-1], bool)
                if test.is_anomaly[row]:
                    source = str(test.images.source[row])
                    mask = masks.open_mask(paths[source], source, test.images.open(row), size)
                    if not mask.any():
                        empty.append(paths[source].relative_to(test.gan.dataset).as_posix())
                        continue
                yield heatmaps.at_own_size(heat, size), mask

    figures = pixel_figures(heat_and_mask(), level)
    without = Counter(test.class_name[test.is_anomaly & ~has_file].tolist())
    with_mask = int((test.is_anomaly & has_file).sum()) - len(empty)
    return figures | {"with_mask": with_mask, "without_mask": dict(without), "empty_masks": empty}
