"""The pictures that are drawn of what a run finds and misses."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import found_and_missed


def test_which_are_chosen() -> None:
    """Of each anomalous class as many of the highest as of the lowest, and none twice."""
    names = np.array(["good", "a", "a", "a", "a", "a", "b", "b", "c"])
    score = np.array([9.0, 3, 1, 5, 2, 4, 7, 8, 6])
    order = np.argsort(-score)
    test = SimpleNamespace(class_name=names, is_anomaly=names != "good", ranked=lambda name: order)
    rows, words = found_and_missed.chosen(test, "any", each=2)
    assert score[rows].tolist() == [5, 4, 2, 1, 8, 7, 6]
    assert words == ["highest", "highest", "lowest", "lowest", "highest", "highest", "highest"]


def test_a_run_is_drawn(trained: Path, run_here: Callable[..., None], tmp_path: Path) -> None:
    run_here("evaluate.py", "--bootstrap", "20", "--score", "pca_peak", "--device", "cpu")
    run_here("benchmarks.found_and_missed", "--out", str(tmp_path / "drawn.png"), "--each", "1")
    with Image.open(tmp_path / "drawn.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 20


def test_a_run_that_was_not_evaluated(trained: Path, fails: Callable[..., str], tmp_path: Path) -> None:
    (trained / "metrics.json").unlink()
    assert "was not evaluated" in fails("benchmarks.found_and_missed", "--out", str(tmp_path / "drawn.png"))
    assert "--alpha must lie between" in fails("benchmarks.found_and_missed", "--out", "a.png", "--alpha", "2")


@pytest.mark.parametrize("mask", [False, True])
def test_mask_panel(tmp_path: Path, mask: bool) -> None:
    """As large as the other panels, of what the networks see of the picture."""
    Image.fromarray(np.pad(np.full((4, 10), 255, np.uint8), ((0, 36), (10, 0)))).save(tmp_path / "mask.png")
    picture = Image.new("L", (20, 40))
    images = SimpleNamespace(source=["a.png"], open=lambda row: picture, picture=lambda row, view: picture)
    view = SimpleNamespace(window=lambda size: (0, 0, 20, 20))
    test = SimpleNamespace(images=images, gan=SimpleNamespace(view=view))
    panel = found_and_missed.mask_panel(test, 0, tmp_path / "mask.png" if mask else None, (10, 10, 3))
    assert panel.shape == (10, 10, 3)
    assert (panel[0, 7:] > 200).all() and (panel[5:] == 0).all() if mask else (panel == 128).all()
