"""What bad input gets: one line that names what is wrong and what to do, an exit code, and no file lost."""

import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from test_util import draw, folder

from anogan.images import open_split

Fails = Callable[..., str]
TRAIN = ["train_gan.py", "--epochs", "1", *TINY]


def test_one_line_and_exit_code_from_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train_gan.py"), "--dataset", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().splitlines() == [done.stderr.strip()]
    assert "unknown dataset 'nowhere'" in done.stderr and "digits" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_network_and_no_archive(tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    message = fails(*TRAIN)
    assert "cifar-10-python.tar.gz" in message and "--dataset digits" in message
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--normal-class", "car"], "unknown class 'car'"),
        (["--normal-class", "10"], "unknown class '10'"),
        (["--image-size", "48"], "power of two from 32 up"),
        (["--image-size", "16"], "power of two from 32 up"),
        (["--checkpoint-every", "0"], "minutes such as 10m, or steps such as 500"),
        (["--checkpoint-every", "0m"], "minutes such as 10m, or steps such as 500"),
        (["--checkpoint-every", "ten"], "minutes such as 10m, or steps such as 500"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--batch-size", "-3"], "--batch-size must be at least 1"),
        (["--generator-steps", "0"], "--generator-steps must be at least 1"),
        (["--lr", "nan"], "--lr must be at least 0"),
        (["--device", "gpu"], "--device gpu cannot be used here"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
    ],
)
def test_wrong_flags_of_training(tmp_path: Path, fails: Fails, flags: list[str], words: str) -> None:
    assert words in fails(*TRAIN, "--dataset", "digits", *flags)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"test/good": 6}, "no folder 'train'"),
        ({"train/good": 4, "test/good": 1}, "has 4 training files"),
        ({"train/other": 6, "test/good": 1}, "with training images (other)"),
    ],
)
def test_incomplete_folder(tmp_path: Path, fails: Fails, counts: dict[str, int], words: str) -> None:
    folder(tmp_path / "set", counts)
    assert words in fails(*TRAIN, "--dataset", "set", "--normal-class", "good")
    assert not (tmp_path / "outputs").exists()


def test_empty_class_folder(tmp_path: Path, fails: Fails) -> None:
    folder(tmp_path / "set", {"train/good": 6, "test/good": 1})
    (tmp_path / "set/train/bad").mkdir()
    message = fails(*TRAIN, "--dataset", "set", "--normal-class", "good")
    assert str(Path("set/train/bad")) in message and "holds no images" in message


def test_unreadable_training_image(
    tmp_path: Path, fails: Fails, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "set", {"train/good": 10, "test/good": 1})
    (tmp_path / "set/train/good/02.png").write_bytes(b"not a picture")
    arguments = [*TRAIN, "--dataset", "set", "--normal-class", "good"]
    message = fails(*arguments)
    assert "train/good/02.png" in message and "--skip-unreadable" in message
    assert not list((tmp_path / "outputs").rglob("*.pt"))
    run_here(*arguments, "--skip-unreadable")
    assert (tmp_path / "outputs/set-good/gan.pt").is_file()
    printed = capsys.readouterr()
    assert "skipped 1 of 9 images" in printed.out and "train/good/02.png" in printed.err


def test_training_that_diverges(tmp_path: Path, fails: Fails) -> None:
    assert "diverged at step" in fails(*TRAIN, "--dataset", "digits", "--lr", "1e38", "--epochs", "3")
    assert not list((tmp_path / "outputs").rglob("gan.pt"))


def test_no_training_image_can_be_read(tmp_path: Path, fails: Fails) -> None:
    folder(tmp_path / "set", {"train/good": 5, "test/good": 1})
    for path in (tmp_path / "set/train/good").iterdir():
        path.write_bytes(b"")
    message = fails(*TRAIN, "--dataset", "set", "--normal-class", "good", "--skip-unreadable")
    assert "none of the 4 training images" in message


