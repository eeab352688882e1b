"""A GAN of patches through every script, as real processes: what is searched, scored, drawn and refused.

Values are held against short computations of their own from the files: pictures, latents and networks.
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, made_once, read_scores, run_together, start
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.svm import OneClassSVM
from test_long_runs import assert_same_latents, finish
from test_pictures import CPU, read_verdicts
from test_search import Networks

import evaluate
import fit_latent
from anogan import heatmaps, images, latents, plots, reconstruction, runs, scores, scoring, verdicts
from anogan.scoring import ScoredSplit
from detectors import acae, cutpaste, f_anogan, pca, rotnet
from util import InputError

pytestmark = pytest.mark.usefixtures("undrawn")

Run = Callable[..., None]
Fails = Callable[..., str]
Captured = pytest.CaptureFixture[str]
SIDE, RUN = 32, Path("outputs/set-good")
SIZES = ((50, 70), (64, 48), (32, 40))  # height and width
FIT = ["fit_latent.py", "--steps", "10", "--candidates", "200", *CPU]
EVALUATE = ["evaluate.py", "--bootstrap", "10", "--alpha", "0.1", *CPU]
POOLS = {"_worst": np.max, "": lambda of: np.sort(of)[-max(1, round(len(of) / 10)) :].mean(), "_mean": np.mean}


def drawn(number: int, random: np.random.Generator, spoilt: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A grey picture of a wave, with a bright spot if it is spoilt, and where the spot is."""
    height, width = SIZES[number % 3]
    down, across = np.mgrid[:height, :width]
    picture = 110 + 50 * np.sin(across / 2.5) * np.cos(down / 2.5) + random.normal(0, 6, (height, width))
    mask = np.zeros((height, width), bool)
    if spoilt:
        top, left = random.integers(0, height - 8), random.integers(0, width - 8)
        mask[top : top + 8, left : left + 8] = True
    return np.where(mask, 240, picture).clip(0, 255).astype(np.uint8), mask


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def draw_set(root: Path) -> None:
    """A data set of pictures of several sizes, with masks, and pictures without labels in new/."""
    random = np.random.default_rng(0)
    for part, count in (("train/good", 9), ("validation/good", 12), ("test/good", 6), ("test/spot", 6), ("new", 4)):
        for i in range(count):
            spoilt = part == "test/spot" or (part == "new" and i % 2 == 1)
            picture, mask = drawn(i, random, spoilt)
            save(root / part / f"{i:02d}.png", picture)
            if part == "test/spot":
                save(root / f"ground_truth/spot/{i:02d}_mask.png", mask)


@pytest.fixture(scope="session")
def patch_workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which every script ran on patches, each as its own process. outputs/whole sees none."""
    return made_once(tmp_path_factory, "patches", run_on_patches)


def run_on_patches(workdir: Path) -> None:
    """A small training of whole pictures, and of patches all that there is."""
    draw_set(workdir / "set")
    train = ["train_gan.py", "--dataset", "set", *TINY]
    for command in (
        [*train, "--epochs", "1", "--run-dir", "outputs/whole"],
        [*train, "--epochs", "12", "--picture-size", "own", "--normalise", "patch"],
        [*FIT, "--shard-size", "20"],
        [*FIT, "--discrimination", "reference"],
        ["detectors.f_anogan", "--epochs", "2"],
        ["detectors.acae", "--epochs", "2"],
        ["detectors.rotnet", "--epochs", "2"],
        ["detectors.baselines"],
        [*EVALUATE, "--score", "anomaly_score_mean"],
        [*FIT, "--images", "set/new"],
        [*EVALUATE, "--images", "set/new"],
    ):
        more = [] if command[0] == "train_gan.py" else ["--run-dir", str(RUN)]
        finish(workdir, [*command, *more])


@pytest.fixture
def run_dir(patch_workdir: Path, tmp_path: Path) -> Path:
    """A copy of that run, in `tmp_path`, next to a copy of its set's new/."""
    shutil.copytree(patch_workdir / "set/new", tmp_path / "set/new")
    return shutil.copytree(patch_workdir / RUN, tmp_path / RUN)


@pytest.fixture
def whole_dir(patch_workdir: Path, tmp_path: Path) -> Path:
    """A copy of the run that sees no patches."""
    return shutil.copytree(patch_workdir / "outputs/whole", tmp_path / "whole")


