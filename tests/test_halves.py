"""ROC-AUC on the two halves of test pictures, over runs."""

import csv
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import util
from benchmarks import halves


def write_run(run_dir: Path, shift: float) -> np.ndarray:
    """A scores.csv of eight pictures in two classes; returns the score."""
    score = np.array([1.0, 2, 3, 4, 5, 6, 7, 8]) + shift * np.array([0, 0, 9, 9, 0, 0, 0, 0])
    run_dir.mkdir()
    with (run_dir / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "index", "source", "label", "class_name", "is_anomaly", "odd", "p_value", "flagged"])
        writer.writerow(["validation", 0, "v", 0, "good", 0, 0, 0, 0])
        for i in range(8):
            name = "bad" if i >= 4 else "good"
            writer.writerow(["test", i, f"test/{name}/{i}.png", i // 4, name, int(i >= 4), score[i], 0.5, 0])
    return score


def test_table_over_two_runs_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(halves.runs, "load_gan", lambda run_dir, device: type("GAN", (), {"group_by": None}))
    scores = [write_run(tmp_path / str(i), shift) for i, shift in enumerate((0, 1))]
    runs = tuple(tmp_path / str(i) for i in range(2))
    halves.main(halves.Config(runs))
    bad = np.arange(8) >= 4
    cells = []
    for half in (slice(1, None, 2), slice(0, None, 2)):  # the report half is from the second picture on
        aucs = [roc_auc_score(bad[half], score[half]) for score in scores]
        cells.append(f"{np.mean(aucs):.3f} ± {np.std(aucs, ddof=1):.3f}")
    assert f"| `odd` | {cells[0]} | {cells[1]} |" in capsys.readouterr().out
    with pytest.raises(util.InputError, match="not every run has the score even: choose --scores from odd"):
        halves.main(halves.Config(runs, ("even",)))
    with pytest.raises(util.InputError, match="name one or more"):
        halves.main(halves.Config(()))
