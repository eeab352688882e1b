"""What evaluate.py prints and its report says: the table, with hundreds of classes too, and what to try at chance."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from anogan import report, verdicts
from anogan.decoding import View

pytestmark = pytest.mark.usefixtures("undrawn")


def figures(roc_auc: float, half_width: float, **more: object) -> dict[str, object]:
    """What metrics.json has of one score."""
    return {
        "roc_auc": roc_auc,
        "roc_auc_95_interval": [roc_auc - half_width, roc_auc + half_width],
        "average_precision": 0.5,
        "fpr_at_95_tpr": 0.5,
        "n_normal": 20,
        "n_anomalous": 30,
        **more,
    }


def advice(judged: str, **of_scores: float) -> str:
    """The advice of a run in which the scores have these ROC-AUCs ± 0.1."""
    gan = SimpleNamespace(run_dir=Path("outputs/my run"), image_size=64, view=View(64, 3), augment=None)
    test = SimpleNamespace(gan=gan)
    verdict = verdicts.Verdict(judged, 0.05, None, 0.0, {}, {}, 1.0, 1.0, 9)
    return "\n".join(verdicts.advice(test, verdict, {name: figures(auc, 0.1) for name, auc in of_scores.items()}))


ROTNET = "python -m detectors.rotnet --run-dir 'outputs/my run', then python evaluate.py --run-dir 'outputs/my run'"
PEAK = "python evaluate.py --run-dir 'outputs/my run' --score peak"


def test_advice_only_at_chance() -> None:
    assert advice("anomaly_score", anomaly_score=0.61, peak=0.3) == ""
    assert "is not clearly better than chance, 0.590 [0.490, 0.690]" in advice("p_d", p_d=0.59)
    assert "not clearly better" in advice("p_d", p_d=0.41) and "worse than chance" in advice("p_d", p_d=0.35)
    assert "20 normal and 30 anomalous images" in advice("p_d", p_d=0.35)


def test_advice_leaves_out_what_was_done() -> None:
    found = advice("anomaly_score", anomaly_score=0.5, peak=0.8)
    assert ROTNET in found and PEAK in found and "fit_latent.py" not in found
    assert (
        found.index(ROTNET)
        < found.index(PEAK)
        < found.index("--picture-size own")
        < found.index("docs/own-pictures.md")
    )
    # peak was looked at: judged by, or at chance too
    assert "--score peak" not in advice("peak", anomaly_score=0.5, peak=0.5)
    assert "--score peak" not in advice("anomaly_score", anomaly_score=0.5, peak=0.55)
    # nothing was searched: peak needs it
    search = f"python fit_latent.py --run-dir 'outputs/my run', then {PEAK}"
    assert search in advice("p_d", p_d=0.5) and search in advice("combined", p_d=0.5, combined=0.5)
    # detectors were trained
    names = {"rotation": "rotnet", "cutpaste": "cutpaste", "pca": "pca"}
    for trained in names:
        found = advice("combined", p_d=0.5, combined=0.5, **{trained: 0.5})
        assert [f"detectors.{of}" in found for of in names.values()] == [name != trained for name in names]
    found = advice("anomaly_score", anomaly_score=0.5, peak=0.5, combined=0.9)
    assert "python evaluate.py --run-dir 'outputs/my run' --score combined" in found
    found = advice("combined", combined=0.5, rotation=0.5, cutpaste=0.8, pca_peak=0.7)
    assert "- of what was trained already: python evaluate.py --run-dir 'outputs/my run' --score cutpaste" in found
    assert "--score combined" not in advice("anomaly_score", anomaly_score=0.5, peak=0.5, combined=0.5)
    assert "64x64" in found


def test_what_a_run_says(trained: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """The last lines at chance, in the report too; and how far each score is from the one that is judged by."""
    scores = json.loads((trained / "metrics.json").read_text())["test"]
    ranked = sorted(scores, key=lambda name: scores[name]["roc_auc_95_interval"][0])
    assert scores[ranked[0]]["roc_auc_95_interval"][0] <= 0.5 < scores[ranked[-1]]["roc_auc_95_interval"][0]
    run_here("evaluate.py", "--bootstrap", "50", "--score", ranked[0])
    lines = capsys.readouterr().out.splitlines()
    where = next(i for i, line in enumerate(lines) if line.startswith(f"By {ranked[0]} the ROC-AUC of 6 normal and 54"))
    assert lines[-1] == "- for all else: docs/own-pictures.md" and len(lines) - where <= 6
    assert "so that its flags mean little" in (trained / "report.html").read_text(encoding="utf-8")

    judged = ranked[-1]
    run_here("evaluate.py", "--bootstrap", "50", "--score", judged)
    printed, page = capsys.readouterr().out, (trained / "report.html").read_text(encoding="utf-8")
    assert "so that its flags mean little" not in printed + page
    assert f"AUC minus {judged}'s [95% interval]" in printed
    metrics = json.loads((trained / "metrics.json").read_text())
    for protocol in ("test", "all_splits"):
        assert metrics[protocol][judged]["roc_auc_minus_judged_95_interval"] == [0, 0]
        for name, of in metrics[protocol].items():
            value, said = of["roc_auc_minus_judged"], report.difference(of)
            assert value == pytest.approx(of["roc_auc"] - metrics[protocol][judged]["roc_auc"])
            assert said.startswith(f"{value:+z.3f} [")
            assert name == judged or (f"  {said}" in printed and (protocol != "test" or f"<td>{said}</td>" in page))


def test_a_table_of_hundreds_of_classes(capsys: pytest.CaptureFixture[str]) -> None:
    values = np.random.default_rng(0).permutation(np.arange(1, 901)) / 900
    per_class = {f"kind {i:03d}": figures(value, 0.05) for i, value in enumerate(values)}
    per_class |= {"two\nlines \udcff": figures(0, 0)}
    against = {"roc_auc_minus_judged": -1e-9, "roc_auc_minus_judged_95_interval": [-0.1, 0.1]}
    of = figures(0.7, 0.1, per_class=per_class, **against)
    found = {"threshold": {"score": "peak"}, "normal_class": "a\tb", "test": {"peak": of, "residual": of}}
    report.print_table(found, ["peak", "residual"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip()[:8] for line in lines if line.startswith("  ")]
    assert len(rows) == 30 and rows[:2] == ["two\\nlin", f"kind {values.argmin():03d}"]
    assert "peak by anomalous class, the 30 worst; metrics.json has 871 more" in lines
    assert any(line.endswith("  +0.000 [-0.100, +0.100]") for line in lines)
    assert "test: 20 normal (a\\tb), 30 anomalous images" in lines