def test_pictures_larger_than_the_normals_are_named(run_dir: Path, run_here: Run, capsys: Captured) -> None:
    """A score depends on the number of patches, so their p-values do not hold."""
    large = Path(run_dir.parent.parent / "set/large.png")
    save(large, np.tile(drawn(1, np.random.default_rng(0))[0], (2, 2)))  # 128x96: 35 patches
    for pictures, count in (([str(large.parent / "new/00.png")], 0), ([str(large)], 1)):
        run_here(*EVALUATE, "--run-dir", str(run_dir), "--images", *pictures, "--score", "p_d")
        printed = capsys.readouterr().out
        assert ("images: 1 of 1 pictures are smaller or larger than every validation picture" in printed) == bool(count)
    assert "large.png (35 patches, not 2 to 12)" in printed.replace("\n", " ")


def grid_of(size: tuple[int, int], stride: int) -> list[tuple[int, int]]:
    """The corners of the patches of a picture of this height and width, by hand."""
    tops, lefts = ([*range(0, length - SIDE, stride), length - SIDE] for length in size)
    return [(top, left) for top in tops for left in lefts]


def of_split(run_dir: Path, split: str, reference: bool = False) -> dict[str, np.ndarray]:
    return dict(np.load(run_dir / f"latents-{split}{'-reference' if reference else ''}.npz"))


def pixels_of(root: Path, source: str) -> np.ndarray:
    return np.asarray(Image.open(root / source))


def to_x(root: Path, source: str, corners: list[tuple[int, int]]) -> torch.Tensor:
    """Patches of a picture as a network takes them: (N, 1, SIDE, SIDE), -1 and 1 are 4 standard deviations away."""
    picture = pixels_of(root, source) / 127.5 - 1
    cut = [picture[top : top + SIDE, left : left + SIDE] for top, left in corners]
    scaled = [((patch - patch.mean()) / (4 * max(patch.std(), 0.04))).clip(-1, 1) for patch in cut]
    return torch.from_numpy(np.stack(scaled)[:, None]).float()


# ---- fit_latent.py --------------------------------------------------------------------------------------------------


def test_latents_are_of_the_grid_and_of_their_patches(patch_workdir: Path) -> None:
    """Half a side apart and at the edges; what was left over is what the z found leave of each patch."""
    gan = runs.load_gan(patch_workdir / RUN, torch.device("cpu"))
    for split, count in (("validation", 12), ("test", 12)):
        found = of_split(patch_workdir / RUN, split)
        assert len(found["source"]) == len(found["index"]) == len(found["class_name"]) == count
        for number, source in enumerate(found["source"]):
            own = found["picture"] == number
            corners = list(zip(found["top"][own].tolist(), found["left"][own].tolist(), strict=True))
            picture = pixels_of(patch_workdir / "set", source)
            assert corners == grid_of(picture.shape, 16)
            is_seen = np.zeros(picture.shape, bool)
            for top, left in corners:
                is_seen[top : top + SIDE, left : left + SIDE] = True
            assert is_seen.all()
            x, generated = (
                to_x(patch_workdir / "set", source, corners),
                gan.generator(torch.from_numpy(found["z"][own])),
            )
            features = gan.discriminator.features(x) - gan.discriminator.features(generated)
            for name, difference in (("residual", x - generated), ("discrimination", features)):
                np.testing.assert_allclose(found[name][own], difference.abs().sum((1, 2, 3)), rtol=1e-4)


def test_strides(
    run_dir: Path, whole_dir: Path, patch_workdir: Path, run_here: Run, fails: Fails, capsys: Captured
) -> None:
    """Another one is searched again, any that leaves pixels out is refused, and so is one for whole pictures."""
    sizes = [pixels_of(patch_workdir / "set", source).shape for source in of_split(run_dir, "validation")["source"]]
    few = [*FIT, "--run-dir", str(RUN), "--steps", "1"]
    for stride in (32, 8):
        run_here(*few, "--splits", "validation", "--stride", str(stride))
        printed = capsys.readouterr().out
        assert "was fitted with other settings: searching again" in printed
        assert re.search(r"leaves 0.\d+ standard deviations in 32 validation patches, the median patch leaves", printed)
        found = of_split(run_dir, "validation")
        expected = [(number, *corner) for number, size in enumerate(sizes) for corner in grid_of(size, stride)]
        assert list(zip(*(found[name].tolist() for name in ("picture", "top", "left")), strict=True)) == expected
    for stride in ("0", "33"):
        assert f"--stride must lie between 1 and the side of a patch, 32, not {stride}" in fails(
            *few, "--stride", stride
        )
    message = fails(*few, "--stride", "16", "--images", "set/new")
    assert "the validation images were searched with stride 8: use the same for --images" in message
    message = fails(*EVALUATE, "--run-dir", str(RUN))
    assert "validation and test were fitted with different settings (steps, stride)" in message
    whole = fails(*few, "--run-dir", str(whole_dir), "--stride", "16")
    assert "--stride is for a GAN of patches" in whole


