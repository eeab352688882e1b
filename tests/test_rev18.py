"""Pictures of extreme sizes, relative heat maps from end to end, and figures of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, read_scores
from PIL import Image, PngImagePlugin

from anogan import decoding, heatmaps, images, loading, metrics, runs
from anogan.decoding import View

OWN = View(32, 1, picture_size="own")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")  # decodes in this process: to start others takes longer
    return tmp_path


def test_a_thin_picture_does_not_fill_the_memory(folder: Path) -> None:
    """4 x 20,000 pixels are 0.08 megapixels, and 328 with 256 pixels across."""
    Image.fromarray(np.zeros((4, 20_000), np.uint8)).save(folder / "thin.png")
    thin, view = images.open_pictures([str(folder)]), View(32, 1, picture_size=256)
    with pytest.raises(ValueError, match="it has 328 megapixels once its shorter side has 256 pixels, more than 179"):
        decoding.as_seen(thin.open(0), view)
    assert loading.seen_sizes(thin, view).tolist() == [[0, 0]]
    assert loading.seen_sizes(thin, replace(view, max_megapixels=400)).tolist() == [[256, 1_280_000]]


def test_sizes_are_found_without_pixels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a picture above --max-megapixels neither."""
    Image.fromarray(np.zeros((50, 70), np.uint8)).save(folder / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    found = images.open_pictures([str(folder)])
    assert loading.seen_sizes(found, OWN).tolist() == [[50, 70]]
    assert loading.seen_sizes(found, replace(OWN, max_megapixels=0.003)).tolist() == [[0, 0]]


def test_pictures_of_16_bits_that_are_all_too_small_are_called_so(folder: Path) -> None:
    Image.fromarray(np.full((20, 40), 30_000, np.uint16)).save(folder / "a.png")
    found = images.open_pictures([str(folder)])
    levels = loading.find_levels(found, OWN)
    with pytest.raises(ValueError, match="smaller than a patch"):
        decoding.as_seen(found.open(0), replace(OWN, levels=levels))


def test_black_bars_are_not_part_of_the_contrast(fails: Callable[..., str]) -> None:
    message = fails("train_gan.py", "--dataset", "digits", "--fit", "pad", "--normalise", "patch", *TINY)
    assert "--normalise patch would measure the black that --fit pad adds" in message


def test_relative_heats_keep_their_order() -> None:
    heats = np.float32([-900, -3, -0.5, 0, 0.01, 1, 5, 5.01, 900])
    found = metrics.from_0_to_1(heats)
    assert (np.diff(found) > 0).all() and found[0] > 0 and found[-1] < 1 and found[3] == 0.5 and found[6] == 0.75


def test_peaks_are_relative_to_validation_without_the_picture_itself(trained: Path) -> None:
    """From the latents alone, by hand; as evaluate.py wrote them, and as it keeps them for pictures without labels."""
    gan, rows = runs.load_gan(trained, torch.device("cpu")), read_scores(trained)

    def smoothed(split: str) -> list[np.ndarray]:
        found = dict(np.load(trained / f"latents-{split}.npz"))
        pictures = runs.open_split(gan, split)
        pictures = pictures.take(np.isin(pictures.source, found["source"]))
        x = gan.to_model(loading.load_images(pictures, gan.view)[0])
        difference = heatmaps.difference(x, gan.generator(torch.from_numpy(found["z"])))
        return [heatmaps.smoothed(each[0], 32) for each in difference]

    normals = smoothed("validation")
    assert len(normals) > heatmaps.FEWEST
    of_others = [heatmaps.usual(normals[:i] + normals[i + 1 :]) for i in range(len(normals))]
    usual = heatmaps.usual(normals)
    expected = {
        "validation": [others.relative(heat, 32).max() for others, heat in zip(of_others, normals, strict=True)],
        "test": [usual.relative(heat, 32).max() for heat in smoothed("test")],
    }
    for split, peaks in expected.items():
        found = [float(row["peak"]) for row in rows if row["split"] == split]
        np.testing.assert_allclose(found, peaks, rtol=1e-3)
    kept = np.load(trained / "validation-scores.npz")
    np.testing.assert_allclose(kept["usual_total"], usual.total, rtol=1e-4)
    assert kept["usual_count"] == len(normals)
