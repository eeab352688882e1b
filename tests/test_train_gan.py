"""The GAN losses by hand and the learning rate over the epochs."""

import math
from pathlib import Path

import pytest
import torch
from test_util import folder

import train_gan
import util


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([0.0, math.log(3)]), torch.tensor([0.0, -math.log(4)])  # D: 1/2, 3/4; 1/2, 1/5
    expected = -(math.log(1 / 2) + math.log(3 / 4)) / 2 - (math.log(1 / 2) + math.log(4 / 5)) / 2
    assert train_gan.discriminator_loss(real, fake).item() == pytest.approx(expected)
    assert train_gan.generator_loss(fake).item() == pytest.approx(-(math.log(1 / 2) + math.log(1 / 5)) / 2)


def test_losses_do_not_overflow() -> None:
    logits = torch.tensor([1000.0])
    assert train_gan.discriminator_loss(-logits, logits).item() == pytest.approx(2000)
    assert train_gan.generator_loss(-logits).item() == pytest.approx(1000)


def test_learning_rate_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cosine from lr to 0 over 15 epochs, then over 30, stepped by fractions of an epoch."""
    seen = {}

    class Recorder(train_gan.CosineAnnealingWarmRestarts):
        def step(self, epoch: float | None = None) -> None:
            super().step(epoch)
            seen[epoch] = self.get_last_lr()[0]

    monkeypatch.setattr(train_gan, "CosineAnnealingWarmRestarts", Recorder)
    dataset = folder(tmp_path / "set", {"train/good": 5, "test/good": 1})  # 4 to train with, so 2 steps an epoch
    train_gan.main(
        train_gan.Config(
            dataset=str(dataset),
            normal_class="good",
            run_dir=tmp_path / "run",
            image_size=32,
            latent_dim=2,
            ngf=1,
            ndf=1,
            batch_size=2,
            epochs=31,
            generator_steps=1,
            save_every=31,
            lr=1.0,
            device="cpu",
        )
    )
    for epoch, lr in ((0.0, 1), (0.5, (1 + math.cos(math.pi / 30)) / 2), (7.5, 0.5), (10.0, 0.25)):
        assert seen[epoch] == pytest.approx(lr)
    for epoch, lr in ((15.0, 1), (25.0, 0.75), (30.0, 0.5), (30.5, (1 + math.cos(math.pi * 15.5 / 30)) / 2)):
        assert seen[epoch] == pytest.approx(lr)


def test_same_seed_same_weights(digits_workdir: Path, run_here: object) -> None:
    from conftest import TINY

    run_here("train_gan.py", "--dataset", "digits", "--normal-class", "0", "--epochs", "3", "--save-every", "1", *TINY)
    again = util.load_gan(Path("outputs/digits-0"), torch.device("cpu"))
    first = util.load_gan(digits_workdir / "outputs/digits-0", torch.device("cpu"))
    for name in ("generator", "discriminator"):
        weights = getattr(first, name).state_dict()
        for key, tensor in getattr(again, name).state_dict().items():
            torch.testing.assert_close(tensor, weights[key])