@pytest.mark.parametrize("seed", range(3))
def test_shards_hold_whole_pictures(seed: int) -> None:
    """Each picture once and in order, and as few patches more than asked for as can be."""
    random = np.random.default_rng(seed)
    for _ in range(200):
        counts = random.integers(0, 9, random.integers(0, 20)) * random.integers(0, 2)
        size = int(random.integers(1, 30))
        ranges = latents.whole_pictures(counts, size)
        assert [row for part in ranges for row in part] == list(range(len(counts)))
        for part in ranges[:-1]:
            held = counts[part.start : part.stop]
            assert held.sum() >= size > held[:-1].sum()


def test_however_it_is_searched_it_finds_the_same(run_dir: Path, tmp_path: Path) -> None:
    """Killed on the way, in two processes, in other batches and shards."""
    whole = shutil.copytree(run_dir, tmp_path / "whole")
    fit = [*FIT, "--run-dir", str(RUN), "--shard-size", "20"]

    def forget(*splits: str) -> None:
        for split in splits:
            (run_dir / f"latents-{split}.npz").unlink()

    forget("validation", "test")
    search = start(tmp_path, *fit)
    search.wait_for((run_dir / "latents-validation/000000.npz").exists)
    os.kill(search.process.pid, signal.SIGKILL)
    assert search.end()[0] == -signal.SIGKILL and not (run_dir / "latents-test.npz").exists()
    assert "shards are done, going on with the others" in finish(tmp_path, fit)
    for split in ("validation", "test"):
        assert_same_latents(run_dir, whole, split)

    forget("validation")
    (code, first), (other_code, other) = run_together(tmp_path, *fit)
    assert code == other_code == 0, first + other
    assert "80 patches to search: about " in first and "to search" not in other.replace("nothing to search", "")
    assert_same_latents(run_dir, whole, "validation")

    forget("validation")
    finish(tmp_path, [*fit, "--batch-size", "7", "--shard-size", "25"])
    found = of_split(run_dir, "validation")
    for name, expected in of_split(whole, "validation").items():
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-3)
        else:
            np.testing.assert_array_equal(found[name], expected)


def test_pictures_are_counted_and_patches_searched(run_dir: Path, run_here: Run, capsys: Captured) -> None:
    """--max-images takes pictures. The bar and the line on how long it takes count patches: of all splits together,
    once, and only where there is more than a batch to do."""
    fit = [*FIT, "--run-dir", str(RUN), "--steps", "2", "--max-images", "5"]
    run_here(*fit, "--batch-size", "8")
    printed = capsys.readouterr()
    patches = {}
    for split in ("validation", "test"):
        found = of_split(run_dir, split)
        sizes = [len(grid_of(SIZES[int(Path(source).stem) % 3], 16)) for source in found["source"]]
        assert len(sizes) == 5 and sum(sizes) == len(found["z"]) == len(found["picture"])
        assert f"/{sum(sizes)} [" in printed.err and f"{split}: {sum(sizes)} patches, mean loss" in printed.out
        patches[split] = sum(sizes)
    line = f"{sum(patches.values())} patches to search: about "
    assert printed.out.count(line) == printed.out.count("to search") == 1

    run_here(*fit, "--batch-size", "8")
    assert "to search" not in capsys.readouterr().out.replace("nothing to search", "")
    (run_dir / "latents-test.npz").unlink()
    run_here(*fit, "--batch-size", str(patches["test"]))
    assert "to search" not in capsys.readouterr().out.replace("nothing to search", "")


def test_pictures_in_any_order_and_from_anywhere(run_dir: Path, tmp_path: Path, capsys: Captured) -> None:
    names = [f"set/new/{i:02d}.png" for i in range(4)]
    found = of_split(run_dir, "images")  # as they lie in the data set
    finish(tmp_path, [*FIT, "--run-dir", str(run_dir), "--images", *names[::-1]])
    again = of_split(run_dir, "images")
    assert (
        again["source"].tolist() == names
        and [len(grid_of(SIZES[i % 3], 16)) for i in range(4)] == np.bincount(again["picture"]).tolist()
    )
    for name in ("z", "residual", "discrimination", "picture", "top", "left", "index"):
        np.testing.assert_array_equal(again[name], found[name])
    (tmp_path / "elsewhere").mkdir()
    printed = finish(tmp_path / "elsewhere", [*EVALUATE, "--run-dir", str(run_dir), "--images", "../set/new"])
    header, *rows = printed[printed.index(" p_value  anomaly_score_mean  flagged  picture") :].splitlines()[:5]
    assert all(row.index(str(tmp_path)) == header.index("picture") for row in rows)  # however long the score's name is
    verdicts = read_verdicts(run_dir / "images-new")
    assert sorted(verdicts) == [str(tmp_path / name) for name in names]


