"""The measures against small cases worked out by hand."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from anogan.metrics import bootstrap_interval, detection_metrics, pixel_figures
from anogan.verdicts import flag_metrics, flags, p_values, threshold

SCORE = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
IS_ANOMALY = np.array([False, True, False, True, True])


def test_detection_metrics_by_hand() -> None:
    metrics = detection_metrics(SCORE, IS_ANOMALY, resamples=10, seed=0)
    assert metrics["roc_auc"] == pytest.approx(5 / 6)  # 5 of the 6 pairs in the right order
    # ranked from the top, anomalies come 1st, 2nd and 4th: precisions 1/1, 2/2, 3/4
    assert metrics["average_precision"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert metrics["fpr_at_95_tpr"] == 0.5  # catching all three takes one of the two normals along
    assert (metrics["n_normal"], metrics["n_anomalous"]) == (2, 3)


def test_an_inverted_score_stays_inverted() -> None:
    metrics = detection_metrics(-SCORE, IS_ANOMALY, resamples=200, seed=0)
    assert metrics["roc_auc"] == pytest.approx(1 / 6)
    assert metrics["roc_auc_95_interval"][0] < 1 / 6
    assert detection_metrics(-SCORE[[0, 4]], IS_ANOMALY[[0, 4]], 10, 0)["roc_auc_95_interval"] == [0, 0]


def test_bootstrap_by_hand() -> None:
    # one normal and one anomaly: every resample is the sample itself
    assert bootstrap_interval(np.array([1.0, 2.0]), np.array([False, True]), 20, 0) == [1, 1]
    assert bootstrap_interval(np.array([2.0, 2.0]), np.array([False, True]), 20, 0) == [0.5, 0.5]
    # normals 1, 3 against one anomaly 2: two draws of {1, 3} give AUC 0, 1/2 or 1, with 1/4, 1/2, 1/4
    assert bootstrap_interval(np.array([1.0, 3.0, 2.0]), np.array([False, False, True]), 4000, 0) == [0, 1]


def test_bootstrap_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    is_anomaly = rng.random(300) < 0.3
    score = np.round(rng.normal(size=300) + is_anomaly, 1)  # rounded, so that there are ties
    low, high = bootstrap_interval(score, is_anomaly, 400, seed=1)
    normals, anomalies = score[~is_anomaly], score[is_anomaly]
    labels, aucs = np.sort(is_anomaly), []
    for _ in range(400):
        resample = np.r_[rng.choice(normals, len(normals)), rng.choice(anomalies, len(anomalies))]
        aucs.append(roc_auc_score(labels, resample))
    assert [low, high] == pytest.approx(np.quantile(aucs, [0.025, 0.975]), abs=0.01)
    assert low < roc_auc_score(is_anomaly, score) < high


def test_bootstrap_covers_the_truth() -> None:
    """Of 200 intervals around an AUC known to be 0.76, about 95% hold it."""
    rng = np.random.default_rng(0)
    is_anomaly = np.arange(200) < 100
    holds = 0
    for i in range(200):
        low, high = bootstrap_interval(rng.normal(size=200) + is_anomaly, is_anomaly, 200, seed=i)
        holds += low <= 0.7602 <= high  # Φ(1/√2)
    assert 180 <= holds <= 198


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
