"""CutPaste: what is pasted, its distances against scipy, and a run that is judged and shown without a search."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, read_scores
from PIL import Image
from scipy.spatial.distance import mahalanobis
from test_pictures import read_verdicts

from anogan import gaussians
from anogan.loop import Training
from benchmarks import halves
from detectors import cutpaste

SIDE = 64  # of the drawn pictures
CPU = ["--device", "cpu"]


def drawn(random: np.random.Generator) -> np.ndarray:
    """Stripes that lie anywhere, with a little noise: uint8 (SIDE, SIDE)."""
    wave = 128 + 60 * np.sin((np.arange(SIDE) + random.integers(16)) * np.pi / 8)
    return (wave + random.normal(0, 4, (SIDE, SIDE))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of stripes; in the defective ones a square of them is moved by half a wave."""
    folder, random = tmp_path_factory.mktemp("work") / "stripes", np.random.default_rng(0)
    counts = {"train/good": 16, "validation/good": 20, "test/good": 10, "test/moved": 10}
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture = drawn(random)
            if name == "test/moved":
                top, left = random.integers(4, SIDE - 20, 2)
                place = slice(top, top + 16), slice(left, left + 16)
                picture[place] = np.roll(picture, 8, 1)[place]
                mask = np.zeros((SIDE, SIDE), np.uint8)
                mask[place] = 255
                (folder / "ground_truth/moved").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(folder / f"ground_truth/moved/{i:02d}_mask.png")
            Image.fromarray(picture).save(folder / name / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize("is_scar", [False, True])
def test_what_is_pasted(is_scar: bool) -> None:
    """A piece of 2% to 15% of the image, or a thin and long scar; all else stays, and the seed decides."""
    x = 2 * torch.rand(200, 1, 64, 64, generator=torch.Generator().manual_seed(0)) - 1
    torch.manual_seed(0)
    found = cutpaste.pasted(x, is_scar, fade=0)
    changed = (found != x).float()
    shares = changed.mean((1, 2, 3))
    assert found.abs().max() <= 1 and shares.min() > 0
    assert shares.max() < (0.08 if is_scar else 0.17)  # a scar has 12% of 50% at most
    rows, columns = changed.amax(3).sum(2), changed.amax(2).sum(2)  # (N, 1) the sides of the box around it
    fills = changed.sum((1, 2, 3)) / (rows * columns)[:, 0]
    assert (fills > 0.95).all() if not is_scar else (fills < 0.7).float().mean() > 0.5  # a turned one leaves corners
    torch.manual_seed(0)
    assert torch.equal(found, cutpaste.pasted(x, is_scar, fade=0))


def test_half_of_the_pieces_are_of_another_picture() -> None:
    x = torch.arange(100.0)[:, None, None, None].expand(100, 1, 32, 32) / 200  # each of one level of its own
    torch.manual_seed(0)
    found = cutpaste.pasted(x, is_scar=False, fade=0)  # no deviation: neither brightness nor contrast change
    is_other = ((found - x.roll(1, 0)).abs() < 1e-6).flatten(1).any(1)
    assert 0.35 < is_other.float().mean() < 0.65
    assert ((found - x).abs() < 1e-6).flatten(1).float().mean(1)[~is_other].eq(1).all()


def test_the_edge_of_a_piece_fades() -> None:
    """A part of another picture of one level, pasted into black: each pixel is as bright as the piece's share of it."""
    x = torch.tensor([-1.0, 0.5])[:, None, None, None].repeat(100, 1, 64, 64)
    for fade in (0.0, 3.0, 6.0):
        torch.manual_seed(0)
        black = cutpaste.pasted(x, is_scar=False, fade=fade)[::2, 0]  # (100, 64, 64)
        share = (black[black.amax((1, 2)) > 0.42] + 1) / 1.5
        middle = share.flatten(1).argmax(1)
        rows = share[torch.arange(len(share)), middle // 64]  # (N, 64) through the piece
        edges = ((rows > 0.1) & (rows < 0.9)).sum(1)[(rows[:, 0] < 0.1) & (rows[:, -1] < 0.1)]  # both sides of a piece
        assert len(edges) > 5 and abs(edges.float().median() - 2 * fade) <= 3, (fade, edges)


def test_the_network_sees_brightness_and_contrast() -> None:
    """It sees a darker image as another one, by the half of its input that is not normalised."""
    torch.manual_seed(0)
    network, x = cutpaste.CutPaste(32, 1, 4).eval(), torch.rand(1, 1, 32, 32) - 0.5
    for darker in (x - 0.3, x / 2):
        assert (network.rungs(darker)[0] - network.rungs(x)[0]).abs().max() > 1e-3
    with torch.no_grad():
        network.body[0].weight[:, 0] = 0  # of the image as it is
    for darker in (x - 0.3, x / 2):
        assert torch.allclose(network.rungs(darker)[0], network.rungs(x)[0], atol=1e-5)


def test_distances_against_scipy() -> None:
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(5000, 3, generator=random) * torch.tensor([1.0, 2.0, 1.5]) + 5
    gaussian = gaussians.fit(normal)
    found = torch.randn(4, 2, 3, generator=random)
    precision = np.linalg.inv(np.cov(normal.numpy().T))
    expected = [[mahalanobis(f, normal.mean(0), precision) ** 2 for f in row] for row in found.numpy()]
    np.testing.assert_allclose(gaussian.distance(found), expected, rtol=0.01)  # the shrinkage is small
    covariance = np.cov(normal.numpy().T, bias=True)
    shrunk = 0.7 * covariance + 0.3 * np.trace(covariance) / 3 * np.eye(3)
    np.testing.assert_allclose(gaussians.fit(normal, least=0.3).precision, np.linalg.inv(shrunk), rtol=1e-3, atol=1e-5)


def test_it_finds_and_shows_what_was_moved_without_a_search(
    stripes: Path,
    run_here: Callable[..., None],
    fails: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    about = ["--picture-size", "own", *TINY, "--epochs", "1"]
    run_here("train_gan.py", "--dataset", str(stripes), "--normal-class", "good", "--run-dir", str(run_dir), *about)
    for fade, words in (("-1", "at least 0"), ("nan", "at least 0"), ("inf", "finite"), ("33", "at most the side")):
        assert words in fails("detectors.cutpaste", "--run-dir", str(run_dir), "--fade", fade, *CPU)
    run_here("detectors.cutpaste", "--run-dir", str(run_dir), "--epochs", "15", "--batch-size", "8", *CPU)
    run_here("evaluate.py", "--run-dir", str(run_dir), "--bootstrap", "20", *CPU)
    printed, metrics = capsys.readouterr().out, json.loads((run_dir / "metrics.json").read_text())
    assert metrics["threshold"]["score"] == "cutpaste"  # the one that needs no search
    assert "without heat maps" not in printed
    run_here("evaluate.py", "--run-dir", str(run_dir), "--score", "cutpaste_peak", "--bootstrap", "20", *CPU)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    auc = {name: metrics["test"][name]["roc_auc"] for name in ("pasted", "cutpaste", "cutpaste_peak")}
    assert max(auc.values()) > 0.9 and min(auc.values()) > 0.7, auc
    assert metrics["pixels"]["pixel_roc_auc"] > 0.8 and metrics["pixels"]["regions"] == 10
    assert (run_dir / "difference_maps.png").is_file()
    assert '"panels": ["real", "distance", "marked"]' in (run_dir / "report.html").read_text(encoding="utf-8")

    # pixels of the two halves: those of test splits of every other picture, from the second on and from the first
    halves.main(halves.Config((run_dir,), ("cutpaste",), pixels=True))
    printed, of_halves = capsys.readouterr().out, []
    for left_out in (0, 1):
        half, run_of_half = tmp_path / f"half-{left_out}", tmp_path / f"run-{left_out}"
        shutil.copytree(stripes, half)
        for kind in ("good", "moved"):
            for path in sorted((half / "test" / kind).iterdir())[left_out::2]:
                path.unlink()
        shutil.copytree(run_dir, run_of_half)
        flags = ["--dataset", str(half), "--score", "cutpaste_peak", "--bootstrap", "20", *CPU]
        run_here("evaluate.py", "--run-dir", str(run_of_half), *flags)
        found = json.loads((run_of_half / "metrics.json").read_text())
        assert found["pixels"]["regions"] == 5
        of_halves.append(
            (found["test"]["cutpaste"]["roc_auc"], found["pixels"]["pixel_roc_auc"], found["pixels"]["aupro"])
        )
    for name, *values in zip(
        ("`cutpaste`", "pixel-level ROC-AUC, distance", "AUPRO, distance"), *of_halves, strict=True
    ):
        assert f"| {name} | {values[0]:.3f} | {values[1]:.3f} |" in printed
    (extra := stripes / "test/good/99.png").write_bytes((stripes / "test/good/00.png").read_bytes())
    assert "has other test pictures than before" in fails("benchmarks.halves", str(run_dir), "--pixels")
    extra.unlink()
    (tmp_path / "run-0/metrics.json").unlink()
    assert "has no metrics.json with a verdict" in fails("benchmarks.halves", str(tmp_path / "run-0"), "--pixels")

    # pictures without labels: the same scores and maps, on what the run folder keeps
    stripes.rename(moved := stripes.with_name("elsewhere"))
    run_here("evaluate.py", "--run-dir", str(run_dir), "--images", str(moved / "test/moved"), *CPU)
    assert "deviations above what is usual at that place" in (run_dir / "images-moved/report.html").read_text()
    rows = (run_dir / "scores.csv").read_text().splitlines()
    header = rows[0].split(",")
    before = {row.split(",")[2]: row.split(",")[header.index("cutpaste_peak")] for row in rows[1:]}
    names, *found = [row.split(",") for row in (run_dir / "images-moved/scores.csv").read_text().splitlines()]
    for row in found:
        name = "test/moved/" + Path(row[0]).name
        assert float(row[names.index("cutpaste_peak")]) == pytest.approx(float(before[name]), rel=1e-4)
        assert (run_dir / "images-moved/heat" / f"{Path(row[0]).name}.png").is_file()

    # after a search the map is still that of the method that the verdict rests on
    moved.rename(stripes)
    run_here("fit_latent.py", "--run-dir", str(run_dir), "--steps", "2", "--candidates", "8", *CPU)
    for score, shown in (("cutpaste", "distance"), ("anomaly_score", "difference")):
        run_here("evaluate.py", "--run-dir", str(run_dir), "--score", score, "--bootstrap", "20", *CPU)
        assert json.loads((run_dir / "metrics.json").read_text())["pixels"]["map"] == shown

    flags = ["--scores", "cutpaste", "--pixels"]  # the copy of the run before its search
    shutil.copytree(run_dir, tmp_path / "searched")
    run_here("evaluate.py", "--run-dir", str(run_dir), "--score", "cutpaste", "--bootstrap", "20", *CPU)
    both = [str(run_dir), str(tmp_path / "searched")]
    assert "the runs show different heat maps" in fails("benchmarks.halves", *both, *flags)

    # with PCA the verdict rests on both, for new pictures too, and the map is one of theirs
    run_here("detectors.pca", "--run-dir", str(run_dir))
    run_here("evaluate.py", "--run-dir", str(run_dir), "--bootstrap", "20", *CPU)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["threshold"]["parts"] == ["cutpaste", "pca_peak"] and metrics["test"]["combined"]["roc_auc"] > 0.7
    assert metrics["threshold"]["score"] == "combined" and metrics["pixels"]["map"] == "linear_difference"
    new = str(stripes / "test/moved")
    run_here("evaluate.py", "--run-dir", str(run_dir), "--images", new, *CPU)
    of_test = {row["source"]: row["combined"] for row in read_scores(run_dir)}
    for path, row in read_verdicts(run_dir / "images-moved").items():
        expected = float(of_test["test/moved/" + Path(path).name])
        assert float(row["combined"]) == pytest.approx(expected, rel=1e-3, abs=1e-3)
    (run_dir / "pca.pt").unlink()
    message = fails("evaluate.py", "--run-dir", str(run_dir), "--images", new, *CPU)
    assert "was last judged by combined of cutpaste, pca_peak, and now there are cutpaste" in message


@pytest.mark.parametrize(
    ("patches", "processes", "epochs"),
    [(386, 1, 105), (1000, 1, 45), (1760, 1, 45), (3408, 1, 15), (3408, 4, 45), (10**6, 1, 15), (9, 4, 105)],
)
def test_epochs_by_default(patches: int, processes: int, epochs: int) -> None:
    """About 1,500 steps, as near as 15, 45 or 105 epochs of batches of 32 come, by their ratio."""
    pictures = SimpleNamespace(turns=np.zeros(patches))
    settings = {"processes": processes, "epochs": 1, "lr": 1e-3}
    training = Training("", Path(), cutpaste.Config(), pictures, torch.device("cpu"), settings)
    found = training.of_about(cutpaste.STEPS)
    assert found.config.epochs == found.settings["epochs"] == epochs
    assert found.settings["lr"] == 1e-3 and training.settings["epochs"] == 1


def test_a_training_has_these_epochs(trained: Path, run_here: Callable[..., None]) -> None:
    run_here("detectors.cutpaste", "--device", "cpu")
    state = torch.load(trained / "cutpaste.pt", weights_only=True)
    assert state["config"]["epochs"] == 105 and state["step"] == 105 * 3
    assert json.loads((trained / "run.json").read_text())["cutpaste"]["hyperparameters"]["epochs"] == 105


def test_the_covariance_is_shrunk() -> None:
    """Of features that span two dimensions of many, the smallest eigenvalue is a share of the mean one."""
    torch.manual_seed(0)
    network = cutpaste.CutPaste(32, 1, 4).eval()
    x = torch.rand(2, 1, 32, 32) - 0.5
    with torch.no_grad():
        found = cutpaste.gaussians(network, [torch.cat([x.lerp(x.flip(0), share) for share in torch.rand(20)])])
    for of in ("whole", "place"):
        variances = 1 / torch.linalg.eigvalsh(found[f"{of}_precision"].double())
        assert variances.min() > 0.9 * cutpaste.SHRINKAGE * variances.mean()
