"""Verdicts from scores: p-values, thresholds, flags, and what they mean in a sentence."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import beta, false_discovery_control

from anogan import heatmaps
from anogan.scores import COMBINED
from anogan.scoring import ScoredSplit
from util import quoted


def p_values(score: np.ndarray, of_normals: np.ndarray) -> np.ndarray:
    """How often a normal picture would score as high: scores (N,) to (N,) in (0, 1], given those of normals (V,).

    (1 + number of normals that score at least as high) / (V + 1), the conformal p-value (Bates et al. 2023). For a
    picture like those V, the probability that it is at most alpha is at most alpha, whatever the score, if the score
    does not depend on those V. `combined` does a little, by their means and deviations: with 19 normals 0.054 instead
    of 0.05 were flagged in a simulation, with 79 0.050. A `peak` that is relative to what is usual compares a normal
    with the V - 1 others, and a new picture with all V: between 0.028 and 0.047 instead of 0.048 were flagged in one.
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


def too_few_to_mark(alpha: float, normals: int) -> str:
    """A sentence for where `threshold` is infinite: so many normals cannot say which differences to mark."""
    needed = math.ceil(1 / alpha - 1e-9) - 1
    return (
        f"nothing can be marked: --alpha {alpha:g} takes {needed} validation normals, and there are {normals}; "
        "train on more pictures, or raise --alpha"
    )


def false_alarm_bound(alpha: float, normals: int) -> float:
    """With 95% confidence, at most this share of normal pictures is flagged at `alpha`, given so many normals.

    On average over sets of normals it is at most alpha; that of one set is a beta variable (Vovk 2012).
    """
    k = possible_p_values(alpha, normals)
    return float(beta.ppf(0.95, k, normals + 1 - k)) if k > 0 else 0.0


def flags(p_value: np.ndarray, alpha: float, fdr: float | None = None) -> np.ndarray:
    """Which of the p-values (N,) are flagged, (N,) bool: those up to alpha, each by itself.

    With `fdr` instead as many as keep the expected share of normals among the flagged at or below it (Benjamini and
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


@dataclass(frozen=True)
class Verdict:
    """What one score says of every image, by split, and from where on a difference is marked."""

    score: str
    alpha: float
    fdr: float | None
    threshold: float  # above which images are flagged; infinite if there are too few normals for it, or with an fdr
    p_value: dict[str, np.ndarray]  # (N,) each
    flagged: dict[str, np.ndarray]  # (N,) bool each
    level: float  # of a heat map: at most a share alpha of normals has a pixel that passes it
    brightest: float  # the difference from which on a heat map has its brightest colour
    normals: int  # how many validation normals it compares with
    unit: tuple[float, str] = heatmaps.unit(normalise=False)  # of the level, see there

    @property
    def level_in_words(self) -> str:
        """The level as a person is told it: 0.123 of the range from black to white, or 1.23 standard deviations."""
        factor, name = self.unit
        return f"{factor * self.level:.3g} {name}"


def decide(
    scored: dict[str, ScoredSplit], normals: dict[str, np.ndarray], score: str, alpha: float, fdr: float | None
) -> Verdict:
    """P-values and flags of a score, all from the scores of validation normals alone, (V,) each by name.

    Flags are those of `flags`; with `fdr` no threshold belongs to them. Without a heat map nothing is marked.
    """
    one = next(iter(scored.values()))
    level, largest = math.inf, 1.0
    if one.map is not None:
        level, largest = threshold(normals[one.peak], alpha), float(normals[one.peak].max())
    p_value = {name: p_values(split.scores[score], normals[score]) for name, split in scored.items()}
    return Verdict(
        score=score,
        alpha=alpha,
        fdr=fdr,
        threshold=threshold(normals[score], alpha) if fdr is None else math.inf,
        p_value=p_value,
        flagged={name: flags(values, alpha, fdr) for name, values in p_value.items()},
        level=level,
        # not by the largest heat of any normal: a single odd picture would make every other map black
        brightest=2 * level if 0 < level < math.inf else largest if largest > 0 else 1.0,
        normals=len(normals[score]),
        unit=(1.0, "") if one.map is None else one.unit,
    )


def meaning(verdict: Verdict) -> str:
    """A sentence on what the flags of a verdict mean."""
    normals = verdict.normals
    smallest = 1 / (normals + 1)
    if verdict.fdr is not None:
        return (
            f"flagged by {verdict.score} at a false discovery rate of {verdict.fdr:g}: of what is flagged, on average "
            f"at most {verdict.fdr:.1%} is normal ({normals} validation normals, smallest p_value {smallest:.2g})"
        )
    if math.isinf(verdict.threshold):
        return (
            f"nothing can be flagged at --alpha {verdict.alpha:g}: with {normals} validation normals no p_value is "
            f"under {smallest:.2g}; train on more pictures, or raise --alpha"
        )
    bound = false_alarm_bound(verdict.alpha, normals)
    return (
        f"flagged where {verdict.score} passes {verdict.threshold:.4g}, p_value at most {verdict.alpha:g}: on average "
        f"this flags at most {verdict.alpha:.1%} of normal pictures; with these {normals} validation normals it is at "
        f"most {bound:.1%}, with 95% confidence"
    )


def advice(test: ScoredSplit, verdict: Verdict, metrics: dict[str, dict[str, Any]]) -> list[str]:
    """What to try, in lines, if the score of a verdict may be no better than chance on the test images; else [].

    `metrics` are those of `metrics.protocol_metrics`. What was tried already is left out.
    """

    def is_good(name: str) -> bool:
        return metrics[name]["roc_auc_95_interval"][0] > 0.5

    if is_good(verdict.score):
        return []
    of = metrics[verdict.score]
    low, high = of["roc_auc_95_interval"]
    how = "worse than chance" if high < 0.5 else "not clearly better than chance"
    lines = [
        f"By {verdict.score} the ROC-AUC of {of['n_normal']} normal and {of['n_anomalous']} anomalous images is {how}, "
        f"{of['roc_auc']:.3f} [{low:.3f}, {high:.3f}], so that its flags mean little. What may help:"
    ]
    run_dir = f"--run-dir {quoted(test.gan.run_dir)}"
    again = f"python evaluate.py {run_dir}"
    good = [name for name in ("combined", *COMBINED.parts) if name in metrics and is_good(name)]
    if good:
        best = max(good, key=lambda name: metrics[name]["roc_auc"])
        lines.append(f"- of what was trained already: {again} --score {best}")
    if "rotation" not in metrics and test.gan.augment is None:
        natural = "- for natural pictures, such as animals or vehicles: "
        lines.append(f"{natural}python -m detectors.rotnet {run_dir}, then {again}")
    for name, what, command in (
        ("pca", "equal parts that always lie the same way", "python -m detectors.pca"),
        ("cutpaste", "surfaces and parts", "python -m detectors.cutpaste"),
    ):
        if name not in metrics:
            lines.append(f"- for {what}: {command} {run_dir}, then {again}")
    small, size = "- for small defects: ", test.gan.image_size
    if "peak" not in metrics:
        lines.append(f"{small}python fit_latent.py {run_dir}, then {again} --score peak")
    elif verdict.score != "peak" and is_good("peak"):
        lines.append(f"{small}{again} --score peak")
    view = test.gan.view
    if not view.has_patches:
        lines.append(
            f"- for small defects that cannot be seen at {size}x{size}: train_gan.py --picture-size own, for patches "
            "of the whole picture"
        )
    elif view.picture_size != "own":
        lines.append("- for small defects: train_gan.py with a larger --picture-size, or own")
    lines.append("- for all else: docs/own-pictures.md")
    return lines