# ---- evaluate.py ----------------------------------------------------------------------------------------------------


def pooled(of_patches: np.ndarray, picture: np.ndarray) -> dict[str, np.ndarray]:
    """The three scores of each picture, by the ending of their names."""
    parts = [of_patches[picture == number] for number in range(picture[-1] + 1)]
    return {ending: np.array([pool(part) for part in parts]) for ending, pool in POOLS.items()}


def stitched(root: Path, gan: runs.TrainedGAN, found: dict[str, np.ndarray], number: int) -> np.ndarray:
    """The heat map of a picture, by hand: the mean of its patches' differences, weighted by a window, smoothed."""
    own = found["picture"] == number
    corners = list(zip(found["top"][own].tolist(), found["left"][own].tolist(), strict=True))
    x = to_x(root, found["source"][number], corners)
    differences = (x - gan.generator(torch.from_numpy(found["z"][own]))).abs()[:, 0].numpy() / 2
    wave = np.sin(np.pi * (np.arange(SIDE) + 0.5) / SIDE) ** 2
    total, weight = (np.zeros(pixels_of(root, found["source"][number]).shape) for _ in range(2))
    for difference, (top, left) in zip(differences, corners, strict=True):
        place = slice(top, top + SIDE), slice(left, left + SIDE)
        total[place] += np.outer(wave, wave) * difference
        weight[place] += np.outer(wave, wave)
    return gaussian_filter(total / weight, SIDE / 32, mode="mirror", truncate=3)


def test_scores_are_those_of_the_patches(patch_workdir: Path) -> None:
    """The worst patch, the mean of the worst tenth and the mean of all; peak is of the map of the whole picture."""
    gan = runs.load_gan(patch_workdir / RUN, torch.device("cpu"))
    rows = read_scores(patch_workdir / RUN)
    training = gan.to_model(runs.images_of_gan(gan).some(5000)).flatten(1)  # patches: 9 pictures have some 20
    components = PCA(0.95, svd_solver="full").fit(training)
    one_class = OneClassSVM(nu=0.1, gamma="scale").fit(components.transform(training))
    assert len(training) > 15
    for split in ("validation", "test"):
        found, reference = (of_split(patch_workdir / RUN, split, which) for which in (False, True))
        own = {name: np.array([float(r[name]) for r in rows if r["split"] == split]) for name in list(rows[0])[6:]}
        assert [row["source"] for row in rows if row["split"] == split] == found["source"].tolist()
        corners = zip(found["top"].tolist(), found["left"].tolist(), strict=True)
        sources = found["source"][found["picture"]]
        x = torch.cat(
            [to_x(patch_workdir / "set", *each) for each in zip(sources, ([c] for c in corners), strict=True)]
        )
        of_patches = {
            "residual": found["residual"],
            "discrimination": found["discrimination"],
            "anomaly_score": 0.9 * found["residual"] + 0.1 * found["discrimination"],
            "gan_r": 0.9 * reference["residual"] + 0.1 * reference["discrimination"],
            "p_d": 1 - gan.discriminator(x).double().sigmoid().numpy(),
            "acae": acae.score(acae.load(gan), x).detach().numpy(),
            "f_anogan": f_anogan.score(f_anogan.load(gan), gan, x).detach().numpy(),
            "rotation": rotnet.rotation(rotnet.load(gan).network, x).detach().numpy(),
        }
        for name, values in of_patches.items():
            for ending, expected in pooled(values, found["picture"]).items():
                np.testing.assert_allclose(own[name + ending], expected, rtol=1e-4, err_msg=name + ending)
        vectors = -one_class.score_samples(components.transform(x.flatten(1)))
        np.testing.assert_allclose(own["oc_svm"], pooled(vectors, found["picture"])[""], rtol=1e-4)
        peaks = [stitched(patch_workdir / "set", gan, found, number).max() for number in range(len(found["source"]))]
        np.testing.assert_allclose(own["peak"], peaks, rtol=1e-4)
        assert not {"peak_mean", "combined_mean", "kde_mean"} & set(own)  # of a map, of other scores, of a picture


