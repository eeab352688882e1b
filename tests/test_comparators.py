"""f-AnoGAN's encoder and the aCAE: losses by hand, what they can learn, what they must leave alone, and bad input."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Batches, read_scores, run_together
from test_long_runs import assert_same
from torch import nn

import evaluate
import util
from anogan import latents, loop, runs
from anogan.decoding import View
from anogan.images import open_split, to_model
from anogan.loading import load_images
from benchmarks import comparators
from detectors import acae, baselines, f_anogan
from network import Discriminator, Encoder, Generator, initialise_weights

pytestmark = pytest.mark.usefixtures("undrawn")

CPU = torch.device("cpu")


def test_izi_f_by_hand() -> None:
    x = torch.tensor([[[[0.0, 1.0]]], [[[0.5, 0.5]]]])  # two images of two pixels
    generated = torch.tensor([[[[1.0, -1.0]]], [[[0.5, 0.0]]]])
    discriminator = SimpleNamespace(features=lambda images: 2 * images.sum((1, 2, 3), keepdim=True))  # one feature
    residual, discrimination = f_anogan.izi_f_loss(lambda images: 10 * images, lambda z: generated, discriminator, x)
    assert residual.tolist() == [(1 + 4) / 2, 0.25 / 2]  # means over pixels, squares not roots
    assert discrimination.tolist() == [(2 * 1 - 0) ** 2, (2 * 1 - 2 * 0.5) ** 2]
    seen = []
    f_anogan.izi_f_loss(lambda images: 10 * images, lambda z: seen.append(z) or generated, discriminator, x)
    assert torch.equal(seen[0], 10 * x)  # G draws from E(x)


def test_autoencoder_loss_by_hand() -> None:
    x, reconstructed = torch.zeros(2, 1, 1, 2), torch.tensor([[[[0.5, -0.5]]], [[[1.0, 0.0]]]])
    logits = torch.tensor([0.0, np.log(3)])  # D(x̂) of 1/2 and 3/4
    loss, adversarial, l1 = acae.autoencoder_loss(x, reconstructed, logits, l1_weight=100)
    assert l1.item() == 0.5
    assert adversarial.item() == pytest.approx(-(np.log(1 / 2) + np.log(3 / 4)) / 2)
    assert loss.item() == pytest.approx(adversarial.item() + 50)


def small_gan() -> runs.TrainedGAN:
    """Untrained, but with weights large enough that every z is another picture; frozen as `load_gan` does it."""
    torch.manual_seed(0)
    generator, discriminator = Generator(32, 1, 4, 8), Discriminator(32, 1, 8)
    with torch.no_grad():
        for _ in range(20):
            discriminator(generator(torch.randn(64, 4)))  # statistics for BatchNorm
    for network in (generator, discriminator):
        runs.freeze(network, CPU)
    names = ("dataset", "normal_class", "training_images", "fingerprint")
    facts = dict.fromkeys(names, "") | dict.fromkeys(("group_by", "levels", "picture_size", "augment"))
    facts |= {"max_megapixels": 179.0, "fit": "crop", "normalise": False}
    sizes = {"image_size": 32, "image_channels": 1, "latent_dim": 4, "ngf": 8, "ndf": 8, "batch_size": 8, "epoch": 0.0}
    return runs.TrainedGAN(Path(), generator, discriminator, **facts, **sizes)


def test_encoder_overfits_eight_images_and_leaves_the_gan_alone() -> None:
    """On images that G can draw, G(E(x)) comes nearer than their mean, with E as the scores use it."""
    gan = small_gan()
    before = copy.deepcopy([gan.generator.state_dict(), gan.discriminator.state_dict()])
    x = gan.generator(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
    encoder = Encoder(32, 1, 4, 8).apply(initialise_weights)
    batches = Batches([x] * 150)
    f_anogan.train(batches, encoder, loop.prepare(encoder, f_anogan.Config(lr=2e-3), CPU), gan, kappa=1.0)

    runs.freeze(encoder, CPU)
    mean_image = (x - x.mean(0)).square().mean().item()
    assert (x - gan.generator(encoder(x))).square().mean().item() < 0.3 * mean_image
    assert sum(batches.rows[-1].values()) < 0.3 * sum(batches.rows[0].values())
    for network, state in zip((gan.generator, gan.discriminator), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())


def test_kappa_weighs_the_features() -> None:
    """With a large κ the encoder learns for D's features, and leaves pixels worse than with none."""
    gan, found = small_gan(), {}
    x = gan.generator(torch.randn(8, 4, generator=torch.Generator().manual_seed(1))).flip(2, 3)  # G cannot draw these
    for kappa in (0.0, 1000.0):
        torch.manual_seed(0)
        encoder = Encoder(32, 1, 4, 8).apply(initialise_weights)
        batches = Batches([x] * 80)
        f_anogan.train(batches, encoder, loop.prepare(encoder, f_anogan.Config(lr=2e-3), CPU), gan, kappa)
        found[kappa] = batches.rows[-1]
    assert found[0.0]["residual"] < found[1000.0]["residual"]
    assert found[0.0]["features"] > found[1000.0]["features"]


