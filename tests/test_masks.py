"""Masks as people have them: which pixels count, whose mask it is, and what evaluate.py says of those it cannot use."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import ExifTags, Image, ImageFilter, ImageOps

from anogan import heatmaps, images, loading, masks, report, runs, verdicts
from anogan.decoding import View
from anogan.metrics import pixel_figures, pixel_metrics
from anogan.scores import DIFFERENCE
from util import InputError

CPU = ["--device", "cpu", "--bootstrap", "5"]
ORIENTATION = ExifTags.Base.Orientation
SHAPE = np.zeros((48, 48), bool)
SHAPE[18:26, 21:29] = True
GREY = (255 * SHAPE).astype(np.uint8)


def coloured(background: tuple[int, ...], shape: tuple[int, ...]) -> Image.Image:
    """The shape in one colour on another, RGB or RGBA."""
    return Image.fromarray(np.where(SHAPE[..., None], np.uint8(shape), np.uint8(background)))


def with_palette(colours: list[int], indices: np.ndarray = SHAPE) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8)).convert("P")
    image.putpalette(colours)
    return image


def saved(image: Image.Image, ending: str, folder: Path, **options: object) -> np.ndarray:
    """What counts of a mask that was saved to such a file, of a grey picture of its size."""
    path = folder / f"000_mask.{ending}"
    image.save(path, **options)
    return masks.open_mask(path, "test/bad/000.png", Image.new("L", image.size), image.size)


RED, WHITE, BLACK = (200, 0, 0), (255, 255, 255), (0, 0, 0)
ENDINGS = {
    "1 bit": (Image.fromarray(SHAPE), "png"),
    "grey": (Image.fromarray(GREY), "bmp"),
    "labels 0 and 1": (Image.fromarray(SHAPE.astype(np.uint8)), "png"),
    "16 bits": (Image.fromarray(SHAPE * np.uint16(65535)), "png"),
    "16 bits, labels": (Image.fromarray(SHAPE.astype(np.uint16)), "png"),
    "floating point": (Image.fromarray(SHAPE.astype(np.float32)), "tif"),
    "RGB, white on black": (coloured(BLACK, WHITE), "png"),
    "RGB, red on black": (coloured(BLACK, RED), "png"),
    "RGB, red on white": (coloured(WHITE, RED), "png"),
    "RGB, yellow on violet": (coloured((68, 1, 84), (253, 231, 37)), "png"),
    "RGBA, white on transparent white": (coloured((*WHITE, 0), (*WHITE, 255)), "png"),
    "RGBA, black on transparent black": (coloured((*BLACK, 0), (*BLACK, 255)), "png"),
    "RGBA, half opaque": (coloured((*BLACK, 0), (*RED, 128)), "png"),
    "RGBA, opaque": (coloured((*BLACK, 255), (*WHITE, 255)), "png"),
    "palette": (with_palette([*BLACK, *RED]), "png"),
    "palette that begins with white": (with_palette([*WHITE, *BLACK, *RED], 2 * SHAPE), "png"),
    "grey palette, white first": (with_palette([*WHITE, *BLACK], ~SHAPE), "png"),
    "GIF, transparent": (coloured((*WHITE, 0), (*WHITE, 255)), "gif"),
}


@pytest.mark.parametrize("kind", ENDINGS)
def test_the_shape_counts_however_it_is_drawn(kind: str, tmp_path: Path) -> None:
    image, ending = ENDINGS[kind]
    np.testing.assert_array_equal(saved(image, ending, tmp_path), SHAPE)


def test_jpeg_leaves_no_specks(tmp_path: Path) -> None:
    """Anything above 0 would make it dozens of regions; that noise saved as PNG again is told from labels, or named."""
    for quality in (50, 75, 90, 95, 98, 100):
        for image in (Image.fromarray(GREY), coloured(BLACK, WHITE)):
            counted = saved(image, "jpg", tmp_path, quality=quality)
            np.testing.assert_array_equal(counted, SHAPE)
        content = io.BytesIO()
        Image.fromarray(GREY).save(content, "JPEG", quality=quality)
        if quality < 98:
            np.testing.assert_array_equal(saved(Image.open(content), "png", tmp_path), SHAPE)
    with pytest.raises(InputError, match=r"000_mask.png of test/bad/000.png has levels next to the background \(1\)"):
        saved(Image.open(content), "png", tmp_path)
    heat = SHAPE.astype(float)
    found = pixel_figures([(heat, counted)], 0.5)
    assert found["pixel_roc_auc"] == 1 and found["regions"] == 1
    red = np.asarray(coloured(WHITE, RED).resize((480, 480), Image.Resampling.NEAREST))
    counted = saved(Image.fromarray(red), "jpg", tmp_path, quality=75)
    assert (counted != SHAPE.repeat(10, 0).repeat(10, 1)).mean() < 0.002


def test_a_soft_shape_counts_from_half_of_its_core(tmp_path: Path) -> None:
    soft = np.asarray(Image.fromarray(GREY).filter(ImageFilter.GaussianBlur(1.5)))
    assert len(np.unique(soft)) > 10 and soft.max() < 255
    expected = soft >= soft.max() / 2
    assert 40 < expected.sum() < 90 < (soft > 0).sum()
    for image in (
        Image.fromarray(soft),
        Image.fromarray(soft * np.uint16(257)),
        Image.fromarray(soft / np.float32(255)),
        Image.merge("RGBA", [Image.new("L", (48, 48), 255)] * 3 + [Image.fromarray(soft)]),
        Image.merge("RGB", [Image.fromarray(soft), Image.new("L", (48, 48)), Image.new("L", (48, 48))]),
    ):
        np.testing.assert_array_equal(saved(image, "tif", tmp_path), expected)


def test_every_label_counts(tmp_path: Path) -> None:
    """A 1 beside a 2 is a defect, not the soft edge of one; so is the darkest of many."""
    labels = np.zeros((48, 48), np.uint8)
    labels[4:8, 4:8], labels[18:26, 18:26], labels[30:34, 4:20] = 1, 2, 3
    for factor in (1, 20, 85):
        in_colours = with_palette([*BLACK, 64, 0, 0, 192, 0, 0, 0, 128, 0], labels)
        for image in (Image.fromarray(factor * labels), in_colours):
            np.testing.assert_array_equal(saved(image, "png", tmp_path), labels > 0)
    many = np.zeros((48, 48), np.uint8)
    many[::6, 4:8] = np.arange(1, 9)[:, None]
    np.testing.assert_array_equal(saved(Image.fromarray(many), "png", tmp_path), many > 0)


def test_what_marks_most_of_a_picture_is_refused(tmp_path: Path) -> None:
    large = np.zeros((48, 48), np.uint8)
    large[:30] = 255
    inverted = {
        "grey": (255 - GREY, 97),
        "1 bit": (~SHAPE, 97),
        "white": (np.full_like(GREY, 255), 100),
        "labels": (np.ones_like(GREY), 100),
        "RGB": (np.asarray(coloured(WHITE, BLACK)), 97),
        "transparent": (np.asarray(coloured((*BLACK, 255), (*BLACK, 0))), 97),
        "large": (large, 62),
    }
    for kind, (pixels, share) in inverted.items():
        with pytest.raises(InputError, match=rf"000_mask.png marks {share}% of test/bad/000.png, more than half"):
            print(kind)
            saved(Image.fromarray(pixels), "png", tmp_path)
    with pytest.raises(InputError, match="more than half"):
        saved(Image.fromarray(255 - GREY), "jpg", tmp_path)
    large[24:] = 0
    assert saved(Image.fromarray(large), "png", tmp_path).mean() == 0.5


def test_damaged_masks_are_named(tmp_path: Path) -> None:
    picture, path = Image.new("L", (48, 48)), tmp_path / "000_mask.png"
    Image.fromarray(GREY).save(path)
    whole = path.read_bytes()
    for content in (b"", b"no picture", whole[:-40]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"000_mask.png of test/bad/000.png cannot be read"):
            masks.open_mask(path, "test/bad/000.png", picture, (48, 48))
    with pytest.raises(InputError, match="not finite numbers"):
        saved(Image.fromarray(np.where(SHAPE, 1, np.nan).astype(np.float32)), "tif", tmp_path)
    Image.fromarray(GREY[:40]).save(path)
    with pytest.raises(InputError, match=r"000_mask.png has another size than test/bad/000.png"):
        masks.open_mask(path, "test/bad/000.png", picture, (48, 48))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_with_its_picture(orientation: int, tmp_path: Path) -> None:
    """Drawn on the stored pixels or on the picture as it is shown: the size tells which, or it is refused."""
    rng = np.random.default_rng(0)
    for shape in ((40, 60), (48, 48)):
        stored = np.zeros(shape, bool)
        stored[5:15, 30:36] = True
        picture = Image.fromarray((200 * stored + rng.integers(0, 9, shape)).astype(np.uint8))
        tag = Image.Exif()
        tag[ORIENTATION] = orientation
        for ending, options in (("png", {}), ("tif", {"compression": "tiff_lzw"})):  # Pillow turns a TIFF itself
            picture.save(tmp_path / f"000.{ending}", exif=tag, **options)
            shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"000.{ending}"))) > 100
            size = shown.shape[::-1]

            def read(drawn_on: np.ndarray, ending: str = ending, size: tuple = size, **options: object) -> np.ndarray:
                path = tmp_path / "000_mask.png"
                Image.fromarray(drawn_on).save(path, **options)
                return masks.open_mask(path, f"test/bad/000.{ending}", Image.open(tmp_path / f"000.{ending}"), size)

            np.testing.assert_array_equal(read(stored, exif=tag), shown)  # turned by its own
            if orientation > 1 and stored.shape == shown.shape:
                for drawn_on in (stored, shown):
                    with pytest.raises(InputError, match=r"000_mask.png of test/bad/000.\w+: the picture is turned by"):
                        read(drawn_on)
            else:
                np.testing.assert_array_equal(read(stored), shown)
                np.testing.assert_array_equal(read(shown), shown)
            upright = Image.Exif()
            upright[ORIENTATION] = 1
            np.testing.assert_array_equal(read(shown, exif=upright), shown)


def test_whose_mask_it_is(tmp_path: Path) -> None:
    """<name>_mask before <name>, the ending of any picture, the picture's folders; never the mask of another."""
    names = ["a/000.png", "a/001.JPG", "a/more/000.png", "b/003.png", "c/000.png", "a/004.png", "a/004.jpg"]
    sources = [f"test/{name}" for name in names]
    for name in ("a/000_mask.PNG", "a/001.bmp", "a/more/000.tif", "c/000.json", "c/.000.png", *names[:1], *names[-2:]):
        path = tmp_path / "ground_truth" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = masks.find_masks(str(tmp_path), sources)
    assert {source: str(path.relative_to(tmp_path / "ground_truth")) for source, path in found.items()} == {
        "test/a/000.png": "a/000_mask.PNG",
        "test/a/001.JPG": "a/001.bmp",
        "test/a/more/000.png": "a/more/000.tif",
        "test/a/004.png": "a/004.png",
        "test/a/004.jpg": "a/004.jpg",
    }
    with pytest.raises(InputError, match=r"a/001.bmp is the mask of test/a/001.JPG and of test/a/001.png: rename"):
        masks.find_masks(str(tmp_path), [*sources, "test/a/001.png"])
    (tmp_path / "ground_truth/a/001.gif").touch()
    with pytest.raises(InputError, match=r"test/a/001.JPG has several masks, .*/a/001.bmp and .*/a/001.gif: keep one"):
        masks.find_masks(str(tmp_path), sources)


