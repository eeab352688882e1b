"""One picture file to pixels: more than 8 bits, DICOM, pages, broken EXIF blocks, very large pictures, lost colour."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, read_scores
from PIL import Image
from test_pictures import read_verdicts

from anogan import decoding, runs
from anogan.decoding import View
from anogan.images import open_pictures
from anogan.loading import find_levels, load_images
from util import InputError

pytestmark = pytest.mark.usefixtures("undrawn")

GREY = View(32, 1)


def scene(seed: int, *, is_bad: bool = False) -> np.ndarray:
    """48x48 in [0, 1]: a disc on a darker ground, with noise; a bright square on it if it is bad."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :48]
    pixels = 0.25 + 0.4 * ((x - 24) ** 2 + (y - 24) ** 2 < 200) + random.normal(0, 0.015, (48, 48))
    if is_bad:
        pixels[18:26, 18:26] = 0.95
    return pixels.clip(0, 1)


def png_16(levels: np.ndarray) -> bytes:
    """A PNG with 16 bits a channel, (H, W, 3) or (H, W, 4), which Pillow reads but does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = levels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def data_set(root: Path, write: Callable[[Path, np.ndarray], None], ending: str) -> Path:
    """A data set of scenes: 25 normal ones to train on, 6 normal and 6 bad ones to test with."""
    for part, count, first in (("train/good", 25, 0), ("test/good", 6, 100), ("test/bad", 6, 200)):
        (root / part).mkdir(parents=True)
        for i in range(count):
            write(root / part / f"{i:02d}{ending}", scene(first + i, is_bad=part == "test/bad"))
    return root


def open_one(path: Path, page: int = 0) -> Image.Image:
    return decoding.open_file(path, page)


# ---- more than 8 bits


def test_a_scene_of_12_bits_is_seen_as_well_as_one_of_8(
    tmp_path: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Divided by 257 it would have 16 grey levels, and A(x) would be of no use."""

    def write_12(path: Path, pixels: np.ndarray) -> None:
        levels = (pixels * 4095).astype(np.uint16)
        levels[0, :3] = 65535  # hot pixels
        Image.fromarray(levels).save(path)

    def write_8(path: Path, pixels: np.ndarray) -> None:
        Image.fromarray((pixels * 255).astype(np.uint8)).save(path)

    residual = {}
    for name, write in (("deep", write_12), ("plain", write_8)):
        data_set(tmp_path / name, write, ".png")
        run_here("train_gan.py", "--dataset", name, "--epochs", "2", *TINY)
        run_here("fit_latent.py", "--steps", "30", "--device", "cpu")
        run_here("evaluate.py", "--bootstrap", "20", "--device", "cpu")
        rows = read_scores(tmp_path / f"outputs/{name}-good")
        residual[name] = [
            np.mean([float(row["residual"]) for row in rows if row["split"] == "test" and row["is_anomaly"] == bad])
            for bad in "01"
        ]
        gan = runs.load_gan(tmp_path / f"outputs/{name}-good", torch.device("cpu"))
        pixels = load_images(runs.open_split(gan, "test"), gan.view)[0]
        assert len(pixels[-1].unique()) > 60, name
    printed = capsys.readouterr().out
    assert "more than 8 bits: black is" in printed and "pixels outside the levels" in printed
    assert gan.levels is None
    levels = runs.load_gan(tmp_path / "outputs/deep-good", torch.device("cpu")).levels
    assert 0 < levels[0] < 0.25 * 4095 and 0.65 * 4095 < levels[1] < 4095, "the hot pixels decide"
    assert residual["deep"][1] > residual["deep"][0]


def test_levels_are_robust_and_leave_room() -> None:
    spreads = np.array([[100.0, 1100.0]] * 97 + [[0.0, 65535.0]] * 3)  # three odd pictures of a hundred
    assert decoding.black_and_white(spreads) == (-150.0, 1350.0)
    black, white = decoding.black_and_white(np.full((5, 2), 7.0))
    assert black < 7 < white


