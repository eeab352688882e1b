"""A person's own pictures: from fit_latent.py --images to the verdict, the heat maps and the report."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, read_scores
from PIL import Image
from test_util import draw

from anogan import runs, verdicts
from anogan.decoding import View
from anogan.images import open_pictures, open_split
from anogan.loading import load_images
from examples import planted_defects
from util import InputError

pytestmark = pytest.mark.usefixtures("undrawn")

CPU = ["--device", "cpu"]


def read_verdicts(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of scores.csv of own pictures, by path."""
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def digit(path: Path, value: int, number: int = 0) -> None:
    """One of the test scans of a digit as a picture of 80x60."""
    path.parent.mkdir(parents=True, exist_ok=True)
    test = open_split("digits", "test", "0")
    wide = Image.new("L", (80, 60))
    wide.paste(test.open(np.flatnonzero(test.label == value)[number]).resize((60, 60)), (10, 0))
    wide.save(path)


def test_pictures_of_a_folder_a_glob_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*paths: str) -> list[str]:
        return sorted(open_pictures(paths).source.tolist())

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("p/b.png", "p/deep/er/a.jpg", "p/.hidden/c.png", "p/._d.png", "one.webp", "../up.png"):
        draw(tmp_path / "here" / name)
    (tmp_path / "here/p/notes.txt").write_text("no picture")
    assert found("p") == found("p/**/*.jpg", "p/b.png", "p") == found("./p") == ["p/b.png", "p/deep/er/a.jpg"]
    assert found("*") == found(".") == ["one.webp", "p/b.png", "p/deep/er/a.jpg"]  # a pattern that matches folders
    assert found("p/../one.webp", "one.webp") == ["one.webp"] and found("../up.png") == [str(tmp_path / "up.png")]
    one = open_pictures(["one.webp"])
    assert (one.name, one.label.tolist(), one.classes) == ("one", [-1], [])
    assert open_pictures(["p"]).name == "p" and open_pictures(["p", "one.webp"]).name == "here"
    # however they are spelt, and from wherever, they are the same pictures
    index = open_pictures(["p"]).index
    assert (open_pictures([str(tmp_path / "here/p")]).index == index).all()
    monkeypatch.chdir(tmp_path)
    assert (open_pictures(["here/p"]).index == index).all()
    for path in ("nowhere", "here/p/.hidden/none*.png", "here/p/*.gif"):
        with pytest.raises(InputError, match=f"--images {path.replace('*', '.')}: no such picture"):
            open_pictures([path])
    with pytest.raises(InputError, match="--images names no picture"):
        open_pictures([])


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_among_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "p/a.png")
    (tmp_path / "p/same.png").symlink_to("a.png")
    for name in ("x", "y"):
        (tmp_path / "p" / name).symlink_to(".")  # back to itself, twice
    assert open_pictures(["p"]).source.tolist() == ["p/a.png"]
    (tmp_path / "p/dead.png").symlink_to("nowhere")
    pictures = open_pictures(["p"])
    assert sorted(Path(each).name for each in pictures.source) == ["a.png", "dead.png"]
    with pytest.raises(InputError, match=r"cannot read the image p/dead.png"):
        load_images(pictures, View(32, 3))
    assert len(load_images(pictures, View(32, 3), skip_unreadable=True)[0]) == 1