def test_verdict_is_conformal_by_the_score_that_was_asked_for(patch_workdir: Path) -> None:
    """A p-value a picture, against the validation pictures' mean of patches."""
    rows = read_scores(patch_workdir / RUN)
    normals = np.array([float(row["anomaly_score_mean"]) for row in rows if row["split"] == "validation"])
    assert len(normals) == 12
    for row in rows:
        p_value = (1 + (normals >= float(row["anomaly_score_mean"])).sum()) / 13
        assert float(row["p_value"]) == pytest.approx(p_value) and int(row["flagged"]) == (p_value <= 0.1)
    metrics = json.loads((patch_workdir / RUN / "metrics.json").read_text())
    assert metrics["threshold"]["score"] == "anomaly_score_mean" and metrics["threshold"]["validation_images"] == 12
    assert metrics["test"]["anomaly_score_worst"]["n_normal"] == metrics["test"]["p_d_mean"]["n_anomalous"] == 6
    assert metrics["pixels"]["with_mask"] == metrics["pixels"]["regions"] == 6
    assert metrics["pixels"]["marked_unseen"] == metrics["pixels"]["masks_unseen"] == 0


def test_pixel_figures_are_of_the_whole_pictures(patch_workdir: Path) -> None:
    """Against scikit-learn over every pixel of every test picture, edges included."""
    gan = runs.load_gan(patch_workdir / RUN, torch.device("cpu"))
    found = of_split(patch_workdir / RUN, "test")
    heats, masks = [], []
    for number, source in enumerate(found["source"]):
        heats.append(stitched(patch_workdir / "set", gan, found, number).ravel())
        mask = patch_workdir / "set/ground_truth" / f"{source.removeprefix('test/').removesuffix('.png')}_mask.png"
        masks.append(np.asarray(Image.open(mask)).ravel() if mask.exists() else np.zeros(heats[-1].size, bool))
    expected = roc_auc_score(np.concatenate(masks), np.concatenate(heats))
    metrics = json.loads((patch_workdir / RUN / "metrics.json").read_text())
    assert metrics["pixels"]["pixel_roc_auc"] == pytest.approx(expected, abs=2e-3)  # it counts in 4,096 steps


def test_figures_and_report_name_the_main_scores_and_the_judged_one(patch_workdir: Path) -> None:
    text = (patch_workdir / RUN / "report.html").read_text(encoding="utf-8")
    data = json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    main = [score.name for score in evaluate.SCORES if score.source not in (cutpaste.CUTPASTE, pca.LINEAR)]  # not here
    assert data["scores"] == [main[0], "anomaly_score_mean", *main[1:]] and data["verdict"] == "anomaly_score_mean"
    assert len(data["rows"]) == 12
    normals = [float(row["peak"]) for row in read_scores(patch_workdir / RUN) if row["split"] == "validation"]
    assert f"passes {8 * max(normals):.3g} standard deviations, which few normal pictures do anywhere" in text
    for row in data["rows"]:
        strip = Image.open(io.BytesIO(base64.b64decode(row[-1])))
        height, width = SIZES[int(Path(row[0]).stem) % 3]
        assert strip.size == (4 * width, height)
    for name in ("roc", "score_histograms", "per_class_auc", "ranking", "difference_maps", "reconstructions"):
        assert (patch_workdir / RUN / f"{name}.png").is_file()


def test_own_pictures_are_shown_whole_at_their_own_size(patch_workdir: Path) -> None:
    """What is red is what passes the level in the stitched map, up to the edges; nothing is grey, as if not seen."""
    gan = runs.load_gan(patch_workdir / RUN, torch.device("cpu"))
    found, folder = of_split(patch_workdir / RUN, "images"), patch_workdir / RUN / "images-new"
    peaks = [float(row["peak"]) for row in read_scores(patch_workdir / RUN) if row["split"] == "validation"]
    level, red = sorted(peaks)[-1], 0  # of 12 normals, one may be above it at alpha 0.1
    for number, source in enumerate(found["source"]):
        name = Path(source).name
        original = np.asarray(Image.open(patch_workdir / source))
        heat, marked = (np.asarray(Image.open(folder / kind / f"{name}.png")) for kind in ("heat", "marked"))
        assert heat.shape == marked.shape == (*original.shape, 3)
        assert not (heat == 128).all(2).any()
        expected = stitched(patch_workdir, gan, found, number)
        is_sure = abs(expected - level) > 1e-5
        np.testing.assert_array_equal((marked != original[..., None]).any(2)[is_sure], (expected > level)[is_sure])
        red += (expected > level).sum()
    assert red > 50
    normals = np.load(patch_workdir / RUN / "validation-scores.npz")["anomaly_score_mean"]
    rows = read_verdicts(folder)
    assert len(rows) == 4
    for row in rows.values():
        p_value = (1 + (normals >= float(row["anomaly_score_mean"])).sum()) / 13
        assert float(row["p_value"]) == pytest.approx(p_value) and int(row["flagged"]) == (p_value <= 0.1)


