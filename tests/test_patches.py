"""Patches by hand and by property, what a training draws of them, and the file that holds many pictures."""

import shutil
import signal
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, run_together, start
from PIL import Image
from test_long_runs import assert_same_training

from anogan import images, loading, loop, patches, pictures, reconstruction, runs
from anogan.decoding import View
from anogan.pictures import Pictures

# ---- grid, cut, batches ---------------------------------------------------------------------------------------------


def test_places_by_hand() -> None:
    for (length, side, stride), expected in {
        (64, 64, 32): [0],
        (65, 64, 32): [0, 1],
        (96, 64, 32): [0, 32],
        (100, 64, 32): [0, 32, 36],
        (10, 4, 4): [0, 4, 6],
        (50, 64, 32): [-7],
        (51, 64, 32): [-6],
        (1, 32, 16): [-15],
    }.items():
        assert patches.places(length, side, stride).tolist() == expected
    corners = patches.grid((100, 70), 64, 32).tolist()
    assert corners == [[0, 0], [0, 6], [32, 0], [32, 6], [36, 0], [36, 6]]  # row by row


def test_a_grid_sees_every_pixel() -> None:
    for side, length in product((4, 7, 32), range(1, 130)):
        for stride in {1, side // 3, side // 2, side - 1, side} - {0}:
            at = patches.places(length, side, stride)
            if length <= side:
                assert len(at) == 1 and at[0] <= 0 and at[0] + side >= length
                continue
            assert at[0] == 0 and at[-1] + side == length
            steps = np.diff(at)
            assert (steps[:-1] == stride).all() and (steps > 0).all() and (steps <= stride).all()


def test_a_picture_smaller_than_a_patch_lies_on_black() -> None:
    picture = np.arange(1, 3 * 5 * 7 + 1, dtype=np.uint8).reshape(3, 5, 7)
    (patch,) = patches.cut(picture, patches.grid((5, 7), 8, 4), 8)
    np.testing.assert_array_equal(patch, np.pad(picture, ((0, 0), (1, 2), (0, 1))))
    (corner,) = patches.cut(picture, np.array([[3, -2]]), 4)
    np.testing.assert_array_equal(corner, np.pad(picture[:, 3:, :2], ((0, 0), (0, 2), (2, 0))))


SIZES = [(8, 8), (30, 17), (5, 8), (8, 21)]


def numbered() -> list[tuple[int, np.ndarray]]:
    """Pictures at positions with gaps between them."""
    random = np.random.default_rng(0)
    return [(3 * i + 1, random.integers(1, 256, (3, *size), dtype=np.uint8)) for i, size in enumerate(SIZES)]


def in_batches(batch_size: int) -> list[patches.Patches]:
    def corners_of(row: int, size: tuple[int, int]) -> patches.Corners:
        assert size == SIZES[row // 3]
        return patches.grid(size, 8, 4)

    return list(patches.batches(numbered(), corners_of, 8, batch_size))


def test_batches_hold_the_same_patches_whatever_their_size() -> None:
    (whole,) = in_batches(1000)
    expected = [patches.cut(picture, patches.grid(picture.shape[1:], 8, 4), 8) for _, picture in numbered()]
    counts = [len(each) for each in expected]
    assert counts == [1, 28, 1, 5] and len(whole) == 35
    np.testing.assert_array_equal(whole.pixels, np.concatenate(expected))
    np.testing.assert_array_equal(whole.row, np.repeat([1, 4, 7, 10], counts))
    np.testing.assert_array_equal(whole.number, np.concatenate([np.arange(count) for count in counts]))
    np.testing.assert_array_equal(whole.of, np.repeat(counts, counts))
    np.testing.assert_array_equal(whole.size, np.repeat(SIZES, counts, axis=0))
    for batch_size in (1, 2, 7, 28, 29, 34, 35):
        parts = in_batches(batch_size)
        assert [len(part) for part in parts[:-1]] == [batch_size] * (len(parts) - 1)
        for name in vars(whole):
            np.testing.assert_array_equal(np.concatenate([vars(part)[name] for part in parts]), vars(whole)[name])


# ---- stitching ------------------------------------------------------------------------------------------------------


def test_pixels_stitched_are_the_picture() -> None:
    for batch_size in (3, 1000):
        stitching = patches.Stitching()
        found = [each for part in in_batches(batch_size) for each in stitching.add(part, part.pixels)]
        for (row, whole), (expected_row, picture) in zip(found, numbered(), strict=True):
            assert row == expected_row
            np.testing.assert_allclose(whole, picture, rtol=1e-5)


SIDE, STRIDE = 32, 16


def stitched_errors(first: int) -> tuple[np.ndarray, patches.Corners]:
    """The map of a picture whose patches are each wrong by something smooth; the grid begins `first` pixels later."""
    size = 150, 117
    inner = patches.grid((size[0] - first, size[1] - first), SIDE, STRIDE) + first
    corners = np.unique(np.concatenate([patches.grid(size, SIDE, SIDE), inner]), axis=0) if first else inner
    random = np.random.default_rng(first)
    at = np.linspace(-1, 1, SIDE)
    level, down, across, bowl = random.normal(size=(4, len(corners), 1, 1))
    wrong = level + down * at[:, None] + across * at + bowl * (at[:, None] ** 2 + at**2)  # (P, side, side)
    (whole,) = patches.batches([(0, np.zeros((1, *size), np.uint8))], lambda *_: corners, SIDE, 1000)
    ((_, found),) = patches.Stitching().add(whole, torch.from_numpy(wrong[:, None]))
    return found[0].numpy(), corners


def seam() -> float:
    """How much steeper the difference of two maps, of which one has a shifted grid, is across the borders of patches
    than elsewhere, from a pixel to the next."""
    (one, corners), (other, shifted) = stitched_errors(0), stitched_errors(7)
    across, elsewhere = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(one - other, axis=axis))
        begin = np.unique(np.concatenate([corners, shifted])[:, axis])
        at = np.union1d(begin, begin + SIDE)
        is_border = np.isin(np.arange(steps.shape[axis]) + 1, at)
        across.append(steps.compress(is_border, axis).ravel())
        elsewhere.append(steps.compress(~is_border, axis).ravel())
    return float(np.concatenate(across).mean() / np.concatenate(elsewhere).mean())


def test_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seam() < 1.3
    monkeypatch.setattr(patches, "falling", lambda side: torch.ones(side, side))
    assert seam() > 5  # a plain mean has them


# ---- drawing --------------------------------------------------------------------------------------------------------


def of_places(sizes: list[tuple[int, int]], **about: object) -> Pictures:
    """Pictures in whose three channels each pixel says its picture, its row and its column."""
    pixels = [np.stack([np.full(size, i), *np.indices(size)]).astype(np.uint8).ravel() for i, size in enumerate(sizes)]
    view = View(32, 3, picture_size="own")
    return Pictures(np.concatenate(pixels), np.array(sizes), view, **about)


def drawn(found: Pictures, first_step: int, count: int, **where: int) -> torch.Tensor:
    """The patches of some steps of a training, together (N, 3, 32, 32)."""
    return torch.cat(list(islice(loop.real_batches(found, 8, 0, first_step, **where), count)))


def test_every_place_is_drawn_as_often_as_it_is_searched() -> None:
    found = of_places([(96, 128), (33, 250), (32, 32)])
    x = found.draw(np.repeat([0, 1, 2], [20_000, 4_000, 10]), np.random.default_rng(0)).int()
    top, left = x[:, 1, 0, 0].numpy(), x[:, 2, 0, 0].numpy()
    for channel, corner in ((1, top), (2, left)):  # each is what lies at its corner
        of_axis = torch.from_numpy(corner)[:, None] + torch.arange(32)
        expected = of_axis[:, :, None] if channel == 1 else of_axis[:, None, :]
        assert (x[:, channel] == expected).all()
    for corner, side in ((top[:20_000], 96), (left[:20_000], 128)):
        at = patches.places(side, 32, 16)
        nearest = np.abs(corner[:, None] - at + 0.25).argmin(1)
        share = np.bincount(nearest) / len(corner)
        np.testing.assert_allclose(share, 1 / len(at), atol=0.02)
        assert len(np.unique(corner)) == side - 32 + 1
    assert set(top[20_000:24_000]) == {0, 1} and set(left[20_000:24_000]) == set(range(250 - 32 + 1))
    assert not top[24_000:].any() and not left[24_000:].any()


def test_an_epoch_draws_each_picture_as_often_as_its_size_says() -> None:
    found = of_places([(32, 32), (64, 96), (40, 33)])
    assert Counter(found.turns.tolist()) == {0: 1, 1: 6, 2: 1}
    assert Counter(drawn(found, 0, 1)[:, 0, 0, 0].tolist()) == {0: 1, 1: 6, 2: 1}
    whole = Pictures(found.pixels, found.size, View(32, 3, fit="pad"))
    assert whole.turns.tolist() == [0, 1, 2]


def test_what_a_step_draws_depends_on_seed_step_and_rank_alone() -> None:
    found = of_places([(96, 128)] * 5, augment="turns")
    both = drawn(found, 0, 12)
    for first in (1, 7, 11):  # gone on with there, in the middle of an epoch or not
        assert torch.equal(drawn(found, first, 12 - first), both[8 * first :])
    assert len(torch.unique(both.flatten(1), dim=0)) == len(both)  # no step repeats what another one has seen
    one, other = (drawn(found, 0, 6, rank=rank, processes=2) for rank in range(2))
    assert not (one == other).flatten(1).all(1).any()
    shown = found.some(20)
    assert torch.equal(shown, found.some(20)) and set(shown[:, 0, 0, 0].tolist()) == set(range(5))


def turned_ways(x: torch.Tensor) -> list[bytes]:
    """A patch (C, H, H) mirrored and turned in every way."""
    return [
        way.contiguous().numpy().tobytes() for k in range(4) for way in (x.rot90(k, (1, 2)), x.flip(2).rot90(k, (1, 2)))
    ]


def test_turns_are_equally_likely() -> None:
    one = of_places([(32, 32)])
    patch = one.draw(np.array([0]), np.random.default_rng(0))[0]
    mirrored = [patch.flip(dims).numpy().tobytes() for dims in ((), (1,), (2,), (1, 2))]
    for augment, ways in ((None, [mirrored[0]]), ("flips", mirrored), ("turns", turned_ways(patch))):
        found = Pictures(one.pixels, one.size, one.view, augment)
        x = found.draw(np.zeros(8000, np.int64), np.random.default_rng(1))
        counts = Counter(each.numpy().tobytes() for each in x)
        assert counts.keys() == set(ways) and len(set(ways)) == len(ways)
        assert max(abs(count * len(ways) / 8000 - 1) for count in counts.values()) < 0.1


# ---- --normalise patch ----------------------------------------------------------------------------------------------


def test_normalised_by_hand() -> None:
    x = torch.full((5, 3, 8, 8), 100, dtype=torch.uint8)
    x[0, :, :4], x[0, :, 4:] = 0, 255  # a deviation of 1 in [-1, 1], of which 4 fill the range
    x[1, :, :4], x[1, :, 4:] = 75, 125  # the same at less contrast and another exposure
    x[2, 0], x[2, 1:] = 200, 50  # colours stay: one mean for all channels
    x[3, 0, 0, 0] = 255  # 13.8 deviations above the mean, cut off
    x[4, 0, 0, 0] = 105  # next to even: FLOOR in place of a deviation of 0.0028
    found = images.to_model(x, normalise=True)
    for i in (0, 1):
        torch.testing.assert_close(found[i, :, :4], torch.full((3, 4, 8), -0.25))
        torch.testing.assert_close(found[i, :, 4:], torch.full((3, 4, 8), 0.25))
    torch.testing.assert_close(found[2, :, 0, 0], torch.tensor([2**0.5, -(0.5**0.5), -(0.5**0.5)]) / 4)
    assert found[3, 0, 0, 0] == 1 and found[3].max() <= 1
    assert found[4, 0, 0, 0].item() == pytest.approx(5 / 127.5 * 191 / 192 / (0.04 * 4), abs=1e-6)
    back = images.to_levels(found, x, normalise=True)
    for i in (0, 1, 2, 4):
        torch.testing.assert_close(back[i], x[i] / 127.5 - 1, atol=1e-6, rtol=0)
    plain = images.to_model(x)
    assert torch.equal(plain, x / 127.5 - 1) and images.to_levels(plain, x) is plain


# ---- training -------------------------------------------------------------------------------------------------------

OWN = ["--picture-size", "own"]
TRAIN = ["train_gan.py", "--dataset", "set", "--run-dir", "run", "--epochs", "2", *TINY, "--checkpoint-every", "14"]
TRAIN += ["--batch-size", "4", "--precision", "fp32"]
ALL = [*TRAIN, *OWN, "--augment", "turns", "--normalise", "patch"]
SMALL = 5000  # bytes of pictures in memory: two of them have more

# Run a script with so many bytes of pictures in memory, and be killed: after 18 steps, while the file of pictures is
# written, or before it is described; or be on another machine than the first process
LAUNCH = """
import os, signal, sys
from conftest import run_main
from anogan import files, kept, loading, loop, pictures

def dying(function, calls):
    def call(*arguments, **options):
        nonlocal calls
        calls -= 1
        if calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

def one_by_one(batches, count, name="reading"):
    for batch in batches:
        yield dying_picture(batch)

pictures.MEMORY, moment, *command = int(sys.argv[1]), *sys.argv[2:]
dying_picture = dying(lambda batch: batch, 5)
if moment == "step":
    loop.Loop.log = dying(loop.Loop.log, 18)
elif moment == "picture":
    loading.with_bar = one_by_one
elif moment == "description":
    files.write_arrays = dying(files.write_arrays, 0)
elif moment == "elsewhere" and os.environ["RANK"] == "1":
    kept.read_about = lambda *_: None
run_main(*command)
"""


def noise(path: Path, size: tuple[int, int], seed: int, in_colour: bool = False) -> None:
    """A picture of this (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size[::-1], 3) if in_colour else size[::-1]
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
    """Ten grey pictures of several sizes in the folder `set`, all of which train."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")  # decodes in this process: to start others takes longer
    for i in range(10):
        noise(tmp_path / f"set/train/good/{i}.png", (50 + 5 * i, 90 - 4 * i), i)
    noise(tmp_path / "set/validation/good/0.png", (64, 64), 11)
    (tmp_path / "launch.py").write_text(LAUNCH)
    return tmp_path / "set"


