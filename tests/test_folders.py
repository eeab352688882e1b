"""A person's folders: which pictures train and validate, what counts as a picture, replaced and moved data sets."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, read_scores
from PIL import Image
from test_pictures import read_verdicts
from test_util import draw, folder

from anogan import folders, runs
from anogan.images import class_label, default_class, open_dataset, open_pictures, open_split
from detectors import rotnet
from util import InputError

pytestmark = pytest.mark.usefixtures("undrawn")

CPU = ["--device", "cpu"]
QUICK = ["--epochs", "1", *TINY]
FIT = ["fit_latent.py", "--steps", "2", *CPU]
EVALUATE = ["evaluate.py", "--bootstrap", "5", *CPU]
Run = Callable[..., None]
Fails = Callable[..., str]
Captured = pytest.CaptureFixture[str]


def set_of(root: Path, names: list[str]) -> Path:
    """A data set of plain pictures, each of another colour."""
    for i, name in enumerate(names):
        draw(root / name, value=(i % 256, i // 256, 50))
    return root


def sides(root: Path, group_by: str | None = None) -> tuple[list[str], list[str]]:
    """The sources that train and that validate."""
    return tuple(open_split(str(root), split, "good", group_by).source.tolist() for split in ("train", "validation"))


# ---- which pictures validate


def test_validation_is_spread_over_the_names(tmp_path: Path) -> None:
    """Bolts and nuts, and five cameras, are on both sides: in the order of names the last fifth was one kind."""
    names = [f"bolt_{i:02d}" for i in range(80)] + [f"nut_{i:02d}" for i in range(20)]
    train, validation = sides(set_of(tmp_path / "parts", [f"train/good/{name}.png" for name in names]))
    assert len(train) + len(validation) == 100 and 12 <= len(validation) <= 28
    for side in (train, validation):
        assert {Path(name).name.split("_")[0] for name in side} == {"bolt", "nut"}
    cameras = [f"train/good/cam{camera}/{i:02d}.png" for camera in "ABCDE" for i in range(20)]
    train, validation = sides(set_of(tmp_path / "cameras", cameras))
    assert len({Path(name).parent for name in validation}) == len({Path(name).parent for name in train}) == 5


def test_a_picture_stays_on_its_side_when_others_are_added(tmp_path: Path) -> None:
    root = set_of(tmp_path, [f"train/good/{i:03d}.png" for i in range(60)])
    train, validation = map(set, sides(root))
    set_of(root, [f"train/good/a{i:03d}.png" for i in range(60)])
    more_train, more_validation = map(set, sides(root))
    assert train <= more_train and validation <= more_validation and len(more_validation) > len(validation)


def test_few_pictures_are_on_both_sides(tmp_path: Path) -> None:
    for count in (5, 6, 7):
        train, validation = sides(set_of(tmp_path / str(count), [f"train/good/{i}.png" for i in range(count)]))
        assert train and validation and len(train) + len(validation) == count


def test_group_by_keeps_together_what_belongs_together(tmp_path: Path) -> None:
    """The same part under six lights is not trained on under five and validated with under the sixth."""
    names = [f"train/good/light{light}_part{part:02d}.png" for light in range(6) for part in range(20)]
    root = set_of(tmp_path, names)

    def parts_of(side: list[str]) -> set[str]:
        return {re.search(r"part\d+", name)[0] for name in side}

    alone, grouped = sides(root), sides(root, r"part(\d+)")
    assert parts_of(alone[0]) & parts_of(alone[1])
    assert not parts_of(grouped[0]) & parts_of(grouped[1]) and len(grouped[0]) + len(grouped[1]) == 120
    without_parentheses = sides(root, r"part\d+")
    assert not parts_of(without_parentheses[0]) & parts_of(without_parentheses[1])
    for pattern, words in (("nothing", "finds nothing in good/"), ("(", "no regular expression"), ("", "one group")):
        with pytest.raises(InputError, match=words):
            sides(root, pattern)
    with pytest.raises(InputError, match="--group-by is for folders"):
        open_split("digits", "train", "1", "x")


def test_group_by_is_kept_with_the_run(tmp_path: Path, run_here: Run, fails: Fails) -> None:
    set_of(tmp_path / "set", [f"train/good/{light}_{part:02d}.png" for light in range(3) for part in range(12)])
    command = ["train_gan.py", "--dataset", "set", "--group-by", r"_(\d+)", *QUICK]
    run_here(*command)
    gan = runs.load_gan(tmp_path / "outputs/set-good", torch.device("cpu"))
    expected = sides(tmp_path / "set", r"_(\d+)")[1]
    assert runs.open_split(gan, "validation").source.tolist() == expected
    assert "was trained with group_by" in fails("train_gan.py", "--dataset", "set", *QUICK)


def test_a_validation_folder_is_the_validation_set(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/good": 6, "validation/good": 3, "test/good": 1})
    train, validation = sides(root)
    assert len(train) == 6 and validation == [f"validation/good/{i:02d}.png" for i in range(3)]
    with pytest.raises(InputError, match=r"--group-by has no use where .*/validation"):
        sides(root, "x")
    shutil.move(root / "validation/good", root / "validation/other")
    with pytest.raises(InputError, match=r"validation has no pictures of the normal class: put some into good/"):
        sides(root)


def test_the_pages_of_a_file_stay_together(tmp_path: Path) -> None:
    pages = [Image.new("L", (40, 40), level) for level in range(4)]
    (tmp_path / "train/good").mkdir(parents=True)
    for i in range(12):
        pages[0].save(tmp_path / f"train/good/{i:02d}.tif", save_all=True, append_images=pages[1:])
    train, validation = sides(tmp_path)
    assert len(train) + len(validation) == 48
    assert not {name.split("#")[0] for name in train} & {name.split("#")[0] for name in validation}


# ---- what counts


@pytest.mark.parametrize("left_behind", [".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX"])
def test_hidden_folders_do_not_count(tmp_path: Path, left_behind: str) -> None:
    root = folder(
        tmp_path, {"train/good": 6, f"train/good/{left_behind}": 6, f"train/{left_behind}": 2, "test/good": 1}
    )
    images = open_dataset(str(root), "train")
    assert len(images) == 6 and images.classes == ["good"]
    assert len(open_pictures([str(root / "train")])) == 6


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_back_to_a_folder_list_a_picture_once(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/good": 6, "test/good": 1})
    for name in ("again", "and-again"):
        (root / "train/good" / name).symlink_to(".")
    folder(tmp_path / "store", {"more": 2})
    for name in ("x", "y"):
        (root / "train/good" / name).symlink_to(tmp_path / "store/more")
    (root / "train/good/zz.png").symlink_to("00.png")
    assert len(open_dataset(str(root), "train")) == len(open_pictures([str(root / "train")])) == 8


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "set", {"train/good": 6, "train/good/locked": 2})
    scandir = os.scandir

    def refuse(path: object) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, who may list everything
    with pytest.raises(InputError, match=r"locked cannot be listed \(Permission denied\)"):
        folders.pictures_below(tmp_path / "set/train/good")


def test_an_empty_validation_folder_is_no_hash_split(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/good": 6})
    (root / "validation").mkdir()
    (root / "validation/a.heic").touch()
    with pytest.raises(InputError, match="validation has no pictures of the normal class"):
        sides(root)


def test_files_passed_over_are_counted_by_ending(tmp_path: Path, capsys: Captured) -> None:
    root = folder(tmp_path, {"train/good": 6, "test/good": 1})
    for i in range(10):
        (root / f"train/good/{i}.HEIC").write_bytes(b"")
    (root / "train/good/readme").write_text("")
    for _ in range(2):
        open_dataset(str(root), "train")
    printed = capsys.readouterr().out
    assert printed.count(f"passed over in {root / 'train/good'}") == 1
    assert "1 without an ending, 10 .heic, which Pillow does not read" in printed


def test_normal_class_is_a_name_or_where_none_is_a_number_an_index() -> None:
    numbers, words = ["1", "10", "2", "3"], ["airplane", "automobile", "bird"]
    assert class_label(numbers, "10") == 1 and class_label(words, "bird") == class_label(words, "2") == 2
    shares = ["0.1", "0.5", "1.0"]
    for classes, name in (
        (shares, "1"),
        (["-1", "-2"], "1"),
        (numbers, "0"),
        (numbers, "01"),
        (numbers, ""),
        (words, ""),
        (words, "01"),
        (words, "3"),
    ):
        with pytest.raises(InputError, match=f"unknown class '{name}'"):
            class_label(classes, name)


def test_pictures_straight_in_train(tmp_path: Path, run_here: Run, capsys: Captured) -> None:
    set_of(tmp_path / "set", [f"train/{i}.png" for i in range(10)] + ["test/0.png", "test/1.png"])
    run_here("train_gan.py", "--dataset", "set", *QUICK)
    printed = capsys.readouterr().out
    test = tmp_path / "set/test"
    assert "normal class: good" in printed and printed.count(f"passed over in {test}: 2 pictures in no class") == 1
    run_here(*FIT)
    run_here(*FIT, "--images", "set/test")
    run_here("evaluate.py", "--images", "set/test", *CPU)
    assert len(read_verdicts(tmp_path / "outputs/set-good/images-test")) == 2


def test_pictures_straight_in_train_are_the_good_ones_of_test(tmp_path: Path) -> None:
    root = set_of(tmp_path, [f"train/{i}.png" for i in range(10)] + ["test/good/0.png", "test/bad/1.png"])
    assert default_class(str(root)) == "good"
    test = open_split(str(root), "test", "good")
    assert test.class_name.tolist() == ["bad", "good"]


def test_class_names_that_differ_in_capitals_are_named(tmp_path: Path, fails: Fails) -> None:
    folder(tmp_path / "set", {"train/Good": 6, "test/good": 2})
    message = fails("train_gan.py", "--dataset", "set", *QUICK)
    assert "has class folders 'Good' and 'good': give both the same name" in message


def test_a_factory_on_its_first_day(tmp_path: Path, run_here: Run, fails: Fails, capsys: Captured) -> None:
    """No test pictures at all: it trains, searches validation and judges."""
    folder(tmp_path / "set", {"train/good": 10})
    draw(tmp_path / "new/a.png")
    run_here("train_gan.py", "--dataset", "set", *QUICK)
    run_here(*FIT)
    assert "set has no test pictures: none are searched" in capsys.readouterr().out
    assert "the split test of" in fails(*FIT, "--splits", "test", "validation")
    run_here(*EVALUATE)
    assert "has no test pictures, so nothing is measured" in capsys.readouterr().out
    run_here(*FIT, "--images", "new")
    run_here("evaluate.py", "--images", "new", *CPU)
    assert list(read_verdicts(tmp_path / "outputs/set-good/images-new")) == ["new/a.png"]


# ---- replaced, added and moved


@pytest.fixture
def run_dir(tmp_path: Path, run_here: Run) -> Path:
    """A run on a small data set in `tmp_path`/set, searched and evaluated."""
    folder(tmp_path / "set", {"train/good": 12, "test/good": 3, "test/scratch": 3})
    run_here("train_gan.py", "--dataset", "set", *QUICK)
    run_here(*FIT)
    run_here(*EVALUATE)
    return tmp_path / "outputs/set-good"


def test_pictures_replaced_under_their_names_are_searched_again(
    tmp_path: Path, run_dir: Path, run_here: Run, fails: Fails, capsys: Captured
) -> None:
    run_here("detectors.baselines")
    for i in range(3):
        draw(tmp_path / f"set/test/scratch/{i:02d}.png", value=(200, 200, i))
    assert "latents-test.npz was fitted to (other contents)" in fails(*EVALUATE)
    assert "baselines-test.npz is of other images" in fails(*EVALUATE, "--score", "kde")
    capsys.readouterr()
    run_here(*FIT)
    printed = capsys.readouterr().out
    assert "latents-test.npz holds other images: searching again" in printed
    assert "latents-validation.npz is complete" in printed
    shutil.copytree(tmp_path / "set", tmp_path / "copy")  # other times of change, the same bytes
    run_here(*FIT, "--dataset", "copy")
    assert capsys.readouterr().out.count("is complete") == 2


def test_replaced_training_pictures_are_refused(tmp_path: Path, run_dir: Path, fails: Fails) -> None:
    """Under the names of others they could be among validation, too."""
    trained_on = sides(tmp_path / "set")[0][0]
    draw(tmp_path / "set" / trained_on, value=(99, 99, 99))
    for script in (["detectors.rotnet", "--epochs", "1", *CPU], FIT, EVALUATE):
        assert "are not those of gan.pt" in fails(*script)


def test_replaced_validation_pictures_give_no_verdict(
    tmp_path: Path, run_dir: Path, run_here: Run, fails: Fails
) -> None:
    draw(tmp_path / "new/a.png")
    run_here(*FIT, "--images", "new")
    draw(tmp_path / "set" / sides(tmp_path / "set")[1][0], value=(99, 99, 99))
    assert "latents-validation.npz was fitted to (other contents)" in fails("evaluate.py", "--images", "new", *CPU)


def test_what_rotnet_remembers_is_of_that_rotnet(
    tmp_path: Path, run_dir: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training leaves it, from the images that it holds: no process opens the data set alone."""
    draw(tmp_path / "new/a.png")
    judge = ["evaluate.py", "--images", "new", "--score", "neighbours", *CPU]
    found = []
    for seed in ("0", "1"):
        with monkeypatch.context() as patch:
            patch.setattr(rotnet.runs, "load_training_images", counted := Counted(runs.load_training_images))
            run_here("detectors.rotnet", "--epochs", "1", "--seed", seed, "--fresh", *CPU)
        assert counted.calls == 1
        run_here(*judge)
        with np.load(run_dir / "rotnet-normals.npz") as kept, np.load(run_dir / "validation-scores.npz") as scores:
            found.append((str(kept["rotnet"]), kept["directions"].sum(), scores["mahalanobis"].sum()))
    assert all(one != other for one, other in zip(*found, strict=True))
    (run_dir / "rotnet-normals.npz").write_bytes(b"damaged")
    run_here(*judge)
    with np.load(run_dir / "rotnet-normals.npz") as kept:
        assert str(kept["rotnet"]) == found[1][0]


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: object) -> object:
        self.calls += 1
        return self.function(*arguments)


