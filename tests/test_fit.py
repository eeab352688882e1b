"""Whatever the networks see of a picture, its heat map, marked picture and pixel figures lie on the defect.

Defects are planted in a corner and off the middle of pictures of odd sizes; G draws about the grey that surrounds them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import ExifTags, Image
from scipy.ndimage import binary_dilation

from anogan import heatmaps, judge, metrics, plots, runs, scores, scoring

CPU = ["--device", "cpu"]
CROP, STRETCH, PAD = (["--fit", fit] for fit in ("crop", "stretch", "pad"))
OWN, ENLARGED = (["--picture-size", size] for size in ("own", "70"))
SIZES = [(333, 77), (61, 240), (101, 100), (131, 97)]  # (width, height) as shown; the last ones lie turned on the disk
GREYS = {8: (128, 2, 230), 16: (20_000, 50, 24_000)}  # of the surroundings, their deviation, and of a defect
LEVEL = 0.15  # a difference that is far above that of the surroundings


def planted(size: tuple[int, int], place: str, corner: int) -> np.ndarray:
    """A defect as a mask (height, width): in one of four corners, or off the middle of the square in the middle."""
    width, height = size
    mask = np.zeros((height, width), bool)
    if place == "corner":
        mask[: height // 3, : width // 4] = True
        return mask[:: 1 - 2 * (corner % 2), :: 1 - 2 * (corner // 2)]
    side = min(size)
    top, left = (height - side) // 2 + side // 8, (width - side) // 2 + side // 8
    mask[top : top + side // 2, left : left + side // 3] = True
    return mask


def save(picture: np.ndarray, path: Path, is_turned: bool) -> None:
    """Write what is to be shown; turned by 90 degrees on the disk, with the EXIF tag that turns it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = Image.Exif()
    tag[ExifTags.Base.Orientation] = 6 if is_turned else 1
    Image.fromarray(np.rot90(picture) if is_turned else picture).save(path, exif=tag)


def draw_data_set(root: Path, bits: int) -> dict[str, np.ndarray]:
    """Normal pictures, and one of each size with a defect in each place; returns their masks, as shown, by source."""
    random, masks = np.random.default_rng(0), {}
    grey, deviation, of_defect = GREYS[bits]
    for name, count in (("train/good", 12), ("test/good", 1), ("test/corner", 4), ("test/middle", 4)):
        for i in range(count):
            size, is_turned = SIZES[i % 4], i % 4 == 3
            exposure = (
                (i / 5.5 - 1) * 60 * deviation if name == "train/good" else 0
            )  # which spreads the levels of 16 bits
            pixels = random.normal(grey + exposure, deviation, size[::-1])
            file = f"{i:03d}.{'tif' if bits == 16 and is_turned else 'png'}"
            if "good" not in name:
                mask = planted(size, name.removeprefix("test/"), i)
                pixels[mask] = of_defect
                masks[f"{name}/{file}"] = mask
                path = root / name.replace("test", "ground_truth") / f"{i:03d}_mask.png"
                save(mask, path, is_turned=is_turned and "middle" in name)  # the other one as the picture is shown
            save(pixels.round().astype(f"uint{bits}"), root / name / file, is_turned)
    return masks


def own_pixels(size: tuple[int, int], flags: list[str]) -> np.ndarray:
    """How many pixels of a picture, down and across, one pixel is that the networks see; 1 where they see more."""
    width, height = size
    if flags == STRETCH:
        return np.array([height, width]) / 32
    of_kind = {"crop": min(size) / 32, "pad": max(size) / 32, "own": 1.0, "70": min(size) / 70}
    return np.full(2, max(1.0, of_kind[flags[1]]))


def is_middle_square(is_seen: np.ndarray) -> bool:
    """Whether what is seen of a picture (height, width) is the square in its middle, give or take half a pixel."""
    rows, columns = np.flatnonzero(is_seen.any(1)), np.flatnonzero(is_seen.any(0))
    margins = [abs(each[0] - (side - 1 - each[-1])) for each, side in zip((rows, columns), is_seen.shape, strict=True)]
    return len(rows) == len(columns) == min(is_seen.shape) and max(margins) <= 1 and is_seen.sum() == len(rows) ** 2


