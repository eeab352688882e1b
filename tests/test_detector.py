"""The detector that a program holds: its verdicts are those of evaluate.py --images, and it writes nothing."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import evaluate
from anogan import candidates, decoding, heatmaps, runs, scoring
from detector import Detector, Judgement
from util import InputError

pytestmark = pytest.mark.usefixtures("undrawn")

CPU = ["--device", "cpu"]
QUICK = ["--bootstrap", "5", "--alpha", "0.2", *CPU]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Five grey pictures of one size."""
    folder = tmp_path / "new"
    folder.mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 52), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def contents(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file() and path.name != ".lock"}


def brightest(detector: Detector) -> float:
    """The heat that has the brightest colour, see `verdicts.decide`."""
    if 0 < detector.level < np.inf:
        return 2 * detector.level
    largest = float(detector.normals.scores[scoring.peak_of(detector.map, evaluate.SCORES)].max())
    return largest if largest > 0 else 1.0


def assert_same_verdicts(run_dir: Path, pictures: list[Path], found: list[Judgement], detector: Detector) -> None:
    """They are those in scores.csv and marked/ of the folder images-new."""
    folder = run_dir / "images-new"
    with (folder / "scores.csv").open() as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["path"])
    assert len(rows) == len(found)
    for i, (row, one) in enumerate(zip(rows, found, strict=True)):
        assert one.score == pytest.approx(float(row[detector.score]), rel=1e-5)
        assert one.p_value == pytest.approx(float(row["p_value"]))
        assert one.flagged == (row["flagged"] == "1")
        assert one.doubts == []
        if one.heat is not None:
            with Image.open(folder / f"marked/{i}.png.png") as drawn, Image.open(pictures[i]) as picture:
                marked = heatmaps.marked(np.asarray(picture.convert("RGB")), one.heat, detector.level)
                assert (np.asarray(drawn) == marked).all()
            with Image.open(folder / f"heat/{i}.png.png") as drawn:
                coloured = heatmaps.coloured(one.heat, brightest(detector))
                assert (np.asarray(drawn) == coloured).all() and coloured.std() > 1


@pytest.mark.parametrize("score", ["anomaly_score", "peak", "combined", "f_anogan", "kde"])
def test_whole_pictures(trained: Path, pictures: list[Path], run_here: Callable[..., None], score: str) -> None:
    run_here("evaluate.py", *QUICK, "--score", score)
    if score == "kde":
        with pytest.raises(InputError, match="there is no score kde of pictures without labels"):
            Detector.load(trained)
        return
    run_here("fit_latent.py", "--images", "new", "--steps", "20", *CPU)
    run_here("evaluate.py", "--images", "new", *QUICK)
    before = contents(trained)
    detector = Detector.load(trained, alpha=0.2, device="cpu")
    assert (detector.score, Detector.load(trained, device="cpu").alpha) == (score, 0.05)  # as evaluate.py --images
    found = detector.judge(pictures)
    assert contents(trained) == before
    assert_same_verdicts(trained, pictures, found, detector)
    assert (detector.search is None) == (score in ("combined", "f_anogan"))
    assert [one.heat is None for one in found] == 5 * [score == "f_anogan"]

    # a picture alone, one that Pillow has opened, and an array
    array = np.asarray(Image.open(pictures[1]))
    for one in (pictures[1], str(pictures[1]), Image.open(pictures[1]), array, np.stack(3 * [array], 2)):
        (alone,) = detector.judge([one])
        assert alone.score == pytest.approx(found[1].score, rel=1e-5) and alone.p_value == found[1].p_value
    assert detector.judge([]) == []


@pytest.fixture
def patch_run(tmp_path: Path, run_here: Callable[..., None]) -> Path:
    """A GAN of patches, PCA and CutPaste, never searched."""
    for name, count in {"train/good": 30, "test/good": 3, "test/odd": 3}.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(100 + 10 * len(name) + i).integers(0, 256, (40, 52), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"set/{name}/{i}.png")
    run_here("train_gan.py", "--dataset", "set", "--epochs", "1", "--picture-size", "own", "--run-dir", "run", *TINY)
    run_here("detectors.pca", "--run-dir", "run")
    run_here("detectors.cutpaste", "--run-dir", "run", "--epochs", "1", *CPU)
    return tmp_path / "run"


