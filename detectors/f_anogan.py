"""f-AnoGAN: learn E, which finds in one pass the z that AnoGAN searches for (Schlegl et al. 2019). Needs a gan.pt.

    python -m detectors.f_anogan                                     # for the run trained last
    python -m detectors.f_anogan --run-dir outputs/cifar10-automobile --epochs 15
    torchrun --standalone --nproc-per-node=8 -m detectors.f_anogan   # on eight GPUs

Writes encoder.pt, encoder-losses.csv and .png, encoder-samples.png and .gif to the run folder, and adds to its
run.json; gan.pt stays as it is. Stop it at any time: the same command continues from the last encoder.pt. evaluate.py
then has the score `f_anogan`, which needs no search, and `fit_latent.py --init encoder` starts its search at E(x).
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
from network import Encoder, initialise_weights

COMMAND = "python -m detectors.f_anogan"
SAME = ("gan",)  # what a checkpoint must share with the GAN
CURVES = {"izi_f: residual of pixels and of features": {"residual": "A_R", "features": "A_D"}}


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    dataset: str | None = None  # where the pictures of the run lie now, if they were moved
    epochs: int | None = None  # passes over the images that the GAN was trained on, by default as many as the GAN had
    batch_size: int | None = None  # images a step, in each process, by default as many as the GAN saw
    kappa: float = 1.0  # weight of the features in the loss and in the score, 1 in the paper
    lr: float = 2e-4  # Adam's step size
    weight_decay: float = 1e-5  # Adam's pull of the weights towards 0
    checkpoint_every: str = "10m"  # how often to save encoder.pt, losses and samples: minutes (10m) or steps (500)
    fresh: bool = False  # start over and replace encoder.pt, instead of continuing it
    tensorboard: bool = False  # also log the losses to tensorboard/ in the run folder, if tensorboard is installed
    seed: int = 0  # of the first weights and the order of the images
    device: str = "auto"  # cuda, cuda:1, mps, cpu, ...; auto: the first there is of cuda, mps and cpu
    precision: util.Precision = "auto"  # of the convolutions; auto: bf16 where the hardware has it natively
    skip_unreadable: bool = False  # go on without the images that cannot be read


def izi_f_loss(
    encoder: nn.Module, generator: nn.Module, discriminator: nn.Module, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts of izi_f and of f-AnoGAN's anomaly score (Schlegl et al. 2019): x (N, C, H, W) to (N,) twice.

    A_R = |x - G(E(x))|² / n, over an image's n pixels, and A_D = |f(x) - f(G(E(x)))|² / n_d, over its n_d features. E
    learns to make A_R + κ A_D small for normal images, and the same sum is the score.
    """
    generated = generator(encoder(x))
    features, generated_features = discriminator.features(x), discriminator.features(generated)
    # in the precision of x again, if the networks run in a lower one
    difference = (features.to(x.dtype) - generated_features.to(x.dtype)).square().mean((1, 2, 3))
    return (x - generated.to(x.dtype)).square().mean((1, 2, 3)), difference


def train(loop: Loop, encoder: nn.Module, optimizer: Adam, gan: runs.TrainedGAN, kappa: float) -> None:
    """Steps of E by izi_f, A_R + κ A_D, over batches (B, C, H, W) in [-1, 1], with G and D frozen."""
    for x in loop:
        with loop.autocast:
            parts = izi_f_loss(encoder, gan.generator, gan.discriminator, x)
        residual, features = (part.mean() for part in parts)
        util.take_step(optimizer, residual + kappa * features)
        loop.log(residual=residual, features=features)


def build(gan: runs.TrainedGAN) -> Encoder:
    """An encoder of the GAN's sizes."""
    return Encoder(gan.image_size, gan.image_channels, gan.latent_dim, gan.ndf)


def load(gan: runs.TrainedGAN) -> runs.Trained:
    """E of encoder.pt in the GAN's run folder, frozen. Raises InputError, see `runs.load_trained`."""
    return runs.load_trained(gan, "encoder.pt", COMMAND, "encoder", build(gan), SAME)


def score(trained: runs.Trained, gan: runs.TrainedGAN, x: torch.Tensor) -> torch.Tensor:
    """A_R + κ A_D, see `izi_f_loss`: (N, C, H, W) in [-1, 1] to (N,)."""
    residual, features = izi_f_loss(trained.network, gan.generator, gan.discriminator, x)
    return residual + trained.settings["kappa"] * features


ENCODER = Source("encoder.pt", COMMAND, lambda gan, image_sets: (load(gan), gan))
SCORES = (Score("f_anogan", "f-AnoGAN, encoder", ENCODER, lambda loaded, batch: score(*loaded, batch.x), "tab:green"),)


def main(config: Config) -> Path:
    """Check what was asked for, read the GAN and its images, and train E; returns the run folder."""
    util.check_at_least(config, 0, "kappa")
    with detector_training(config, COMMAND, "encoder.pt", load, SAME) as (gan, training):
        encoder = build(gan).apply(initialise_weights)
        optimizer = prepare(encoder, training.config, gan.device)
        shown = gan.to_model(training.pictures.some(64))
        parts = {"encoder": encoder, "optimizer": optimizer}
        draw = partial(sample_grid, encoder, lambda: gan.generator(encoder(shown)))
        with Loop(training, parts, CURVES, draw) as loop:
            train(loop, loop.share(encoder), optimizer, gan, config.kappa)
        where = util.quoted(gan.run_dir)
        print(f"next: python evaluate.py --run-dir {where}, or python fit_latent.py --run-dir {where} --init encoder")
        return gan.run_dir


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