def test_scripts_out_of_order(digits_workdir: Path, trained: Path, tmp_path: Path, fails: Fails) -> None:
    for split in ("validation", "test", "train_anomalies"):
        (trained / f"latents-{split}.npz").unlink()
    message = fails("evaluate.py", "--score", "anomaly_score")
    assert "latents-validation.npz is missing" in message and "run fit_latent.py" in message
    for name in ("rotnet.pt", "pca.pt"):  # then A(x) is what a verdict rests on
        (trained / name).unlink()
    assert "latents-validation.npz is missing" in fails("evaluate.py")
    shutil.rmtree(tmp_path / "outputs")
    for script in ("fit_latent.py", "evaluate.py"):
        assert "run train_gan.py first" in fails(script)
    message = fails("fit_latent.py", "--run-dir", "some where")
    assert "has no gan.pt" in message
    assert "run train_gan.py --run-dir 'some where' first" in message  # as it can be pasted into a shell


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--splits", "test", "training"], "unknown split 'training'"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--shard-size", "0"], "--shard-size must be at least 1"),
        (["--candidates", "0"], "--candidates must be at least 1"),
        (["--max-images", "0"], "--max-images must be at least 1"),
        (["--discrimination-weight", "1.5"], "at most 1"),
        (["--lr", "-1"], "--lr must be at least 0"),
        (["--seed", "-1"], "--seed must lie between"),
        (["--splits"], "names no split"),
    ],
)
def test_wrong_flags_of_the_search(trained: Path, fails: Fails, flags: list[str], words: str) -> None:
    before = (trained / "latents-test.npz").read_bytes()
    assert words in fails("fit_latent.py", *flags)
    assert (trained / "latents-test.npz").read_bytes() == before


def test_latents_of_another_gan(trained: Path, fails: Fails) -> None:
    state = torch.load(trained / "gan.pt", weights_only=True)
    state["generator"]["layers.0.weight"] += 1e-3
    torch.save(state, trained / "gan.pt")
    message = fails("evaluate.py")
    assert "belongs to another gan.pt" in message and "run fit_latent.py" in message


def test_splits_fitted_with_different_settings(trained: Path, fails: Fails, run_here: Callable[..., None]) -> None:
    run_here("fit_latent.py", "--splits", "validation", "--steps", "3", "--max-images", "8")
    assert "different settings" in fails("evaluate.py")


def test_searches_of_two_losses(trained: Path, fails: Fails, run_here: Callable[..., None]) -> None:
    """The latents of GAN_R must be of the images and splits that the others are of, and not the others themselves."""
    shutil.copy(trained / "latents-test.npz", trained / "latents-test-reference.npz")
    assert "latents-test-reference.npz was not guided by the reference loss" in fails("evaluate.py")
    fit = ["fit_latent.py", "--splits", "validation", "test", "--steps", "2", "--discrimination", "reference"]
    run_here(*fit, "--max-images", "20")
    (trained / "latents-train_anomalies.npz").unlink()
    assert "the two searches of validation are not of the same images" in fails("evaluate.py")
    (trained / "latents-validation-reference.npz").unlink()
    assert "--discrimination reference --splits validation" in fails("evaluate.py")


@pytest.mark.parametrize("kept", [0, 1, 100, 5000, -1])
def test_gan_cut_short(trained: Path, fails: Fails, kept: int) -> None:
    whole = (trained / "gan.pt").read_bytes()
    (trained / "gan.pt").write_bytes(whole[:kept])
    for script in ("fit_latent.py", "evaluate.py"):
        message = fails(script)
        assert "gan.pt is damaged or was not written by this train_gan.py" in message


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("you-have-been-pwned",)


@pytest.mark.parametrize("content", [Malicious(), {"config": {}, "generator": Malicious()}])
def test_malicious_gan_runs_nothing(trained: Path, tmp_path: Path, fails: Fails, content: object) -> None:
    torch.save(content, trained / "gan.pt")
    for script in ("fit_latent.py", "evaluate.py"):
        assert "nothing in it was run" in fails(script)
    assert not (tmp_path / "you-have-been-pwned").exists()
    torch.load(trained / "gan.pt", weights_only=False)  # the same file does its harm where pickles are trusted
    assert (tmp_path / "you-have-been-pwned").exists()


@pytest.mark.parametrize("content", [{}, [1, 2], {"config": {"image_size": 32}}, torch.zeros(3)])
def test_foreign_gan(trained: Path, fails: Fails, content: object) -> None:
    torch.save(content, trained / "gan.pt")
    assert "was not written by this train_gan.py" in fails("fit_latent.py")