def launch(cwd: Path, moment: str, *command: str, **options: object) -> tuple[int, str]:
    """Run a script as LAUNCH says: exit code, and what it printed."""
    command = str(cwd / "launch.py"), str(SMALL), moment, *command
    return start(cwd, *command, environment={"LOCAL_WORLD_SIZE": "99"}, **options).end()


def test_a_killed_training_from_a_file_is_one_from_memory_that_nothing_disturbed(
    data: Path, tmp_path: Path, run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(*ALL)
    assert not Path("run", pictures.FILE).exists()
    Path("run").rename("whole")
    code, printed = launch(tmp_path, "step", *ALL)
    assert code == -signal.SIGKILL and torch.load("run/gan.pt", weights_only=True)["step"] == 14, printed
    code, printed = launch(tmp_path, "", *ALL)
    assert code == 0 and "holds 14 steps" in printed, printed
    assert Path("run", pictures.FILE).exists()
    assert_same_training(Path("run"), Path("whole"))
    # nothing is decoded again, for a detector neither
    monkeypatch.setattr(pictures, "MEMORY", SMALL)
    monkeypatch.setattr(loading, "image_batches", None)
    run_here(*ALL)
    run_here("detectors.acae", "--run-dir", "run", "--epochs", "1", "--device", "cpu")
    gan = runs.load_gan(Path("run"), torch.device("cpu"))
    training = runs.images_of_gan(gan, skip_unreadable=True)
    assert training.augment == "turns" and gan.image_channels == 1
    x = gan.to_model(training.some(40))
    assert x.mean((1, 2, 3)).abs().max() < 0.01 and x.std((1, 2, 3), correction=0).sub(0.25).abs().max() < 0.01


def test_two_processes_share_the_file(data: Path, tmp_path: Path) -> None:
    for memory in (10**9, SMALL):
        done = run_together(tmp_path, str(tmp_path / "launch.py"), str(memory), "", *ALL)
        assert [code for code, _ in done] == [0, 0], done
        if memory != SMALL:
            (tmp_path / "run").rename(tmp_path / "whole")
    assert (tmp_path / "run" / pictures.FILE).exists()
    assert_same_training(tmp_path / "run", tmp_path / "whole")
    done = run_together(tmp_path, str(tmp_path / "launch.py"), str(SMALL), "elsewhere", *ALL, "--fresh")
    assert [code for code, _ in done] == [1, 1] and not any("Traceback" in printed for _, printed in done), done
    assert f"error: run/{pictures.FILE} is not there for every process" in done[1][1]


def listed(data: Path) -> images.ImageSet:
    return images.open_split(str(data), "train", "good")


def same(one: Pictures, other: Pictures) -> bool:
    return (
        one.view == other.view
        and np.array_equal(one.size, other.size)
        and torch.equal(one.some(50), other.some(50))
        and len(one) > 0
    )


def test_the_file_is_made_again_when_it_is_not_the_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, path = View(32, 3, picture_size="own"), tmp_path / pictures.FILE
    about = path.with_suffix(".npz")

    def load(view: View = view) -> bool:
        """Whether the file is made again; what comes from it is what memory would hold."""
        before = path.stat().st_ino if path.exists() else None
        monkeypatch.setattr(pictures, "MEMORY", SMALL)
        found = pictures.load(listed(data), view, path, find_channels=True)
        assert found.pixels == path and not list(tmp_path.glob(".partial*"))
        assert same(found, pictures.load(listed(data), view, find_channels=True))
        return path.stat().st_ino != before

    assert load() and not load()
    for spoilt in (path, about):
        content = spoilt.read_bytes()
        for kept in (content[:-1], content[:40], b""):
            spoilt.write_bytes(kept)
            assert load() and not load()
        spoilt.unlink()
        assert load() and not load()
    noise(data / "train/good/3.png", (65, 78), 99)  # of the same size
    assert load() and not load()
    smaller = View(32, 3, picture_size=40)
    assert load(smaller) and not load(smaller) and load()
    noise(data / "train/good/9.png", (95, 54), 99, in_colour=True)  # the last one
    assert load() and not load()
    assert pictures.load(listed(data), view, path, find_channels=True).view.channels == 3


def test_what_a_kill_or_a_full_disk_leaves_is_not_taken_for_whole(
    data: Path, tmp_path: Path, run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    code, printed = launch(tmp_path, "", *ALL, largest_file=20_000)
    assert code == 1 and f"error: cannot write run/{pictures.FILE}" in printed and "Traceback" not in printed
    assert [path.name for path in run.iterdir()] == [".lock"]
    assert launch(tmp_path, "picture", *ALL)[0] == -signal.SIGKILL
    assert not (run / pictures.FILE).exists() and list(run.glob(f".partial-*{pictures.FILE}"))
    assert launch(tmp_path, "", *ALL)[0] == 0
    run.rename(tmp_path / "first")

    # killed between the two files, those of other pictures with as many bytes
    run.mkdir()
    for path in (tmp_path / "first").glob("training-pictures.*"):
        shutil.copy(path, run)
    first = (data / "train/good/3.png").read_bytes()
    noise(data / "train/good/3.png", (65, 78), 99)
    assert launch(tmp_path, "description", *ALL)[0] == -signal.SIGKILL
    assert (run / pictures.FILE).read_bytes() != (tmp_path / "first" / pictures.FILE).read_bytes()
    (data / "train/good/3.png").write_bytes(first)
    assert launch(tmp_path, "", *ALL)[0] == 0
    assert_same_training(run, tmp_path / "first")


def test_memory_that_large_pictures_take(
    data: Path, run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of training pictures their bytes twice, while they are joined; the reconstruction check holds one at a time."""
    for i in range(10):
        noise(data / f"train/good/{i}.png", (1200, 1000), i)
    run_here(*TRAIN, "--picture-size", "32", "--batch-size", "16")
    gan = replace(runs.load_gan(Path("run"), torch.device("cpu")), picture_size="own")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # what comes from workers lies in memory in another order
    peaks = []
    for load in (
        lambda: pictures.load(listed(data), gan.view, find_channels=True),
        lambda: reconstruction._median(gan, listed(data)),
    ):
        tracemalloc.start()
        load()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 2.5 * 12e6 and peaks[1] < 8e6  # bytes; all pictures have 12e6


def test_flags_and_pictures_that_cannot_be_used(
    data: Path, run_here: Callable[..., None], fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(*TRAIN, "--picture-size", "31")
    assert message == "error: --picture-size 31 is less than --image-size 32, the side of a patch"
    assert "--fit is for whole pictures" in fails(*TRAIN, *OWN, "--fit", "pad")
    noise(data / "train/good/3.png", (31, 64), 3)
    assert fails(*TRAIN, *OWN) == (
        "error: cannot read the image train/good/3.png (it has 31x64 pixels, smaller than a patch of 32x32: leave it "
        "out, or train with --picture-size 32, to which smaller pictures are enlarged): replace it, or use "
        "--skip-unreadable"
    )
    run_here(*TRAIN, *OWN, "--skip-unreadable")
    printed = capsys.readouterr()
    assert "skipped 1 of 10 images" in printed.out and "normal class: good (9 images, " in printed.out
    assert printed.err.count("skipped, cannot be read: train/good/3.png (it has 31x64 pixels") == 1
    run_here(*TRAIN, "--picture-size", "32", "--fresh")
    said = "1 of 10 pictures are enlarged to a shorter side of 32, such as train/good/3.png"
    assert capsys.readouterr().out.count(said) == 1
