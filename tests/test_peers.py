"""Other methods on a run's pictures: the halves, what is measured once, the table, and each method where installed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_scores
from sklearn.metrics import roc_auc_score

from anogan import images
from benchmarks import measure, peer_methods, peers
from benchmarks.peer_methods import CPU, METHODS, Budget, Fitted, Method, Pictures
from util import InputError

BUDGET = Budget(minutes=0, device=CPU)


def striped(count: int, random: np.random.Generator, size: tuple[int, int] = (52, 44)) -> Pictures:
    """Pictures (1, height, width) of stripes, shifted at random, with some noise."""
    across = np.arange(size[1])
    shifted = (np.sin((across + random.uniform(0, 8)) * np.pi / 4) for _ in range(count))
    return [(128 + 60 * line + random.normal(0, 4, (1, *size))).clip(0, 255).astype(np.uint8) for line in shifted]


@pytest.mark.parametrize("corner", [(20, 12), (46, 38), (0, 0)])  # in the middle, and at two corners
def test_patch_pca_finds_a_planted_defect(corner: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    fitted = peer_methods.patch_pca(striped(30, random), BUDGET)
    good, bad = striped(10, random), striped(10, random)
    for picture in bad:
        picture[0, corner[0] : corner[0] + 6, corner[1] : corner[1] + 6] = 255
    assert fitted.score(bad).min() > fitted.score(good).max()
    assert fitted.size == "components: 16" and fitted.seconds > 0


def test_patch_pca_by_hand() -> None:
    """Of one patch the score is what its projection leaves, in units of white."""
    random = np.random.default_rng(0)
    pictures = striped(30, random, size=(16, 16))
    fitted = peer_methods.patch_pca(pictures, BUDGET)
    x = np.stack(pictures).reshape(30, -1) / 255
    _, _, components = np.linalg.svd(x - x.mean(0), full_matrices=False)
    test = random.integers(0, 256, (1, 16, 16), np.uint8)
    left = (test.reshape(-1) / 255) - x.mean(0)
    left -= components[:16].T @ (components[:16] @ left)
    np.testing.assert_allclose(fitted.score([test]), [np.linalg.norm(left)], rtol=1e-4)


def test_whole_pca_by_hand() -> None:
    random = np.random.default_rng(0)
    pictures = list(random.integers(0, 256, (300, 1, 20, 20), np.uint8))
    fitted = peer_methods.whole_pca(pictures, BUDGET)
    x = np.stack(pictures).reshape(300, -1) / 255
    _, _, components = np.linalg.svd(x - x.mean(0), full_matrices=False)
    test = random.integers(0, 256, (1, 20, 20), np.uint8)
    left = test.reshape(-1) / 255 - x.mean(0)
    left -= components[:256].T @ (components[:256] @ left)
    np.testing.assert_allclose(fitted.score([test]), [np.linalg.norm(left)], rtol=1e-4)
    assert fitted.size == "components: 256"
    assert peer_methods.whole_pca(pictures[:20], BUDGET).size == "components: 19"


def test_smoothness_by_hand() -> None:
    """One pixel of one third of white on black: a ninth of it is the mean at it and at its eight neighbours."""
    picture = np.zeros((1, 9, 9), np.uint8)
    picture[0, 4, 4] = 85
    left = ((8 / 9) ** 2 + 8 * (1 / 9) ** 2) / 9 / 81
    np.testing.assert_allclose(peer_methods.smoothness([], BUDGET).score([picture]), [-left], rtol=1e-6)


def rows_of(*sources: str) -> list[dict[str, str]]:
    """Rows of scores.csv; the class stands in front of the name."""
    return [{"source": f"test/{source}", "class_name": source.split("/")[0], "label": "0"} for source in sources]


def test_report_half() -> None:
    """Every other group in the order of the groups, whatever their numbers; else every other picture."""
    rows = rows_of("crack/tile002_a.jpg", "crack/tile009_b.jpg", "good/tile002_c.jpg", "good/tile010_d.jpg")
    assert measure.report_half(rows, r"tile(\d+)").tolist() == [False, True, False, False]
    assert measure.report_half(rows, None).tolist() == [False, True, False, True]
    with pytest.raises(InputError, match="finds nothing in"):
        measure.report_half(rows, r"module(\d+)")
    of_cifar10 = [{**rows[0], "class_name": name, "label": str(i)} for i, name in enumerate(measure.CIFAR10)] * 4
    label = np.array([int(row["label"]) for row in of_cifar10])
    in_report = measure.report_half(of_cifar10, None)
    assert in_report.tolist() == measure.seeded_half(label).tolist()
    assert np.bincount(label[in_report]).tolist() == np.bincount(label[~in_report]).tolist() == [2] * 10


def test_the_pictures_of_a_run(digits_workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = digits_workdir / "outputs/digits-0"
    rows = [row for row in read_scores(run_dir) if row["split"] == "test"]
    whole = peers.open_run(run_dir, 1000)
    assert [row["source"] for row in whole.rows] == list(whole.images.source) == [row["source"] for row in rows]
    assert whole.in_report.tolist() == [False, True] * 30
    assert whole.is_anomaly.tolist() == [row["class_name"] != "0" for row in rows]

    # a subset keeps its halves, and the pictures of a seeded half are not the same as those of the subset
    monkeypatch.setattr(measure, "CIFAR10", tuple("0123456789"))
    half = measure.report_half(rows, None)
    some = peers.open_run(run_dir, 30)
    position = [[row["source"] for row in rows].index(source) for source in some.images.source]
    assert len(position) == 30 and some.in_report.tolist() == half[position].tolist()
    assert 8 < some.in_report.sum() < 22
    assert [row["source"] for row in some.rows] == list(some.images.source)
    assert set(some.images.label) == set(range(10))


def test_views(digits_workdir: Path) -> None:
    """No side is larger than that of a GAN that sees whole pictures, and anomalib sees three channels."""
    run = peers.open_run(digits_workdir / "outputs/digits-0", 60)
    for name, method in METHODS.items():
        picture = peers.read(run.images, method.view(run.gan))[0]
        assert picture.shape == (3 if method.package == "anomalib" else 1, 32, 32), name


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for the tables."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return tmp_path


def counted(monkeypatch: pytest.MonkeyPatch, **methods: Method) -> list[str]:
    """Make these the methods; returns a list to which the name of each is added that is trained."""
    trained = []

    def noting(name: str, method: Method) -> Method:
        def fit(pictures: Pictures, budget: Budget) -> Fitted:
            trained.append(f"{name} {budget.minutes:g}")
            return method.fit(pictures, budget)

        return method._replace(fit=fit)

    monkeypatch.setattr(peers, "METHODS", {name: noting(name, method) for name, method in methods.items()})
    return trained


def test_every_row_is_measured_once(digits_workdir: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = digits_workdir / "outputs/digits-0"
    pca = METHODS["patch_pca"]
    trained = counted(monkeypatch, patch_pca=pca, slow=pca._replace(has_budget=True))
    config = peers.Config((run_dir,), minutes=2)
    peers.main(config)
    assert trained == ["patch_pca 2", "slow 2"]
    ours, of_pca, slow = measure.read_rows(results / "peers.csv")
    assert (ours["method"], of_pca["method"]) == ("ours: anomaly_score", "patch_pca")
    # in the key of those alone that have them
    assert [(row["minutes"], row["device"]) for row in (of_pca, slow)] == [("", ""), ("2", "cpu")]
    assert (ours["side"], of_pca["side"]) == ("", "32")
    assert of_pca["roc_auc"] == slow["roc_auc"] and of_pca["size"].startswith("components: ")

    # the figures, worked out again
    of_verdict = json.loads((run_dir / "metrics.json").read_text())["test"]["anomaly_score"]
    assert float(ours["roc_auc"]) == pytest.approx(of_verdict["roc_auc"], abs=1e-4)
    record = json.loads((run_dir / "run.json").read_text())
    assert float(ours["training_seconds"]) == pytest.approx(record["train_gan"]["seconds"], abs=0.1)
    assert ours["seed"] == "0"
    run = peers.open_run(run_dir, 1000)
    view = pca.view(run.gan)
    training = peers.read(images.open_split("digits", "train", "0"), view)
    score = pca.fit(training, BUDGET).score(peers.read(run.images, view))
    for part, name in ((slice(None), "roc_auc"), (slice(1, None, 2), "roc_auc_report")):
        assert float(of_pca[name]) == pytest.approx(roc_auc_score(run.is_anomaly[part], score[part]), abs=1e-4)

    before = (results / "peers.csv").read_bytes()
    peers.main(config)
    assert len(trained) == 2
    assert sorted((results / "peers.csv").read_bytes().splitlines()) == sorted(before.splitlines())
    peers.main(peers.Config((run_dir,), minutes=3))
    assert trained[2:] == ["slow 3"]
    peers.main(peers.Config((run_dir,), methods=("patch_pca",), seeds=(0, 1)))
    assert trained[3:] == ["patch_pca 10"]
    peers.main(peers.Config((run_dir,), methods=("patch_pca",), max_test=40))  # other test pictures: other rows
    assert trained[4:] == ["patch_pca 10"]
    smaller = pca._replace(view=lambda gan: replace(pca.view(gan), picture_size=16))
    monkeypatch.setitem(peers.METHODS, "patch_pca", smaller)  # as of a run whose GAN sees smaller pictures
    peers.main(peers.Config((run_dir,), methods=("patch_pca",)))
    rows = measure.read_rows(results / "peers.csv")
    assert len(rows) == 2 + 6 and {row["side"] for row in rows} == {"", "32", "16"}
    assert "| digits | 0 | `patch_pca` | 32 | 0, 1 |" in (results / "peers.md").read_text()


def test_the_seconds_of_our_score_are_of_what_it_needs(digits_workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = peers.open_run(digits_workdir / "outputs/digits-0", 1000)
    record = json.loads((run.gan.run_dir / "run.json").read_text())
    for score, needs in (("peak", []), ("rotation", ["rotnet"]), ("combined", ["rotnet", "pca"]), ("acae", ["acae"])):
        metrics = {"threshold": {"score": score}}
        monkeypatch.setattr(measure, "read_metrics", lambda run_dir, metrics=metrics: metrics)
        expected = sum(record[script]["seconds"] for script in ["train_gan", *needs])
        assert float(peers.our_row(run)["training_seconds"]) == pytest.approx(expected, abs=0.06), score
    record["rotnet"]["hyperparameters"]["seed"] = 5  # another training on the same GAN is another row
    monkeypatch.setattr(peers.runs, "read_record", lambda run_dir: record)
    assert peers.our_row(run)["seed"] == "0"
    metrics["threshold"]["score"] = "rotation"
    assert peers.our_row(run)["seed"] == "5"


def test_a_method_that_fails_ends_the_script(
    digits_workdir: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own traceback; what was measured before stays."""

    def broken(pictures: Pictures, budget: Budget) -> Fitted:
        raise ZeroDivisionError("a fault of its own")

    pca = METHODS["patch_pca"]
    counted(monkeypatch, patch_pca=pca, broken=pca._replace(fit=broken))
    with pytest.raises(ZeroDivisionError, match="a fault of its own"):
        peers.main(peers.Config((digits_workdir / "outputs/digits-0",)))
    assert [row["method"] for row in measure.read_rows(results / "peers.csv")] == ["ours: anomaly_score", "patch_pca"]


