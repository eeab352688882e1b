"""Images in, the four splits, the losses, run files out."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import util
from anogan import files, runs
from anogan.decoding import View
from anogan.images import ImageSet, class_label, open_dataset, open_split, to_display, to_model
from anogan.loading import load_images
from util import InputError


def draw(path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 40), value: object = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def folder(root: Path, counts: dict[str, int]) -> Path:
    """A data set of plain pictures: {"train/good": 10, ...}."""
    for name, count in counts.items():
        for i in range(count):
            draw(root / name / f"{i:02d}.png", value=(i, 0, 0))
    return root


def load_one(path: Path, channels: int = 3, size: int = 32) -> np.ndarray:
    """What one picture becomes: (channels, size, size)."""
    image_set = ImageSet("x", ["a"], np.array([0]), np.array([0]), np.array(["p"]), lambda i, source: Image.open(path))
    return load_images(image_set, View(size, channels))[0][0].numpy()


def test_cores_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under taskset each script would start eight decoders for one core."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    assert util.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert util.cores() == 16


# ---- images in


def test_four_splits_of_digits() -> None:
    train = open_split("digits", "train", "3")
    validation = open_split("digits", "validation", "3")
    anomalies = open_split("digits", "train_anomalies", "3")
    test = open_split("digits", "test", "3")
    assert set(train.label) == set(validation.label) == {3}
    assert len(train) == int(0.8 * (len(train) + len(validation)))
    assert max(train.index) < min(validation.index)  # the first 80%, in the data set's order
    assert 3 not in anomalies.label and set(test.label) == set(range(10))
    parts = [set(part.index) for part in (train, validation, anomalies)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1347 and len(test) == 450


def test_digits_parts_do_not_share_a_scan() -> None:
    pixels = []
    for part in ("train", "test"):
        image_set = open_dataset("digits", part)
        pixels.append([image_set.open(i).tobytes() for i in range(len(image_set))])
    whole = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    assert sorted(pixels[0] + pixels[1]) == sorted(scan.tobytes() for scan in whole)
    assert abs(np.bincount(open_dataset("digits", "test").label) - 45).max() <= 2  # stratified
    assert max(map(max, pixels[0])) == 255  # sixteen grey levels spread over 0 to 255


def test_folder_in_mvtec_layout(tmp_path: Path) -> None:
    root = folder(tmp_path / "bottle", {"train/good": 10, "test/good": 2, "test/broken": 3, "ground_truth/broken": 3})
    train, test = open_split(str(root), "train", "good"), open_split(str(root), "test", "good")
    assert train.classes == test.classes == ["broken", "good"]  # one numbering, though train/ lacks a class
    validation = open_split(str(root), "validation", "good")
    assert train.name == "bottle" and len(train) + len(validation) == 10 and set(train.label) == {1}
    names = ["broken/00.png", "broken/01.png", "broken/02.png", "good/00.png", "good/01.png"]
    assert test.source.tolist() == [f"test/{name}" for name in names]
    assert test.label.tolist() == [0, 0, 0, 1, 1]
    images, _ = load_images(train, View(32, 3))
    assert images[:, 0, 0, 0].tolist() == [int(name[-6:-4]) for name in train.source]  # rows follow the sources


def test_files_that_are_not_pictures_are_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/good": 5, "test/good": 1})
    (root / "train/good/notes.txt").write_text("not an image")
    (root / "train/good/._00.png").write_bytes(b"what a file manager leaves")
    (root / "train/.cache").mkdir()
    assert len(open_dataset(str(root), "train")) == 5


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", "RGBA", value=(0, 0, 0, 0))
    draw(tmp_path / "b.png", "RGBA", value=(200, 0, 0, 255))
    draw(tmp_path / "c.png", "LA", value=(0, 0))
    assert (load_one(tmp_path / "a.png") == 255).all()
    assert load_one(tmp_path / "b.png")[:, 0, 0].tolist() == [200, 0, 0]
    assert (load_one(tmp_path / "c.png") == 255).all()


@pytest.mark.parametrize(
    ("mode", "value"), [("RGB", (9, 99, 199)), ("CMYK", (3, 5, 7, 9)), ("L", 77), ("1", 1), ("P", 3)]
)
def test_every_mode_becomes_grey_or_colour(tmp_path: Path, mode: str, value: object) -> None:
    draw(tmp_path / "a.tif", mode, value=value)
    expected = Image.new(mode, (1, 1), value).convert("RGB").getpixel((0, 0))
    assert load_one(tmp_path / "a.tif")[:, 5, 5].tolist() == list(expected)
    assert load_one(tmp_path / "a.tif", channels=1).shape == (1, 32, 32)


def test_shorter_side_is_resized_and_the_centre_cut_out(tmp_path: Path) -> None:
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 250  # the middle third
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert load_one(tmp_path / "a.png")[:, :, 2:-2].min() > 240
    draw(tmp_path / "tiny.png", size=(5, 9), value=(60, 60, 60))
    assert (load_one(tmp_path / "tiny.png") == 60).all()


def test_downscaling_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    assert abs(load_one(tmp_path / "a.png").astype(int) - 127).max() < 12  # grey, not a moiré


def test_upright_by_exif(tmp_path: Path) -> None:
    lower_half_white = np.zeros((32, 32), np.uint8)
    lower_half_white[16:] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(lower_half_white).save(tmp_path / "a.png", exif=exif)
    turned = load_one(tmp_path / "a.png", channels=1)
    assert turned[0, 0, 0] == 255 and turned[0, -1, 0] == 0


def test_unreadable_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, {"train/good": 6, "test/good": 1})
    broken = root / "train/good/03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    image_set = open_dataset(str(root), "train")
    with pytest.raises(InputError, match=r"train/good/03\.png.*--skip-unreadable"):
        load_images(image_set, View(32, 3))
    images, kept = load_images(image_set, View(32, 3), skip_unreadable=True)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 4, 5]
    assert [name[-6:-4] for name in kept.source] == ["00", "01", "02", "04", "05"]
    assert "train/good/03.png" in capsys.readouterr().err


def test_range_of_the_models_images() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(to_model(images), torch.tensor([-1.0, -0.6, 1.0]))
    torch.testing.assert_close(to_display(to_model(images)), images / 255)


def test_class_by_name_or_index() -> None:
    assert class_label(["airplane", "automobile"], "automobile") == 1
    assert class_label(["airplane", "automobile"], "1") == 1
    assert class_label(["2", "0", "1"], "1") == 2  # a name goes before an index
    for wrong in ("car", "2", "-1", ""):
        with pytest.raises(InputError, match="unknown class"):
            class_label(["airplane", "automobile"], wrong)


# ---- losses


def test_losses_by_hand() -> None:
    x = torch.tensor([[[[1.0, -1.0]]], [[[0.5, 0.0]]]])  # (2, 1, 1, 2)
    generated = torch.tensor([[[[0.0, 1.0]]], [[[0.25, 0.25]]]])
    assert util.residual_loss(x, generated).tolist() == [3.0, 0.5]
    features = torch.tensor([[[[1.0]], [[2.0]]], [[[3.0]], [[-4.0]]]])  # (2, 2, 1, 1)
    assert util.discrimination_loss(features, torch.zeros_like(features)).tolist() == [3.0, 7.0]
    logits = torch.tensor([0.0, np.log(3), -np.log(4), 500, -500], dtype=torch.float64)  # D: 1/2, 3/4, 1/5, 1, 0
    torch.testing.assert_close(
        util.reference_loss(logits), torch.tensor([np.log(2), np.log(4 / 3), np.log(5), 0, 500], dtype=torch.float64)
    )
    assert util.anomaly_score(np.array([3.0, 0.5]), np.array([3.0, 7.0]), 0.1).tolist() == pytest.approx([3.0, 1.15])


# ---- run files


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with files.replacing(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), files.replacing(path) as partial:
        partial.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_newest_run_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"run train_gan\.py first"):
        runs.find_run(None)
    for name, modified in (("b", 300), ("a", 200), ("c", 100)):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "gan.pt").touch()
        os.utime(tmp_path / "outputs" / name / "gan.pt", (modified, modified))
    assert runs.find_run(None) == Path("outputs/b")
    with pytest.raises(InputError, match=r"has no gan\.pt"):
        runs.find_run(Path("outputs/d"))


def test_help_is_wrapped_and_its_examples_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    example = "    python x.py --flag    # an example that is longer than forty columns"
    wrapped = util.help_text(
        f"One line that says what it does, in more than forty columns.\n\n{example}\n\nThen\nmore.\n"
    )
    lines = wrapped.splitlines()
    assert example in lines and lines[-1] == " Then more."
    assert all(line.startswith(" ") and len(line) <= 40 for line in lines if line and line != example)


@pytest.mark.parametrize("name", ["plain", "a b'c", "two\nlines", "é 写 \x1b[31m\t\udcff\\'$HOME"])
def test_a_path_as_a_shell_reads_it(name: str) -> None:
    typed = util.quoted(Path(name))
    assert typed.isprintable()
    read = subprocess.run(["bash", "-c", f"printf %s {typed}"], capture_output=True, check=True).stdout
    assert read == os.fsencode(name)


def test_printable_by_hand() -> None:
    assert util.printable("é 写\\n") == "é 写\\n"
    assert util.printable("a\nb\x1b\udcff") == "a\\nb\\x1b\\udcff"


def test_the_device_that_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert util.pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(InputError, match="--device mps cannot be used here"):  # it was chosen, but is not here
        util.pick_device("auto")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert util.pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(InputError, match="--device cuda:3 cannot be used here"):  # this process's own
        util.pick_device("auto")


def test_processes_do_not_share_a_numbered_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--device cuda:0 cannot be used here"):
        util.pick_device("cuda:0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(InputError, match="cuda:0 would put every process of torchrun on one GPU: use --device cuda"):
        util.pick_device("cuda:0")


def test_a_gpu_without_bf16_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ampere the precision is fp32; the first line that a script prints says why."""
    gpu = torch.device("cuda", 0)
    for capability, precision, words in (((8, 0), "bf16", "cuda:0, bf16"), ((7, 5), "fp32", "cuda:0, fp32 (no fast")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert util.pick_precision("auto", gpu) == precision
        assert util.in_words(gpu, precision).startswith(words)
    assert util.in_words(torch.device("cpu"), "fp32") == "cpu, fp32"