def assert_on(hot: np.ndarray, mask: np.ndarray, seen: np.ndarray) -> None:
    """What is hot covers a mask and goes no farther than one pixel that the networks see, of `seen` own pixels down and
    across; the centres of the two are half of that apart at most."""
    around = np.ones(2 * np.ceil(1 + seen).astype(int) + 1)
    inner = ~binary_dilation(~mask, around)
    assert inner.any() and hot[inner].all()
    assert not hot[~binary_dilation(mask, around)].any()
    centres = [np.argwhere(each).mean(0) for each in (hot, mask)]
    assert (np.abs(centres[0] - centres[1]) <= 0.3 + seen / 2).all(), centres


@dataclass(frozen=True)
class Found:
    """What was found in a test picture at its own size, (height, width) each."""

    heat: np.ndarray
    is_red: np.ndarray  # in the marked picture


def find(run_dir: Path, level: float) -> tuple[dict[str, Found], dict]:
    """What was found in every test picture, by source; and the pixel figures."""
    gan = runs.load_gan(run_dir, torch.device("cpu"))
    request = scoring.Request("peak", True, 64, False)
    # nothing is usual, so that the heat is the difference itself
    normals = scoring.Normals({"peak": np.zeros(1)}, None, usual={}, patch_range=(1, 99))
    test = scoring.score_run(gan, {"test": runs.open_split(gan, "test")}, scores.SEARCH, request, normals)["test"]
    judge.mark_pictures(run_dir, test, SimpleNamespace(level=level, brightest=1.0))
    found = {}
    for row, heat in test.heats():
        source, picture = str(test.images.source[row]), test.images.picture(row, gan.view)
        marked = np.asarray(Image.open(run_dir / f"marked/{source.removeprefix('test/')}.png")).astype(int)
        is_red = (marked != np.asarray(picture)).any(2)
        assert (marked[is_red][:, 0] > marked[is_red][:, 1] + 50).all()
        found[source] = Found(heatmaps.at_own_size(heat, picture.size, gan.view), is_red)
        (shown,) = test.shown(np.array([row]))  # what figures and reports show
        np.testing.assert_array_equal(shown.heat, heat)
        is_bright = shown.real.mean(2) > 0.6 * 255
        assert (is_bright == (heat > level)).mean() > 0.8 and is_bright.any() == (heat > level).any()
    return found, metrics.pixel_metrics(test, level, 0.5)


@pytest.mark.parametrize(
    ("flags", "bits"),
    [(CROP, 8), (STRETCH, 8), (PAD, 8), (OWN, 8), (ENLARGED, 8), (PAD, 16), (OWN, 16)],
    ids=lambda each: each[-1] if isinstance(each, list) else f"{each} bits",
)
def test_what_is_found_lies_on_the_mask(
    flags: list[str], bits: int, tmp_path: Path, run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")  # decodes in this process: to start others takes longer
    monkeypatch.setattr(plots, "save", lambda figure, path: None)  # nobody looks at the figures
    masks = draw_data_set(tmp_path / "set", bits)
    of_run = ["--run-dir", "run", "--epochs", "1", "--lr", "0"]  # G stays at the grey that it begins with
    run_here("train_gan.py", "--dataset", "set", *TINY, *of_run, *flags)
    run_here("fit_latent.py", "--run-dir", "run", "--steps", "1", "--candidates", "1", *CPU)
    found, figures = find(Path("run"), LEVEL)
    unseen_pixels = unseen_masks = 0
    for source, of_picture in found.items():
        size = of_picture.heat.shape[::-1]
        is_seen = ~np.isnan(of_picture.heat)
        assert is_middle_square(is_seen) if flags == CROP else is_seen.all()
        hot = of_picture.heat > LEVEL
        np.testing.assert_array_equal(of_picture.is_red, hot)
        mask = masks.get(source, np.zeros(size[::-1], bool))
        unseen_pixels += (mask & ~is_seen).sum()
        unseen_masks += mask.any() and not (mask & is_seen).any()
        if (mask & is_seen).any():
            assert_on(hot, mask & is_seen, own_pixels(size, flags))
        else:
            assert not hot.any()
    assert unseen_masks == (2 if flags == CROP else 0)  # the corners of the longest pictures
    assert figures["masks_unseen"] == unseen_masks and figures["regions_found"] == 8 - unseen_masks
    assert figures["marked_unseen"] == unseen_pixels / sum(mask.sum() for mask in masks.values())
    assert flags == CROP or figures["pixel_roc_auc"] > 0.999
