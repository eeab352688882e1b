"""A person's own pictures: from fit_latent.py --images to the verdict, the heat maps and the report."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from test_util import draw

import datasets
import runs
import scoring
from util import InputError

CPU = ["--device", "cpu"]


def read_verdicts(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of scores.csv of own pictures, by path."""
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def digit(path: Path, value: int, number: int = 0) -> None:
    """One of the test scans of a digit as a picture of 80x60."""
    path.parent.mkdir(parents=True, exist_ok=True)
    test = datasets.open_split("digits", "test", "0")
    wide = Image.new("L", (80, 60))
    wide.paste(test.open(np.flatnonzero(test.label == value)[number]).resize((60, 60)), (10, 0))
    wide.save(path)


def test_pictures_of_a_folder_a_glob_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("p/b.png", "p/deep/er/a.jpg", "p/.hidden/c.png", "p/._d.png", "one.webp"):
        draw(tmp_path / name)
    (tmp_path / "p/notes.txt").write_text("no picture")
    assert datasets.open_pictures(["p"]).source.tolist() == ["p/b.png", "p/deep/er/a.jpg"]
    assert datasets.open_pictures(["p/**/*.jpg", "p/b.png", "p"]).source.tolist() == ["p/b.png", "p/deep/er/a.jpg"]
    assert datasets.open_pictures([str(tmp_path / "p")]).source[0] == str(tmp_path / "p/b.png")
    assert datasets.open_pictures(["p/../one.webp", "one.webp"]).source.tolist() == ["one.webp"]
    one = datasets.open_pictures(["one.webp"])
    assert (one.name, one.label.tolist(), one.classes) == ("one", [-1], [])
    assert datasets.open_pictures(["p"]).name == "p" and datasets.open_pictures(["p", "one.webp"]).name == tmp_path.name
    for path in ("nowhere", "p/.hidden/none*.png", "p/*.txt"):
        with pytest.raises(InputError, match=f"--images {path.replace('*', '.')}: no such picture"):
            datasets.open_pictures([path])


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
    digit(root / "other/b.png", 0)
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
    assert "fit_latent_images" in runs.read_record(trained) and "searched" in str(
        runs.read_record(trained)["fit_latent"]
    )
    assert "--images nowhere: no such picture" in fails(*fit, "nowhere")
    run_here("fit_latent.py", "--steps", "5", *CPU, "--images", "other")
    assert "fitted with different settings (steps)" in fails("evaluate.py", "--images", "other", *CPU)


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
    assert "nothing can be flagged at --alpha 0.001" in capsys.readouterr().out
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


def test_heat_maps_find_planted_defects(tmp_path: Path, run_here: Callable[..., None]) -> None:
    """Discs, some with a bright patch: it is marked, the pixel-level figures say so, and so does the verdict."""
    rng = np.random.default_rng(0)

    def disc(path: Path, patch: tuple[int, int] | None) -> None:
        down, across = np.mgrid[:48, :64]
        pixels = np.where(np.hypot(down - 24, across - 32) < 18, 120, 30) + rng.normal(0, 3, (48, 64))
        mask = np.zeros((48, 64), bool)
        if patch:
            mask[patch[0] : patch[0] + 7, patch[1] : patch[1] + 7] = True
            pixels[mask] = 250
            mask_path = tmp_path / "discs/ground_truth" / path.parent.name / f"{path.stem}_mask.png"
            mask_path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(mask_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)

    for i in range(60):
        disc(tmp_path / f"discs/train/good/{i}.png", None)
    for i in range(8):
        disc(tmp_path / f"discs/test/good/{i}.png", None)
        disc(tmp_path / f"discs/test/patch/{i}.png", (15 + 2 * (i % 4), 24 + 2 * (i // 2)))
    sizes = ["--image-size", "32", "--ngf", "8", "--ndf", "8", "--latent-dim", "8", "--batch-size", "8"]
    train = ["train_gan.py", "--dataset", "discs", "--normal-class", "good", "--epochs", "15", *sizes, *CPU]
    run_here(*train, "--generator-steps", "1", "--lr", "1e-3")
    run_here("fit_latent.py", "--steps", "30", *CPU)
    run_here("evaluate.py", "--score", "peak", "--alpha", "0.1", "--bootstrap", "20", *CPU)
    run_dir = tmp_path / "outputs/discs-good"
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["pixels"]["regions"] == 8 and metrics["pixels"]["regions_found"] >= 7
    assert metrics["pixels"]["pixel_roc_auc"] > 0.9 and metrics["pixels"]["aupro"] > 0.6
    assert metrics["test"]["peak"]["roc_auc"] > 0.9

    run_here("fit_latent.py", "--steps", "30", "--images", "discs/test/patch", *CPU)
    run_here("evaluate.py", "--images", "discs/test/patch", "--score", "peak", "--alpha", "0.1", *CPU)
    overlaps = []
    for i in range(8):
        original = np.asarray(Image.open(tmp_path / f"discs/test/patch/{i}.png").convert("RGB"))
        marked = np.asarray(Image.open(run_dir / f"images-patch/marked/{i}.png.png"))
        is_marked = (marked != original).any(2)
        mask = np.asarray(Image.open(tmp_path / f"discs/ground_truth/patch/{i}_mask.png"))
        overlaps.append((is_marked & mask).sum() / max(1, (is_marked | mask).sum()))
    assert np.median(overlaps) > 0.3  # intersection over union

    (tmp_path / "discs/ground_truth/patch/3_mask.png").unlink()
    with pytest.raises(SystemExit, match=r"the mask .*3_mask.png of test/patch/3.png cannot be read"):
        run_here("evaluate.py", *CPU)


def test_share_flagged_of_fresh_normals(digits_workdir: Path) -> None:
    """Zeros of the test split, which no part of the run has seen: flagged at most at the level, plus noise."""
    run_dir, device = digits_workdir / "outputs/digits-0", torch.device("cpu")
    gan = runs.load_gan(run_dir, device)
    image_sets = {split: datasets.open_split("digits", split, "0") for split in ("validation", "test")}
    scored, _ = scoring.score_run(run_dir, gan, image_sets, 64, device)
    normals = ~scored["test"].is_anomaly
    for score in ("anomaly_score", "combined", "peak"):
        for alpha in (0.1, 0.3):
            flagged = scoring.verdicts(scored, score, alpha, None).flagged["test"][normals]
            noise = 3 * (alpha * (1 - alpha) * (1 / len(flagged) + 1 / len(scored["validation"].images))) ** 0.5
            assert flagged.mean() <= alpha + noise


def test_a_small_training_of_pictures(tmp_path: Path, run_here: Callable[..., None]) -> None:
    """--epochs 1 goes through all scripts on a folder of pictures."""
    for i in range(12):
        draw(tmp_path / f"set/train/good/{i}.png", value=(i, 2 * i, 90))
    for i in range(4):
        draw(tmp_path / f"set/test/good/{i}.png", value=(i, 2 * i, 90))
        draw(tmp_path / f"set/test/bad/{i}.png", value=(200, i, 0))
    run_here("train_gan.py", "--dataset", "set", "--normal-class", "good", "--epochs", "1", *TINY)
    run_here("train_rotnet.py", "--epochs", "1", *CPU)
    run_here("fit_latent.py", "--steps", "1", *CPU)
    run_here("evaluate.py", "--bootstrap", "5", *CPU)
    assert (tmp_path / "outputs/set-good/report.html").is_file()
