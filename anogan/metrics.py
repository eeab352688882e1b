"""From scores to figures: ROC-AUC and its interval, and how well heat maps find defects (pixel ROC-AUC, AUPRO)."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from scipy.ndimage import label
from sklearn.metrics import auc, roc_curve

from anogan import heatmaps, masks
from anogan.decoding import upright
from anogan.scores import DIFFERENCE
from anogan.scoring import ScoredSplit

CLASSES = 30  # anomalous classes that figures and the terminal show at most; metrics.json has them all


def bootstrap_aucs(
    scores: np.ndarray, is_anomaly: np.ndarray, classes: np.ndarray, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """ROC-AUCs of several scores (S, N) in the same resamples: of all anomalies (S, resamples), and of each class
    (S, K, resamples). `classes` (A,) numbers the classes of the anomalies from 0 to K - 1.

    Normals, anomalies, and the anomalies of each class are resampled each among themselves. The AUC is the share of
    (normal, anomaly) pairs in which the anomaly scores higher, ties counting half (Mann-Whitney), so a resample needs
    only how often each image was drawn, and no new sort.
    """
    rng, rng_of_classes = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    normals, anomalies = scores[:, ~is_anomaly], scores[:, is_anomaly]  # (S, M), (S, A)
    order = np.argsort(normals, axis=1)
    ranked = np.take_along_axis(normals, order, 1)
    # how many normals score less than an anomaly, and how many at most as much: (S, A) each
    less, up_to = (
        np.array([np.searchsorted(one, other, side) for one, other in zip(ranked, anomalies, strict=True)])
        for side in ("left", "right")
    )
    members, sizes = np.argsort(classes, kind="stable"), np.bincount(classes)  # members class by class
    first = np.cumsum(sizes) - sizes  # where a class begins among them
    own_first, own_size = np.repeat(first, sizes), np.repeat(sizes, sizes)  # of each member's class

    (count, m), a = normals.shape, len(classes)
    of_all, of_classes = np.empty((count, resamples)), np.empty((count, len(sizes), resamples))
    drawn_so_far = np.zeros((count, m + 1), np.int64)  # normals, from the lowest score up
    for i in range(resamples):
        np.cumsum(np.bincount(rng.integers(0, m, m), minlength=m)[order], axis=1, out=drawn_so_far[:, 1:])
        halves = np.take_along_axis(drawn_so_far, less, 1) + np.take_along_axis(drawn_so_far, up_to, 1)  # (S, A)
        of_all[:, i] = halves @ np.bincount(rng.integers(0, a, a), minlength=a)
        drawn = own_first + rng_of_classes.integers(0, own_size)
        weighted = halves[:, members] * np.bincount(drawn, minlength=a)
        of_classes[:, :, i] = np.add.reduceat(weighted, first, axis=1)
    return of_all / (2 * m * a), of_classes / (2 * m * sizes[:, None])


def interval(values: np.ndarray) -> list[float]:
    """The 95% percentile interval of what resamples gave, (B,) to [low, high]."""
    return np.quantile(values, [0.025, 0.975]).tolist()


def detection_metrics(score: np.ndarray, is_anomaly: np.ndarray, resampled: np.ndarray) -> dict[str, Any]:
    """How well a score (N,) ranks anomalies above normals, with its `bootstrap_aucs` (B,).

    An inverted score comes out below 0.5, never flipped.
    """
    # once, and all else from it: with hundreds of classes, calls of scikit-learn take minutes
    fpr, tpr, _ = roc_curve(is_anomaly, score, drop_intermediate=False)
    n_normal, n_anomalous = int((~is_anomaly).sum()), int(is_anomaly.sum())
    caught, false = n_anomalous * tpr[1:], n_normal * fpr[1:]  # from each threshold up
    return {
        "roc_auc": float(auc(fpr, tpr)),
        "roc_auc_95_interval": interval(resampled),
        "average_precision": float(np.diff(tpr) @ (caught / (caught + false))),
        "fpr_at_95_tpr": float(fpr[np.argmax(tpr >= 0.95)]),  # false alarms when 95% of the anomalies are caught
        "n_normal": n_normal,
        "n_anomalous": n_anomalous,
    }


def protocol_metrics(splits: list[ScoredSplit], judged: str, resamples: int, seed: int) -> dict[str, dict]:
    """`detection_metrics` of every score over these splits together: all anomalies, then each anomalous class.

    Of all anomalies also the difference between the score's ROC-AUC and that of the score `judged`, with an interval of
    its own: both are of the same images, so their own intervals do not say whether one is better.
    """
    class_name = np.concatenate([split.class_name for split in splits])
    is_anomaly = np.concatenate([split.is_anomaly for split in splits])
    by_name = {name: np.concatenate([split.scores[name] for split in splits]) for name in splits[0].scores}
    names, classes = np.unique(class_name[is_anomaly], return_inverse=True)
    of_all, of_classes = bootstrap_aucs(np.array(list(by_name.values())), is_anomaly, classes, resamples, seed)
    found = {name: detection_metrics(by_name[name], is_anomaly, of_all[i]) for i, name in enumerate(by_name)}
    reference = of_all[list(by_name).index(judged)]
    metrics = {}
    for (name, score), all_resampled, by_class in zip(by_name.items(), of_all, of_classes, strict=True):
        metrics[name] = found[name] | {
            "roc_auc_minus_judged": found[name]["roc_auc"] - found[judged]["roc_auc"],
            "roc_auc_minus_judged_95_interval": interval(all_resampled - reference),
            "per_class": {},
        }
        for anomaly, resampled in zip(names, by_class, strict=True):
            rows = ~is_anomaly | (class_name == anomaly)
            metrics[name]["per_class"][str(anomaly)] = detection_metrics(score[rows], is_anomaly[rows], resampled)
    return metrics


def worst_classes(per_class: dict[str, dict[str, Any]]) -> list[str]:
    """The anomalous classes to show: all, in their order, or of more than CLASSES those of the lowest ROC-AUC, worst
    first."""
    if len(per_class) <= CLASSES:
        return list(per_class)
    return sorted(per_class, key=lambda name: per_class[name]["roc_auc"])[:CLASSES]


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


def from_0_to_1(heat: np.ndarray, middle: float) -> np.ndarray:
    """Heats of any size and sign to [0, 1], in the same order: 0 to 1/2, and `middle` to 3/4."""
    return (1 + heat / (np.abs(heat) + middle)) / 2


def pixel_metrics(test: ScoredSplit, level: float, middle: float, among: np.ndarray | None = None) -> dict[str, Any]:
    """`pixel_figures` of the test images' heat maps, at the pictures' own size, by the data set's masks; of all images
    or of those `among` (N,) bool.

    Anomalous images without a mask, or with an empty one, are left out: `with_mask` is the number of the others,
    `without_mask` the number of those without by class, and `empty_masks` names the empty ones. Raises InputError for
    a mask that cannot be used.
    """
    paths = masks.find_masks(test.gan.dataset, test.images.source[test.is_anomaly])
    has_file = np.array([source in paths for source in test.images.source])
    normal, anomalous = (kind if among is None else kind & among for kind in (~test.is_anomaly, test.is_anomaly))
    empty: list[str] = []

    def heat_and_mask() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for row, heat in test.heats(np.flatnonzero(normal | (anomalous & has_file))):
            picture = test.images.open(row)
            size = upright(picture).size
            mask = np.zeros(size[::-1], bool)
            if test.is_anomaly[row]:
                source = str(test.images.source[row])
                mask = masks.open_mask(paths[source], source, picture, size)
                if not mask.any():
                    empty.append(paths[source].relative_to(test.gan.dataset).as_posix())
                    continue
            heat = heatmaps.at_own_size(heat, size, test.gan.view)
            yield (heat if is_share else from_0_to_1(heat, middle)), mask

    is_share = test.map is DIFFERENCE and test.map.name not in test.usual  # of the range from black to white
    is_scaled = math.isfinite(level) and not is_share
    passed = float(from_0_to_1(np.float32(level), middle)) if is_scaled else level
    figures = pixel_figures(heat_and_mask(), passed)
    without = Counter(test.class_name[anomalous & ~has_file].tolist())
    with_mask = int((anomalous & has_file).sum()) - len(empty)
    return (
        {"map": test.map.name} | figures | {"with_mask": with_mask, "without_mask": dict(without), "empty_masks": empty}
    )