def test_acae_overfits_eight_images() -> None:
    images = open_split("digits", "train", "3").take(slice(8))
    x = to_model(load_images(images, View(32, 1))[0])
    torch.manual_seed(0)
    autoencoder = nn.Sequential(Encoder(32, 1, 8, 8), Generator(32, 1, 8, 8)).apply(initialise_weights)
    discriminator = Discriminator(32, 1, 8).apply(initialise_weights)
    config = acae.Config(lr=3e-3)
    optimizers = [loop.prepare(network, config, CPU) for network in (autoencoder, discriminator)]
    batches = Batches([x] * 300)
    acae.train(batches, autoencoder, discriminator, optimizers, l1_weight=100.0)
    runs.freeze(autoencoder, CPU)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in autoencoder.modules())
    assert (x - autoencoder(x)).abs().mean() < 0.5 * (x - x.mean(0)).abs().mean()
    assert batches.rows[-1]["l1"] < 0.5 * batches.rows[0]["l1"]
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


def test_acae_and_its_judge_are_adversaries() -> None:
    """Against a D that is held still, a step raises D's belief in the reconstructions; D's own step lowers it."""
    torch.manual_seed(0)
    autoencoder = nn.Sequential(Encoder(32, 1, 8, 8), Generator(32, 1, 8, 8)).apply(initialise_weights)
    discriminator = Discriminator(32, 1, 8).apply(initialise_weights)
    x = torch.rand(8, 1, 32, 32) * 2 - 1
    for rates, grows in (((1e-3, 0.0), True), ((0.0, 1e-3), False)):
        networks = copy.deepcopy((autoencoder, discriminator))
        optimizers = [loop.prepare(net, acae.Config(lr=lr), CPU) for net, lr in zip(networks, rates, strict=True)]
        batches = Batches([x] * 5)
        acae.train(batches, *networks, optimizers, l1_weight=0.0)
        losses = [row["adversarial"] for row in batches.rows]
        assert (losses[-1] < losses[0]) == grows  # the autoencoder's loss is -log D(x̂)


