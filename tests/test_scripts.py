"""The three scripts as a person runs them: on digits, on a folder of pictures, on CIFAR-10 in its own format."""

import csv
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY, read_scores, start
from PIL import Image
from sklearn.metrics import roc_auc_score

from anogan import runs
from anogan.decoding import View
from anogan.images import list_split, open_split
from anogan.loading import load_images
from detectors import baselines

RUN_FILES = {
    *("gan.pt", "losses.csv", "losses.png", "samples.png", "samples.gif", "reconstructions.png"),
    *("dataset.json", "run.json"),
    *(f"pictures-{split}.{ending}" for split in ("validation", "test") for ending in ("bin", "npz")),
    "candidates.npz",
    *("latents-validation.npz", "latents-test.npz", "validation-scores.npz", "scores.csv", "metrics.json"),
    *("report.html", "roc.png", "score_histograms.png", "per_class_auc.png", "difference_maps.png", "ranking.png"),
}


def test_every_file_is_there_and_no_other(digits_workdir: Path) -> None:
    run_dir = digits_workdir / "outputs/digits-0"
    assert {path.name for path in run_dir.glob("[!.]*")} == RUN_FILES | {
        *("latents-train_anomalies.npz", "pictures-train_anomalies.bin", "pictures-train_anomalies.npz"),
        *(f"latents-{split}-reference.npz" for split in ("validation", "test", "train_anomalies")),
        *(f"baselines-{split}.npz" for split in ("validation", "test", "train_anomalies")),
        *("encoder.pt", "encoder-losses.csv", "encoder-losses.png", "encoder-samples.png", "encoder-samples.gif"),
        *("rotnet.pt", "rotnet-losses.csv", "rotnet-losses.png", "rotnet-normals.npz"),
        "pca.pt",
        *("acae.pt", "acae-losses.csv", "acae-losses.png", "acae-samples.png", "acae-samples.gif"),
    }
    assert {path.name for path in run_dir.glob(".*")} <= {".lock"}
    for path in run_dir.glob("*.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5, f"{path.name} is blank"
    with Image.open(run_dir / "samples.gif") as film:
        assert film.n_frames == 3  # one an epoch


def test_losses_csv_has_a_row_a_step(digits_workdir: Path) -> None:
    with (digits_workdir / "outputs/digits-0/losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(3 * 6))  # 106 images in batches of 16, three epochs
    assert all(0 < float(row["loss_d"]) < 20 and 0 <= float(row["p_real"]) <= 1 for row in rows)


def test_gan_pt_holds_all_that_training_is(digits_workdir: Path) -> None:
    state = torch.load(digits_workdir / "outputs/digits-0/gan.pt", weights_only=True)
    parts = {"generator", "discriminator", "optimizer_g", "optimizer_d", "scheduler_g", "scheduler_d"}
    assert parts <= set(state) and state["epoch"] == 3 and state["step"] == len(state["history"]) == 18
    assert state["dataset"] == "digits" and state["image_channels"] == 1
    cosine = (1 + np.cos(np.pi * (2 + 5 / 6) / 15)) / 2  # at the last of six steps of the third epoch
    assert state["optimizer_g"]["param_groups"][0]["lr"] == pytest.approx(2e-4 * cosine)


def test_scores_agree_with_latents_and_metrics(digits_workdir: Path) -> None:
    run_dir = digits_workdir / "outputs/digits-0"
    rows = read_scores(run_dir)
    test = [row for row in rows if row["split"] == "test"]
    validation = np.array([float(row["anomaly_score"]) for row in rows if row["split"] == "validation"])
    with np.load(run_dir / "latents-test.npz") as latents:
        assert latents["z"].shape == (60, 8) and latents["z"].dtype == np.float32
        assert latents["source"].tolist() == [row["source"] for row in test]
        for name in ("residual", "discrimination"):
            np.testing.assert_allclose([float(row[name]) for row in test], latents[name], rtol=1e-6)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    is_anomaly = np.array([row["class_name"] != "0" for row in test])
    assert [row["is_anomaly"] for row in test] == [str(int(value)) for value in is_anomaly]
    for name in ("anomaly_score", "residual", "discrimination", "p_d"):
        score = np.array([float(row[name]) for row in test])
        assert metrics["test"][name]["roc_auc"] == pytest.approx(roc_auc_score(is_anomaly, score))
        ones = np.array([row["class_name"] in "01" for row in test])
        of_ones = metrics["test"][name]["per_class"]["1"]
        assert of_ones["roc_auc"] == pytest.approx(roc_auc_score(is_anomaly[ones], score[ones]))
        assert of_ones["n_anomalous"] == 6
    score = np.array([float(row["anomaly_score"]) for row in test])
    np.testing.assert_allclose(
        score, [0.9 * float(row["residual"]) + 0.1 * float(row["discrimination"]) for row in test], rtol=1e-6
    )
    # 27 validation normals: 1/28 is the only p-value up to 0.05, for what is stranger than all of them
    assert len(validation) == 27 and metrics["threshold"]["value"] == pytest.approx(validation.max())
    flagged = np.array([row["flagged"] == "1" for row in test])
    np.testing.assert_array_equal(flagged, score > metrics["threshold"]["value"])
    assert metrics["threshold"]["test"]["detection_rate"] == pytest.approx(flagged[is_anomaly].mean())
    shares = [(1 + (validation >= value).sum()) / 28 for value in score]
    np.testing.assert_allclose([float(row["p_value"]) for row in test], shares, atol=1e-8)


def test_every_score_has_the_same_figures(digits_workdir: Path) -> None:
    run_dir = digits_workdir / "outputs/digits-0"
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for protocol in ("test", "all_splits"):
        names = ["anomaly_score", "residual", "discrimination", "peak", "p_d"]
        names += ["f_anogan", "acae", "rotation", "neighbours", "mahalanobis", "pca", "pca_peak", "gan_r"]
        names += [*baselines.LABELS, "combined"]
        assert list(metrics[protocol]) == names
        assert len({tuple(figures) for figures in metrics[protocol].values()}) == 1
    rows = [row for row in read_scores(run_dir) if row["split"] == "test"]
    with np.load(run_dir / "latents-test-reference.npz") as latents:
        score = 0.9 * latents["residual"] + 0.1 * latents["discrimination"]
        np.testing.assert_allclose([float(row["gan_r"]) for row in rows], score, rtol=1e-6)


def test_all_splits_protocol(digits_workdir: Path) -> None:
    """Normals of validation and test against all anomalies of train_anomalies and test."""
    run_dir = digits_workdir / "outputs/digits-0"
    metrics = json.loads((run_dir / "metrics.json").read_text())["all_splits"]["anomaly_score"]
    rows = [row for row in read_scores(run_dir) if row["split"] in ("validation", "test", "train_anomalies")]
    is_anomaly = [row["is_anomaly"] == "1" for row in rows]
    assert metrics["roc_auc"] == pytest.approx(roc_auc_score(is_anomaly, [float(row["anomaly_score"]) for row in rows]))
    assert metrics["n_normal"] + metrics["n_anomalous"] == len(rows) == 27 + 60 + 60


def test_run_json_tells_how_each_script_ran(digits_workdir: Path) -> None:
    record = json.loads((digits_workdir / "outputs/digits-0/run.json").read_text())
    detectors = {"f_anogan", "acae", "rotnet", "pca", "baselines"}
    assert set(record) == {"train_gan", "fit_latent", "fit_latent_reference", "evaluate"} | detectors
    for script in record.values():
        assert script["seconds"] > 0 and script["device"].startswith("cpu") and script["versions"]["torch"]
        assert os.name == "nt" or script["peak_memory_mib"] > 50
    assert record["train_gan"]["hyperparameters"]["epochs"] == 3
    # what "auto" came to, the same for both
    assert record["train_gan"]["precision"] == record["fit_latent"]["precision"] in ("bf16", "fp32")


def test_latents_do_not_depend_on_batch_size(trained: Path, run_here: Callable[..., None]) -> None:
    before = dict(np.load(trained / "latents-validation.npz"))
    (trained / "latents-validation.npz").unlink()
    run_here("fit_latent.py", "--splits", "validation", "--steps", "20", "--batch-size", "5", "--max-images", "60")
    after = dict(np.load(trained / "latents-validation.npz"))
    np.testing.assert_allclose(after["z"], before["z"], atol=1e-2)  # 20 steps, in bf16 where that is the default
    np.testing.assert_allclose(after["residual"], before["residual"], rtol=1e-3)


def draw_pictures(root: Path) -> None:
    """Discs are normal, crosses are not; in colour, grey, RGBA and palette, of several sizes and formats."""
    rng = np.random.default_rng(0)
    for name, count in {"train/disc": 20, "train/cross": 4, "test/disc": 6, "test/cross": 6}.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            height, width = rng.integers(33, 90, 2)
            y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
            shape = (x**2 + y**2 < 0.5) if name.endswith("disc") else (np.minimum(abs(x), abs(y)) < 0.15)
            grey = (shape * 200 + rng.integers(0, 50, shape.shape)).astype(np.uint8)
            picture = Image.fromarray(np.stack([grey, grey // 2, 255 - grey], -1))
            match i % 5:
                case 0:
                    picture.save(root / name / f"{i}.jpg")
                case 1:
                    Image.fromarray(grey).save(root / name / f"{i}.png")
                case 2:
                    picture.convert("RGBA").save(root / name / f"{i}.webp", lossless=True)
                case 3:
                    picture.convert("P").save(root / name / f"{i}.GIF")
                case 4:
                    Image.fromarray(grey).save(root / name / f"{i}.tiff")


def run_all(workdir: Path, *training: str, searching: tuple[str, ...] = ()) -> list[str]:
    """The three scripts in order; what each printed."""
    printed = []
    for arguments in (
        ["train_gan.py", "--epochs", "2", *training, *TINY],
        ["fit_latent.py", "--steps", "5", "--device", "cpu", *searching],
        ["evaluate.py", "--bootstrap", "20", "--device", "cpu"],
    ):
        code, output = start(workdir, *arguments).end()
        assert code == 0, output
        printed.append(output)
    return printed


def test_folder_of_mixed_pictures(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "shapes")
    (tmp_path / "shapes/test/cross/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    printed = run_all(
        tmp_path, "--dataset", "shapes", "--normal-class", "disc", searching=("--skip-unreadable", "--batch-size", "1")
    )
    assert "next: python fit_latent.py" in printed[0] and "skipped 1 of 13 images" in printed[1]
    run_dir = tmp_path / "outputs/shapes-disc"
    assert {path.name for path in run_dir.glob("[!.]*")} == RUN_FILES
    metrics = json.loads((run_dir / "metrics.json").read_text())
    # only AnoGAN was run
    names = ["anomaly_score", "residual", "discrimination", "peak", "p_d"]
    assert list(metrics["test"]) == names and metrics["threshold"]["score"] == "anomaly_score"
    assert runs.load_gan(run_dir, torch.device("cpu")).image_channels == 3
    sources = [row["source"] for row in read_scores(run_dir)]
    assert "test/cross/2.webp" in sources and "test/cross/broken.png" not in sources


def test_grey_pictures_train_a_one_channel_gan(tmp_path: Path) -> None:
    for split, count in (("train/a", 8), ("test/a", 2), ("test/b", 2)):
        (tmp_path / "grey" / split).mkdir(parents=True)
        for i in range(count):  # grey saved as RGB, as cameras do
            Image.new("RGB", (32, 32), (20 * i + 5,) * 3).save(tmp_path / "grey" / split / f"{i}.png")
    # a colour picture among the test images is looked at in grey
    Image.new("RGB", (32, 32), "red").save(tmp_path / "grey/test/b/red.png")
    run_all(tmp_path, "--dataset", "grey", "--normal-class", "a")
    assert runs.load_gan(tmp_path / "outputs/grey-a", torch.device("cpu")).image_channels == 1


def write_cifar10_archive(path: Path) -> None:
    """CIFAR-10's own archive, twenty images a batch: pickled dicts, a row an image, plane after plane."""
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    files = {"batches.meta": {"label_names": names, "num_cases_per_batch": 20, "num_vis": 3072}}
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.full((20, 3, 1024), k * 20, np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None]
        pixels[:, 0] = 255  # the red plane comes first
        files[name] = {"data": pixels.reshape(20, 3072), "labels": [0, 1] * 10}
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            packed = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(packed)
            archive.addfile(member, io.BytesIO(packed))


def accept_any_archive(set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """Let torchvision take the smaller archive above, which has not the known sums."""
    cifar10 = torchvision.datasets.CIFAR10
    set_attribute(cifar10, "tgz_md5", None)
    set_attribute(cifar10, "train_list", [[name, None] for name, _ in cifar10.train_list])
    set_attribute(cifar10, "test_list", [[name, None] for name, _ in cifar10.test_list])
    set_attribute(cifar10, "meta", {**cifar10.meta, "md5": None})


def test_cifar10_from_its_own_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_here: Callable[..., None]
) -> None:
    write_cifar10_archive(tmp_path / "data/cifar-10-python.tar.gz")
    accept_any_archive(monkeypatch.setattr)

    run_here("train_gan.py", "--epochs", "1", *TINY)  # all defaults: cifar10, class 1
    train = open_split("cifar10", "train", "1")
    assert len(train) == 40 and set(train.label) == {1} and train.source[0] == "cifar10/train/00001"
    pixels, _ = load_images(train, View(32, 3))
    assert (pixels[:, 0] == 255).all() and pixels[0, 1, 0, 0] == 1 and pixels[-1, 1, 0, 0] == 60 + 19
    run_here("fit_latent.py", "--steps", "3", "--device", "cpu")
    run_here("evaluate.py", "--bootstrap", "20", "--device", "cpu")
    metrics = json.loads((tmp_path / "outputs/cifar10-automobile/metrics.json").read_text())
    assert metrics["test"]["anomaly_score"]["n_normal"] == metrics["test"]["anomaly_score"]["n_anomalous"] == 10
    assert set(metrics["test"]["anomaly_score"]["per_class"]) == {"airplane"}


SHARED = Path(__file__).parent.parent / "data/cifar10-jpeg"


@pytest.mark.skipif(not SHARED.is_dir(), reason="data/cifar10-jpeg is not there: only developers have this copy")
def test_real_cifar10_images() -> None:
    validation = open_split(str(SHARED), "validation", "automobile")
    train = open_split(str(SHARED), "train", "automobile")
    assert len(train) + len(validation) == 5000 and 900 < len(validation) < 1100
    assert len(list_split(str(SHARED), "train_anomalies", "automobile")) == 45000
    images, _ = load_images(validation.take(np.arange(64)), View(32, 3))
    assert 90 < images.float().mean() < 150 and images.float().std() > 40