def scored(run_dir: Path, score: str, is_the_only_one: bool = True) -> ScoredSplit:
    """The test split as evaluate.py works with it, without its figures."""
    gan = runs.load_gan(run_dir, torch.device("cpu"))
    image_sets = {split: runs.open_split(gan, split) for split in ("validation", "test")}
    request = scoring.Request(score, is_the_only_one, batch_size=16, skip_unreadable=False)
    return scoring.score_run(gan, image_sets, evaluate.SCORES, request)["test"]


def test_gan_r_of_other_patches(run_dir: Path, tmp_path: Path, run_here: Run, capsys: Captured) -> None:
    """Beside a search of another stride it is left out or refused; alone it is scored, at its own."""
    run_here(*FIT, "--discrimination", "reference", "--stride", "32", "--steps", "1")
    line = "the two searches of validation are of other patches (stride 16 and 32): run fit_latent.py"
    for wanted, is_the_only_one in (("gan_r", True), ("anomaly_score", False)):
        with pytest.raises(InputError) as refused:
            scored(run_dir, wanted, is_the_only_one)
        assert line in str(refused.value)
    capsys.readouterr()
    assert "gan_r" not in scored(run_dir, "anomaly_score").scores
    assert f"without the scores of fit_latent.py --discrimination reference: {line}" in capsys.readouterr().out

    for path in run_dir.glob("latents-*[!e].npz"):
        path.unlink()
    alone, reference = scored(run_dir, "gan_r"), of_split(run_dir, "test", reference=True)
    of_patches = 0.9 * reference["residual"] + 0.1 * reference["discrimination"]
    for ending, expected in pooled(of_patches, reference["picture"]).items():
        np.testing.assert_allclose(alone.scores[f"gan_r{ending}"], expected, rtol=1e-6)
    assert alone.latents is None and "p_d" in alone.scores


@pytest.mark.parametrize("stride", [None, 8])
def test_pictures_without_a_search_have_the_patches_of_the_normals(
    run_dir: Path, patch_workdir: Path, run_here: Run, capsys: Captured, stride: int | None
) -> None:
    """The validation pictures, judged again without a search, score what they scored as normals: of the grid of their
    search, or of half a side."""
    for path in run_dir.glob("latents-*"):
        path.unlink()
    if stride is not None:
        run_here(*FIT, "--splits", "validation", "--stride", str(stride), "--steps", "1")
    normal = str(patch_workdir / "set/validation/good")
    run_here(*EVALUATE, "--images", normal, "--score", "p_d")
    assert "without heat maps, since these images were not searched" in capsys.readouterr().out
    folder = run_dir / "images-good"
    assert {path.name for path in folder.iterdir()} == {"scores.csv", "scores.png", "report.html"}
    rows, normals = read_verdicts(folder), np.load(run_dir / "validation-scores.npz")
    gan = runs.load_gan(run_dir, torch.device("cpu"))
    for i in range(12):
        row = rows[f"{normal}/{i:02d}.png"]
        for name in ("p_d", "p_d_mean", "rotation", "neighbours_worst", "acae", "f_anogan", "combined"):
            assert float(row[name]) == pytest.approx(normals[name][i], rel=1e-5, abs=1e-6)
        x = to_x(patch_workdir / "set", f"validation/good/{i:02d}.png", grid_of(SIZES[i % 3], stride or 16))
        of_patches = (1 - gan.discriminator(x).double().sigmoid()).detach().numpy()
        assert float(row["p_d"]) == pytest.approx(POOLS[""](of_patches))


def test_a_copied_run_judges_without_its_data_set(
    run_dir: Path, patch_workdir: Path, run_here: Run, fails: Fails
) -> None:
    about = json.loads((run_dir / "dataset.json").read_text())
    (run_dir / "dataset.json").write_text(json.dumps(about | {"dataset": "/not/here"}))
    shutil.rmtree(run_dir / "images-new")
    (run_dir / "latents-images.npz").unlink()
    run_here(*FIT, "--images", "set/new")
    run_here(*EVALUATE, "--images", "set/new")
    before, after = (path / "images-new/scores.csv" for path in (patch_workdir / RUN, run_dir))
    assert after.read_bytes() == before.read_bytes()
    assert "the data set of this run is not in /not/here" in fails(*EVALUATE)