def test_scores_by_hand(digits_workdir: Path) -> None:
    """f_anogan and acae in scores.csv against the formulas, on networks with BatchNorm in place."""
    run_dir = digits_workdir / "outputs/digits-0"
    states = {name: torch.load(run_dir / f"{name}.pt", weights_only=True) for name in ("gan", "encoder", "acae")}
    networks = {
        "generator": Generator(32, 1, 8, 4),
        "discriminator": Discriminator(32, 1, 4),
        "encoder": Encoder(32, 1, 8, 4),
        "autoencoder": nn.Sequential(Encoder(32, 1, 8, 4), Generator(32, 1, 8, 4)),
    }
    for name, network in networks.items():
        state = next(state for state in states.values() if name in state)
        network.load_state_dict(state[name])
        network.eval()
    rows = [row for row in read_scores(run_dir) if row["split"] == "test"]
    test = open_split("digits", "test", "0")
    test = test.take(np.isin(test.source, [row["source"] for row in rows]))
    x = to_model(load_images(test, View(32, 1))[0])
    with torch.no_grad():
        generated = networks["generator"](networks["encoder"](x))
        f = networks["discriminator"].features
        of_encoder = (x - generated).pow(2).mean((1, 2, 3)) + 0.5 * (f(x) - f(generated)).pow(2).mean((1, 2, 3))
        of_autoencoder = (x - networks["autoencoder"](x)).abs().sum((1, 2, 3))
    np.testing.assert_allclose([float(row["f_anogan"]) for row in rows], of_encoder, rtol=1e-4)
    np.testing.assert_allclose([float(row["acae"]) for row in rows], of_autoencoder, rtol=1e-4)


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("detectors.f_anogan", "encoder"),
        ("detectors.acae", "acae"),
        ("detectors.rotnet", "rotnet"),
        ("detectors.cutpaste", "cutpaste"),
    ],
)
def test_training_goes_on_as_if_it_had_not_stopped(
    trained: Path, run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, script: str, name: str
) -> None:
    path = trained / f"{name}.pt"
    gan = (trained / "gan.pt").read_bytes()
    of = ["--epochs", "4", "--batch-size", "16", "--device", "cpu"]
    run_here(script, *of, "--fresh")
    whole = torch.load(path, weights_only=True)
    # An earlier checkpoint, as a kill leaves it: one inside the last epoch
    write, checkpoints = torch.save, []
    monkeypatch.setattr(torch, "save", lambda state, file: (write(state, file), checkpoints.append(file.getvalue())))
    run_here(script, *of, "--fresh", "--checkpoint-every", "10")
    monkeypatch.undo()
    path.write_bytes(checkpoints[1])
    assert torch.load(path, weights_only=True)["step"] == 20
    os.chdir(trained.parent.parent)
    run_here(script, *of)
    again = torch.load(path, weights_only=True)
    assert_same({**again, "seconds": 0}, {**whole, "seconds": 0})
    assert len((trained / f"{name}-losses.csv").read_text().splitlines()) == 1 + 24
    assert (trained / "gan.pt").read_bytes() == gan


def test_defaults_are_those_of_the_gan(digits_workdir: Path) -> None:
    record = json.loads((digits_workdir / "outputs/digits-0/run.json").read_text())
    for script in ("f_anogan", "acae"):
        assert record[script]["hyperparameters"]["epochs"] == record["train_gan"]["hyperparameters"]["epochs"] == 3
        assert record[script]["hyperparameters"]["batch_size"] == 16 and record[script]["steps"] == 18


def test_two_processes_average_their_gradients(trained: Path) -> None:
    """The encoder of two processes against two encoders in this one, whose gradients are averaged by hand."""
    arguments = ["--epochs", "1", "--batch-size", "8", "--fresh", "--device", "cpu", "--precision", "fp32"]
    for script in ("detectors.f_anogan", "detectors.acae"):
        done = run_together(trained.parent.parent, script, *arguments)
        assert [code for code, _ in done] == [0, 0], done

    gan = runs.load_gan(trained, CPU)
    seen = runs.images_of_gan(gan)
    batches = [map(to_model, loop.real_batches(seen, 8, 0, 0, rank, 2)) for rank in range(2)]
    torch.manual_seed(0)
    encoders = [Encoder(32, 1, 8, 4).apply(initialise_weights)]
    encoders.append(copy.deepcopy(encoders[0]))
    optimizers = [loop.prepare(encoder, f_anogan.Config(), CPU) for encoder in encoders]
    prepared = [(each, loop.CosineAnnealingWarmRestarts(each, T_0=15, T_mult=2)) for each in optimizers]
    for step in range(6):
        for encoder, batch in zip(encoders, batches, strict=True):
            x = next(batch)
            residual, discrimination = f_anogan.izi_f_loss(encoder, gan.generator, gan.discriminator, x)
            encoder.zero_grad()
            (residual + discrimination).mean().backward()
        for first, second in zip(encoders[0].parameters(), encoders[1].parameters(), strict=True):
            first.grad = second.grad = (first.grad + second.grad) / 2
        for optimizer, scheduler in prepared:
            optimizer.step()
            scheduler.step(step / 6)
    found = torch.load(trained / "encoder.pt", weights_only=True)["encoder"]
    torch.manual_seed(0)
    for name, first in Encoder(32, 1, 8, 4).apply(initialise_weights).named_parameters():
        moved = (encoders[0].get_parameter(name) - first).detach().abs().mean()
        # in the mean, since Adam magnifies the rounding of gradients near 0
        assert (found[name] - encoders[0].get_parameter(name)).abs().mean() < 0.01 * moved
    of_acae = torch.load(trained / "acae.pt", weights_only=True)
    assert of_acae["config"]["processes"] == 2 and of_acae["step"] == 6


