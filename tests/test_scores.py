"""Each score against a value worked out by hand, on images made for it."""

import copy
import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Batches, read_scores
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.covariance import LedoitWolf
from torch import nn

from anogan import loop, pictures, runs
from anogan.decoding import View
from anogan.images import open_split, to_model
from anogan.loading import load_images
from anogan.scores import WEIGHTS, combined
from detectors import rotnet as method
from detectors.rotnet import RotNet
from network import initialise_weights

pytestmark = pytest.mark.usefixtures("undrawn")

CPU = torch.device("cpu")


def test_rotation_by_hand() -> None:
    """A network that always says the same is wrong in a known way; one that knows the turn scores near 0."""
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4])
    same = method.rotation(lambda images: probability.log().expand(len(images), 4), torch.rand(3, 1, 4, 4))
    torch.testing.assert_close(same, torch.full((3,), -probability.double().log().sum().item()).double())

    def knows(images: torch.Tensor) -> torch.Tensor:  # which of the corners is white
        corners = images[:, 0, [0, -1, -1, 0], [0, 0, -1, -1]]  # a turn moves it from one to the next
        return 30 * corners

    white = torch.zeros(2, 1, 4, 4)
    white[:, :, 0, 0] = 1
    assert method.rotation(knows, white).tolist() == pytest.approx([0, 0], abs=1e-3)
    assert (method.rotation(knows, white) > 0).all()  # 4 e^-30, which float32 would round to 0: a tie
    assert (method.rotation(knows, white.flip(2)) > 100).all()  # an image that stands upside down


def test_neighbours_by_hand() -> None:
    # two rungs that say the same weigh as much as one
    rotnet = SimpleNamespace(features=lambda images: [images.expand(-1, -1, 8, 8), images.expand(-1, -1, 4, 4)])
    training = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])[:, :, None, None]
    normal = method.NormalFeatures(**method.normal_features(rotnet, [training[:2], training[2:]]))
    assert normal.directions.shape == (3, 2 * 2 * 16)
    assert normal.directions.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    x = torch.tensor([[3.0, 0.0], [1.0, 1.0]])[:, :, None, None]  # its length does not count, its direction does
    found = method.neighbours(rotnet, x, normal, count=2)
    assert found.tolist() == pytest.approx([(0 + 1) / 2, 1 - 2**-0.5])
    assert method.neighbours(rotnet, x, normal, count=9)[0].item() == pytest.approx((0 + 1 + 2) / 3)


def test_mahalanobis_by_hand() -> None:
    """Channels that spread by 1 and by 3: a step of 3 in the first is as far as one of 9 in the second."""
    rotnet = SimpleNamespace(features=lambda images: [images[:, :1], images[:, 1:]])  # rungs of a channel each
    spread = torch.tensor([1.0, 3.0])
    rows = 5 + spread * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    pixels = rows[:, :, None, None].expand(-1, -1, 4, 4)
    normal = method.NormalFeatures(**method.normal_features(rotnet, pixels.split(3000)))
    assert normal.means.shape == (4, 2) and normal.precisions.shape == (4, 2, 2)
    x = (5 + torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 9.0], [3.0, 9.0]]))[:, :, None, None].expand(-1, -1, 4, 4)
    # four turns, in each of which a plain picture has the same channels
    assert method.mahalanobis(rotnet, x, normal).tolist() == pytest.approx(
        [0, 4 * 9, 4 * 9, 4 * 18], rel=0.05, abs=0.01
    )
    # the channels are those of the turned image: one that looks at the top row alone sees four different rows
    top = SimpleNamespace(features=lambda images: [images[:, :, :1]])
    edges = torch.zeros(2, 1, 4, 4)
    edges[0, :, 0], edges[1, :, :, 0] = 1, 1
    assert [method.channel_means(top, images)[:, 0].tolist() for images in method.turned(edges)] == [
        [1, 0.25],
        [0.25, 0],
        [0, 0.25],
        [0.25, 1],
    ]
    # fewer images than channels: shrinkage keeps the covariance invertible
    few = method.NormalFeatures(**method.normal_features(rotnet, [pixels[:1], pixels[1:2]]))
    assert torch.isfinite(method.mahalanobis(rotnet, x, few)).all()


