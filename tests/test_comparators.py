"""f-AnoGAN's encoder and the aCAE: losses by hand, what they can learn, what they must leave alone, and bad input."""

import copy
import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_process
from torch import nn

import datasets
import runs
import train_acae
import train_encoder
import training
import util
from network import Discriminator, Encoder, Generator, initialise_weights

CPU = torch.device("cpu")
FP32 = torch.autocast("cpu", torch.bfloat16, enabled=False)


def test_izi_f_by_hand() -> None:
    x = torch.tensor([[[[0.0, 1.0]]], [[[0.5, 0.5]]]])  # two images of two pixels
    generated = torch.tensor([[[[1.0, -1.0]]], [[[0.5, 0.0]]]])
    features = torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 3, 1, 1)
    residual, discrimination = util.izi_f_loss(x, generated, features, torch.zeros(2, 3, 1, 1))
    assert residual.tolist() == [(1 + 4) / 2, 0.25 / 2]  # means over pixels, squares not roots
    assert discrimination.tolist() == [1, 4]


def test_autoencoder_loss_by_hand() -> None:
    x, reconstructed = torch.zeros(2, 1, 1, 2), torch.tensor([[[[0.5, -0.5]]], [[[1.0, 0.0]]]])
    logits = torch.tensor([0.0, np.log(3)])  # D(x̂) of 1/2 and 3/4
    loss, adversarial, l1 = train_acae.autoencoder_loss(x, reconstructed, logits, l1_weight=100)
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
    facts = {"dataset": "", "classes": [], "normal_class": "", "training_images": "", "fingerprint": ""}
    sizes = {"image_size": 32, "image_channels": 1, "latent_dim": 4, "ngf": 8, "ndf": 8, "batch_size": 8, "epoch": 0.0}
    return runs.TrainedGAN(generator, discriminator, **facts, **sizes)