def test_markdown_by_hand() -> None:
    about = {
        **dict.fromkeys(peers.COLUMNS, ""),
        "data": "set",
        "normal_class": "good",
        "hardware": "here",
        "side": "64",
    }
    figures = {"roc_auc": "0.5", "roc_auc_report": "0.8", "training_seconds": "1", "ms_a_picture": "20"}
    rows = [
        {**about, "method": "knn", "seed": "0", **figures},
        {**about, "method": "knn", "seed": "1", **figures, "roc_auc": "0.7", "training_seconds": "2000"},
        {**about, "method": "draem", "seed": "0", "minutes": "10", "device": "cpu", **figures, "size": "epochs: 2"},
        {**about, "method": "draem", "seed": "0", "minutes": "20", "device": "cpu", **figures, "size": "epochs: 4"},
        {**about, "method": "ours: peak", "seed": "0", "roc_auc": "1", "roc_auc_report": "1"},
    ]
    table = peers.to_markdown(rows).splitlines()[2:6]
    assert table == [
        "| set | good | `knn` | 64 | 0, 1 | 0.600 ± 0.141 | 0.800 ± 0.000 | 1000.5 | 20.0 |  | here |",
        "| set | good | `draem` | 64 | 0 | 0.500 | 0.800 | 1.0 | 20.0 | epochs: 2 | here |",
        "| set | good | `draem` | 64 | 0 | 0.500 | 0.800 | 1.0 | 20.0 | epochs: 4 | here |",
        "| set | good | `ours: peak` | 64 | 0 | 1.000 | 1.000 |  |  |  | here |",
    ]
    rows[1]["hardware"] = "there"
    row = "| set | good | `knn` | 64 | 0, 1 | 0.600 ± 0.141 | 0.800 ± 0.000 |  |  |  | here; there |"
    assert peers.to_markdown(rows).splitlines()[2] == row