def test_patches_without_a_search(patch_run: Path, pictures: list[Path], run_here: Callable[..., None]) -> None:
    run_here("evaluate.py", "--run-dir", "run", *QUICK)
    run_here("evaluate.py", "--run-dir", "run", "--images", "new", *QUICK)
    before = contents(patch_run)
    detector = Detector.load(patch_run, alpha=0.2, device="cpu")
    found = detector.judge(pictures)
    assert detector.score == "combined" and detector.search is None and contents(patch_run) == before
    assert_same_verdicts(patch_run, pictures, found, detector)
    by_worst = Detector.load(patch_run, score="cutpaste_worst", alpha=0.5, device="cpu")
    assert by_worst.alpha == 0.5 and len(by_worst.judge(pictures[:1])) == 1
    (other,) = detector.judge([np.full((90, 52, 3), (255, 0, 0), np.uint8)])
    assert [doubt.split(",")[0] for doubt in other.doubts] == ["it has 15 patches", "it is in colour"]


def test_the_search_of_an_encoder(trained: Path, pictures: list[Path], run_here: Callable[..., None]) -> None:
    (trained / "latents-train_anomalies.npz").unlink()
    run_here("fit_latent.py", "--init", "encoder", "--steps", "10", "--max-images", "30", *CPU)
    run_here("evaluate.py", *QUICK, "--score", "residual")
    run_here("fit_latent.py", "--images", "new", "--init", "encoder", "--steps", "10", *CPU)
    run_here("evaluate.py", "--images", "new", *QUICK)
    detector = Detector.load(trained, alpha=0.2, device="cpu")
    assert_same_verdicts(trained, pictures, detector.judge(pictures), detector)


def test_what_is_refused(trained: Path, pictures: list[Path], tmp_path: Path) -> None:
    detector = Detector.load(trained, device="cpu")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    stack = [Image.fromarray(np.full((40, 52), i, np.uint8)) for i in range(3)]
    stack[0].save(tmp_path / "stack.tif", save_all=True, append_images=stack[1:])
    for picture, message in (
        (tmp_path / "broken.png", r"cannot read .*broken.png"),
        (tmp_path / "missing.png", r"cannot read .*missing.png"),
        (tmp_path / "stack.tif", r"stack.tif holds 3 pictures"),
        (np.zeros((4, 4), np.complex64), r"cannot read an array \(4, 4\) of complex64"),
        (np.zeros((40, 52), np.uint16), r"cannot read an array \(40, 52\) of uint16 \(it has more than 8 bits"),
    ):
        with pytest.raises(InputError, match=message):
            detector.judge([picture])
    for alone in (str(pictures[0]), pictures[0], np.zeros((40, 52), np.uint8)):
        with pytest.raises(InputError, match="judge takes a list of pictures"):
            detector.judge(alone)
    # a file whose first page is a thumbnail of the other: it is the other that counts
    picture = Image.open(pictures[0])
    small, page = picture.resize((26, 20)), picture.copy()
    small.encoderinfo, page.encoderinfo = {"tiffinfo": {254: 1}}, {"tiffinfo": {254: 0}}
    small.save(tmp_path / "both.tif", save_all=True, append_images=[page], tiffinfo={254: 1})
    assert decoding.page_numbers(tmp_path / "both.tif") == [1]
    (one,), (other,) = detector.judge([tmp_path / "both.tif"]), detector.judge([picture])
    assert one.score == other.score
    with pytest.raises(InputError, match="alpha must lie between 0 and 1"):
        Detector.load(trained, alpha=0)
    with pytest.raises(InputError, match="there is no score beauty"):
        Detector.load(trained, score="beauty")
    (trained / "validation-scores.npz").unlink()
    with pytest.raises(InputError, match=r"run python evaluate.py --run-dir"):
        Detector.load(trained)
    with pytest.raises(InputError, match=r"has no gan.pt"):
        Detector.load(tmp_path)


def test_candidates_are_kept(trained: Path, run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The next search takes those in the run folder; damaged ones, and those of another seed, are drawn anew."""
    monkeypatch.chdir(trained)
    gan = runs.load_gan(trained, torch.device("cpu"))
    path = trained / candidates.FILE
    kept = candidates.candidates_of(gan, 4000, 0)
    drawn = candidates.draw_candidates(gan.generator, gan.latent_dim, 4000, 0)
    assert (kept.z == drawn.z).all() and (kept.thumbnails == drawn.thumbnails).all()
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    candidates.candidates_of(gan, 4000, 0)
    assert path.stat().st_mtime_ns == stamp
    for content in (before[:-40], b""):
        path.write_bytes(content)
        again = candidates.candidates_of(gan, 4000, 0)
        assert (again.thumbnails == drawn.thumbnails).all() and path.read_bytes() == before
    other = candidates.candidates_of(gan, 4000, 1, keep=False)
    assert not (other.z == kept.z).all() and path.read_bytes() == before
    candidates.candidates_of(gan, 100, 0)
    assert len(candidates.candidates_of(gan, 100, 0).z) == 100 and path.read_bytes() != before
