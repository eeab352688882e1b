"""What works on a run that was never searched, and what main(Config(...)) returns to a notebook."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import read_scores
from test_pictures import CPU, digit, read_verdicts
from test_util import draw

import evaluate
import fit_latent
import train_gan

NEED_Z = {"anomaly_score", "residual", "discrimination", "peak", "gan_r"}


@pytest.fixture
def unsearched(trained: Path) -> Path:
    """A run with all its detectors, without latents and without what evaluate.py made of them."""
    for pattern in ("latents-*", "metrics.json", "report.html", "*maps.png"):
        for path in trained.glob(pattern):
            path.unlink()
    return trained


def test_scores_that_need_no_z(
    unsearched: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """They are the same as on a searched run, of all test images; what shows G(z) is left out and named."""
    before = {row["source"]: row for row in read_scores(unsearched)}
    run_here("evaluate.py", "--bootstrap", "5", *CPU)
    printed = capsys.readouterr().out
    assert "no difference maps, since nothing was searched" in printed
    metrics = json.loads((unsearched / "metrics.json").read_text())
    names = [score.name for score in evaluate.SCORES if score.name not in NEED_Z]
    assert list(metrics["test"]) == names and metrics["threshold"]["score"] == "combined"
    assert metrics["search"] is None and not (unsearched / "difference_maps.png").exists()
    rows = [row for row in read_scores(unsearched) if row["split"] == "test"]
    assert len(rows) == 450
    shared = [row for row in rows if row["source"] in before]
    assert len(shared) == 60
    for name in set(names) - {"combined"}:  # its scale is that of the validation images
        found, expected = ([float(each[name]) for each in of] for of in (shared, [before[r["source"]] for r in shared]))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert '"panels": ["real"]' in (unsearched / "report.html").read_text(encoding="utf-8")


def test_a_score_that_needs_z_asks_for_the_search(unsearched: Path, fails: Callable[..., str]) -> None:
    for name in ("anomaly_score", "peak"):
        message = fails("evaluate.py", "--score", name, *CPU)
        assert "latents-validation.npz is missing: run fit_latent.py --run-dir outputs/digits-0" in message
    assert "there is no score gan_r here" in fails("evaluate.py", "--score", "gan_r", *CPU)
    (unsearched / "acae.pt").unlink()
    message = fails("evaluate.py", "--score", "acae", *CPU)
    assert "there is no score acae here" in message and "run python -m detectors.acae first" in message


def test_own_pictures_without_a_search(
    unsearched: Path, run_here: Callable[..., None], fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = unsearched.parents[1]
    for i in range(3):
        digit(root / f"mine/zero-{i}.png", 0, i)
        digit(root / f"mine/five-{i}.png", 5, i)
    run_here("evaluate.py", "--images", "mine", "--score", "rotation", "--alpha", "0.1", *CPU)
    printed = capsys.readouterr().out
    assert "no heat maps, since these pictures were not searched" in printed and "wrote outputs/digits-0" in printed
    folder = unsearched / "images-mine"
    rows = read_verdicts(folder)
    assert len(rows) == 6 and "rotation" in rows["mine/five-0.png"] and "kde" not in rows["mine/five-0.png"]
    assert {path.name for path in folder.iterdir()} == {"scores.csv", "scores.png", "report.html"}
    draw(root / "mine/broken.png")
    (root / "mine/broken.png").write_bytes(b"")
    assert "cannot read the image mine/broken.png" in fails("evaluate.py", "--images", "mine", *CPU)
    run_here("evaluate.py", "--images", "mine", "--skip-unreadable", *CPU)
    assert len(read_verdicts(folder)) == 6


def test_searched_run_and_pictures_that_were_not(
    trained: Path, run_here: Callable[..., None], fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether a picture needs a search depends on the score that was asked for."""
    digit(trained.parents[1] / "mine/a.png", 5)
    message = fails("evaluate.py", "--images", "mine", *CPU)  # by anomaly_score, as the test images were
    assert "latents-images.npz is missing: run fit_latent.py" in message
    run_here("evaluate.py", "--images", "mine", "--score", "p_d", *CPU)
    assert "no heat maps" in capsys.readouterr().out
    assert "anomaly_score" not in read_verdicts(trained / "images-mine")["mine/a.png"]


def test_what_main_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"image_size": 32, "latent_dim": 4, "ngf": 2, "ndf": 2}
    run_dir = train_gan.main(train_gan.Config(dataset="digits", epochs=1, device="cpu", **sizes))
    assert run_dir == Path("outputs/digits-1") and (run_dir / "gan.pt").is_file()
    config = fit_latent.Config(run_dir, steps=2, max_images=20, candidates=10, device="cpu")
    latents = fit_latent.main(config)
    assert list(latents) == ["validation", "test"] and latents["test"]["z"].shape == (20, 4)
    again = fit_latent.main(config)  # complete: read, not searched
    np.testing.assert_array_equal(latents["test"]["z"], again["test"]["z"])
    metrics = evaluate.main(evaluate.Config(run_dir, bootstrap=5, device="cpu"))
    assert metrics == json.loads((run_dir / "metrics.json").read_text())
    digit(tmp_path / "mine/a.png", 5)
    found = evaluate.main(evaluate.Config(run_dir, images=("mine",), score="p_d", device="cpu"))
    assert list(found) == ["mine/a.png"] and 0 < found["mine/a.png"]["p_value"] <= 1
