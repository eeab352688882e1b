"""aCAE: an adversarially trained convolutional autoencoder, which AnoGAN's paper compares with. Needs a gan.pt.

    python train_acae.py                                     # on the images of the run trained last
    python train_acae.py --run-dir outputs/cifar10-automobile --epochs 15
    torchrun --standalone --nproc-per-node=8 train_acae.py   # on eight GPUs

From gan.pt it takes the data set, the normal class and the sizes of the networks, no weights. Writes acae.pt,
acae-losses.csv and .png, acae-samples.png and .gif to the run folder, and adds to its run.json. However it was
stopped, the same command goes on from the last acae.pt. evaluate.py then has the score `acae`, which needs no search.
Next: python evaluate.py
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn
from torch.optim import Adam

import datasets
import runs
import training
import util
from network import Discriminator, initialise_weights

CURVES = {
    "Reconstruction: mean distance of a pixel": {"l1": "L1"},
    "Adversarial losses": {"loss_d": "D loss", "adversarial": "AE loss"},
}


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    epochs: int | None = None  # passes over the images that the GAN was trained on, by default as many as the GAN had
    batch_size: int | None = None  # images a step, in each process, by default as many as the GAN saw
    l1_weight: float = 100.0  # lambda: the autoencoder's loss is adversarial + lambda L1
    lr: float = 2e-4  # Adam's step size, for the autoencoder and D
    weight_decay: float = 1e-5  # Adam's pull of the weights towards 0
    checkpoint_every: str = "10m"  # minutes (10m) or steps (500) between two writes of acae.pt, losses and samples
    fresh: bool = False  # start over, and replace acae.pt, instead of going on from there
    tensorboard: bool = False  # also log the losses to tensorboard/ in the run folder, if tensorboard is installed
    seed: int = 0  # of the first weights and the order of the images
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda, cuda:1, cpu, ...
    precision: util.Precision = "auto"  # of the convolutions; auto: bf16 where the hardware multiplies it faster
    skip_unreadable: bool = False  # go on without the images that cannot be read


def autoencoder_loss(
    x: torch.Tensor, reconstructed: torch.Tensor, logits: torch.Tensor, l1_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-log D(x̂) + λ |x - x̂|, the second averaged over pixels: the joint loss of Pathak et al. 2016 (equation 3) with
    the L1 distance and the λ of Isola et al. 2017 (equation 4, λ = 100).

    x and its reconstruction x̂ are (N, C, H, W), D's logits of x̂ (N,). Returns the loss and its two parts, unweighted.
    """
    adversarial, l1 = util.generator_loss(logits), (x - reconstructed).abs().mean()
    return adversarial + l1_weight * l1, adversarial, l1


def train_step(
    autoencoder: nn.Module,
    discriminator: nn.Module,
    optimizer_a: Adam,
    optimizer_d: Adam,
    x: torch.Tensor,
    l1_weight: float,
    autocast: torch.autocast,
) -> torch.Tensor:
    """One step of D, which tells images (N, C, H, W) from reconstructions, then one of the autoencoder against it.

    Returns the L1 distance, D's loss and the autoencoder's adversarial loss, (3,), on the device. Both networks may be
    wrapped in DistributedDataParallel.
    """
    judge = getattr(discriminator, "module", discriminator)  # D in the autoencoder's step, which has no gradients for D
    with autocast:
        reconstructed = autoencoder(x)
        # the losses are computed in full precision again
        real_logits, fake_logits = discriminator(x).to(x.dtype), discriminator(reconstructed.detach()).to(x.dtype)
    loss_d = util.discriminator_loss(real_logits, fake_logits)
    optimizer_d.zero_grad()
    loss_d.backward()
    optimizer_d.step()

    discriminator.requires_grad_(False)
    with autocast:
        logits = judge(reconstructed).to(x.dtype)
    loss, adversarial, l1 = autoencoder_loss(x, reconstructed.to(x.dtype), logits, l1_weight)
    optimizer_a.zero_grad()
    loss.backward()
    optimizer_a.step()
    discriminator.requires_grad_(True)
    return torch.stack([l1, loss_d, adversarial]).detach()


def main(config: Config) -> None:
    """Check what was asked for, read the GAN's images, and train encoder, decoder and D in the run folder."""
    util.check_at_least(config, 0, "l1_weight")
    with training.beside_gan(config, "acae", runs.load_acae) as start:
        gan, config = start.gan, start.config
        autoencoder = runs.build_acae(gan).apply(initialise_weights)
        discriminator = Discriminator(gan.image_size, gan.image_channels, gan.ndf).apply(initialise_weights)
        optimizer_a, scheduler_a = training.prepare(autoencoder, config, start.images.device)
        optimizer_d, scheduler_d = training.prepare(discriminator, config, start.images.device)
        shown = datasets.to_model(start.images[:64])
        training.train(
            "train_acae",
            config,
            start.path,
            start.images,
            start.settings | {name: getattr(gan, name) for name in runs.SIZES},
            parts={
                "autoencoder": autoencoder,
                "discriminator": discriminator,
                "optimizer_a": optimizer_a,
                "optimizer_d": optimizer_d,
                "scheduler_a": scheduler_a,
                "scheduler_d": scheduler_d,
            },
            train_step=lambda networks, x: train_step(
                *networks, optimizer_a, optimizer_d, x, config.l1_weight, start.autocast
            ),
            curves=CURVES,
            draw_samples=lambda: training.draw(autoencoder, lambda: autoencoder(shown)),
        )
        print(f"next: python evaluate.py --run-dir {util.quoted(start.path.parent)}")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