@pytest.mark.parametrize(
    ("dtype", "scale", "offset"),
    [("<u2", 1, 0), (">u2", 1, 0), ("<i4", 1000, -2_000_000), ("<f4", 1e-3, -1.0)],
)
def test_every_depth_is_seen_alike(tmp_path: Path, dtype: str, scale: float, offset: float) -> None:
    """16-bit, 32-bit and float files of the same scenes become the same 8-bit pixels."""
    seen = {}
    for kind, s, o in (("reference", 1, 0), (dtype, scale, offset)):
        (tmp_path / kind.strip("<>")).mkdir(exist_ok=True)
        for i in range(6):
            levels = (scene(i) * 4095).round() * s + o
            Image.fromarray(levels.astype("<u2" if kind == "reference" else dtype)).save(
                tmp_path / kind.strip("<>") / f"{i}.tif"
            )
        pictures = open_pictures([str(tmp_path / kind.strip("<>"))])
        view = View(32, 1, find_levels(pictures, GREY))
        seen[kind] = load_images(pictures, view)[0].numpy().astype(int)
    assert abs(seen["reference"] - seen[dtype]).max() <= 1


def test_signed_16_bits_and_white_for_small(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    levels = (scene(0) * 4095).round()
    tifffile.imwrite(tmp_path / "signed.tif", (levels - 2000).astype(np.int16))
    tifffile.imwrite(tmp_path / "inverted.tif", (65535 - levels).astype(np.uint16), photometric="miniswhite")
    assert np.array_equal(decoding.levels_of(open_one(tmp_path / "signed.tif"))[..., 0], levels - 2000)
    assert np.array_equal(decoding.levels_of(open_one(tmp_path / "inverted.tif"))[..., 0], levels)


def test_white_for_small_without_another_package(tmp_path: Path) -> None:
    levels = (scene(0) * 4095).astype(np.uint16)
    Image.fromarray(65535 - levels).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert np.array_equal(decoding.levels_of(open_one(tmp_path / "a.tif"))[..., 0], levels)


def test_colour_with_16_bits_keeps_them(tmp_path: Path) -> None:
    """Pillow alone would keep the upper 8 of 16 bits: 16 levels of a scene with 12 bits."""
    levels = np.stack([scene(i) * 4095 for i in range(3)], 2).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(png_16(levels))
    assert np.array_equal(decoding.levels_of(open_one(tmp_path / "a.png")), levels)
    (tmp_path / "b.png").write_bytes(png_16(np.concatenate([levels, levels[..., :1]], 2)))
    with pytest.raises(ValueError, match="transparency"):
        decoding.levels_of(open_one(tmp_path / "b.png"))


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}, {"tile": (16, 16)}])
def test_colour_tiff_with_16_bits_keeps_them(tmp_path: Path, options: dict) -> None:
    tifffile = pytest.importorskip("tifffile")
    levels = np.stack([scene(i) * 4095 for i in range(3)], 2).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", levels, photometric="rgb", **options)
    assert np.array_equal(decoding.levels_of(open_one(tmp_path / "a.tif")), levels)


def test_more_bits_than_pillow_keeps_are_refused(tmp_path: Path) -> None:
    """16-bit colour in formats of which Pillow would keep the upper byte."""
    levels = np.full((40, 40, 3), 1200, ">u2")
    (tmp_path / "a.ppm").write_bytes(b"P6 40 40 65535\n" + levels.tobytes())
    header = struct.pack(">HBBHHHH", 474, 0, 2, 3, 40, 40, 3)
    (tmp_path / "a.sgi").write_bytes(header.ljust(512, b"\0") + levels.tobytes())
    with pytest.raises(ValueError, match="more than 8 bits are not read from this kind of PPM: save it as PNG"):
        decoding.levels_of(open_one(tmp_path / "a.ppm"))
    with pytest.raises(ValueError, match="more than 8 bits are not read from this kind of SGI"):
        decoding.levels_of(open_one(tmp_path / "a.sgi"))
    Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / "b.ppm")
    assert decoding.levels_of(open_one(tmp_path / "b.ppm")) is None


def test_signed_8_bits_do_not_wrap_round(tmp_path: Path) -> None:
    levels = np.arange(-20, 20, dtype=np.int8).repeat(40).reshape(40, 40)
    Image.fromarray(levels.view(np.uint8)).save(tmp_path / "a.tif", tiffinfo={339: (2,)})
    assert np.array_equal(decoding.levels_of(open_one(tmp_path / "a.tif"))[..., 0], levels)


