"""The baselines: which way their scores point, the bandwidth, and what bad input gets."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from scipy.special import logsumexp
from sklearn.metrics import roc_auc_score

from detectors.baselines import LABELS, Config, choose_bandwidth, fit_baseline

NORMAL = np.random.default_rng(0).normal(size=(300, 3)) * [3, 2, 1]


@pytest.mark.parametrize("name", LABELS)
def test_what_is_far_away_scores_lower(name: str) -> None:
    """`score_samples` is high where normal; the script writes its negative."""
    model = fit_baseline(name, NORMAL, Config())
    near, far = model.score_samples(np.zeros((1, 3))), model.score_samples(np.full((1, 3), 20.0))
    assert far < near
    fresh = np.random.default_rng(1).normal(size=(200, 3)) * [3, 2, 1]
    scores = np.r_[-model.score_samples(fresh), -model.score_samples(fresh + np.array([0, 0, 6]))]
    assert roc_auc_score(np.arange(400) >= 200, scores) > 0.9


def test_kernel_density_by_hand() -> None:
    model = choose_bandwidth(NORMAL, seed=0)
    h, x = model.bandwidth, np.array([1.0, -1.0, 0.5])
    exponents = -((NORMAL - x) ** 2).sum(1) / (2 * h**2)
    expected = logsumexp(exponents) - np.log(len(NORMAL)) - 1.5 * np.log(2 * np.pi * h**2)
    assert model.score_samples(x[None])[0] == pytest.approx(expected)


def test_kernel_density_is_exact_in_many_dimensions() -> None:
    """With scikit-learn's default tree, log-densities of pictures are wrong by hundreds."""
    spread = 5 * 0.97 ** np.arange(200)  # as principal components have
    vectors, fresh = (np.random.default_rng(i).normal(size=(1500, 200)) * spread for i in range(2))
    model = choose_bandwidth(vectors, seed=0)
    h, x = model.bandwidth, fresh[:20]
    exponents = -((x[:, None] - vectors) ** 2).sum(2) / (2 * h**2)
    expected = logsumexp(exponents, axis=1) - np.log(1500) - 100 * np.log(2 * np.pi * h**2)
    np.testing.assert_allclose(model.score_samples(x), expected)


def test_bandwidth_is_likeliest_on_fresh_images() -> None:
    model = choose_bandwidth(NORMAL, seed=0)
    fresh = np.random.default_rng(1).normal(size=(300, 3)) * [3, 2, 1]
    for factor in (0.3, 3):
        other = type(model)(bandwidth=factor * model.bandwidth).fit(NORMAL)
        assert other.score(fresh) < model.score(fresh)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("name", LABELS)
def test_a_handful_of_pictures(name: str, count: int) -> None:
    """Every baseline can be fitted to them, with a score for what is near and what is far; two may be the same."""
    vectors = np.random.default_rng(0).normal(size=(count, 1))
    vectors[1:-1] = vectors[0]
    scores = fit_baseline(name, vectors, Config()).score_samples(np.r_[vectors, [[50.0]]])
    assert np.isfinite(scores).all() and scores[-1] <= scores[0]
    if name == "kde":
        assert scores[-1] < scores.min(where=np.arange(count + 1) < count, initial=np.inf)


def test_data_sets_of_five_pictures(tmp_path: Path, run_here: Callable[..., None], fails: Callable[..., str]) -> None:
    """Four of them are to train on, too few for five folds. Of four that are all the same nothing can be learned."""
    for part, count in (("train/good", 5), ("test/good", 2), ("test/bad", 2)):
        (tmp_path / "few" / part).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (32, 32), 50 + 10 * i).save(tmp_path / "few" / part / f"{i}.png")
    run_here("train_gan.py", "--dataset", "few", "--epochs", "1", *TINY)
    run_here("detectors.baselines")
    with np.load(tmp_path / "outputs/few-good/baselines-test.npz") as file:
        assert all(np.isfinite(file[name]).all() and len(file[name]) == 4 for name in LABELS)

    for i in range(5):
        Image.new("L", (32, 32), 50).save(tmp_path / "few/train/good" / f"{i}.png")
    run_here("train_gan.py", "--dataset", "few", "--epochs", "1", "--fresh", *TINY)
    assert "the 4 training images that can be read are all the same" in fails("detectors.baselines")


def test_scores_are_those_of_the_images_that_were_searched(digits_workdir: Path) -> None:
    run_dir = digits_workdir / "outputs/digits-0"
    record = json.loads((run_dir / "run.json").read_text())["baselines"]
    assert record["bandwidth"] > 0 and record["principal_components"] > 1
    with np.load(run_dir / "baselines-test.npz") as file, np.load(run_dir / "latents-test.npz") as latents:
        assert len(file["index"]) == 450 and len(latents["index"]) == 60
        place = np.searchsorted(file["index"], latents["index"])
        scores, sources = file["kde"][place], file["source"][place]
    rows = [line.split(",") for line in (run_dir / "scores.csv").read_text().splitlines()]
    column = rows[0].index("kde")
    test = [row for row in rows if row[0] == "test"]
    assert [row[2] for row in test] == sources.tolist()
    np.testing.assert_allclose([float(row[column]) for row in test], scores, rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nu", "0"], "--nu must lie between 0 and 1"),
        (["--variance", "1.5"], "--variance must lie between 0 and 1"),
        (["--trees", "0"], "--trees must be at least 1"),
        (["--splits", "tests"], "unknown split 'tests'"),
        (["--seed", "9999999999"], "--seed must be below 2**32"),
    ],
)
def test_wrong_flags(trained: Path, fails: Callable[..., str], flags: list[str], words: str) -> None:
    assert words in fails("detectors.baselines", *flags)


def test_spoilt_and_missing_files(digits_workdir: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    run_dir = shutil.copytree(digits_workdir / "outputs/digits-0", tmp_path / "outputs/digits-0")
    path = run_dir / "baselines-test.npz"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    message = fails("evaluate.py")
    assert "baselines-test.npz is damaged" in message and "run python -m detectors.baselines" in message
    shutil.copy(run_dir / "baselines-validation.npz", path)
    assert "holds the split 'validation', not 'test'" in fails("evaluate.py")
    with np.load(digits_workdir / "outputs/digits-0/baselines-test.npz") as file:
        np.savez(path, **{name: array[:400] if array.ndim else array for name, array in file.items()})
    assert "is of other images than those that are scored" in fails("evaluate.py")
    path.unlink()
    assert "baselines-test.npz is missing: run python -m detectors.baselines" in fails("evaluate.py")