def test_combined_by_hand() -> None:
    one = {"a": 2 ** np.array([3.0, 0.0]), "b": 2 ** np.array([10.0, 40.0])}
    normal = {"a": 2 ** np.array([1.0, 2.0]), "b": 2 ** np.array([10.0, 30.0])}
    # of the logarithms: the base does not matter
    np.testing.assert_allclose(combined({"a": 1, "b": 4}, one, normal), [3 + 4 * (10 - 20) / 10, -3 + 4 * 2])
    # of those that validation has
    np.testing.assert_allclose(combined({"a": 2, "b": 4, "c": 1}, one, {"a": normal["a"]}), [6, -6])
    # a part that is the same for all validation normals, or for the only one there is
    for same in ([3], [3, 3]):
        found = combined({"a": 1}, {"a": np.float32([12, 1])}, {"a": np.float32(same)})
        np.testing.assert_allclose(found, np.log([4, 1 / 3]))
    # the peak of a heat map that is relative to what is usual may lie below 0
    peaks = {"pca_peak": np.exp([0.0, 1, 3]) - 1}, {"pca_peak": np.array([-5, 0, np.e**2 - 1])}
    found, normal = combined({"pca_peak": 2}, *peaks), np.array([0, 0, 2])
    np.testing.assert_allclose(found, 2 * (np.array([0, 1, 3]) - normal.mean()) / normal.std())
    # a distance that rounding has put at or below 0
    found = combined({"a": 1}, {"a": np.float32([-1e-7, 0, 1e-6])}, {"a": np.float32([1e-3, 1])})
    assert np.isfinite(found).all() and np.ptp(found) < 1e-6


def test_augmented_images_are_mirrored_and_moved() -> None:
    torch.manual_seed(0)
    columns = torch.arange(32.0).expand(200, 1, 32, 32)
    both = method.augmented(torch.cat([columns, columns.mT], 1))  # a ramp across, and one down
    assert both.shape == (200, 2, 32, 32)
    images, down = both[:, :1], both[:, 1:]
    assert torch.equal(down, down[..., :1].expand_as(down)) and (down[:, 0, 17] - down[:, 0, 16] == 1).all()
    assert len(down[:, 0, 16, 0].unique()) == 7 and (down[:, 0, 16, 0] - 16).abs().max() == 3
    middle = images[:, 0, 16, 16]
    steps = images[:, 0, 16, 17] - middle
    assert 60 < (steps == -1).sum() < 140 and (steps.abs() == 1).all()  # about half are mirrored
    offsets = torch.where(steps > 0, middle - 16, middle - 15)
    assert offsets.abs().max() == 3 and len(offsets.unique()) == 7  # up to a tenth of the side, either way
    assert torch.equal(images, images[:, :, :1].expand_as(images))  # rows are alike, so nothing else has moved


def test_recoloured_images_keep_their_shapes() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 8, 8) - 0.5
    found = method.recoloured(image.expand(500, -1, -1, -1))
    grey = image.mean(1)
    levels = found.mean(1)  # (500, 8, 8), whose contrast and brightness alone have changed
    contrast = (levels - levels.mean((1, 2), keepdim=True)).norm(dim=(1, 2)) / (grey - grey.mean()).norm()
    assert 0.6 <= contrast.min() < 0.65 and 1.35 < contrast.max() <= 1.4 + 1e-5
    brighter = levels.mean((1, 2)) - grey.mean()
    assert -0.2 - 1e-5 <= brighter.min() < -0.17 and 0.17 < brighter.max() <= 0.2 + 1e-5
    correlation = torch.corrcoef(torch.cat([grey.flatten(1), levels.flatten(1)]))[0]
    assert correlation.min() > 0.999  # what was darker is darker still, everywhere
    saturation = (found - levels[:, None]).flatten(1).norm(dim=1) / (image - grey[:, None]).norm() / contrast
    assert 60 < (saturation < 1e-4).sum() < 140  # grey
    assert 0.4 - 1e-4 <= saturation[saturation > 1e-4].min() < 0.45 and 1.55 < saturation.max() <= 1.6 + 1e-4
    one_channel = image[:, :1].expand(5, -1, -1, -1)
    assert method.recoloured(one_channel).shape == one_channel.shape


def test_rotnet_learns_to_tell_turns() -> None:
    """On digits that it has not seen, a turn is told far better than by chance, with RotNet as the scores use it."""
    training = pictures.load(open_split("digits", "train", "7"), View(32, 1))
    validation = to_model(load_images(open_split("digits", "validation", "7"), View(32, 1))[0])
    torch.manual_seed(0)
    rotnet = RotNet(32, 1, 8).apply(initialise_weights)
    batches = Batches(islice(map(to_model, loop.real_batches(training, 32, seed=0)), 120))
    method.train(batches, rotnet, loop.prepare(rotnet, method.Config(), CPU))
    assert batches.rows[-1]["loss"] < 0.5 * batches.rows[0]["loss"]
    before = copy.deepcopy(rotnet).eval()(validation)
    runs.freeze(rotnet, CPU)
    torch.testing.assert_close(rotnet(validation), before, rtol=1e-4, atol=1e-4)  # folded
    chance = 4 * np.log(4)
    assert method.rotation(rotnet, validation).mean() < 0.7 * chance
    assert method.rotation(rotnet, validation.rot90(1, (2, 3))).mean() > method.rotation(rotnet, validation).mean()


