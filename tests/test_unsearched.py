"""What works on a run that was never searched, and what main(Config(...)) returns to a notebook."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, read_scores
from test_pictures import CPU, digit, read_verdicts
from test_util import draw

import evaluate
import fit_latent
import train_gan
from anogan import runs, scoring, verdicts
from detectors import cutpaste, pca

pytestmark = pytest.mark.usefixtures("undrawn")

NEED_Z = {"anomaly_score", "residual", "discrimination", "peak", "gan_r"}


@pytest.fixture
def unsearched(trained: Path) -> Path:
    """A run without latents and what evaluate.py made of them, with all its detectors that bring no heat map."""
    for pattern in ("latents-*", "pca.pt", "metrics.json", "report.html", "*maps.png"):
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
    assert "without heat maps, since these images were not searched" in printed
    assert "python evaluate.py --run-dir outputs/digits-0 --images PATH" in printed  # the command that works next
    metrics = json.loads((unsearched / "metrics.json").read_text())
    declared = [score for score in evaluate.SCORES if score.source not in (cutpaste.CUTPASTE, pca.LINEAR)]  # not here
    names = [score.name for score in declared if score.name not in NEED_Z]
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
    assert "there is no score acae here" in message
    assert "run python -m detectors.acae --run-dir outputs/digits-0 first" in message


def test_own_pictures_without_a_search(
    unsearched: Path, run_here: Callable[..., None], fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = unsearched.parents[1]
    for i in range(3):
        digit(root / f"mine/zero-{i}.png", 0, i)
        digit(root / f"mine/five-{i}.png", 5, i)
    run_here("evaluate.py", "--images", "mine", "--score", "rotation", "--alpha", "0.1", *CPU)
    printed = capsys.readouterr().out
    assert "without heat maps, since these images were not searched" in printed
    assert "wrote outputs/digits-0" in printed
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
    (trained / "pca.pt").unlink()  # it has a heat map without a search
    digit(trained.parents[1] / "mine/a.png", 5)
    message = fails("evaluate.py", "--images", "mine", *CPU)  # by anomaly_score, as the test images were
    assert "latents-images.npz is missing: run fit_latent.py" in message
    run_here("evaluate.py", "--images", "mine", "--score", "p_d", *CPU)
    assert "without heat maps, since these images were not searched" in capsys.readouterr().out
    assert "anomaly_score" not in read_verdicts(trained / "images-mine")["mine/a.png"]


def test_a_map_is_not_read_without_that_of_the_normals(trained: Path) -> None:
    """The latents of validation may be gone while those of pictures are there."""
    (trained / "pca.pt").unlink()
    gan = runs.load_gan(trained, torch.device("cpu"))
    pictures = {"test": runs.open_split(gan, "test")}
    request = scoring.Request("p_d", True, batch_size=64, skip_unreadable=False)
    normals = scoring.scores_of_normals(gan, evaluate.SCORES, request)
    assert scoring.score_run(gan, pictures, evaluate.SCORES, request, normals)["test"].peak == "peak"
    without = replace(normals, scores={name: of for name, of in normals.scores.items() if name != "peak"})
    scored = scoring.score_run(gan, pictures, evaluate.SCORES, request, without)
    assert scored["test"].map is None
    assert verdicts.decide(scored, without.scores, "p_d", 0.05, None).level == np.inf


def test_an_image_that_became_unreadable_shifts_no_other(tmp_path: Path, run_here: Callable[..., None]) -> None:
    """What G draws for an image is from that image's own z, whichever images are left out."""
    for name, count in (("train/good", 10), ("test/good", 4), ("test/bad", 4)):
        for i in range(count):
            draw(tmp_path / f"set/{name}/{i}.png", value=(10 * i, 0, len(name)))
    run_here("train_gan.py", "--dataset", "set", "--epochs", "1", *TINY)
    run_here("fit_latent.py", "--steps", "2", *CPU)
    gan = runs.load_gan(tmp_path / "outputs/set-good", torch.device("cpu"))
    image_sets = {split: runs.open_split(gan, split) for split in ("validation", "test")}
    request = scoring.Request("peak", True, batch_size=3, skip_unreadable=True)
    before = scoring.score_run(gan, image_sets, evaluate.SCORES, request)["test"]
    kept = np.arange(8) != 1
    expected = [each.generated for each in before.shown(np.flatnonzero(kept))]
    (tmp_path / "set/test/bad/1.png").write_bytes(b"")
    (gan.run_dir / "pictures-test.bin").unlink()  # or nobody would notice
    after = scoring.score_run(gan, image_sets, evaluate.SCORES, request)["test"]
    assert after.images.source.tolist() == before.images.source[kept].tolist()
    np.testing.assert_array_equal(after.latents["z"], before.latents["z"][kept])
    for name, values in after.scores.items():
        np.testing.assert_allclose(values, before.scores[name][kept], rtol=1e-5)
    drawn = [each.generated for each in after.shown(np.arange(7))]
    np.testing.assert_array_equal(drawn, expected)
    # the decoded pictures that it held are gone: the others are decoded from their files
    np.testing.assert_array_equal([each.generated for each in before.shown(np.flatnonzero(kept))], expected)


def test_stored_scores_of_other_images_are_refused(
    tmp_path: Path, run_here: Callable[..., None], fails: Callable[..., str]
) -> None:
    """A picture that is gone moves the others up by one: their scores must not move with it."""
    for name, count in (("train/good", 10), ("test/good", 3), ("test/bad", 3)):
        for i in range(count):
            draw(tmp_path / f"set/{name}/{i}.png", value=(10 * i, 0, len(name)))
    run_here("train_gan.py", "--dataset", "set", "--epochs", "1", *TINY)
    run_here("detectors.baselines")
    run_here("fit_latent.py", "--discrimination", "reference", "--steps", "2", *CPU)
    run_here("evaluate.py", "--score", "kde", "--bootstrap", "5", *CPU)
    run_here("evaluate.py", "--score", "gan_r", "--bootstrap", "5", *CPU)
    (tmp_path / "set/test/bad/1.png").rename(tmp_path / "set/test/bad/9.png")
    message = fails("evaluate.py", "--score", "kde", *CPU)
    assert "baselines-test.npz is of other images than those that are scored" in message
    assert "run python -m detectors.baselines --run-dir outputs/set-good --splits validation test" in message
    assert "not of the same images (other index)" in fails("evaluate.py", "--score", "gan_r", *CPU)
    run_here("evaluate.py", "--score", "p_d", "--bootstrap", "5", *CPU)  # which neither file has a part in


def test_the_check_of_a_search_that_was_stopped_before_it(trained: Path, run_here: Callable[..., None]) -> None:
    (trained / "reconstructions.png").unlink()
    run_here("fit_latent.py", "--splits", "validation", "--max-images", "60", "--steps", "20", *CPU)
    assert (trained / "reconstructions.png").is_file()


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
