"""f-AnoGAN: learn E, which finds in one pass the z that AnoGAN searches for. Needs a trained gan.pt.

    python train_encoder.py                                     # for the run trained last
    python train_encoder.py --run-dir outputs/cifar10-automobile --epochs 15
    torchrun --standalone --nproc-per-node=8 train_encoder.py   # on eight GPUs

Writes encoder.pt, encoder-losses.csv and .png, encoder-samples.png and .gif to the run folder, and adds to its
run.json; gan.pt stays as it is. However it was stopped, the same command goes on from the last encoder.pt. evaluate.py
then has the score `f_anogan`, which needs no search, and `fit_latent.py --init encoder` starts its search at E(x).
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
from network import Encoder, initialise_weights

CURVES = {"izi_f: residual of pixels and of features": {"residual": "A_R", "features": "A_D"}}


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    epochs: int | None = None  # passes over the images that the GAN was trained on, by default as many as the GAN had
    batch_size: int | None = None  # images a step, in each process, by default as many as the GAN saw
    kappa: float = 1.0  # weight of the features in the loss and in the score, 1 in the paper
    lr: float = 2e-4  # Adam's step size
    weight_decay: float = 1e-5  # Adam's pull of the weights towards 0
    checkpoint_every: str = "10m"  # minutes (10m) or steps (500) between two writes of encoder.pt, losses and samples
    fresh: bool = False  # start over, and replace encoder.pt, instead of going on from there
    tensorboard: bool = False  # also log the losses to tensorboard/ in the run folder, if tensorboard is installed
    seed: int = 0  # of the first weights and the order of the images
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda, cuda:1, cpu, ...
    precision: util.Precision = "auto"  # of the convolutions; auto: bf16 where the hardware multiplies it faster
    skip_unreadable: bool = False  # go on without the images that cannot be read


def train_step(
    encoder: nn.Module, optimizer: Adam, gan: runs.TrainedGAN, x: torch.Tensor, kappa: float, autocast: torch.autocast
) -> torch.Tensor:
    """One step of E on images (N, C, H, W) by izi_f, A_R + κ A_D (see `util.izi_f_loss`), with G and D frozen.

    Returns the means of A_R and A_D over the batch, (2,).
    """
    with autocast:
        parts = util.izi_f_loss(encoder, gan.generator, gan.discriminator, x)
    residual, discrimination = (part.mean() for part in parts)
    optimizer.zero_grad()
    (residual + kappa * discrimination).backward()
    optimizer.step()
    return torch.stack([residual, discrimination]).detach()


def main(config: Config) -> None:
    """Check what was asked for, read the GAN and its images, and train E in the run folder."""
    util.check_at_least(config, 0, "kappa")
    with training.beside_gan(config, "encoder", runs.load_encoder) as start:
        gan, config = start.gan, start.config
        encoder = Encoder(gan.image_size, gan.image_channels, gan.latent_dim, gan.ndf).apply(initialise_weights)
        optimizer, scheduler = training.prepare(encoder, config, start.images.device)
        shown = datasets.to_model(start.images[:64])
        training.train(
            "train_encoder",
            config,
            start.path,
            start.images,
            start.settings | {"gan": gan.fingerprint},
            parts={"encoder": encoder, "optimizer": optimizer, "scheduler": scheduler},
            train_step=lambda networks, x: train_step(*networks, optimizer, gan, x, config.kappa, start.autocast),
            curves=CURVES,
            draw_samples=lambda: training.draw(encoder, lambda: gan.generator(encoder(shown))),
        )
        print(f"next: python evaluate.py --run-dir {util.quoted(start.path.parent)}, or fit_latent.py --init encoder")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