def test_from_a_folder_to_the_verdict(
    trained: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    """Fives look stranger than zeros to a GAN of zeros, and each picture gets what belongs to it."""
    root = trained.parents[1]
    for i in range(4):
        digit(root / f"mine/zero-{i}.png", 0, i)
        digit(root / f"mine/more/five {i}.png", 5, i)
    run_here("fit_latent.py", "--images", "mine", "--steps", "20", *CPU)
    assert "next: python evaluate.py --run-dir outputs/digits-0 --images mine\n" in capsys.readouterr().out
    run_here("evaluate.py", "--images", "mine", "--score", "anomaly_score", "--alpha", "0.1", *CPU)
    printed = capsys.readouterr().out
    folder = trained / "images-mine"
    rows = read_verdicts(folder)
    assert set(rows) == {f"mine/zero-{i}.png" for i in range(4)} | {f"mine/more/five {i}.png" for i in range(4)}
    with np.load(trained / "latents-validation.npz") as latents:
        normals = 0.9 * latents["residual"] + 0.1 * latents["discrimination"]
    for row in rows.values():
        p = (1 + (normals >= float(row["anomaly_score"])).sum()) / (1 + len(normals))
        assert float(row["p_value"]) == pytest.approx(p) and row["flagged"] == str(int(p <= 0.1))
    fives = [float(row["anomaly_score"]) for path, row in rows.items() if "five" in path]
    zeros = [float(row["anomaly_score"]) for path, row in rows.items() if "zero" in path]
    assert min(fives) > np.median(zeros)
    # the most anomalous first, in the file and on the terminal
    ranked = [float(row["anomaly_score"]) for row in rows.values()]
    assert ranked == sorted(ranked, reverse=True)
    listed = [line.split("  ")[-1].strip() for line in printed.splitlines() if line.endswith(".png")]
    assert listed == list(rows)
    for kind in ("heat", "marked"):
        assert {path.name for path in (folder / kind / "more").iterdir()} == {f"five {i}.png.png" for i in range(4)}
        with Image.open(folder / kind / "zero-0.png.png") as picture:
            assert picture.size == (80, 60) and picture.mode == "RGB"
    # what G has not seen, left and right of the square in the middle, is grey in the heat map and as it was when marked
    heat = np.asarray(Image.open(folder / "heat/zero-0.png.png"))
    assert (heat[:, :10] == 128).all() and (heat[:, 70:] == 128).all() and np.ptp(heat[:, 10:70]) > 20
    assert (np.asarray(Image.open(folder / "marked/zero-0.png.png"))[:, :10] == 0).all()
    # the run's own figures are as they were
    assert json.loads((trained / "metrics.json").read_text())["threshold"]["score"] == "anomaly_score"


def test_the_search_of_pictures_goes_on_and_is_of_these_pictures(
    trained: Path, run_here: Callable[..., None], fails: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    root = trained.parents[1]
    digit(root / "mine/a.png", 0)
    digit(root / "other/b.png", 0, 1)
    assert "run fit_latent.py --run-dir outputs/digits-0" in fails("evaluate.py", "--images", "mine", *CPU)
    fit = ["fit_latent.py", "--steps", "20", *CPU, "--images"]
    run_here(*fit, "mine")
    run_here(*fit, "mine")
    assert "is complete: nothing to search" in capsys.readouterr().out
    message = fails("evaluate.py", "--images", "other", *CPU)
    assert "not those that latents-images.npz was fitted to" in message and "--images" in message
    run_here(*fit, "other")
    assert "holds other images" in capsys.readouterr().out
    run_here("evaluate.py", "--images", "other", *CPU)
    assert list(read_verdicts(trained / "images-other")) == ["other/b.png"]
    digit(root / "other/b.png", 5)  # a camera that writes to the same name again
    assert "not those that latents-images.npz was fitted to" in fails("evaluate.py", "--images", "other", *CPU)
    run_here(*fit, "other")
    assert "holds other images" in capsys.readouterr().out
    run_here("evaluate.py", "--images", "other", *CPU)
    record = runs.read_record(trained)
    assert "latents-images.npz" in record["fit_latent_images"]["fitted"]
    assert "latents-test.npz" in record["fit_latent"]["fitted"]
    assert "--images nowhere: no such picture" in fails(*fit, "nowhere")
    message = fails("fit_latent.py", "--steps", "5", *CPU, "--images", "other")
    assert "the validation images were searched with steps 20: use the same" in message
    for flags in (["--splits", "test"], ["--discrimination", "reference"]):
        assert "--images goes with neither" in fails(*fit, "other", *flags)
    assert "--images names no picture" in fails(*fit)
    message = fails("evaluate.py", "--images", "other", "--score", "gan_r", *CPU)
    assert "there is no score gan_r here" in message and "gan_r scores no pictures without labels" in message
    digit(root / "other/new.png", 3)
    run_here("evaluate.py", "--images", "other", *CPU)
    assert "1 more pictures there were not searched" in capsys.readouterr().out


def test_unreadable_pictures_are_named(
    trained: Path, run_here: Callable[..., None], fails: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    root = trained.parents[1]
    digit(root / "mine/a.png", 0)
    (root / "mine/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    fit = ["fit_latent.py", "--steps", "20", "--images", "mine", *CPU]
    message = fails(*fit)
    assert "mine/broken.png" in message and "--skip-unreadable" in message
    run_here(*fit, "--skip-unreadable")
    assert "skipped, cannot be read: mine/broken.png" in capsys.readouterr().err
    run_here("evaluate.py", "--images", "mine", *CPU)
    assert list(read_verdicts(trained / "images-mine")) == ["mine/a.png"]


def test_too_few_normals_flag_nothing_and_say_so(
    trained: Path, run_here: Callable[..., None], fails: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    digit(trained.parents[1] / "mine/a.png", 7)
    run_here("fit_latent.py", "--steps", "20", "--images", "mine", *CPU)
    run_here("evaluate.py", "--images", "mine", "--alpha", "0.001", *CPU)
    printed = capsys.readouterr().out
    assert "nothing can be flagged at --alpha 0.001" in printed
    assert "nothing can be marked: --alpha 0.001 takes 999 validation normals, and there are 27" in printed
    for flag in ("--alpha", "--fdr"):
        for share in ("0", "1", "nan"):
            assert f"{flag} must lie between 0 and 1" in fails("evaluate.py", flag, share)


def test_benjamini_hochberg_in_scores_csv(trained: Path, run_here: Callable[..., None]) -> None:
    root = trained.parents[1]
    for i in range(6):
        digit(root / f"mine/{i}.png", [0, 7][i % 2], i)
    run_here("fit_latent.py", "--steps", "20", "--images", "mine", *CPU)
    run_here("evaluate.py", "--images", "mine", "--fdr", "0.3", *CPU)
    rows = read_verdicts(trained / "images-mine")
    p = np.array([float(row["p_value"]) for row in rows.values()])  # the most anomalous first
    passing = np.flatnonzero(p <= 0.3 * np.arange(1, 7) / 6)
    flagged = [int(row["flagged"]) for row in rows.values()]
    assert flagged == [int(value <= (p[passing[-1]] if len(passing) else 0)) for value in p]


def test_planted_defects(tmp_path: Path) -> None:
    """What is drawn differs from a good part where the mask says so, and the same seed draws the same."""
    for defect in planted_defects.DEFECTS:
        for seed in range(5):
            picture, mask = planted_defects.draw(np.random.default_rng(seed), defect, grey=False)
            again, _ = planted_defects.draw(np.random.default_rng(seed), defect, grey=False)
            assert picture.shape == (120, 160, 3) and (picture == again).all() and 10 < mask.sum() < 800
            ring = picture[60, 160 // 2 + 32].astype(int)  # on most washers, whatever their defect
            assert np.abs(picture[mask].mean(0) - ring).max() > 15, (defect, seed)
    picture, mask = planted_defects.draw(np.random.default_rng(0), None, grey=True)
    assert not mask.any() and (picture == picture[..., :1]).all()


def test_heat_maps_find_planted_defects(
    tmp_path: Path, run_here: Callable[..., None], fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blots and missing parts are found, pointed at and marked; a tiny GAN does not see scratches of half a pixel."""
    monkeypatch.chdir(tmp_path)
    config = planted_defects.Config(folder=Path("washers"), train=80, test=8)
    planted_defects.main(config)
    with pytest.raises(InputError, match="washers is there already"):
        planted_defects.main(config)
    sizes = ["--image-size", "32", "--ngf", "16", "--ndf", "16", "--latent-dim", "16", "--batch-size", "8"]
    sizes += ["--generator-steps", "3", "--lr", "4e-4"]
    run_here("train_gan.py", "--dataset", "washers", "--normal-class", "good", "--epochs", "40", *sizes, *CPU)
    run_here("fit_latent.py", "--steps", "50", *CPU)
    run_here("evaluate.py", "--score", "peak", "--alpha", "0.1", "--bootstrap", "20", *CPU)
    run_dir = tmp_path / "outputs/washers-good"
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["pixels"]["regions"] >= 24 and metrics["pixels"]["regions_found"] >= 8
    assert metrics["pixels"]["pixel_roc_auc"] > 0.9 and metrics["pixels"]["aupro"] > 0.6
    by_class = metrics["test"]["peak"]["per_class"]
    assert by_class["missing"]["roc_auc"] > 0.9 and by_class["blot"]["roc_auc"] > 0.75

    pictures = ["--images", "washers/test/missing"]
    run_here("fit_latent.py", "--steps", "50", *pictures, *CPU)
    run_here("evaluate.py", *pictures, "--score", "peak", "--alpha", "0.1", *CPU)
    overlaps = []
    for i in range(8):
        original = np.asarray(Image.open(f"washers/test/missing/{i:03d}.png"))
        marked = np.asarray(Image.open(run_dir / f"images-missing/marked/{i:03d}.png.png"))
        is_marked = (marked != original).any(2)
        mask = np.asarray(Image.open(f"washers/ground_truth/missing/{i:03d}_mask.png"))
        overlaps.append((is_marked & mask).sum() / mask.sum())
    assert np.median(overlaps) > 0.3

    mask = Path("washers/ground_truth/missing/003_mask.png")
    Image.new("1", (120, 160), 1).save(mask)
    assert f"{mask} has another size than test/missing/003.png" in fails("evaluate.py", *CPU)


def test_share_flagged_of_fresh_normals(trained: Path, run_here: Callable[..., None]) -> None:
    """Zeros that no part of the run has seen, drawn anew into normals to compare with and pictures to judge: the share
    that is flagged is at most the level, plus noise."""
    for path in trained.glob("*-reference.npz"):
        path.unlink()
    (trained / "latents-train_anomalies.npz").unlink()
    run_here("fit_latent.py", "--steps", "20", *CPU)  # all of them
    run_here("detectors.baselines")
    run_here("evaluate.py", "--bootstrap", "5", *CPU)
    rows = [row for row in read_scores(trained) if row["class_name"] == "0"]
    assert len(rows) == 27 + 45
    rng = np.random.default_rng(0)
    for name in ("anomaly_score", "peak", "rotation", "kde"):
        score = np.array([float(row[name]) for row in rows])
        for alpha in (0.05, 0.1, 0.3):
            shares = []
            for _ in range(400):
                order = rng.permutation(len(score))
                p_value = verdicts.p_values(score[order[40:]], score[order[:40]])
                shares.append(verdicts.flags(p_value, alpha).mean())
            assert np.mean(shares) <= alpha + 3 * np.std(shares) / 400**0.5
            assert np.mean(shares) >= 0.4 * alpha  # no idle bound


def test_pictures_may_not_join_the_training_set_later(
    trained: Path, run_here: Callable[..., None], fails: Callable[..., str]
) -> None:
    """A new name can move pictures that the GAN has seen into validation, which must be new to it."""
    root = trained.parents[1]
    for name in ("train/good", "test/good", "test/bad"):
        for i in range(10):
            draw(root / f"set/{name}/{i}.png", value=(i, 0, 0))
    run_here("train_gan.py", "--dataset", "set", "--epochs", "1", *TINY)  # train/ has one class, which is normal
    draw(root / "set/train/good/+new.png", value=(50, 0, 0))
    for script in ("fit_latent.py", "detectors.baselines", "detectors.rotnet"):
        message = fails(script, "--run-dir", "outputs/set-good")
        assert "than when gan.pt was trained" in message or "not those of gan.pt" in message
    (root / "set/train/good/+new.png").unlink()
    draw(root / "set/train/other/0.png")
    assert "train has pictures of good, other: name one with --normal-class" in fails(
        "train_gan.py", "--dataset", "set"
    )


def test_own_pictures_are_judged_by_the_score_that_was_measured(trained: Path, run_here: Callable[..., None]) -> None:
    digit(trained.parents[1] / "mine/a.png", 7)
    run_here("fit_latent.py", "--steps", "20", "--images", "mine", *CPU)
    for score in ("peak", "rotation"):
        run_here("evaluate.py", "--bootstrap", "5", "--score", score, *CPU)
        run_here("evaluate.py", "--images", "mine", *CPU)
        (row,) = read_verdicts(trained / "images-mine").values()
        normals = [float(other[score]) for other in read_scores(trained) if other["split"] == "validation"]
        p_value = (1 + (np.array(normals) >= float(row[score])).sum()) / (1 + len(normals))
        assert float(row["p_value"]) == pytest.approx(p_value)


def test_a_small_training_of_pictures(tmp_path: Path, run_here: Callable[..., None]) -> None:
    """--epochs 1 goes through all scripts on a folder of pictures."""
    for i in range(12):
        draw(tmp_path / f"set/train/good/{i}.png", value=(i, 2 * i, 90))
    for i in range(4):
        draw(tmp_path / f"set/test/good/{i}.png", value=(i, 2 * i, 90))
        draw(tmp_path / f"set/test/bad/{i}.png", value=(200, i, 0))
    run_here("train_gan.py", "--dataset", "set", "--normal-class", "good", "--epochs", "1", *TINY)
    run_here("detectors.rotnet", "--epochs", "1", *CPU)
    run_here("fit_latent.py", "--steps", "1", *CPU)
    run_here("evaluate.py", "--bootstrap", "5", *CPU)
    assert (tmp_path / "outputs/set-good/report.html").is_file()