def test_search_from_the_encoder(trained: Path, run_here: Callable[..., None], fails: Callable[..., str]) -> None:
    """It starts at E(x), and ends at most 2% above the search from the nearest candidate, in the mean."""
    gan = runs.load_gan(trained, CPU)
    run_here("detectors.f_anogan", "--epochs", "10", "--fresh", "--device", "cpu")

    def search(*flags: str) -> dict:
        run_here("fit_latent.py", "--splits", "test", "--max-images", "60", "--device", "cpu", *flags)
        return latents.read_latents(trained / "latents-test.npz", "test", gan)

    at_start = search("--init", "encoder", "--lr", "0", "--steps", "1")
    x = to_model(load_images(open_split("digits", "test", "0").take(at_start["index"]), View(32, 1))[0])
    np.testing.assert_allclose(at_start["z"], f_anogan.load(gan).network(x), atol=1e-5)

    candidates, encoder = search("--steps", "50"), search("--init", "encoder", "--steps", "50")
    assert "encoder" in encoder["search"] and "encoder" not in candidates["search"]
    loss = [util.anomaly_score(each["residual"], each["discrimination"], 0.1).mean() for each in (encoder, candidates)]
    assert loss[0] < 1.02 * loss[1]
    # a threshold from one search does not fit the scores of another, whichever it is
    search("--init", "encoder", "--steps", "1")
    fit = ["fit_latent.py", "--steps", "1", "--device", "cpu"]
    run_here(*fit, "--splits", "validation", "--max-images", "60")
    assert "fitted with different settings (encoder)" in fails("evaluate.py", "--device", "cpu")
    run_here(*fit, "--splits", "validation", "--max-images", "60", "--init", "encoder")
    assert "use the same (--init encoder) for --images" in fails(*fit, "--images", "mine")
    search("--steps", "1")
    assert "fitted with different settings (encoder)" in fails("evaluate.py", "--device", "cpu")


