"""Heat maps that are relative to what is usual at a place, from end to end; and pictures of extreme sizes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY
from PIL import Image, PngImagePlugin

import evaluate
from anogan import decoding, heatmaps, images, loading, metrics, scoring
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
    found = metrics.from_0_to_1(heats, 5)
    assert (np.diff(found) > 0).all() and found[0] > 0 and found[-1] < 1 and found[3] == 0.5 and found[6] == 0.75


def test_pictures_of_another_size_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """There is no usual at a place for them, so that an edge of theirs passes for a defect."""
    usual = heatmaps.usual([np.ones((40, 60), np.float32)] * 20, 32)
    scored = SimpleNamespace(
        usual={"difference": usual},
        declared={score.name: score for score in evaluate.SCORES},
        patch_counts=np.array([6, 6, 4]),
        seen_size=np.array([[40, 60], [40, 60], [60, 40]]),
        images=images.ImageSet("made", [], np.arange(3), np.zeros(3), np.array(["a", "b", "c"]), None),
    )
    scoring._name_others("test", scored, (4, 6))
    printed = capsys.readouterr().out
    assert printed.endswith("so do not judge them by peak\n")
    assert printed.startswith(
        "test: 1 of 3 pictures have another size than the validation pictures, such as c (40x60, "
    )
    scoring._name_others("test", replace_in(scored, usual={"linear_difference": usual}), (4, 6))
    assert capsys.readouterr().out.endswith("so do not judge them by pca_peak or combined\n")
    others = replace_in(scored, usual={})
    scoring._name_others("test", others, (4, 5))
    printed = capsys.readouterr().out
    assert (
        "2 of 3 pictures are smaller or larger than every validation picture, such as a (6 patches, not 4 to" in printed
    )
    scoring._name_others("test", others, (5, 6))
    assert (
        "1 of 3 pictures are smaller or larger than every validation picture, such as c (4 pa"
        in capsys.readouterr().out
    )
    scoring._name_others("test", others, (4, 6))
    assert capsys.readouterr().out == ""


def replace_in(of: SimpleNamespace, **values: object) -> SimpleNamespace:
    """The same with other values."""
    return SimpleNamespace(**{**vars(of), **values})