def test_size_is_checked_before_the_pixels_are_read(tmp_path: Path) -> None:
    Image.new("L", (100, 50)).save(tmp_path / "a.png")
    image = open_one(tmp_path / "a.png")
    with pytest.raises(ValueError, match="raise --max-megapixels"):
        decoding.as_seen(image, View(32, 1, max_megapixels=0.004))
    assert image._im is None


def test_pictures_of_another_depth_are_refused(tmp_path: Path) -> None:
    Image.fromarray((scene(0) * 4095).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((scene(0) * 255).astype(np.uint8)).save(tmp_path / "plain.png")
    with pytest.raises(InputError, match=r"deep.png \(it has more than 8 bits, and the training pictures have 8"):
        load_images(open_pictures([str(tmp_path / "deep.png")]), GREY)
    with pytest.raises(InputError, match=r"plain.png \(it has 8 bits, and the training pictures have more"):
        load_images(open_pictures([str(tmp_path / "plain.png")]), View(32, 1, (0.0, 4095.0)))


def test_pixels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a.tif \(some of its pixels are not finite numbers"):
        load_images(open_pictures([str(tmp_path / "a.tif")]), View(32, 1, (0.0, 1.0)))


def test_a_deep_picture_at_its_own_size_is_turned_and_in_the_same_levels(tmp_path: Path) -> None:
    levels = np.zeros((20, 30), np.uint16)
    levels[:, :10] = 1000
    Image.fromarray(levels).save(tmp_path / "a.png", exif=exif(6))
    shown = decoding.at_own_size(open_one(tmp_path / "a.png"), View(32, 1, (0.0, 2000.0)))
    assert shown.size == (20, 30) and shown.mode == "RGB"
    assert shown.getpixel((5, 5)) == (128, 128, 128) and shown.getpixel((5, 25)) == (0, 0, 0)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


# ---- EXIF, size, colour


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 3), (8, 1)])
def test_turned_tiff(tmp_path: Path, compression: str | None, orientation: int, turn: int) -> None:
    """Pillow 13 scrambles uncompressed ones that are not square."""
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    for levels, view in ((pixels, GREY), (pixels.astype(np.uint16), View(32, 1, (0.0, 255.0)))):
        Image.fromarray(levels).save(tmp_path / "a.tif", tiffinfo={0x0112: orientation}, compression=compression)
        shown = decoding.at_own_size(open_one(tmp_path / "a.tif"), view)
        assert np.array_equal(np.asarray(shown)[..., 0], np.rot90(pixels, turn))