def test_wrong_input(trained: Path, fails: Callable[..., str], results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(*flags: str) -> str:
        return fails("benchmarks.peers", *flags)

    run = str(trained)
    assert "name one or more evaluated run folders" in message()
    assert "unknown method 'knn': choose --methods from pyod_anogan" in message(run, "--methods", "knn")
    assert "--device must be cpu or cuda, not meta" in message(run, "--device", "meta")
    assert "--minutes must be at least 0.01" in message(run, "--minutes", "0")
    assert "--seeds must lie between" in message(run, "--seeds", "-1")
    flags = [run, "--methods", "patch_pca"]
    assert "two of these runs are of the same pictures and seed" in message(run, *flags)
    assert "the report half lacks normal or anomalous pictures: raise --max-test" in message(*flags, "--max-test", "4")
    monkeypatch.setitem(METHODS, "missing", METHODS["patch_pca"]._replace(package="no-such-package"))
    with pytest.raises(InputError, match="no-such-package is not installed here: use make peers"):
        peers.check(peers.Config((trained,), methods=("missing",)))

    scores = (trained / "scores.csv").read_text()
    (trained / "scores.csv").write_text(scores.replace("digits/test/0002", "digits/test/9999"))
    assert "scores.csv is of other test pictures than are there" in message(*flags)
    (trained / "scores.csv").write_text(scores)
    (trained / "rotnet.pt").unlink()
    assert "metrics.json is of another rotnet.pt" in message(*flags)
    (trained / "metrics.json").unlink()
    assert "has no metrics.json with a verdict: run evaluate.py first" in message(*flags)
    assert not list(results.glob("peers.*"))


@pytest.mark.parametrize("name", METHODS)
def test_each_method(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained twice with a seed it has the same scores, and downloads nothing. In .venv-peers alone all of them run."""
    pytest.importorskip({"scikit-learn": "sklearn"}.get(METHODS[name].package, METHODS[name].package))
    if name == "draem":
        monkeypatch.delattr("anomalib.models.image.draem.lightning_model.download_and_extract")
    random = np.random.default_rng(0)
    channels = 3 if METHODS[name].package == "anomalib" else 1
    training, test = ([each.repeat(channels, 0) for each in striped(8, random, (32, 32))] for _ in range(2))
    found = []
    for _ in range(2):
        np.random.seed(0)
        torch.manual_seed(0)
        fitted = METHODS[name].fit(training, BUDGET)  # at least one batch
        found.append(fitted.score(test))
    assert found[0].shape == (8,) and np.isfinite(found[0]).all()
    assert fitted.seconds > 0 or name == "smoothness"  # which learns nothing
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)
    assert len(set(found[0])) > 1
