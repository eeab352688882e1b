"""The measures against small cases worked out by hand."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from evaluate import bootstrap_interval, detection_metrics, p_values, threshold_metrics

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
    validation = np.array([4.0, 1.0, 2.0, 2.0])
    assert p_values(np.array([0.0, 1.0, 1.5, 2.0, 4.0, 4.1]), validation).tolist() == [1, 1, 0.75, 0.75, 0.25, 0]


def test_threshold_by_hand() -> None:
    at = threshold_metrics(SCORE, IS_ANOMALY, threshold=2.0)  # flags 3, 4, 5; 2.0 itself does not pass it
    assert at["false_alarm_rate"] == 0.5 and at["detection_rate"] == at["precision"] == pytest.approx(2 / 3)
    assert threshold_metrics(SCORE, IS_ANOMALY, threshold=9.0)["precision"] is None