def test_scores_csv_by_hand(digits_workdir: Path) -> None:
    """rotation, neighbours, mahalanobis and combined as evaluate.py wrote them, worked out again from the files."""
    run_dir = digits_workdir / "outputs/digits-0"
    state = torch.load(run_dir / "rotnet.pt", weights_only=True)["rotnet"]
    rotnet = RotNet(32, 1, 4)
    rotnet.load_state_dict(state)
    rotnet.eval()
    rows = {split: [row for row in read_scores(run_dir) if row["split"] == split] for split in ("validation", "test")}
    sets = {
        "train": open_split("digits", "train", "0"),
        "validation": open_split("digits", "validation", "0"),
        "test": open_split("digits", "test", "0"),
    }
    sets["test"] = sets["test"].take(np.isin(sets["test"].source, [row["source"] for row in rows["test"]]))
    x = {split: to_model(load_images(image_set, View(32, 1))[0]) for split, image_set in sets.items()}
    parts = {}

    def channels(split: str, turn: int) -> np.ndarray:
        """The mean over the image of what each rung puts out: five layers, then six and six."""
        rungs = [rotnet.body[:end](x[split].rot90(turn, (2, 3))) for end in (5, 11, 17)]
        return torch.cat([rung.mean((2, 3)) for rung in rungs], 1).double().numpy()

    with torch.no_grad():
        # the last rung is six layers: two convolutions, each with BatchNorm and LeakyReLU
        rungs = {split: (rotnet.body[:-6](x[split]), rotnet.body(x[split])) for split in x}
        averaged = {split: (nn.functional.avg_pool2d(parts, 2), last) for split, (parts, last) in rungs.items()}
        vectors = {
            split: torch.cat([rung.flatten(1) / rung.flatten(1).norm(dim=1, keepdim=True) for rung in both], 1) / 2**0.5
            for split, both in averaged.items()
        }
        for split in ("validation", "test"):
            losses = [-rotnet(x[split].rot90(turn, (2, 3))).log_softmax(1)[:, turn] for turn in range(4)]
            distances = (1 - vectors[split] @ vectors["train"].T).sort(1).values[:, :5].mean(1)
            of_turns = [
                LedoitWolf().fit(channels("train", turn)).mahalanobis(channels(split, turn)) for turn in range(4)
            ]
            parts[split] = sum(losses).numpy(), distances.numpy(), sum(of_turns)
            for name, values in zip(("rotation", "neighbours", "mahalanobis"), parts[split], strict=True):
                np.testing.assert_allclose([float(row[name]) for row in rows[split]], values, rtol=1e-3, atol=1e-5)
    log: dict[str, dict[str, np.ndarray]] = {split: {} for split in rows}
    for split, of_split in rows.items():
        for name in set(WEIGHTS).intersection(of_split[0]):
            values = np.array([float(row[name]) for row in of_split])
            log[split][name] = np.log(1 + values.clip(0)) if name == "pca_peak" else np.log(values)
    assert (np.array([float(row["pca_peak"]) for row in rows["validation"]]) < 1).any()  # relative to what is usual
    assert set(WEIGHTS) - set(log["test"]) == {"cutpaste"}  # not trained here
    expected = sum(
        WEIGHTS[name] * (part - log["validation"][name].mean()) / log["validation"][name].std()
        for name, part in log["test"].items()
    )
    np.testing.assert_allclose([float(row["combined"]) for row in rows["test"]], expected, rtol=1e-3, atol=1e-3)