def test_a_score_of_all_patches_needs_patches(whole_dir: Path, fails: Fails) -> None:
    message = fails(*EVALUATE, "--score", "anomaly_score_mean", "--run-dir", str(whole_dir))
    assert "there is no score anomaly_score_mean here: it is of a GAN of patches, and this one sees none" in message


def test_a_search_starts_at_what_the_encoder_says_of_a_patch(run_dir: Path, patch_workdir: Path, run_here: Run) -> None:
    run_here(*FIT, "--splits", "test", "--init", "encoder", "--steps", "1", "--lr", "0")
    found, gan = of_split(run_dir, "test"), runs.load_gan(run_dir, torch.device("cpu"))
    assert "encoder" in json.loads(str(found["search"]))
    for number, source in enumerate(found["source"]):
        x = to_x(patch_workdir / "set", source, grid_of(SIZES[int(Path(source).stem) % 3], 16))
        expected = f_anogan.load(gan).network(x)
        torch.testing.assert_close(torch.from_numpy(found["z"][found["picture"] == number]), expected)


def test_rotnet_refuses_pictures_without_a_direction(
    patch_workdir: Path, tmp_path: Path, run_here: Run, fails: Fails
) -> None:
    """Before it reads them, and the advice does not name it."""
    flags = ["--picture-size", "own", "--epochs", "1", "--run-dir", str(RUN)]
    run_here("train_gan.py", "--dataset", str(patch_workdir / "set"), *TINY, *flags, "--augment", "flips")
    gan = runs.load_gan(tmp_path / RUN, torch.device("cpu"))
    message = fails("detectors.rotnet")
    assert f"and {RUN} was trained with --augment flips, for pictures without a direction" in message
    with pytest.raises(InputError, match="--augment turns"):
        rotnet.check_direction(replace(gan, augment="turns"))
    rotnet.check_direction(replace(gan, augment=None))
    chance = {"roc_auc": 0.5, "roc_auc_95_interval": [0.4, 0.6], "n_normal": 6, "n_anomalous": 6}
    verdict = verdicts.Verdict("p_d", 0.05, None, 0.0, {}, {}, 1.0, 1.0, 9)
    for augment in (None, "flips"):
        test = SimpleNamespace(gan=replace(gan, augment=augment))
        assert ("detectors.rotnet" in str(verdicts.advice(test, verdict, {"p_d": chance}))) == (augment is None)


def test_pictures_that_cannot_be_cut_are_named(
    run_dir: Path, patch_workdir: Path, tmp_path: Path, run_here: Run, fails: Fails, capsys: Captured
) -> None:
    """Smaller than a patch, not to be decoded, or not even a size to be read; with --skip-unreadable they are left."""
    good, bad = tmp_path / "set/new/00.png", tmp_path / "bad"
    save(bad / "small.png", np.zeros((31, 40), np.uint8))
    (bad / "cut.png").write_bytes(good.read_bytes()[:-300])
    (bad / "empty.png").write_bytes(b"")
    reasons = {"small": "it has 40x31 pixels, smaller than a patch of 32x32", "cut": "truncated", "empty": "identify"}
    for name, reason in reasons.items():
        message = fails(*FIT, "--images", f"bad/{name}.png", str(good))
        assert f"cannot read the image bad/{name}.png (" in message and reason in message
        assert "--skip-unreadable" in message
    run_here(*FIT, "--images", "bad", str(good), "--skip-unreadable", "--shard-size", "1")
    printed = capsys.readouterr()
    assert all(f"skipped, cannot be read: bad/{name}.png" in printed.err for name in reasons)
    assert "skipped 3 of 4 images, which cannot be read" in printed.out
    assert of_split(run_dir, "images")["source"].tolist() == ["set/new/00.png"]
    run_here(*EVALUATE, "--images", "bad", str(good))
    assert "3 more pictures there were not searched, new since then or unreadable" in capsys.readouterr().out

    shutil.copytree(patch_workdir / "set", tmp_path / "set", dirs_exist_ok=True)
    shutil.copy(bad / "small.png", tmp_path / "set/test/spot/99.png")
    message = fails(*FIT, "--dataset", "set", "--splits", "test")
    assert f"cannot read the image test/spot/99.png ({reasons['small']}" in message


# ---- the search ------------------------------------------------------------------------------------------------------