def test_a_file_of_another_run_is_refused(
    trained: Path, tmp_path: Path, run_here: Callable[..., None], fails: Callable[..., str]
) -> None:
    before = {path: path.read_bytes() for path in trained.glob("*.*")}
    message = fails("detectors.f_anogan", "--lr", "1e-3")
    assert "encoder.pt was trained with kappa 0.5, not 1.0; lr 0.0002, not 0.001" in message
    assert "acae.pt was trained with l1_weight 100.0, not 1.0" in fails("detectors.acae", "--l1-weight", "1")
    assert all(path.read_bytes() == content for path, content in before.items())
    (trained / "encoder.pt").rename(tmp_path / "encoder.pt")
    assert "encoder.pt is missing: run python -m detectors.f_anogan" in fails("fit_latent.py", "--init", "encoder")
    content = (tmp_path / "encoder.pt").read_bytes()
    (trained / "encoder.pt").write_bytes(content[:500])
    assert "encoder.pt is damaged or was not written by this python -m detectors.f_anogan" in fails("evaluate.py")
    (trained / "encoder.pt").write_bytes(content)
    content = (trained / "acae.pt").read_bytes()
    (trained / "acae.pt").write_bytes(content[:500])
    assert "acae.pt is damaged or was not written by this python -m detectors.acae" in fails("evaluate.py")
    (trained / "acae.pt").write_bytes(content)

    state = torch.load(trained / "gan.pt", weights_only=True)
    state["config"]["training_images"] = "100 with checksum 0"
    torch.save(state, trained / "gan.pt")
    for command in (["fit_latent.py", "--init", "encoder"], ["detectors.f_anogan"]):
        assert "encoder.pt was trained for another gan.pt" in fails(*command)
    gan = runs.load_gan(trained, CPU)
    with pytest.raises(util.InputError, match=r"acae.pt was trained for another gan.pt .*\(other training_images\)"):
        acae.load(gan)
    assert "are not those of gan.pt" in fails("detectors.acae", "--fresh")


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("detectors.f_anogan", ["--kappa", "-1"], "--kappa must be at least 0"),
        ("detectors.f_anogan", ["--kappa", "inf"], "--kappa must be at least 0 and finite, not inf"),
        ("detectors.f_anogan", ["--epochs", "0"], "--epochs must be at least 1"),
        ("detectors.f_anogan", ["--checkpoint-every", "x"], "--checkpoint-every must be"),
        ("detectors.acae", ["--l1-weight", "nan"], "--l1-weight must be at least 0"),
        ("detectors.acae", ["--batch-size", "0"], "--batch-size must be at least 1"),
        ("detectors.acae", ["--run-dir", "outputs/none"], "has no gan.pt: run train_gan.py"),
    ],
)
def test_wrong_flags(trained: Path, fails: Callable[..., str], script: str, flags: list[str], words: str) -> None:
    assert words in fails(script, *flags)


def test_evaluate_draws_what_is_there(
    trained: Path, run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A curve, a histogram and a row for each score, whichever of them there are."""
    figures, labels = {}, {score.name: score.label for score in evaluate.SCORES}
    monkeypatch.setattr("anogan.plots.save", lambda figure, path: figures.update({path.name: figure}))
    scores = ["anomaly_score", "residual", "discrimination", "peak", "p_d"]
    (trained / "rotnet.pt").unlink()
    for path in trained.glob("*-reference.npz"):
        path.unlink()
    for present, name in ((True, "baselines-*.npz"), (True, "acae.pt"), (False, "encoder.pt")):
        for path in trained.glob(name):
            path.unlink()
        run_here("evaluate.py", "--bootstrap", "20", "--device", "cpu")
        expected = scores + ["f_anogan"] * present + ["acae"] * (name == "baselines-*.npz")
        expected += ["pca", "pca_peak"]
        assert list(json.loads((trained / "metrics.json").read_text())["test"]) == expected
        curves = [line.get_label() for line in figures["roc.png"].axes[0].lines]
        assert [label.split(":")[0] for label in curves[:-1]] == [labels[score] for score in expected]
        panels = [axes.get_xlabel() for axes in figures["score_histograms.png"].axes if axes.get_xlabel()]
        assert panels == [labels[score] for score in expected]


def test_seconds_of_a_run(digits_workdir: Path) -> None:
    """benchmarks/comparators.py: seconds to train on 1,000 images, from run.json, and to score 1,000, measured."""
    run_dir = digits_workdir / "outputs/digits-0"
    record, metrics = comparators.read_run(run_dir)
    train = comparators.training_seconds(record)
    gan, encoder = (record[script]["seconds"] / 0.106 for script in ("train_gan", "f_anogan"))
    assert train["gan_r"] == train["p_d"] == pytest.approx(gan)
    assert train["f_anogan"] == pytest.approx(gan + encoder)
    trained = runs.load_gan(run_dir, CPU)
    fit, models = comparators.fit_baselines(trained, baselines.Config())
    score = comparators.scoring_seconds(trained, comparators.read_searches(trained, metrics), models, 20)
    assert set(score) == set(comparators.SCORES) == {*train, *fit}
    assert all(seconds > 0 for seconds in (*score.values(), *fit.values()))
