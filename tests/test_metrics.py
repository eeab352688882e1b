"""The measures against small cases worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from anogan.metrics import (
    CLASSES,
    bootstrap_aucs,
    detection_metrics,
    interval,
    pixel_figures,
    protocol_metrics,
    worst_classes,
)
from anogan.verdicts import flag_metrics, flags, p_values, threshold

SCORE = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
IS_ANOMALY = np.array([False, True, False, True, True])


def resampled(score: np.ndarray, is_anomaly: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The ROC-AUCs of one score's resamples, with one class of anomalies."""
    of_all, of_class = bootstrap_aucs(score[None], is_anomaly, np.zeros(is_anomaly.sum(), int), resamples, seed)
    assert of_all.shape == (1, resamples) and of_class.shape == (1, 1, resamples)
    return of_all[0]


def test_detection_metrics_by_hand() -> None:
    metrics = detection_metrics(SCORE, IS_ANOMALY, resampled(SCORE, IS_ANOMALY, resamples=10, seed=0))
    assert metrics["roc_auc"] == pytest.approx(5 / 6)  # 5 of the 6 pairs in the right order
    # ranked from the top, anomalies come 1st, 2nd and 4th: precisions 1/1, 2/2, 3/4
    assert metrics["average_precision"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert metrics["fpr_at_95_tpr"] == 0.5  # catching all three takes one of the two normals along
    assert (metrics["n_normal"], metrics["n_anomalous"]) == (2, 3)


def test_detection_metrics_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for size in (5, 300):
        is_anomaly = np.arange(size) % 3 == 0
        score = np.round(rng.normal(size=size) + is_anomaly, 1)  # rounded, so that there are ties
        metrics = detection_metrics(score, is_anomaly, np.zeros(1))
        assert metrics["roc_auc"] == pytest.approx(roc_auc_score(is_anomaly, score))
        assert metrics["average_precision"] == pytest.approx(average_precision_score(is_anomaly, score))


def test_an_inverted_score_stays_inverted() -> None:
    metrics = detection_metrics(-SCORE, IS_ANOMALY, resampled(-SCORE, IS_ANOMALY, resamples=200, seed=0))
    assert metrics["roc_auc"] == pytest.approx(1 / 6)
    assert metrics["roc_auc_95_interval"][0] < 1 / 6
    assert interval(resampled(-SCORE[[0, 4]], IS_ANOMALY[[0, 4]], 10, 0)) == [0, 0]


def test_bootstrap_by_hand() -> None:
    # one normal and one anomaly: every resample is the sample itself
    assert interval(resampled(np.array([1.0, 2.0]), np.array([False, True]), 20, 0)) == [1, 1]
    assert interval(resampled(np.array([2.0, 2.0]), np.array([False, True]), 20, 0)) == [0.5, 0.5]
    # normals 1, 3 against one anomaly 2: two draws of {1, 3} give AUC 0, 1/2 or 1, with 1/4, 1/2, 1/4
    aucs = resampled(np.array([1.0, 3.0, 2.0]), np.array([False, False, True]), 4000, 0)
    assert np.unique(aucs).tolist() == [0, 0.5, 1] and (aucs == 0.5).mean() == pytest.approx(0.5, abs=0.03)


def test_bootstrap_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    is_anomaly = rng.random(300) < 0.3
    score = np.round(rng.normal(size=300) + is_anomaly, 1)  # rounded, so that there are ties
    low, high = interval(resampled(score, is_anomaly, 400, seed=1))
    normals, anomalies = score[~is_anomaly], score[is_anomaly]
    labels, aucs = np.sort(is_anomaly), []
    for _ in range(400):
        resample = np.r_[rng.choice(normals, len(normals)), rng.choice(anomalies, len(anomalies))]
        aucs.append(roc_auc_score(labels, resample))
    assert [low, high] == pytest.approx(np.quantile(aucs, [0.025, 0.975]), abs=0.01)
    assert low < roc_auc_score(is_anomaly, score) < high


def test_bootstrap_covers_the_truth() -> None:
    """Of 200 intervals around an AUC known to be 0.76, about 95% hold it."""
    is_anomaly = np.arange(200) < 100
    scores = np.random.default_rng(0).normal(size=(200, 200)) + is_anomaly
    of_all, _ = bootstrap_aucs(scores, is_anomaly, np.zeros(100, int), 200, seed=0)
    low, high = np.array([interval(aucs) for aucs in of_all]).T
    holds = ((low <= 0.7602) & (high >= 0.7602)).sum()  # Φ(1/√2)
    assert 180 <= holds <= 198


def test_a_class_is_resampled_by_itself() -> None:
    """Its AUCs are those of a bootstrap with no other anomalies, whatever the order of the images."""
    rng = np.random.default_rng(0)
    is_anomaly, classes = np.arange(200) >= 100, rng.integers(0, 3, 100)
    scores = rng.normal(size=(2, 200)) + is_anomaly * np.r_[np.zeros(100), classes]
    _, of_classes = bootstrap_aucs(scores, is_anomaly, classes, 400, seed=0)
    assert of_classes.shape == (2, 3, 400)
    for number in range(3):
        rows = ~is_anomaly | np.r_[np.zeros(100, bool), classes == number]
        for score, aucs in zip(scores, of_classes[:, number], strict=True):
            alone = resampled(score[rows], is_anomaly[rows], 400, seed=1)
            assert aucs.mean() == pytest.approx(roc_auc_score(is_anomaly[rows], score[rows]), abs=0.01)
            assert interval(aucs) == pytest.approx(interval(alone), abs=0.03)


def split_of(scores: dict[str, np.ndarray], class_name: np.ndarray) -> SimpleNamespace:
    return SimpleNamespace(scores=scores, class_name=class_name, is_anomaly=class_name != "good")


def test_scores_are_compared_on_the_same_resamples() -> None:
    rng = np.random.default_rng(0)
    class_name = np.repeat(["good", "dent", "scratch"], [200, 120, 80])
    is_anomaly, noise = class_name != "good", rng.normal(size=400)
    scores = {
        "judged": noise + is_anomaly,
        "same": noise + is_anomaly,
        "order": np.exp(noise + is_anomaly),  # other values in the same order
        "close": noise + is_anomaly + 0.1 * rng.normal(size=400),
        "better": noise + 2 * is_anomaly,
        "worse": rng.normal(size=400),
    }
    found = protocol_metrics([split_of(scores, class_name)], "judged", 300, seed=0)
    for name in ("judged", "same", "order"):
        assert found[name]["roc_auc_minus_judged"] == 0
        assert found[name]["roc_auc_minus_judged_95_interval"] == [0, 0]
    assert found["better"]["roc_auc_minus_judged_95_interval"][0] > 0.05
    assert found["worse"]["roc_auc_minus_judged_95_interval"][1] < -0.05
    for of in found.values():
        assert of["roc_auc_minus_judged"] == pytest.approx(of["roc_auc"] - found["judged"]["roc_auc"])
        assert "roc_auc_minus_judged" not in of["per_class"]["dent"]

    # of two scores that follow each other the difference is known better than from two bootstraps of their own
    low, high = found["close"]["roc_auc_minus_judged_95_interval"]
    assert low <= found["close"]["roc_auc_minus_judged"] <= high
    apart = resampled(scores["close"], is_anomaly, 300, 1) - resampled(scores["judged"], is_anomaly, 300, 2)
    assert high - low < 0.3 * np.ptp(interval(apart))


def test_the_classes_to_show() -> None:
    """All, in their order, or the worst of more than that, worst first."""
    of_classes = {f"{i:03d}": {"roc_auc": (7 * i % 100) / 100} for i in range(100)}
    some = dict(list(of_classes.items())[:CLASSES])
    assert worst_classes(some) == list(some)
    worst = worst_classes(of_classes)
    assert len(worst) == CLASSES and worst[:3] == ["000", "043", "086"]  # 7 * 43 = 301, 7 * 86 = 602


def test_p_values_by_hand() -> None:
    normals = np.array([4.0, 1.0, 2.0, 2.0])
    found = p_values(np.array([0.0, 1.0, 1.5, 2.0, 4.0, 4.1]), normals)
    np.testing.assert_allclose(found, [5 / 5, 5 / 5, 4 / 5, 4 / 5, 2 / 5, 1 / 5])  # never 0


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("count", [1, 4, 19, 20, 99, 1000])
def test_the_threshold_and_the_p_value_say_the_same(alpha: float, count: int) -> None:
    rng = np.random.default_rng(count)
    normals, score = rng.integers(0, 50, count) / 10, rng.integers(-5, 60, 500) / 10  # with ties
    flagged = score > threshold(normals, alpha)
    assert flagged.tolist() == flags(p_values(score, normals), alpha).tolist()
    if alpha * (count + 1) < 1 - 1e-9:
        assert threshold(normals, alpha) == np.inf and not flagged.any()
    # 19 normals: one in twenty is the smallest p-value
    assert threshold(np.arange(19.0), 0.05) == 18 and threshold(np.arange(18.0), 0.05) == np.inf


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_fresh_normals_are_flagged_at_most_at_the_level_asked_for(alpha: float) -> None:
    """Whatever the scores' distribution. Over calibrations, since one of 200 normals is itself a matter of luck."""
    rng = np.random.default_rng(0)

    def rounded(size: int) -> np.ndarray:
        return rng.integers(0, 30, size).astype(float)

    for draw in (rng.normal, rng.exponential, rounded):
        shares = [flags(p_values(draw(size=500), draw(size=200)), alpha).mean() for _ in range(300)]
        noise = 3 * np.std(shares) / 300**0.5
        assert np.mean(shares) <= alpha + noise
        if draw is not rounded:  # no idle bound: without ties nearly all of it is used
            assert np.mean(shares) >= 0.9 * alpha - noise


def test_benjamini_hochberg_by_hand() -> None:
    p_value = np.array([0.20, 0.005, 0.03, 0.9, 0.02])
    # sorted 0.005, 0.02, 0.03, 0.2, 0.9 against 0.01, 0.02, 0.03, 0.04, 0.05: the third is the last that passes
    assert flags(p_value, 0.01, fdr=0.05).tolist() == [False, True, True, False, True]
    assert flags(p_value, 0.01).tolist() == [False, True, False, False, False]
    assert not flags(np.array([0.02, 0.9, 0.9]), 0.05, fdr=0.05).any()  # 0.02 > 0.05 / 3
    assert not flags(np.array([]), 0.05, fdr=0.05).any()


def test_benjamini_hochberg_keeps_its_rate() -> None:
    """Among the flagged of a batch of 180 normals and 20 anomalies, at most a tenth are normal, on average."""
    rng = np.random.default_rng(0)
    is_anomaly = np.arange(200) < 20
    shares, caught = [], []
    for _ in range(200):
        flagged = flags(p_values(rng.normal(size=200) + 5 * is_anomaly, rng.normal(size=1000)), 0.05, fdr=0.1)
        shares.append((flagged & ~is_anomaly).sum() / max(1, flagged.sum()))
        caught.append(flagged[is_anomaly].mean())
    assert np.mean(shares) <= 0.1 + 3 * np.std(shares) / 200**0.5
    assert np.mean(caught) > 0.9


def test_flags_by_hand() -> None:
    at = flag_metrics(SCORE > 2.0, IS_ANOMALY)
    assert at["false_alarm_rate"] == 0.5 and at["detection_rate"] == at["precision"] == pytest.approx(2 / 3)
    assert flag_metrics(SCORE > 9.0, IS_ANOMALY)["precision"] is None


def test_pixel_metrics_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    masks = [np.zeros((20, 30), bool) for _ in range(4)]
    masks[0][3:6, 3:6] = masks[0][10:18, 10:28] = masks[1][5:15, 5:15] = True
    heats = [(0.3 * rng.random((20, 30)) + 0.2 * mask).astype(np.float32) for mask in masks]
    found = pixel_figures(zip(heats, masks, strict=True), level=1)
    mask, heat = np.concatenate(masks).ravel(), np.concatenate(heats).ravel()
    assert found["pixel_roc_auc"] == pytest.approx(roc_auc_score(mask, heat), abs=1e-3)
    assert found["regions"] == 3
    # AUPRO by its definition: a threshold at every pixel, the mean over regions of the share found
    regions = [(0, np.s_[3:6, 3:6]), (0, np.s_[10:18, 10:28]), (1, np.s_[5:15, 5:15])]
    thresholds = np.sort(heat)[::-1]
    fpr = np.array([(heat[~mask] >= t).mean() for t in thresholds])
    overlap = np.mean([[(heats[i][part] >= t).mean() for t in thresholds] for i, part in regions], 0)
    grid = np.linspace(0, 0.3, 2000)
    assert found["aupro"] == pytest.approx(np.interp(grid, fpr, overlap).mean(), abs=3e-3)


def test_pixel_metrics_by_hand() -> None:
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = mask[1, 1] = mask[3, 3] = True  # the first two touch at a corner
    perfect = pixel_figures([(mask.astype(float), mask)], 0.5)
    assert perfect["pixel_roc_auc"] == pytest.approx(1) and perfect["aupro"] == pytest.approx(1)
    assert perfect["regions"] == perfect["regions_found"] == 2
    assert perfect["masks_unseen"] == perfect["marked_unseen"] == 0
    assert pixel_figures([(1.0 - mask, mask)], 0.5)["pixel_roc_auc"] == pytest.approx(0)
    # the same everywhere: the diagonal, whose mean up to 0.3 is 0.15
    flat = pixel_figures([(np.full((4, 4), 0.5), mask)], 0.5)
    assert flat["pixel_roc_auc"] == pytest.approx(0.5) and flat["aupro"] == pytest.approx(0.15)
    # a small region found and a large one missed weigh the same
    mask = np.zeros((10, 10), bool)
    mask[0, 0], mask[5:] = True, True
    heat = np.zeros((10, 10))
    heat[0, 0], heat[1:5] = 0.9, 0.1
    found = pixel_figures([(heat, mask)], 0.5)
    assert found["aupro"] == pytest.approx(0.5, abs=0.02) and found["regions_found"] == 1
    unseen = np.where(mask, np.nan, heat)
    assert pixel_figures([(unseen, mask)], 0.5)["pixel_roc_auc"] < 0.5
    none = pixel_figures([(heat, np.zeros((10, 10), bool))], 0.5)
    assert none["pixel_roc_auc"] is None and none["aupro"] is None and none["regions"] == 0