def in_ball(networks: Networks, x: torch.Tensor, z: torch.Tensor, steps: int) -> torch.Tensor:
    """The search for one image in a plain loop, with the projection written out."""
    z = z.clone().requires_grad_()
    optimizer = torch.optim.Adam([z])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * min(1, 5 * (step + 1) / steps, 5 * (steps - step) / steps)
        generated, generator = networks[0](z[None]), networks[1]
        features = (generator.features(x[None]) - generator.features(generated)).abs().sum()
        optimizer.zero_grad()
        (0.9 * (x - generated).abs().sum() + 0.1 * features).backward()
        optimizer.step()
        length = z.detach().norm().item()
        with torch.no_grad():
            z *= min(1, 8**0.5 / length)
    return z.detach()


def test_a_ball_holds_every_z(tiny_networks: Networks) -> None:
    """It ends where a plain loop over single images ends, on the sphere or inside, and no image sees another."""
    random = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(5, 3, 32, 32, generator=random, dtype=torch.float64) - 1
    z = torch.randn(5, 8, generator=random, dtype=torch.float64) * torch.tensor([0.1, 1, 1, 2, 4])[:, None]
    config = fit_latent.Config(steps=25, lr=0.02, precision="fp32")
    found, residual, _ = fit_latent.search(tiny_networks, x, z, config)
    lengths = found.norm(dim=1)
    assert (lengths <= 8**0.5 + 1e-9).all() and (lengths > 8**0.5 - 1e-9).any() and (lengths < 2.5).any()
    expected = torch.stack([in_ball(tiny_networks, *each, 25) for each in zip(x, z, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(residual, (x - tiny_networks[0](found)).abs().sum((1, 2, 3)))
    apart = [fit_latent.search(tiny_networks, *each, config)[0] for each in zip(x.split(2), z.split(2), strict=True)]
    torch.testing.assert_close(torch.cat(apart), found, rtol=1e-7, atol=1e-7)

    free, near = replace(config, ball=False), replace(config, lr=1e-3)
    assert (fit_latent.search(tiny_networks, x, z, free)[0].norm(dim=1) > 8**0.5).any()
    inside = 0.5 * z[:3]  # steps this small stay inside, where the ball changes nothing
    ends = [fit_latent.search(tiny_networks, x[:3], inside, each)[0] for each in (near, replace(near, ball=False))]
    assert torch.equal(*ends) and (ends[0].norm(dim=1) < 8**0.5).all()


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_no_legend_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every score, and the longest label that one judged by all patches can have."""
    declared = {score.name: score for score in scores.with_pools(evaluate.SCORES)}
    shown = [name for name, score in declared.items() if score.pooled_of is None or name == "mahalanobis_mean"]
    of = {"roc_auc": 0.5, "roc_auc_95_interval": [0.4, 0.6]}
    metrics = {name: of | {"per_class": {"spot": of}} for name in shown}
    is_anomaly = np.arange(8) % 2 == 0
    split = SimpleNamespace(declared=declared, is_anomaly=is_anomaly, scores=dict.fromkeys(shown, np.arange(8.0)))
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plots.roc_curves(tmp_path / "roc.png", split, metrics, "run")
    plots.per_class_auc(tmp_path / "per_class.png", split, metrics, "mahalanobis_mean", "run")
    for figure in figures:
        figure.draw_without_rendering()
        (legend,), (axes,) = figure.legends, figure.axes
        box = legend.get_window_extent()
        assert box.x0 > 0 and box.x1 < figure.bbox.x1 and box.y0 > 0 and box.y1 < axes.get_window_extent().y0
        assert len(legend.get_texts()) >= len(shown)
    colours = [line.get_color() + line.get_linestyle() for line in figures[0].axes[0].lines]
    assert len(set(colours)) == len(shown) + 1


# ---- large pictures --------------------------------------------------------------------------------------------------


def peak_of(function: Callable[[], object]) -> float:
    """The most megabytes that Python and NumPy held at once for what a function did."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return peak


def test_large_pictures_are_held_one_at_a_time(patch_workdir: Path, tmp_path: Path) -> None:
    """For the median of training patches, and in colours: what a network sees of a megapixel takes 4 MB itself."""
    gan = runs.load_gan(patch_workdir / RUN, torch.device("cpu"))
    save(tmp_path / "0.png", np.zeros((1000, 1000), np.uint8))
    for i in range(1, 40):
        (tmp_path / f"{i}.png").hardlink_to(tmp_path / "0.png")
    training = images.open_pictures([str(tmp_path)])
    assert peak_of(lambda: reconstruction._median(gan, training)) < 15  # of 40
    x = torch.zeros(1, 1000, 1000)
    assert peak_of(lambda: heatmaps.to_rgb(x)) < 15
