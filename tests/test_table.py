"""The ten-class table: its two halves, what is measured once, and the Markdown made of it."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import read_scores
from sklearn.metrics import roc_auc_score
from test_util import folder

import util
from anogan.images import stratified_subset
from benchmarks import cifar10_table, measure


def test_halves(digits_workdir: Path) -> None:
    """The halves share no image, have every class in its proportion, and do not change from run to run."""
    run_dir = digits_workdir / "outputs/digits-0"
    aucs, n_test = cifar10_table.halves(run_dir)
    rows = [row for row in read_scores(run_dir) if row["split"] == "test"]
    assert n_test == 30 and {"anomaly_score", "combined", "kde", "p_d"} <= set(aucs)
    assert not {"p_value", "flagged", "label", "index"} & set(aucs)
    label = np.array([int(row["label"]) for row in rows])
    development = np.isin(np.arange(60), stratified_subset(label, 30, seed=0))
    assert np.bincount(label[development]).tolist() == np.bincount(label[~development]).tolist()
    score = np.array([float(row["kde"]) for row in rows])
    for half, auc in zip((~development, development), aucs["kde"], strict=True):
        assert auc == pytest.approx(roc_auc_score(label[half] != 0, score[half]))


def test_the_half_for_choosing_is_the_same_everywhere() -> None:
    rows = stratified_subset(np.repeat(np.arange(10), 1000), 5000, seed=0)
    assert rows[[0, 1, 2, -3, -2, -1]].tolist() == [1, 4, 5, 9990, 9991, 9995]


def test_markdown_by_hand() -> None:
    about = {"dataset": "set", "image_size": "32", "ngf": "8", "epochs": "1", "hardware": "here", "n_test": "5"}
    rows = [
        {**about, "normal_class": name, "method": "kde", "seed": seed, "roc_auc": auc}
        for name, seed, auc in (("a", "0", "0.5"), ("b", "0", "0.7"), ("a", "1", "0.6"), ("b", "1", "0.8"))
    ]
    rows.append({**about, "normal_class": "a", "method": "new", "seed": "0", "roc_auc": "0.9"})
    lines = cifar10_table.to_markdown(rows).splitlines()
    assert "| method | a | b | mean | seeds |" in lines
    assert "| `kde` | 55.0 | 75.0 | **65.0 ± 7.1** | 2 |" in lines  # means 60 and 70, deviation 10 / √2
    assert "| `new` | 90.0 |  |  | 0 |" in lines  # no mean without every class


def test_published_figures_have_their_published_mean() -> None:
    whole = {name: row for name, row in cifar10_table.PUBLISHED.items() if len(row[1]) == 10}
    assert {"OCGAN", "GeoTrans"} <= set(whole)
    for mean, of_class, _ in whole.values():
        assert np.mean(list(of_class.values())) == pytest.approx(mean, abs=0.05)


@pytest.mark.usefixtures("undrawn")
def test_every_class_is_measured_once(
    tmp_path: Path, run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "set", {"train/a": 10, "train/b": 10, "test/a": 4, "test/b": 4})
    ran, quick = [], {"fit_latent.py": ["--steps", "2"], "evaluate.py": ["--bootstrap", "5"]}

    def run(script: str, run_dir: Path, *flags: object) -> None:
        ran.append((script, run_dir.name))
        run_here(script.removeprefix("-m "), "--run-dir", str(run_dir), *map(str, flags), *quick.get(script, []))

    monkeypatch.setattr(cifar10_table, "run", run)
    monkeypatch.setattr(cifar10_table, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    config = cifar10_table.Config(dataset="set", ngf=2, epochs=1)  # and the default device
    cifar10_table.main(config)
    scripts = ("train_gan.py", "-m detectors.rotnet", "-m detectors.baselines", "fit_latent.py", "evaluate.py")
    assert ran == [(script, f"{name}-0-32-2-1") for name in "ab" for script in scripts]
    with (tmp_path / "cifar10_table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["normal_class"], row["seed"]) for row in rows} == {("a", "0"), ("b", "0")}
    assert all(0 <= float(row["roc_auc"]) <= 1 and row["n_test"] == "4" for row in rows)
    assert {"combined", "rotation", "anomaly_score", "kde"} <= {row["method"] for row in rows}
    assert "| `combined` |" in (tmp_path / "cifar10_table.md").read_text()

    before = (tmp_path / "cifar10_table.csv").read_bytes()
    cifar10_table.main(config)
    assert len(ran) == 10 and (tmp_path / "cifar10_table.csv").read_bytes() == before
    aucs, _ = cifar10_table.halves(tmp_path / "outputs/table/b-0-32-2-1")
    of_kde = next(row for row in rows if (row["normal_class"], row["method"]) == ("b", "kde"))
    assert [float(of_kde["roc_auc"]), float(of_kde["roc_auc_development"])] == pytest.approx(aucs["kde"], abs=1e-4)

    # the class that is missing is run, the other is not; rows of another profile stay out of the Markdown
    other = [{**row, "epochs": "2", "method": "foreign"} for row in rows]
    kept = [row for row in rows if row["normal_class"] == "a"] + other
    measure.write_rows(tmp_path / "cifar10_table.csv", cifar10_table.COLUMNS, kept)
    cifar10_table.main(config)
    assert ran[10:] == [(script, "b-0-32-2-1") for script in scripts]
    assert "foreign" not in (tmp_path / "cifar10_table.md").read_text()


def test_a_script_that_fails_ends_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its imports come from the repository, whatever lies in the working directory."""
    for place, code in (("repository", 3), ("here", 0)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "util.py").write_text(f"CODE = {code}")
    (tmp_path / "repository/train_gan.py").write_text("import sys, util; sys.exit(util.CODE * ('0' in sys.argv))")
    monkeypatch.setattr(cifar10_table, "ROOT", tmp_path / "repository")
    monkeypatch.chdir(tmp_path / "here")
    for script in ("train_gan.py", "-m train_gan"):
        cifar10_table.run(script, tmp_path / "run", "--epochs", "1")
        with pytest.raises(util.InputError, match=f"{script} ended with 3, see above"):
            cifar10_table.run(script, tmp_path / "run", "--epochs", "0")
