"""Decoded pictures in the run folder: each is decoded once, they are those of the set, and nothing depends on them."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from anogan import decoding, images, kept, loading, runs

pytestmark = pytest.mark.usefixtures("undrawn")

RUN = ["--run-dir", "run"]
QUICK = [*RUN, "--device", "cpu"]


def noise(path: Path, seed: int, size: tuple[int, int] = (44, 36)) -> None:
    """A grey picture of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def trained(tmp_path: Path, run_here: Callable[..., None]) -> Path:
    """A GAN of patches, trained for some steps on noise; its run folder. No worker processes decode."""
    counts = {"train/good": 12, "test/good": 3, "test/odd": 3}
    names = [f"set/{name}/{i}.png" for name, count in counts.items() for i in range(count)]
    for seed, name in enumerate(names):
        noise(tmp_path / name, seed)
    run_here("train_gan.py", "--dataset", "set", "--epochs", "1", "--picture-size", "own", *TINY, *RUN)
    return tmp_path / "run"


def scores_of(run_dir: Path) -> bytes:
    return (run_dir / "scores.csv").read_bytes()


def evaluate(run_here: Callable[..., None]) -> None:
    run_here("evaluate.py", *QUICK, "--bootstrap", "5", "--score", "p_d")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The pictures that were decoded, in this process and in no other."""
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "1000")
    found, as_seen = [], decoding.as_seen

    def noted(image: Image.Image, view: decoding.View) -> decoding.Seen:
        found.append(np.asarray(image).tobytes())
        return as_seen(image, view)

    monkeypatch.setattr(decoding, "as_seen", noted)
    return found


def test_each_picture_is_decoded_once(
    trained: Path, run_here: Callable[..., None], decoded: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """By the search, the scores, the maps, what is usual, the figures and the report together."""
    run_here("fit_latent.py", *QUICK, "--steps", "2")
    evaluate(run_here)
    expected = [np.asarray(Image.open(path)).tobytes() for path in sorted(trained.parent.glob("set/*/*/*.png"))]
    assert sorted(decoded) == sorted(expected)  # those of train/ for their median
    evaluate(run_here)
    assert len(decoded) == len(expected)
    before = scores_of(trained)

    for path in trained.glob("pictures-*"):
        path.unlink()
    runs_kept, runs.MOST_KEPT = runs.MOST_KEPT, 6 * 44 * 36 - 1
    try:
        capsys.readouterr()
        evaluate(run_here)
    finally:
        runs.MOST_KEPT = runs_kept
    assert "test: more than" in capsys.readouterr().out
    assert not (trained / "pictures-test.bin").exists() and (trained / "pictures-validation.bin").exists()
    assert scores_of(trained) == before


def test_they_are_those_of_the_set(trained: Path, run_here: Callable[..., None], decoded: list[bytes]) -> None:
    """A picture that was replaced is decoded anew; a damaged file, and one of another GAN, is made anew."""
    evaluate(run_here)
    before, path = scores_of(trained), trained / "pictures-test.bin"
    whole, about = path.read_bytes(), path.with_suffix(".npz").read_bytes()
    for content, of in ((whole[:-1], about), (whole[1:], about), (whole, about[:-30]), (b"", about)):
        path.write_bytes(content)
        path.with_suffix(".npz").write_bytes(of)
        evaluate(run_here)
        assert scores_of(trained) == before and path.read_bytes() == whole

    noise(trained.parent / "set/test/odd/0.png", 99)
    evaluate(run_here)
    assert scores_of(trained) != before
    # killed between the two files: the pixels are of this set, and what is said of them is of the one before
    path.with_suffix(".npz").write_bytes(about)
    assert kept.read_about(path) is None
    noise(trained.parent / "set/test/odd/0.png", 15)  # as it was
    del decoded[:]
    evaluate(run_here)
    assert scores_of(trained) == before and len(decoded) == 6


def test_a_kill_leaves_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gan = runs.load_gan(trained, torch.device("cpu"))
    test = runs.open_split(gan, "test")
    seen_batches = loading.seen_batches

    def killed(*given: object, **named: object):
        yield next(seen_batches(*given, **named))
        raise KeyboardInterrupt

    with monkeypatch.context() as within:
        within.setattr(loading, "seen_batches", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.keep_decoded(gan, test, "test")
    assert not list(trained.glob("*pictures-test*"))
    found = runs.keep_decoded(gan, test, "test")
    for row in range(len(test)):
        assert (found.kept.seen(test.index[row]).pixels[0] == np.asarray(test.open(row))).all()
    with pytest.raises(ValueError, match="read-only"):  # a file of several scripts
        np.memmap(found.kept.path, np.uint8, "r")[0] = 1


def test_other_views_do_not_read_them(trained: Path) -> None:
    """A benchmark that sees the same pictures in another way gets them in that way."""
    gan = runs.load_gan(trained, torch.device("cpu"))
    found = runs.keep_decoded(gan, runs.open_split(gan, "test"), "test")
    small = replace(gan.view, picture_size=None, fit="stretch")
    pixels, _ = loading.load_images(found, small)
    assert (pixels == loading.load_images(runs.open_split(gan, "test"), small)[0]).all() and pixels.shape[2] == 32
    assert loading.seen_sizes(found, gan.view).tolist() == 6 * [[44, 36]]
    assert found.kept.is_of(replace(gan.view, normalise=True)) and not found.kept.is_of(small)


def test_pictures_that_cannot_be_read(
    trained: Path, run_here: Callable[..., None], fails: Callable[..., str], decoded: list[bytes]
) -> None:
    """They are left out where that is asked for, and named each time; the others are decoded once."""
    (trained.parent / "set/test/odd/2.png").write_bytes(b"no picture")
    assert "cannot read the image test/odd/2.png" in fails("evaluate.py", *QUICK, "--score", "p_d")
    assert not (trained / "pictures-test.bin").exists()
    for _ in range(2):
        run_here("evaluate.py", *QUICK, "--score", "p_d", "--bootstrap", "5", "--skip-unreadable")
    assert len(scores_of(trained).splitlines()) == 1 + 5 + len(runs.open_split(_gan(trained), "validation"))
    assert set(map(decoded.count, decoded)) <= {1, 2}  # the first time it was in vain
    assert "cannot read the image test/odd/2.png" in fails("evaluate.py", *QUICK, "--score", "p_d")


def _gan(run_dir: Path) -> runs.TrainedGAN:
    return runs.load_gan(run_dir, torch.device("cpu"))


def test_two_pictures_of_the_same_bytes(tmp_path: Path) -> None:
    """They have one number, and are kept once."""
    for name in "ab":
        noise(tmp_path / f"{name}.png", 1)
    both = images.open_pictures([str(tmp_path)])
    view = decoding.View(8, 1)
    seen = [(int(number), decoding.as_seen(both.open(row), view)) for row, number in enumerate(both.index)]
    assert seen[0][0] == seen[1][0]
    kept.write(tmp_path / "it.bin", "gan", view, both.index, seen)
    found = kept.read(tmp_path / "it.bin", "gan", view)
    assert len(found.index) == 1 and (found.seen(seen[1][0]).pixels == seen[1][1].pixels).all()
    assert kept.read(tmp_path / "it.bin", "other", view) is None
    assert kept.read(tmp_path / "it.bin", "gan", replace(view, fit="pad")) is None
