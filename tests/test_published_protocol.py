"""AnoGAN's published protocol: what contrast normalisation does to pictures, and a row a class."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_util import folder

from benchmarks import cifar10_table, measure, published_protocol


def test_normalised_by_hand() -> None:
    """Mean 0 and mean absolute value 1, whatever the brightness and the contrast; a picture of one level is 0."""
    pixels = torch.tensor([[0, 2, 4, 2], [100, 110, 120, 110], [7, 7, 7, 7]], dtype=torch.uint8).reshape(3, 1, 2, 2)
    found = published_protocol.contrast_normalised(pixels)
    assert found.flatten(1).tolist() == [[-2, 0, 2, 0], [-2, 0, 2, 0], [0, 0, 0, 0]]
    levels = published_protocol.scaled(torch.tensor([-3.0, -2.0, 0.0, 2.0, 9.0], dtype=torch.float64), -2, 2)
    assert levels.tolist() == [0, 0, 128, 255, 255]  # what lies beyond the training pictures is cut off


@pytest.mark.usefixtures("undrawn")
def test_every_class_is_measured_once(
    tmp_path: Path, run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "set", {"train/a": 10, "train/b": 10, "test/a": 6, "test/b": 6})
    quick = {"train_gan.py": ["--ngf", "2", "--ndf", "2"], "fit_latent.py": ["--steps", "2"]}
    ran: list[tuple[str, str]] = []
    seen: dict[str, np.ndarray] = {}

    def run(script: str, run_dir: Path, *flags: object) -> None:
        ran.append((script, run_dir.name))
        for path in sorted((tmp_path / "outputs/published-protocol").glob("data-a-*/*/*/*.png")):
            seen[path.parts[-3] + path.name] = np.asarray(Image.open(path))
        run_here(script, "--run-dir", str(run_dir), *map(str, flags), *quick.get(script, ["--bootstrap", "5"]))

    monkeypatch.setattr(cifar10_table, "run", run)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    config = published_protocol.Config(dataset="set", epochs=1, test=8, validation=2)
    published_protocol.main(config)
    scripts = ("train_gan.py", "fit_latent.py", "evaluate.py")
    assert ran == [(script, f"{name}-0-1-set-8-2") for name in "ab" for script in scripts]
    training = np.stack([each for name, each in seen.items() if name.startswith("train")])
    assert training.min() == 0 and training.max() == 255  # the range is theirs
    assert len([name for name in seen if name.startswith("validation")]) <= 2
    rows = measure.read_rows(tmp_path / "published_protocol.csv")
    assert [(row["normal_class"], row["seed"], row["n_test"]) for row in rows] == [("a", "0", "8"), ("b", "0", "8")]
    found = measure.read_metrics(tmp_path / "outputs/published-protocol/b-0-1-set-8-2")["test"]
    assert float(rows[1]["anomaly_score"]) == pytest.approx(found["anomaly_score"]["roc_auc"], abs=1e-4)
    assert found["anomaly_score"]["n_normal"] == found["anomaly_score"]["n_anomalous"] == 4
    assert not list((tmp_path / "outputs/published-protocol").glob("data-*"))
    text = (tmp_path / "published_protocol.md").read_text()
    assert "| score | a | b | mean |" in text

    published_protocol.main(config)
    assert len(ran) == 6


def test_the_mean_is_of_ten_classes() -> None:
    about = {"dataset": "set", "epochs": "1", "n_test": "5", "hardware": "here"}
    rows = [
        {**about, "normal_class": name, "seed": seed, **dict.fromkeys(published_protocol.SCORES, auc)}
        for seed, auc in (("0", "0.5"), ("1", "0.6"))
        for name in measure.CIFAR10
    ]
    line = published_protocol.to_markdown(rows).splitlines()[4]
    assert line == "| `anomaly_score` |" + 10 * " 55.0 |" + " 55.0 ± 7.1 |"
    one_seed = published_protocol.to_markdown(rows[:10]).splitlines()
    assert one_seed[4].endswith(" 50.0 |") and one_seed[-1].endswith("| 61.8 |")
    assert published_protocol.to_markdown(rows[:9]).splitlines()[4].endswith("|  |")