def test_encoder_overfits_eight_images_and_leaves_the_gan_alone() -> None:
    """On images that G can draw, G(E(x)) comes nearer than their mean, with E as the scores use it."""
    gan = small_gan()
    before = copy.deepcopy([gan.generator.state_dict(), gan.discriminator.state_dict()])
    x = gan.generator(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
    encoder = Encoder(32, 1, 4, 8).apply(initialise_weights)
    optimizer, _ = training.prepare(encoder, train_encoder.Config(lr=2e-3), CPU)
    history = [train_encoder.train_step(encoder, optimizer, gan, x, 1.0, FP32) for _ in range(150)]

    runs.freeze(encoder, CPU)
    mean_image = (x - x.mean(0)).square().mean().item()
    assert (x - gan.generator(encoder(x))).square().mean().item() < 0.3 * mean_image
    assert history[-1].sum() < 0.3 * history[0].sum()
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
        optimizer, _ = training.prepare(encoder, train_encoder.Config(lr=2e-3), CPU)
        found[kappa] = [train_encoder.train_step(encoder, optimizer, gan, x, kappa, FP32) for _ in range(80)][-1]
    assert found[0.0][0] < found[1000.0][0] and found[0.0][1] > found[1000.0][1]


def test_acae_overfits_eight_images() -> None:
    images = datasets.open_split("digits", "train", "3").take(slice(8))
    x = datasets.to_model(datasets.load_images(images, 32, 1)[0])
    torch.manual_seed(0)
    autoencoder = nn.Sequential(Encoder(32, 1, 8, 8), Generator(32, 1, 8, 8)).apply(initialise_weights)
    discriminator = Discriminator(32, 1, 8).apply(initialise_weights)
    config = train_acae.Config(lr=1e-3)
    optimizers = [training.prepare(network, config, CPU)[0] for network in (autoencoder, discriminator)]
    history = [train_acae.train_step(autoencoder, discriminator, *optimizers, x, 100.0, FP32) for _ in range(200)]
    for network in autoencoder:
        runs.freeze(network, CPU)
    assert (x - autoencoder(x)).abs().mean() < 0.5 * (x - x.mean(0)).abs().mean()
    assert history[-1][0] < 0.5 * history[0][0]
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


def test_acae_and_its_judge_are_adversaries() -> None:
    """Against a D that is held still, a step raises D's belief in the reconstructions; D's own step lowers it."""
    torch.manual_seed(0)
    autoencoder = nn.Sequential(Encoder(32, 1, 8, 8), Generator(32, 1, 8, 8)).apply(initialise_weights)
    discriminator = Discriminator(32, 1, 8).apply(initialise_weights)
    x = torch.rand(8, 1, 32, 32) * 2 - 1
    for rates, grows in (((1e-3, 0.0), True), ((0.0, 1e-3), False)):
        networks = copy.deepcopy((autoencoder, discriminator))
        optimizers = [
            training.prepare(net, train_acae.Config(lr=lr), CPU)[0] for net, lr in zip(networks, rates, strict=True)
        ]
        losses = [train_acae.train_step(*networks, *optimizers, x, 0.0, FP32)[2] for _ in range(5)]
        assert (losses[-1] < losses[0]) == grows  # the autoencoder's loss is -log D(x̂)


def read_scores(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "scores.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["split"] == "test"]


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
    rows = read_scores(run_dir)
    test = datasets.open_split("digits", "test", "0")
    test = test.take(np.isin(test.source, [row["source"] for row in rows]))
    x = datasets.to_model(datasets.load_images(test, 32, 1)[0])
    with torch.no_grad():
        generated = networks["generator"](networks["encoder"](x))
        f = networks["discriminator"].features
        f_anogan = (x - generated).pow(2).mean((1, 2, 3)) + 0.5 * (f(x) - f(generated)).pow(2).mean((1, 2, 3))
        acae = (x - networks["autoencoder"](x)).abs().sum((1, 2, 3))
    np.testing.assert_allclose([float(row["f_anogan"]) for row in rows], f_anogan, rtol=1e-4)
    np.testing.assert_allclose([float(row["acae"]) for row in rows], acae, rtol=1e-4)
    seconds = json.loads((run_dir / "run.json").read_text())["evaluate"]["seconds_to_score_1000"]
    assert set(seconds) == {"p_d", "f_anogan", "acae"} and all(value > 0 for value in seconds.values())


@pytest.fixture
def trained(digits_workdir: Path, tmp_path: Path) -> Path:
    """A copy of the run that holds everything."""
    return shutil.copytree(digits_workdir / "outputs/digits-0", tmp_path / "outputs/digits-0")


@pytest.mark.parametrize("name", ["encoder", "acae"])
def test_training_goes_on_as_if_it_had_not_stopped(trained: Path, run_here: Callable[..., None], name: str) -> None:
    script, path = f"train_{name}.py", trained / f"{name}.pt"
    gan = (trained / "gan.pt").read_bytes()
    run_here(script, "--epochs", "4", "--fresh", "--device", "cpu")
    whole = torch.load(path, weights_only=True)
    run_here(script, "--epochs", "2", "--fresh", "--device", "cpu")
    assert torch.load(path, weights_only=True)["step"] == 12
    run_here(script, "--epochs", "4", "--device", "cpu")
    again = torch.load(path, weights_only=True)
    network = "encoder" if name == "encoder" else "autoencoder"
    assert torch.equal(again["history"], whole["history"])
    assert all(torch.equal(again[network][key], tensor) for key, tensor in whole[network].items())
    assert len((trained / f"{name}-losses.csv").read_text().splitlines()) == 1 + 24
    assert (trained / "gan.pt").read_bytes() == gan


def test_defaults_are_those_of_the_gan(digits_workdir: Path) -> None:
    record = json.loads((digits_workdir / "outputs/digits-0/run.json").read_text())
    for script in ("train_encoder", "train_acae"):
        assert record[script]["hyperparameters"]["epochs"] == record["train_gan"]["hyperparameters"]["epochs"] == 3
        assert record[script]["hyperparameters"]["batch_size"] == 16 and record[script]["steps"] == 18


def test_two_processes_average_their_gradients(trained: Path) -> None:
    """The encoder of two processes against two encoders in this one, whose gradients are averaged by hand."""
    arguments = ["--epochs", "1", "--batch-size", "8", "--fresh", "--device", "cpu", "--precision", "fp32"]
    for script in ("train_encoder.py", "train_acae.py"):
        done = run_process(trained.parent.parent, script, *arguments, processes=2)
        assert done.returncode == 0, done.stderr

    gan = runs.load_gan(trained, CPU)
    images = training.images_of_gan(gan, False, 2)
    batches = [training.real_batches(images, 8, 0, 0, rank, 2) for rank in range(2)]
    torch.manual_seed(0)
    encoders = [Encoder(32, 1, 8, 4).apply(initialise_weights)]
    encoders.append(copy.deepcopy(encoders[0]))
    prepared = [training.prepare(encoder, train_encoder.Config(), CPU) for encoder in encoders]
    for step in range(6):
        for encoder, batch in zip(encoders, batches, strict=True):
            x = next(batch)
            generated, f = gan.generator(encoder(x)), gan.discriminator.features
            residual, discrimination = util.izi_f_loss(x, generated, f(x), f(generated))
            encoder.zero_grad()
            (residual + discrimination).mean().backward()
        for first, second in zip(encoders[0].parameters(), encoders[1].parameters(), strict=True):
            first.grad = second.grad = (first.grad + second.grad) / 2
        for optimizer, scheduler in prepared:
            optimizer.step()
            scheduler.step(step / 6)
    found = torch.load(trained / "encoder.pt", weights_only=True)["encoder"]
    for name, tensor in encoders[0].state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_search_from_the_encoder_ends_as_low(trained: Path, run_here: Callable[..., None]) -> None:
    """At most 2% above the search from the nearest candidate, though this encoder has learnt next to nothing."""
    found = {}
    for init in ("candidates", "encoder"):
        run_here("fit_latent.py", "--splits", "test", "--max-images", "60", "--init", init, "--device", "cpu")
        gan = runs.load_gan(trained, CPU)
        found[init] = runs.read_latents(trained / "latents-test.npz", "test", gan)
    assert "encoder" in found["encoder"]["search"] and "encoder" not in found["candidates"]["search"]
    candidates, encoder = (runs.fitted_score(found[init]) for init in ("candidates", "encoder"))
    assert not np.array_equal(candidates, encoder)
    assert encoder.mean() < 1.02 * candidates.mean()


def test_a_file_of_another_run_is_refused(
    trained: Path, tmp_path: Path, run_here: Callable[..., None], fails: Callable[..., str]
) -> None:
    message = fails("train_encoder.py", "--lr", "1e-3")
    assert "encoder.pt was trained with kappa 0.5, not 1.0; lr 0.0002, not 0.001" in message
    (trained / "encoder.pt").rename(tmp_path / "encoder.pt")
    assert "encoder.pt is missing: run train_encoder.py" in fails("fit_latent.py", "--init", "encoder")
    content = (tmp_path / "encoder.pt").read_bytes()
    (trained / "encoder.pt").write_bytes(content[:500])
    assert "encoder.pt is damaged or was not written by this train_encoder.py" in fails("evaluate.py")
    (trained / "encoder.pt").write_bytes(content)

    state = torch.load(trained / "gan.pt", weights_only=True)
    state["config"]["training_images"] = "100 with checksum 0"
    torch.save(state, trained / "gan.pt")
    assert "encoder.pt was trained for another gan.pt" in fails("fit_latent.py", "--init", "encoder")
    gan = runs.load_gan(trained, CPU)
    with pytest.raises(util.InputError, match=r"acae.pt was trained on other images or with other sizes"):
        runs.load_acae(trained, gan, CPU)
    assert "are not those of gan.pt" in fails("train_acae.py", "--fresh")


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("train_encoder.py", ["--kappa", "-1"], "--kappa must be at least 0"),
        ("train_encoder.py", ["--epochs", "0"], "--epochs must be at least 1"),
        ("train_encoder.py", ["--checkpoint-every", "x"], "--checkpoint-every must be"),
        ("train_acae.py", ["--l1-weight", "nan"], "--l1-weight must be at least 0"),
        ("train_acae.py", ["--batch-size", "0"], "--batch-size must be at least 1"),
        ("train_acae.py", ["--run-dir", "outputs/none"], "has no gan.pt: run train_gan.py"),
    ],
)
def test_wrong_flags(trained: Path, fails: Callable[..., str], script: str, flags: list[str], words: str) -> None:
    assert words in fails(script, *flags)