def test_the_page_of_a_mask_is_that_of_its_picture(tmp_path: Path) -> None:
    pages = [Image.new("L", (48, 48), i) for i in range(3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    drawn = [Image.fromarray(np.roll(GREY, 8 * i, 0)) for i in range(3)]
    path = tmp_path / "ground_truth/bad/stack_mask.tif"
    path.parent.mkdir(parents=True)
    drawn[0].save(path, save_all=True, append_images=drawn[1:])
    sources = [f"test/bad/stack.tif#{page}" for page in (1, 2, 3)]
    assert masks.find_masks(str(tmp_path), sources) == dict.fromkeys(sources, path)
    with Image.open(tmp_path / "stack.tif") as picture:
        for i, source in enumerate(sources):
            np.testing.assert_array_equal(masks.open_mask(path, source, picture, (48, 48)), np.roll(SHAPE, 8 * i, 0))
        for count in (1, 2):
            drawn[0].save(path, save_all=True, append_images=drawn[1:count])
            with pytest.raises(InputError, match=rf"has {count} pages, not those of test/bad/stack.tif#3"):
                masks.open_mask(path, sources[2], picture, (48, 48))
    with pytest.raises(InputError, match=r"has 2 pages, not those of test/bad/stack.tif"):
        masks.open_mask(path, "test/bad/stack.tif", pages[0], (48, 48))


def test_what_the_network_does_not_see_is_counted() -> None:
    heat = heatmaps.at_own_size(np.ones((4, 4), np.float32), (60, 40), View(4, 1))  # sees columns 10 to 50
    outside, across = np.zeros((2, 40, 60), bool)
    outside[:10, :10] = across[:10, 5:25] = True
    found = pixel_figures([(heat, outside), (heat, across)], 0.5)
    assert found["masks_unseen"] == 1 and found["marked_unseen"] == pytest.approx(150 / 300)
    assert found["regions"] == 2 and found["regions_found"] == 1


def test_too_few_normals_mark_nothing_and_say_so() -> None:
    """With 18 normals no p-value is 0.05: then there is no level, so 0 of 8 regions would be no finding."""
    heat = SHAPE.astype(float)
    assert pixel_figures([(heat, SHAPE)], verdicts.threshold(np.arange(18.0), 0.05))["regions_found"] is None
    assert pixel_figures([(heat, SHAPE)], verdicts.threshold(np.arange(19.0) / 30, 0.05))["regions_found"] == 1
    for alpha in (0.05, 0.1, 0.3, 0.001):
        needed = int(verdicts.too_few_to_mark(alpha, 3).split(" takes ")[1].split()[0])
        assert [verdicts.possible_p_values(alpha, each) for each in (needed - 1, needed)] == [0, 1]


def test_images_without_a_mask_are_left_out_and_counted(tmp_path: Path) -> None:
    """Three masks that mark something, one of them partly outside the square; an empty one; a class without any."""
    draw_data_set(tmp_path)
    test = images.open_dataset(str(tmp_path), "test")
    class_name = np.array(test.classes)[test.label]

    def heats(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        x, _ = loading.load_images(test.take(rows), View(48, 1))
        for row, heat in zip(rows, heatmaps.difference(images.to_model(x), torch.tensor(100 / 127.5 - 1)), strict=True):
            yield row, heatmaps.smoothed(heat[0], 48)

    split = SimpleNamespace(
        gan=SimpleNamespace(dataset=str(tmp_path), view=View(48, 1)),
        images=test,
        is_anomaly=class_name != "good",
        class_name=class_name,
        heats=heats,
        usual={},
        map=DIFFERENCE,
    )
    threshold = {"alpha": 0.05, "validation_images": 4}
    found = pixel_metrics(split, 0.2, 0.5)
    # 32 of 192 marked pixels are unseen, and below all normal ones but the fifth that is unseen too
    assert found["pixel_roc_auc"] == pytest.approx(5 / 6 + 1 / 6 * 0.2 / 2, abs=0.002)
    assert (found["with_mask"], found["regions"], found["regions_found"]) == (3, 3, 3)
    assert found["without_mask"] == {"worse": 2} and found["empty_masks"] == ["ground_truth/bad/002_mask.png"]
    assert found["masks_unseen"] == 0 and found["marked_unseen"] == pytest.approx(32 / 192)
    assert report.pixel_sentences({"pixels": found, "threshold": threshold}).splitlines()[1:] == [
        "something is marked in 3 of their 3 regions",
        "left out for lack of a mask: 2 of worse; that of test/CLASS/000.png is ground_truth/CLASS/000_mask.png, or "
        "000.png, with any picture's ending",
        "left out for an empty mask: 1 (ground_truth/bad/002_mask.png)",
        "16.7% of the marked pixels, and 0 masks entirely, lie outside the centre square, which is all that the "
        "networks see: train with --fit stretch or pad, or --picture-size own",
    ]
    found = pixel_metrics(split, np.inf, 0.5)
    assert found["regions_found"] is None
    lines = report.pixel_sentences({"pixels": found, "threshold": threshold}).splitlines()
    assert lines[0].startswith("heat maps against the masks of 3 images: pixel-level ROC-AUC 0.85")
    assert lines[1].startswith("nothing can be marked: --alpha 0.05 takes 19 validation normals, and there are 4")
    for path in (tmp_path / "ground_truth/bad").iterdir():
        path.unlink()
    found = pixel_metrics(split, 0.2, 0.5)
    assert found["with_mask"] == 0 and found["without_mask"] == {"bad": 4, "worse": 2}
    assert found["pixel_roc_auc"] is None
    lines = report.pixel_sentences({"pixels": found, "threshold": threshold})
    assert lines.startswith("no pixel-level figures: no anomalous image has a mask that marks something\nleft out")


def draw_data_set(root: Path) -> None:
    """Pictures wider than high, and masks of most of the bad ones."""
    rng = np.random.default_rng(0)
    shape = np.pad(GREY, ((0, 0), (6, 6)))
    for name, count in (("train/good", 20), ("test/good", 4), ("test/bad", 4), ("test/worse", 2)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(100, 4, (48, 60))
            if "good" not in name:
                pixels[np.roll(shape, -25 if i == 3 else 0, 1) > 0] = 240
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{name}/{i:03d}.png")
    truth = root / "ground_truth/bad"
    truth.mkdir(parents=True)
    Image.fromarray(shape).save(truth / "000_mask.png")
    Image.fromarray(shape).save(truth / "001.jpg", quality=75)
    Image.fromarray(0 * shape).save(truth / "002_mask.png")
    Image.fromarray(np.roll(shape, -25, 1)).save(truth / "003_mask.png")


@pytest.mark.usefixtures("undrawn")
def test_the_scores_come_whatever_the_masks_are(
    tmp_path: Path, run_here: Callable[..., None], fails: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    """A mask that cannot be used is named, once all but the pixel figures is written."""
    draw_data_set(tmp_path / "set")
    run_here("train_gan.py", "--dataset", "set", "--epochs", "1", *TINY)
    run_here("fit_latent.py", "--steps", "1", "--device", "cpu")
    run_dir = tmp_path / "outputs/set-good"
    mask = tmp_path / "set/ground_truth/bad/000_mask.png"
    mask.write_bytes(mask.read_bytes()[:40])
    message = fails("evaluate.py", *CPU)
    assert f"the mask {mask} of test/bad/000.png cannot be read" in message
    assert message.endswith("; all but the pixel figures is written")
    assert list(json.loads((run_dir / "metrics.json").read_text())["pixels"]) == ["error"]
    assert (run_dir / "scores.csv").is_file() and "evaluate" in runs.read_record(run_dir)
    assert "so nothing is marked" in (run_dir / "report.html").read_text()  # four validation normals are too few
    assert "ROC-AUC [95% interval]" in capsys.readouterr().out


def test_many_labels_count(tmp_path: Path) -> None:
    """Six colours, as RGB and as a palette, and 80 numbers of defects."""
    drawn = np.zeros((48, 48, 3), np.uint8)
    for i, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 0), (0, 90, 90), (60, 0, 60)]):
        drawn[8 * i : 8 * i + 8, :8] = colour
    numbers = np.zeros((48, 48), np.uint8)
    numbers[:40, :32] = np.arange(1, 81).repeat(16).reshape(40, 32)
    for mask, count in (
        (Image.fromarray(drawn), 384),
        (Image.fromarray(drawn).convert("P", palette=Image.Palette.ADAPTIVE), 384),
        (Image.fromarray(numbers), 1280 - 240),
    ):
        if count != 384:
            mask = Image.fromarray(np.where(numbers > 15, numbers, 0).astype(np.uint8))  # less than half is marked
        mask.save(tmp_path / "000_mask.png")
        picture = Image.new("L", (48, 48))
        assert masks.open_mask(tmp_path / "000_mask.png", "test/bad/000.png", picture, (48, 48)).sum() == count


def test_a_picture_with_a_broken_exif_block_has_a_mask(tmp_path: Path) -> None:
    Image.new("L", (48, 48)).save(tmp_path / "000.png", exif=b"Exif\0\0garbage")
    Image.fromarray(GREY).save(tmp_path / "000_mask.png")
    with Image.open(tmp_path / "000.png") as picture:
        found = masks.open_mask(tmp_path / "000_mask.png", "test/bad/000.png", picture, (48, 48))
    np.testing.assert_array_equal(found, SHAPE)


def test_a_transparent_mask_is_empty(tmp_path: Path) -> None:
    Image.new("RGBA", (48, 48), (255, 255, 255, 0)).save(tmp_path / "000_mask.png")
    picture = Image.new("L", (48, 48))
    assert not masks.open_mask(tmp_path / "000_mask.png", "test/bad/000.png", picture, (48, 48)).any()