def test_a_new_defect_does_not_ask_for_another_training(
    tmp_path: Path, run_dir: Path, run_here: Run, capsys: Captured
) -> None:
    folder(tmp_path / "set", {"test/a-new-one": 2, "test/zz": 1})  # before and after the other names
    capsys.readouterr()
    run_here(*FIT)
    printed = capsys.readouterr().out
    assert "latents-validation.npz is complete" in printed and "latents-test.npz holds other images" in printed
    run_here(*EVALUATE)
    rows = [row for row in read_scores(run_dir) if row["split"] == "test"]
    assert {row["class_name"]: row["is_anomaly"] for row in rows} == {
        "a-new-one": "1",
        "good": "0",
        "scratch": "1",
        "zz": "1",
    }
    assert len(rows) == 9


def test_a_copied_run_judges_without_its_data_set(
    trained: Path, tmp_path: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every score of pictures is the same, RotNet's too, whose memory is of the training images."""
    draw(tmp_path / "new/a.png")
    draw(tmp_path / "new/b.png", value=(200, 100, 0))
    expected = {}
    for place in ("here", "there"):
        if place == "there":
            (tmp_path / "elsewhere").mkdir()
            shutil.copytree(trained, tmp_path / "elsewhere/run")

            def gone(dataset: str, *_: object) -> None:
                raise AssertionError(f"the data set {dataset} is opened")

            monkeypatch.setattr("anogan.images.open_dataset", gone)
        run = trained if place == "here" else tmp_path / "elsewhere/run"
        run_here("fit_latent.py", "--run-dir", str(run), "--steps", "20", "--images", "new", *CPU)
        run_here("evaluate.py", "--run-dir", str(run), "--images", "new", "--score", "combined", *CPU)
        expected[place] = read_verdicts(run / "images-new")
    assert expected["here"] == expected["there"] and "neighbours" in expected["here"]["new/a.png"]


def test_kept_scores_of_normals_are_made_anew_when_they_rest_on_something_else(
    tmp_path: Path, run_dir: Path, run_here: Run, capsys: Captured
) -> None:
    draw(tmp_path / "new/a.png")
    run_here(*FIT, "--images", "new")
    path = run_dir / "validation-scores.npz"
    before = path.read_bytes()
    run_here("evaluate.py", "--images", "new", *CPU)
    assert path.read_bytes() == before
    run_here("detectors.rotnet", "--epochs", "1", *CPU)
    run_here("evaluate.py", "--images", "new", "--score", "rotation", *CPU)  # a score that was not there before
    with np.load(path) as kept:
        assert "rotation" in kept.files and "anomaly_score" in kept.files
        arrays = dict(kept)
    other = {"p_d": arrays["p_d"] + 1, "versions": json.dumps({"gan.pt": 0})}  # of scores that were defined otherwise
    np.savez(path, **arrays | other)
    run_here("evaluate.py", "--images", "new", "--score", "p_d", *CPU)
    with np.load(path) as kept:
        np.testing.assert_allclose(kept["p_d"], arrays["p_d"])
    path.write_bytes(b"damaged")
    run_here("evaluate.py", "--images", "new", *CPU)
    assert "scoring the validation images again" in capsys.readouterr().out


def test_a_moved_data_set_is_named_once(
    tmp_path: Path, run_dir: Path, run_here: Run, fails: Fails, capsys: Captured
) -> None:
    (tmp_path / "set").rename(tmp_path / "moved")
    for script in (FIT, EVALUATE, ["detectors.rotnet", "--epochs", "1", *CPU], ["detectors.baselines"]):
        assert "is not in" in (message := fails(*script)) and "--dataset DIR" in message
    folder(tmp_path / "other", {"train/good": 12, "test/good": 3})
    draw(tmp_path / "other/train/good/00.png", value=(77, 77, 77))
    for path in (tmp_path / "other/train/good").iterdir():
        draw(path, value=(1, 2, 3))
    assert "are not those of gan.pt" in fails(*FIT, "--dataset", "other")
    assert "--dataset digits is not where the pictures of this run lie now" in fails(*FIT, "--dataset", "digits")
    run_here(*FIT, "--dataset", "moved")
    assert json.loads((run_dir / "dataset.json").read_text())["dataset"] == str(tmp_path / "moved")
    for script in (EVALUATE, ["detectors.rotnet", "--epochs", "1", *CPU]):
        run_here(*script)
    place = json.loads((run_dir / "dataset.json").read_text())
    (run_dir / "dataset.json").write_text(json.dumps(place | {"training_images": "of another training"}))
    assert f"is not in {tmp_path / 'set'}:" in fails(*FIT)  # what gan.pt says
    (run_dir / "dataset.json").write_text(json.dumps(place))
    capsys.readouterr()
    (tmp_path / "moved").rename(tmp_path / "set2")  # training, too, finds that all is done
    run_here("train_gan.py", "--dataset", "set2", "--run-dir", "outputs/set-good", *QUICK)
    assert "nothing left to train" in capsys.readouterr().out
    run_here(*EVALUATE)
