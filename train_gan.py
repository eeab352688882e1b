"""1. Learn what normal looks like: a DCGAN on the normal class only.

    python train_gan.py                                     # CIFAR-10, automobile is normal
    python train_gan.py --dataset digits                    # no download
    python train_gan.py --dataset DIR --normal-class good   # your own pictures: DIR/train/good/, DIR/test/good/, ...
    python train_gan.py --dataset DIR --picture-size own    # patches of them, for small defects in large pictures
    torchrun --standalone --nproc-per-node=8 train_gan.py   # on eight GPUs

Writes gan.pt, losses.csv, losses.png, samples.png, samples.gif and run.json to outputs/<data set>-<normal class>/.
Stop it at any time: the same command continues from the last gan.pt, to the same weights. Next: python fit_latent.py

Measured: `make demo` (630 steps on 108 digits, 32x32, ngf 16, seed 0) trains in 32 s on one thread of an AMD EPYC
without AVX-512, shared with other jobs.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn
from torch.optim import Adam

import util
from anogan import files, images, loading, pictures, processes, runs
from anogan.decoding import View
from anogan.loop import FIXED_Z, Loop, Training, check_config, prepare, sample_grid, weight_settings
from network import Discriminator, Generator, channel_multipliers, initialise_weights, keeping_statistics

CURVES = {
    "Losses": {"loss_d": "D loss", "loss_g": "G loss"},
    "What D believes: the probability of being real": {"p_real": "P(real)", "p_fake": "P(fake)"},
}


@dataclass
class Config:
    dataset: str = "cifar10"  # cifar10, digits, or a folder with train/<class>/ and test/<class>/
    normal_class: str | None = None  # the class to call normal, name or index; by default 1, or the only one in train/
    group_by: str | None = None  # a regular expression: files in whose names it finds the same stay on one side
    image_size: int = 32  # side in pixels of what the networks see, a power of two from 32 up
    fit: Literal["crop", "stretch", "pad"] = "crop"  # a picture to a square: its middle, squeezed, or on black
    picture_size: int | Literal["own"] | None = None  # patches: of pictures with this shorter side, or their own size
    normalise: Literal["patch"] | None = None  # patch: each image or patch to the same mean and contrast
    augment: pictures.Augment | None = None  # for pictures without a direction: mirrored, or also turned, at random
    latent_dim: int = 128  # length of z
    ngf: int = 32  # width of the generator's last hidden layer
    ndf: int = 32  # width of the discriminator's first hidden layer
    epochs: int = 45  # passes over the training images; the step size is 0 at the end of 15, 45 and 105
    batch_size: int = 64  # images a step, in each process
    generator_steps: int = 1  # G steps after each D step; at 64x64 with ngf 64, D wins at once with fewer than 3
    lr: float = 2e-4  # Adam's step size, for G and D
    weight_decay: float = 1e-5  # Adam's pull of the weights towards 0
    checkpoint_every: str = "10m"  # how often to save gan.pt, losses and samples: minutes (10m) or steps (500)
    fresh: bool = False  # start over and replace what run_dir holds, instead of continuing it
    tensorboard: bool = False  # also log the losses to tensorboard/ in the run folder, if tensorboard is installed
    seed: int = 0  # of the first weights, the order of the images and the latents
    device: str = "auto"  # cuda, cuda:1, mps, cpu, ...; auto: the first there is of cuda, mps and cpu
    precision: util.Precision = "auto"  # of the convolutions; auto: bf16 where the hardware has it natively
    compile: bool = False  # torch.compile G and D, for a GPU: a slow first step; on a CPU slower throughout
    run_dir: Path | None = None  # where to write; by default outputs/<data set>-<normal class>
    max_megapixels: float = 179.0  # larger pictures are refused
    skip_unreadable: bool = False  # go on without the images that cannot be read


def train(
    loop: Loop,
    generator: nn.Module,
    discriminator: nn.Module,
    optimizers: tuple[Adam, Adam],
    latent_dim: int,
    generator_steps: int,
) -> None:
    """The two-player game (Goodfellow et al. 2014), over batches (B, C, H, W) of normal images in [-1, 1],
    which `loop` gives and whose losses it keeps.

    `optimizers` are G's and D's. Both networks may be wrapped in DistributedDataParallel, which averages the gradients
    of their own steps over the processes. D's stored BatchNorm statistics, with which the search and the scores see f
    and D(x), are of real images alone.
    """
    optimizer_g, optimizer_d = optimizers
    unwrapped = getattr(discriminator, "module", discriminator)  # for G's steps, where D has no gradients to average

    @loop.captured
    def play(real: torch.Tensor) -> dict[str, torch.Tensor]:
        """A step of D and the steps of G on one batch; its losses, and the means of D(x) and D(G(z))."""
        draw_z = partial(torch.randn, len(real), latent_dim, device=real.device)  # z ~ N(0, I), (B, latent_dim)

        # D: maximise log D(x) + log(1 - D(G(z)))
        with loop.autocast:
            fake = generator(draw_z())  # (B, C, H, W)
            real_logits = discriminator(real).to(real.dtype)  # losses are computed in full precision again
            with keeping_statistics(discriminator):
                fake_logits = discriminator(fake.detach()).to(real.dtype)
        loss_d = util.discriminator_loss(real_logits, fake_logits)
        util.take_step(optimizer_d, loss_d)

        # G: maximise log D(G(z)), against that D
        discriminator.requires_grad_(False)  # they need no gradient for D's weights: this saves a sixth of their work
        for step in range(generator_steps):
            with loop.autocast, keeping_statistics(discriminator):
                if step > 0:  # the first step takes the images that D has just seen
                    fake = generator(draw_z())
                loss_g = util.generator_loss(unwrapped(fake).to(real.dtype))
            util.take_step(optimizer_g, loss_g)
        discriminator.requires_grad_(True)

        p_real, p_fake = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
        return {"loss_d": loss_d, "loss_g": loss_g, "p_real": p_real, "p_fake": p_fake}

    for real in loop:
        loop.log(**play(real))


def main(config: Config) -> Path:
    """Check what was asked for, read the normal images, and train G and D on them; returns the run folder."""
    check(config)
    device = util.pick_device(config.device)
    config = named(config)
    with processes.join(device):
        normal = normal_images(config)
        normal_class = normal.classes[normal.label[0]]
        run_dir = config.run_dir or Path("outputs") / f"{normal.name}-{normal_class}"
        files.make_folder(run_dir)
        with runs.run_folder(run_dir):
            seen = see(normal, run_dir, config)
            channels, levels = seen.view.channels, seen.view.levels
            precision = util.pick_precision(config.precision, device)
            settings = weight_settings(config, normal_class, precision, normal.checksum())
            training = Training("train_gan.py", run_dir / "gan.pt", config, seen, device, settings)

            torch.manual_seed(config.seed)
            generator = Generator(config.image_size, channels, config.latent_dim, config.ngf).apply(initialise_weights)
            discriminator = Discriminator(config.image_size, channels, config.ndf).apply(initialise_weights)
            if config.compile:
                generator.compile()
                discriminator.compile()
            optimizers = prepare(generator, config, device), prepare(discriminator, config, device)
            parts = {"generator": generator, "discriminator": discriminator}
            parts |= {"optimizer_g": optimizers[0], "optimizer_d": optimizers[1]}
            about = {"dataset": config.dataset, "normal_class": normal_class, "image_channels": channels}
            about |= {"levels": levels, "max_megapixels": config.max_megapixels}
            fixed_z = fixed_latents(config).to(device)  # the samples show these z from the first epoch to the last
            draw = partial(sample_grid, generator, lambda: generator(fixed_z))
            with Loop(training, parts, CURVES, draw, about) as loop:
                shared = loop.share(generator), loop.share(discriminator)
                train(loop, *shared, optimizers, config.latent_dim, config.generator_steps)
            runs.keep_place(run_dir, config.dataset, normal.checksum())
            print(f"next: python fit_latent.py --run-dir {util.quoted(run_dir)}")
    return run_dir


def check(config: Config) -> None:
    """Raise InputError, naming the flag, if a value cannot be used."""
    check_config(config)
    util.check_at_least(config, 1, "latent_dim", "ngf", "ndf", "generator_steps", "max_megapixels")
    if isinstance(config.picture_size, int) and config.picture_size < config.image_size:
        raise util.InputError(
            f"--picture-size {config.picture_size} is less than --image-size {config.image_size}, the side of a patch"
        )
    if config.picture_size is not None and config.fit != "crop":
        raise util.InputError("--fit is for whole pictures: leave it out with --picture-size")
    if config.normalise is not None and config.fit == "pad":
        raise util.InputError("--normalise patch would measure the black that --fit pad adds: choose --fit stretch")
    try:
        channel_multipliers(config.image_size)
    except ValueError as error:
        raise util.InputError(f"--image-size: {error}") from error


def named(config: Config) -> Config:
    """The same with a normal class, and with the whole path of a folder."""
    normal_class = images.default_class(config.dataset) if config.normal_class is None else config.normal_class
    return replace(config, dataset=images.whole_path(config.dataset), normal_class=normal_class)


def normal_images(config: Config) -> images.ImageSet:
    """Which images of the normal class train."""
    which = config.normal_class, config.group_by
    normal = images.open_split(config.dataset, "train", *which)
    held_back = len(images.list_split(config.dataset, "validation", *which))
    print(f"{len(normal)} images to train on, {held_back} for validation; verdicts at --alpha 0.05 need 19, at 0.01 99")
    return normal


def see(normal: images.ImageSet, run_dir: Path, config: Config) -> pictures.Pictures:
    """The training images as the networks see them: in grey if every one of them is grey."""
    names = ("fit", "picture_size", "max_megapixels")
    shape = {name: getattr(config, name) for name in names} | {"normalise": config.normalise is not None}
    view = View(config.image_size, 3, **shape)
    view = replace(view, levels=loading.find_levels(normal, view))
    if view.levels is not None:
        black, white = view.levels
        print(f"more than 8 bits: black is {black:.6g} and white {white:.6g}, here and for every later picture")
    seen = runs.load_training_images(normal, view, run_dir, config.skip_unreadable, find_channels=True)
    return replace(seen, augment=config.augment)


def fixed_latents(config: Config) -> torch.Tensor:
    """64 latents (64, latent_dim), drawn with a separate seed."""
    random = torch.Generator().manual_seed(util.seed_of(config.seed, FIXED_Z))
    return torch.randn(64, config.latent_dim, generator=random)


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
