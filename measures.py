"""From scores to figures and verdicts: ROC-AUC and its interval, p-values, thresholds, flags, pixel-level figures."""

import math
from collections.abc import Iterable

import numpy as np
from scipy.ndimage import label
from scipy.stats import beta, false_discovery_control
from sklearn.metrics import auc, average_precision_score, roc_auc_score, roc_curve


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


# ---- verdicts -------------------------------------------------------------------------------------------------------


def p_values(score: np.ndarray, of_normals: np.ndarray) -> np.ndarray:
    """How often a normal picture would score as high: scores (N,) to (N,) in (0, 1], given those of normals (V,).

    (1 + number of normals that score at least as high) / (V + 1), the conformal p-value (Bates et al. 2023). For a
    picture like those V, the probability that it is at most alpha is at most alpha, whatever the score, if the score
    does not depend on those V. `scores.combined` does a little, by their means and deviations: with 19 normals 0.054
    instead of 0.05 were flagged in a simulation, with 79 0.050.
    """
    below = np.searchsorted(np.sort(of_normals), score, side="left")
    return (1 + len(of_normals) - below) / (len(of_normals) + 1)


def possible_p_values(alpha: float, normals: int) -> int:
    """How many of the p-values that so many normals allow, 1 / (V + 1) to V / (V + 1), are at most alpha."""
    return min(math.floor(alpha * (normals + 1) + 1e-9), normals)


def threshold(of_normals: np.ndarray, alpha: float) -> float:
    """The score above which a p-value is at most alpha; infinite if there are too few normals (V,) for any to be."""
    k = possible_p_values(alpha, len(of_normals))
    return float(np.sort(of_normals)[-k]) if k > 0 else math.inf


def false_alarm_bound(alpha: float, normals: int) -> float:
    """With 95% confidence, at most this share of normal pictures is flagged at `alpha`, given so many normals.

    On average over sets of normals it is at most alpha; that of one set is a beta variable (Vovk 2012).
    """
    k = possible_p_values(alpha, normals)
    return float(beta.ppf(0.95, k, normals + 1 - k)) if k > 0 else 0.0


def flags(p_value: np.ndarray, alpha: float, fdr: float | None = None) -> np.ndarray:
    """Which of the p-values (N,) are flagged, (N,) bool: those up to alpha, each by itself.

    With `fdr` instead as many as leave the expected share of normals among the flagged at or below it (Benjamini and
    Hochberg 1995), which looks at all N together.
    """
    if fdr is None:
        return p_value <= alpha + 1e-9
    return false_discovery_control(p_value, method="bh") <= fdr + 1e-9


def flag_metrics(flagged: np.ndarray, is_anomaly: np.ndarray) -> dict[str, float | None]:
    """What flags (N,) give: false-alarm rate over normals, detection rate over anomalies, precision of the flags."""
    return {
        "false_alarm_rate": float(flagged[~is_anomaly].mean()),
        "detection_rate": float(flagged[is_anomaly].mean()),
        "precision": float(is_anomaly[flagged].mean()) if flagged.any() else None,  # nothing flagged, nothing to divide
    }


# ---- pixels ---------------------------------------------------------------------------------------------------------

BINS = 4096  # steps of difference between 0 and 1 that the pixel-level figures tell apart
PRO_LIMIT = 0.3  # false-alarm rate up to which the overlap with regions is integrated, as in MVTec's figures


def pixel_metrics(pictures: Iterable[tuple[np.ndarray, np.ndarray]], level: float) -> dict[str, float | int]:
    """How well heat maps find defects: pairs of a heat (H, W) in [0, 1] and a mask (H, W), True where the defect is.

    `pixel_roc_auc` ranks all pixels of all pictures together. `aupro` (Bergmann et al. 2021) gives each connected
    region of the masks the same weight, whatever its size: the mean share of a region that is found, averaged over the
    false-alarm rates of pixels from 0 to 0.3. `regions_found` are those with a pixel above the level. Differences are
    told apart in steps of 1 / 4096, and a pixel that G has not looked at, NaN, counts as 0. Raises ValueError unless
    there are pixels of both kinds.
    """
    normal, anomalous, regions, found = np.zeros(BINS), np.zeros(BINS), [], 0

    def counts(values: np.ndarray) -> np.ndarray:
        return np.bincount(np.minimum(values * BINS, BINS - 1).astype(np.int64), minlength=BINS)

    for heat, mask in pictures:
        heat = np.nan_to_num(heat, nan=0)
        normal += counts(heat[~mask])
        anomalous += counts(heat[mask])
        numbered, count = label(mask, np.ones((3, 3)))  # corners touch
        for number in range(1, count + 1):
            of_region = heat[numbered == number]
            regions.append(counts(of_region))
            found += bool((of_region > level).any())
    if not normal.any() or not anomalous.any():
        raise ValueError("pixel-level figures need pixels inside the masks and outside")

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
        "regions": len(regions),
        "regions_found": found,
    }
