"""PCA: what the components draw, its scores in a run, and what bad input gets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_scores
from PIL import Image
from sklearn.decomposition import PCA

import util
from anogan.decoding import View
from anogan.images import open_split, to_model
from anogan.loading import load_images
from detectors import pca as method

CPU = ("--device", "cpu")


def fitted(x: torch.Tensor) -> method.PCA:
    """The components of images (N, C, H, H)."""
    pca = method.PCA(x.shape[-1], x.shape[1])
    method.fit(pca, x)
    return pca


def test_what_it_can_draw_and_what_it_leaves() -> None:
    """Images of two patterns are drawn exactly, in any mixture. What is added to one is left, at its place."""
    torch.manual_seed(0)
    patterns = torch.zeros(2, 3, 8, 8)
    patterns[0, :, :4], patterns[1, 0, :, 4:] = 0.5, 0.5
    shares = torch.rand(10, 2)
    x = 0.1 + torch.einsum("np,pchw->nchw", shares, patterns)
    pca = fitted(x)
    assert (pca.components.abs().sum(1) > 0).sum() == 2  # ten images, but two patterns: the rest is rounding
    torch.testing.assert_close(pca(x), x)
    other = 0.1 + torch.einsum("np,pchw->nchw", torch.tensor([[-1.0, 1.5]]), patterns)
    torch.testing.assert_close(pca(other), other)
    spoilt = other.clone()
    spoilt[0, 1, 6, 2] += 1.0  # where no pattern ever is
    torch.testing.assert_close(spoilt - pca(spoilt), spoilt - other)


def test_images_that_are_all_the_same() -> None:
    with pytest.raises(util.InputError, match="the 4 training images or patches are all the same"):
        fitted(torch.full((4, 1, 8, 8), 0.3))


def test_scores_in_a_run(digits_workdir: Path) -> None:
    """As scikit-learn has them: Σ|x - what its components draw|."""
    run_dir = digits_workdir / "outputs/digits-0"
    vectors = {}
    for split in ("train", "test"):
        vectors[split] = to_model(load_images(open_split("digits", split, "0"), View(32, 1))[0]).flatten(1).numpy()
    reference = PCA(min(256, len(vectors["train"]) - 1), svd_solver="full").fit(vectors["train"])
    drawn = reference.inverse_transform(reference.transform(vectors["test"]))
    source = open_split("digits", "test", "0").source
    expected = dict(zip(source, np.abs(vectors["test"] - drawn).sum(1), strict=True))
    rows = [row for row in read_scores(run_dir) if row["split"] == "test"]
    found = np.array([float(row["pca"]) for row in rows])
    np.testing.assert_allclose(found, [expected[row["source"]] for row in rows], rtol=1e-2)
    is_zero = np.array([row["is_anomaly"] == "0" for row in rows])
    assert np.median(found[~is_zero]) > 1.5 * np.median(found[is_zero])
    peaks = np.array([float(row["pca_peak"]) for row in rows])
    assert np.median(peaks[~is_zero]) > 1.5 * np.median(peaks[is_zero])


def test_a_spoilt_or_foreign_file_is_named(trained: Path, fails: Callable[..., str]) -> None:
    state = torch.load(trained / "pca.pt", weights_only=True)
    (trained / "pca.pt").write_bytes((trained / "pca.pt").read_bytes()[:100])
    message = fails("evaluate.py", "--score", "pca", *CPU)
    assert "pca.pt is damaged" in message and "remove pca.pt and run python -m detectors.pca again" in message
    state["config"]["training_images"] = "9 with checksum 0"
    torch.save(state, trained / "pca.pt")
    assert "other training_images" in fails("evaluate.py", "--score", "pca", *CPU)


def test_pictures_without_labels_get_a_verdict_and_a_heat_map(
    trained: Path, tmp_path: Path, run_here: Callable[..., None]
) -> None:
    (tmp_path / "new").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "new/noise.png")
    run_here("evaluate.py", "--images", "new", "--score", "pca_peak", *CPU)
    (row,) = read_scores(trained / "images-new")
    assert row["flagged"] == "1" and len(list((trained / "images-new/heat").iterdir())) == 1


def test_it_finds_the_same_again(trained: Path, run_here: Callable[..., None]) -> None:
    before = torch.load(trained / "pca.pt", weights_only=True)["pca"]
    (trained / "pca.pt").unlink()
    run_here("detectors.pca")
    after = torch.load(trained / "pca.pt", weights_only=True)["pca"]
    assert all(torch.equal(before[name], after[name]) for name in before)