def test_a_broken_exif_block_does_not_matter(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.new("L", (40, 40), 77).save(tmp_path / name, exif=b"Exif\0\0garbage")
        assert (load_images(open_pictures([str(tmp_path / name)]), GREY)[0] == 77).all(), name


def test_very_large_pictures_are_refused_by_our_limit_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # in place of 179 megapixels
    for name in ("a.png", "a.tif"):
        Image.new("L", (100, 50), 9).save(tmp_path / name)
        pictures = open_pictures([str(tmp_path / name)])
        assert (load_images(pictures, GREY)[0] == 9).all()
        with pytest.raises(InputError, match=r"it has 0 megapixels, more than 0.004: raise --max-megapixels"):
            load_images(pictures, View(32, 1, max_megapixels=0.004))
    assert Image.MAX_IMAGE_PIXELS == 100, "it is the limit of whoever else uses Pillow"


def test_colour_that_a_grey_gan_does_not_see_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey, red = (np.full((48, 48, 3), 100, np.uint8) for _ in range(2))
    red[10:20, 10:20] = (255, 40, 10)
    for name, pixels in (("grey.png", grey), ("red.png", red), ("jpeg.jpg", grey)):
        Image.fromarray(pixels).save(tmp_path / name)
    pictures = open_pictures([str(tmp_path)])
    load_images(pictures, GREY)
    printed = capsys.readouterr().out
    assert printed.count("1 of 3 pictures are in colour, such as") == 1 and "red.png" in printed
    load_images(pictures, View(32, 3))
    assert "in colour" not in capsys.readouterr().out


# ---- pages


def volume(path: Path, count: int = 4) -> None:
    """A file with a page for each level."""
    pages = [Image.new("L", (40, 40), 20 * page) for page in range(count)]
    pages[0].save(
        path, save_all=True, append_images=pages[1:], **({"lossless": True} if path.suffix == ".webp" else {})
    )


@pytest.mark.parametrize("ending", [".tif", ".gif", ".webp", ".png"])
def test_every_page_is_a_picture(tmp_path: Path, ending: str) -> None:
    volume(tmp_path / f"stack{ending}")
    pictures = open_pictures([str(tmp_path)])
    assert [Path(each).name for each in pictures.source] == [f"stack{ending}#{page}" for page in (1, 2, 3, 4)]
    assert len(set(pictures.index.tolist())) == 4
    pixels = load_images(pictures, GREY)[0]
    assert pixels[:, 0, 16, 16].tolist() == pytest.approx([0, 20, 40, 60], abs=2)


def test_smaller_copies_and_previews_are_no_pages(tmp_path: Path) -> None:
    big, small = Image.new("L", (64, 64), 50), Image.new("L", (32, 32), 50)
    small.encoderinfo = {"tiffinfo": {254: 1}}
    big.save(tmp_path / "pyramid.tif", save_all=True, append_images=[small])
    big.convert("RGB").save(tmp_path / "preview.jpg", "MPO", save_all=True, append_images=[small.convert("RGB")])
    assert [Path(each).name for each in open_pictures([str(tmp_path)]).source] == ["preview.jpg", "pyramid.tif"]


def test_pages_that_are_all_copies_are_pictures(tmp_path: Path) -> None:
    pages = [Image.new("L", (40, 40), level) for level in (10, 20)]
    for page in pages:
        page.encoderinfo = {"tiffinfo": {254: 1}}
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:], tiffinfo={254: 1})
    assert len(open_pictures([str(tmp_path)])) == 2


@pytest.mark.parametrize("ending", [".tif", ".gif"])
def test_a_stack_that_is_cut_short_is_named(tmp_path: Path, ending: str) -> None:
    volume(tmp_path / f"a{ending}", 6)
    content = (tmp_path / f"a{ending}").read_bytes()
    (tmp_path / f"a{ending}").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"cannot read the image .*a{ending}"):
        load_images(open_pictures([str(tmp_path)]), GREY)


def test_a_name_may_hold_a_number_sign(tmp_path: Path) -> None:
    Image.new("L", (40, 40), 7).save(tmp_path / "part#3.png")
    pictures = open_pictures([str(tmp_path)])
    assert Path(pictures.source[0]).name == "part#3.png" and (load_images(pictures, GREY)[0] == 7).all()


def test_the_fifth_slice_is_judged(trained: Path, run_here: Callable[..., None]) -> None:
    volume(trained.parents[1] / "scan.tif", 5)
    run_here("fit_latent.py", "--images", "scan.tif", "--steps", "20", "--device", "cpu")
    run_here("evaluate.py", "--images", "scan.tif", "--device", "cpu")
    folder = trained / "images-scan"
    assert set(read_verdicts(folder)) == {f"scan.tif#{page}" for page in range(1, 6)}
    assert {path.name for path in (folder / "marked").iterdir()} == {f"scan.tif#{page}.png" for page in range(1, 6)}


# ---- DICOM


