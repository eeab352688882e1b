"""aCAE: an adversarially trained convolutional autoencoder, which AnoGAN's paper compares with. Needs a gan.pt.

    python -m detectors.acae                                     # on the images of the run trained last
    python -m detectors.acae --run-dir outputs/cifar10-automobile --epochs 15
    torchrun --standalone --nproc-per-node=8 -m detectors.acae   # on eight GPUs

From gan.pt it takes the data set, the normal class and the sizes of the networks, no weights. Writes acae.pt,
acae-losses.csv and .png, acae-samples.png and .gif to the run folder, and adds to its run.json. Stop it at any time:
the same command continues from the last acae.pt. evaluate.py then has the score `acae`, which needs no search.
Next: python evaluate.py
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import nn
from torch.optim import Adam

import util
from anogan import runs
from anogan.loop import Loop, detector_training, prepare, sample_grid
from anogan.scores import Score, Source
from network import Discriminator, Encoder, Generator, initialise_weights

COMMAND = "python -m detectors.acae"
CURVES = {
    "Reconstruction: mean distance of a pixel": {"l1": "L1"},
    "Adversarial losses": {"loss_d": "D loss", "adversarial": "AE loss"},
}
# What a checkpoint must share with the GAN
SAME = (*runs.SAME_IMAGES, "latent_dim", "ngf", "ndf")


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    dataset: str | None = None  # where the pictures of the run lie now, if they were moved
    epochs: int | None = None  # passes over the images that the GAN was trained on, by default as many as the GAN had
    batch_size: int | None = None  # images a step, in each process, by default as many as the GAN saw
    l1_weight: float = 100.0  # lambda: the autoencoder's loss is adversarial + lambda L1
    lr: float = 2e-4  # Adam's step size, for the autoencoder and D
    weight_decay: float = 1e-5  # Adam's pull of the weights towards 0
    checkpoint_every: str = "10m"  # how often to save acae.pt, losses and samples: minutes (10m) or steps (500)
    fresh: bool = False  # start over and replace acae.pt, instead of continuing it
    tensorboard: bool = False  # also log the losses to tensorboard/ in the run folder, if tensorboard is installed
    seed: int = 0  # of the first weights and the order of the images
    device: str = "auto"  # cuda, cuda:1, mps, cpu, ...; auto: the first there is of cuda, mps and cpu
    precision: util.Precision = "auto"  # of the convolutions; auto: bf16 where the hardware has it natively
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


def train(
    loop: Loop,
    autoencoder: nn.Module,
    discriminator: nn.Module,
    optimizers: tuple[Adam, Adam],
    l1_weight: float,
) -> None:
    """Over batches (B, C, H, W) in [-1, 1]: a step of D, which tells images from reconstructions, then one of the
    autoencoder against it.

    Both networks may be wrapped in DistributedDataParallel.
    """
    optimizer_a, optimizer_d = optimizers
    unwrapped = getattr(discriminator, "module", discriminator)  # for the autoencoder's step: no gradients for D
    for x in loop:
        with loop.autocast:
            reconstructed = autoencoder(x)
            # losses are computed in full precision again
            real_logits, fake_logits = discriminator(x).to(x.dtype), discriminator(reconstructed.detach()).to(x.dtype)
        loss_d = util.discriminator_loss(real_logits, fake_logits)
        util.take_step(optimizer_d, loss_d)

        discriminator.requires_grad_(False)
        with loop.autocast:
            logits = unwrapped(reconstructed).to(x.dtype)
        loss, adversarial, l1 = autoencoder_loss(x, reconstructed.to(x.dtype), logits, l1_weight)
        util.take_step(optimizer_a, loss)
        discriminator.requires_grad_(True)
        loop.log(l1=l1, loss_d=loss_d, adversarial=adversarial)


def build(gan: runs.TrainedGAN) -> nn.Sequential:
    """E and a decoder like G, of the GAN's sizes: images in [-1, 1] to their reconstructions."""
    return nn.Sequential(
        Encoder(gan.image_size, gan.image_channels, gan.latent_dim, gan.ndf),
        Generator(gan.image_size, gan.image_channels, gan.latent_dim, gan.ngf),
    )


def load(gan: runs.TrainedGAN) -> runs.Trained:
    """The aCAE of acae.pt in the GAN's run folder, frozen. Raises InputError, see `runs.load_trained`."""
    return runs.load_trained(gan, "acae.pt", COMMAND, "autoencoder", build(gan), SAME)


def score(trained: runs.Trained, x: torch.Tensor) -> torch.Tensor:
    """Σ|x - x̂| over an image's pixels, where x̂ is its reconstruction: (N, C, H, W) in [-1, 1] to (N,)."""
    return util.residual_loss(x, trained.network(x))


ACAE = Source("acae.pt", COMMAND, lambda gan, image_sets: load(gan))
SCORES = (Score("acae", "aCAE, reconstruction", ACAE, lambda trained, batch: score(trained, batch.x), "tab:red"),)


def main(config: Config) -> Path:
    """Check what was asked for, read the GAN's images, and train encoder, decoder and D; returns the run folder."""
    util.check_at_least(config, 0, "l1_weight")
    with detector_training(config, COMMAND, "acae.pt", load, SAME) as (gan, training):
        autoencoder = build(gan).apply(initialise_weights)
        discriminator = Discriminator(gan.image_size, gan.image_channels, gan.ndf).apply(initialise_weights)
        optimizers = tuple(prepare(network, training.config, gan.device) for network in (autoencoder, discriminator))
        parts = {"autoencoder": autoencoder, "discriminator": discriminator}
        parts |= {"optimizer_a": optimizers[0], "optimizer_d": optimizers[1]}
        shown = gan.to_model(training.pictures.some(64))
        draw = partial(sample_grid, autoencoder, lambda: autoencoder(shown))
        with Loop(training, parts, CURVES, draw) as loop:
            train(loop, loop.share(autoencoder), loop.share(discriminator), optimizers, config.l1_weight)
        print(f"next: python evaluate.py --run-dir {util.quoted(gan.run_dir)}")
        return gan.run_dir


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