def test_peak_by_hand(digits_workdir: Path) -> None:
    """The largest difference from G(z), smoothed, in deviations of the validation images at that place: of the others,
    for one of them."""
    run_dir = digits_workdir / "outputs/digits-0"
    gan, heats = runs.load_gan(run_dir, CPU), {}
    for split in ("validation", "test"):
        found = np.load(run_dir / f"latents-{split}.npz")
        image_set = open_split("digits", split, "0")
        image_set = image_set.take(np.isin(image_set.source, found["source"]))
        x = to_model(load_images(image_set, View(32, 1))[0])
        drawn = gan.generator(torch.from_numpy(found["z"]))
        heats[split] = gaussian_filter((x - drawn).abs().mean(1).numpy() / 2, (0, 1, 1), mode="mirror", truncate=3)

    def relative(heat: np.ndarray, normals: np.ndarray) -> float:
        mean, deviation = normals.mean(0), normals.std(0)
        return ((heat - gaussian_filter(mean, 2)) / (gaussian_filter(deviation, 2) + deviation.mean() / 5)).max()

    validation = heats["validation"].astype(np.float64)
    expected = {
        "validation": [relative(heat, np.delete(validation, i, 0)) for i, heat in enumerate(validation)],
        "test": [relative(heat, validation) for heat in heats["test"]],
    }
    for split, values in expected.items():
        peaks = [float(row["peak"]) for row in read_scores(run_dir) if row["split"] == split]
        assert len(peaks) >= 20
        np.testing.assert_allclose(peaks, values, rtol=1e-3)
    kept = np.load(run_dir / "validation-scores.npz")  # for pictures without labels
    np.testing.assert_allclose(kept["difference_usual_total"], validation.sum(0), rtol=1e-4)
    assert kept["difference_usual_count"] == len(validation)


def test_the_verdict_may_rest_on_any_score(
    trained: Path, run_here: Callable[..., None], fails: Callable[..., str]
) -> None:
    for score, flags in (("rotation", ["--score", "rotation"]), ("combined", [])):
        run_here("evaluate.py", "--bootstrap", "20", "--device", "cpu", *flags)
        rows = read_scores(trained)
        validation = np.array([float(row[score]) for row in rows if row["split"] == "validation"])
        for row in rows:
            p_value = (1 + (validation >= float(row[score])).sum()) / (1 + len(validation))
            assert float(row["p_value"]) == pytest.approx(p_value, abs=1e-6)
            assert row["flagged"] == str(int(p_value <= 0.05))
    assert "unknown score 'kdee': choose --score from anomaly_score, " in fails("evaluate.py", "--score", "kdee")
    (trained / "rotnet.pt").unlink()
    message = fails("evaluate.py", "--device", "cpu", "--score", "combined")
    assert "there is no score combined here: it takes two or more of rotation, " in message


def test_the_default_rests_on_what_was_trained(
    trained: Path, run_here: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def judged_by() -> str:
        run_here("evaluate.py", "--bootstrap", "20", "--device", "cpu")
        score = json.loads((trained / "metrics.json").read_text())["threshold"]["score"]
        script = "fit_latent.py" if score == "anomaly_score" else "evaluate.py"  # the command that works next
        assert f"python {script} --run-dir outputs/digits-0 --images PATH" in capsys.readouterr().out
        return score

    picture = tmp_path / "new.png"
    Image.new("L", (8, 8), 100).save(picture)
    with_pca, without = judged_by(), []
    for name in ("rotnet.pt", "pca.pt"):
        (trained / name).unlink()
        without.append(judged_by())
        if name == "rotnet.pt":  # what the test images were judged by, and validation images are kept for, is used
            run_here("evaluate.py", "--images", str(picture), "--device", "cpu")
            assert "pca_peak" in read_scores(trained / "images-new")[0]
    assert [with_pca, *without] == ["combined", "pca_peak", "anomaly_score"]


def test_a_rotnet_of_other_images_is_refused(trained: Path, fails: Callable[..., str]) -> None:
    state = torch.load(trained / "rotnet.pt", weights_only=True)
    state["config"]["training_images"] = "99 with checksum 0"
    torch.save(state, trained / "rotnet.pt")
    for script in ("evaluate.py", "detectors.rotnet"):
        assert (
            "rotnet.pt was trained for another gan.pt than the one that is there now (other training_images)"
            in fails(script)
        )


@pytest.mark.parametrize(
    "script",
    [
        "train_gan",
        "fit_latent",
        "evaluate",
        *(f"detectors.{name}" for name in ("f_anogan", "acae", "rotnet", "cutpaste", "pca", "baselines")),
    ],
)
def test_every_flag_has_help(script: str) -> None:
    """A comment that ruff has wrapped is none to tyro."""
    config = importlib.import_module(script).Config
    for field in dataclasses.fields(config):
        line = next(line for line in inspect.getsource(config).splitlines() if line.startswith(f"    {field.name}:"))
        assert "  # " in line, f"--{field.name} of {script}.py"


def test_scores_are_worked_out_in_full_precision(
    trained: Path, run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = []

    def note(*_: object) -> dict:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return {}

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr("anogan.scoring.score_run", note)
    with pytest.raises(KeyError):  # there are no scores to go on with
        run_here("evaluate.py", "--device", "cpu")
    assert allowed == [False] and torch.backends.cudnn.allow_tf32