@pytest.mark.parametrize("kept", [0, 50, -30])
def test_latents_cut_short(trained: Path, fails: Fails, kept: int) -> None:
    path = trained / "latents-test.npz"
    path.write_bytes(path.read_bytes()[:kept])
    message = fails("evaluate.py")
    assert "latents-test.npz is damaged" in message and "run fit_latent.py" in message


@pytest.mark.parametrize("name", ["z", "residual", "source", "gan"])
def test_latents_that_lack_something(trained: Path, fails: Fails, name: str) -> None:
    content = dict(np.load(trained / "latents-test.npz"))
    del content[name]
    np.savez(trained / "latents-test.npz", **content)
    assert "latents-test.npz is damaged" in fails("evaluate.py")


def test_latents_with_a_pickle_inside(trained: Path, tmp_path: Path, fails: Fails) -> None:
    content = dict(np.load(trained / "latents-test.npz"))
    content["source"] = np.array([Malicious()] * len(content["z"]), dtype=object)
    np.savez(trained / "latents-test.npz", **content)
    assert "latents-test.npz is damaged" in fails("evaluate.py")
    assert not (tmp_path / "you-have-been-pwned").exists()


@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_latents_that_are_not_finite(trained: Path, fails: Fails, spoil: float) -> None:
    content = dict(np.load(trained / "latents-test.npz"))
    content["residual"][3] = spoil
    np.savez(trained / "latents-test.npz", **content)
    assert "not finite" in fails("evaluate.py")


@pytest.mark.usefixtures("undrawn")
def test_images_changed_since_the_search(
    tmp_path: Path, fails: Fails, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "set", {"train/good": 10, "test/good": 2, "test/bad": 2})
    run_here(*TRAIN, "--dataset", "set", "--normal-class", "good")
    run_here("fit_latent.py", "--steps", "1", "--device", "cpu")
    draw(root / "test/bad/00a.png")
    run_here("evaluate.py", "--bootstrap", "5", "--device", "cpu")
    assert "test: 4 of 5 images were searched; the others are left out" in capsys.readouterr().out
    (root / "test/bad/00.png").unlink()
    assert "run fit_latent.py --splits test again" in fails("evaluate.py")
    (root / open_split("set", "train", "good").source[0]).unlink()
    message = fails("fit_latent.py", "--steps", "1", "--device", "cpu")
    assert "are not those of gan.pt" in message and "some were added, removed, renamed or replaced" in message


@pytest.mark.usefixtures("undrawn")
def test_images_to_search_that_cannot_be_read(tmp_path: Path, fails: Fails, run_here: Callable[..., None]) -> None:
    root = folder(tmp_path / "set", {"train/good": 10, "test/good": 2})
    run_here(*TRAIN, "--dataset", "set", "--normal-class", "good")
    arguments = ["fit_latent.py", "--splits", "test", "--steps", "1", "--batch-size", "1", "--device", "cpu"]
    contents = {path: path.read_bytes() for path in (root / "test/good").iterdir()}
    for path in contents:
        path.write_bytes(b"")
    assert "none of the 2 images of the split test" in fails(*arguments, "--skip-unreadable")
    assert not (tmp_path / "outputs/set-good/latents-test.npz").exists()
    # a damaged image is named before anything is searched
    first, last = sorted(contents)
    first.write_bytes(contents[first])
    assert "cannot read the image test/good/01.png" in fails(*arguments, "--shard-size", "1")
    assert not list((tmp_path / "outputs/set-good").glob("latents-test*/*"))
    last.write_bytes(contents[last])
    run_here(*arguments, "--shard-size", "1")
    assert len(np.load(tmp_path / "outputs/set-good/latents-test.npz")["z"]) == 2


@pytest.mark.usefixtures("undrawn")
def test_test_split_of_one_kind(tmp_path: Path, fails: Fails, run_here: Callable[..., None]) -> None:
    folder(tmp_path / "set", {"train/good": 10, "test/good": 2})
    run_here(*TRAIN, "--dataset", "set", "--normal-class", "good")
    run_here("fit_latent.py", "--steps", "1", "--device", "cpu")
    assert "all normal" in fails("evaluate.py")


def test_run_dir_that_is_a_file(tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "taken").write_text("mine")
    fails(*TRAIN, "--dataset", "digits", "--run-dir", "taken")
    assert (tmp_path / "taken").read_text() == "mine"