def dicom(path: Path, stored: np.ndarray, **tags: object) -> Path:
    """A DICOM file with these stored values, (H, W) or (frames, H, W)."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID, data.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.SOPClassUID = CTImageStorage
    data.Rows, data.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        data.NumberOfFrames = len(stored)
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = 8 * stored.dtype.itemsize
    data.BitsStored, data.HighBit = data.BitsAllocated, data.BitsAllocated - 1
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    data.PixelData = stored.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def test_dicom_in_the_units_of_its_modality(tmp_path: Path) -> None:
    stored = (scene(0) * 1000).astype(np.int16)
    path = dicom(tmp_path / "ct.dcm", stored, RescaleSlope=2, RescaleIntercept=-1024)
    assert np.array_equal(decoding.levels_of(open_one(path))[..., 0], stored * 2.0 - 1024)
    path = dicom(tmp_path / "xray.dcm", stored, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(decoding.levels_of(open_one(path))[..., 0], -stored.astype(np.float32))
    stored[:4] = -2000
    path = dicom(tmp_path / "padded.dcm", stored, PixelPaddingValue=-2000)
    assert decoding.levels_of(open_one(path))[0, 0, 0] == stored[4:].min()
    path = dicom(tmp_path / "8.dcm", (scene(0) * 255).astype(np.uint8))
    assert decoding.levels_of(open_one(path)) is None and open_one(path).mode == "L"


def test_dicom_of_few_bits_and_of_frames_with_units_of_their_own(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    six_bits = (scene(0) * 63).astype(np.uint8)
    path = dicom(tmp_path / "6.dcm", six_bits, BitsStored=6, HighBit=5)
    assert np.array_equal(decoding.levels_of(open_one(path))[..., 0], six_bits)
    frames = []
    for slope in (1, 10):
        units = pydicom.Dataset()
        units.RescaleSlope, units.RescaleIntercept = slope, -5
        frames.append(pydicom.Dataset())
        frames[-1].PixelValueTransformationSequence = [units]
    path = dicom(tmp_path / "ct.dcm", np.full((2, 40, 40), 7, np.int16), PerFrameFunctionalGroupsSequence=frames)
    assert [decoding.levels_of(open_one(path, page)).max() for page in (0, 1)] == [2, 65]


def test_dicom_files_that_pydicom_cannot_read_are_faults(tmp_path: Path) -> None:
    """All test files that pydicom has: each is read, or refused when it is decoded; listing them raises nothing."""
    pydicom = pytest.importorskip("pydicom")
    paths = sorted((Path(pydicom.__file__).parent / "data/test_files").glob("*.dcm"))
    assert len(paths) > 20
    for path in paths:
        assert decoding.page_numbers(path)


def test_dicom_frames_names_and_splits(tmp_path: Path) -> None:
    dicom(tmp_path / "IM0001", np.stack([np.full((40, 40), 10 * i, np.int16) for i in range(3)]))
    dicom(tmp_path / "one.dcm", np.full((40, 40), 5, np.int16))
    (tmp_path / "folder").mkdir()
    (tmp_path / "one.dcm").rename(tmp_path / "folder/one.dcm")
    one = open_pictures([str(tmp_path / "folder")])  # by its ending in a folder, and without one if it is asked for
    several = open_pictures([str(tmp_path / "IM0001")])
    assert [Path(each).name for each in (*one.source, *several.source)] == ["one.dcm", *(f"IM0001#{i}" for i in "123")]
    pixels = load_images(several, View(32, 1, (0.0, 255.0)))[0]
    assert pixels[:, 0, 0, 0].tolist() == [0, 10, 20]


def test_dicom_files_of_pydicom_itself(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    path = Path(pydicom.data.get_testdata_file("CT_small.dcm"))
    levels = decoding.levels_of(open_one(path))
    assert levels.shape == (128, 128, 1) and levels.min() == pytest.approx(-896) and levels.max() == pytest.approx(1167)
    frames = Path(pydicom.data.get_testdata_file("examples_rgb_color.dcm"))
    assert decoding.page_numbers(frames) == [0] and open_one(frames).mode == "RGB"


def test_dicom_without_pydicom_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dicom(tmp_path / "a.dcm", np.zeros((40, 40), np.int16))
    monkeypatch.setitem(__import__("sys").modules, "pydicom.pixels", None)
    with pytest.raises(InputError, match=r"a\.dcm is a DICOM file, and reading it needs pydicom: pip install pydicom"):
        open_pictures([str(tmp_path)])


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("L", (40, 40)).save(content, "PNG")
    (tmp_path / "a.dcm").write_bytes(content.getvalue()[:50])
    pytest.importorskip("pydicom")
    with pytest.raises(InputError, match=r"cannot read the image .*a\.dcm"):
        load_images(open_pictures([str(tmp_path)]), GREY)
