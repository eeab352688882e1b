"""1. Learn what normal looks like: a DCGAN on the normal class only.

    python train_gan.py                                     # CIFAR-10, automobile is normal
    python train_gan.py --dataset digits --image-size 32    # no download
    python train_gan.py --dataset DIR --normal-class good   # your own pictures: DIR/train/good/, DIR/test/good/, ...
    torchrun --standalone --nproc-per-node=8 train_gan.py   # on eight GPUs

Writes gan.pt, losses.csv, losses.png, samples.png, samples.gif, reconstructions.png and run.json to
outputs/<data set>-<normal class>/. However it was stopped, the same command goes on from the last gan.pt to the same
weights. At its end it says how well G draws normal pictures that it has not seen. Next: python fit_latent.py
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.nn import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

import datasets
import plots
import runs
import training
import util
from network import Discriminator, Generator, channel_multipliers, initialise_weights
from search import draw_candidates, nearest_candidates, search_latents

CURVES = {
    "Losses": {"loss_d": "D loss", "loss_g": "G loss"},
    "What D believes: the probability of being real": {"p_real": "P(real)", "p_fake": "P(fake)"},
}


@dataclass
class Config:
    dataset: str = "cifar10"  # cifar10, digits, or a folder with train/<class>/ and test/<class>/
    normal_class: str | None = None  # the class to call normal, name or index; by default 1, or the only one in train/
    image_size: int = 64  # side in pixels, a power of two from 32 up; images are resized and cut to it
    latent_dim: int = 128  # length of z
    ngf: int = 64  # width of the generator's last hidden layer
    ndf: int = 64  # width of the discriminator's first hidden layer
    epochs: int = 100  # passes over the training images
    batch_size: int = 64  # images a step, in each process
    generator_steps: int = 3  # G steps after each D step; at 32x32 with ngf 32, 1 drew better images
    lr: float = 2e-4  # Adam's step size, for G and D
    weight_decay: float = 1e-5  # Adam's pull of the weights towards 0
    checkpoint_every: str = "10m"  # minutes (10m) or steps (500) between two writes of gan.pt, losses and samples
    fresh: bool = False  # start over, and replace what run_dir holds, instead of going on from there
    tensorboard: bool = False  # also log the losses to tensorboard/ in the run folder, if tensorboard is installed
    sync_batchnorm: bool = False  # under torchrun on GPUs, BatchNorm over all processes; alone each is faster
    seed: int = 0  # of the first weights, the order of the images and the latents
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda, cuda:1, cpu, ...
    precision: util.Precision = "auto"  # of the convolutions; auto: bf16 where the hardware multiplies it faster
    compile: bool = False  # torch.compile G and D, for a GPU: a later start; on a CPU it was slower
    run_dir: Path | None = None  # where to write; by default outputs/<data set>-<normal class>
    skip_unreadable: bool = False  # go on without the images that cannot be read


def train_step(
    generator: Generator | DistributedDataParallel,
    discriminator: Discriminator | DistributedDataParallel,
    optimizer_g: Adam,
    optimizer_d: Adam,
    real: torch.Tensor,
    config: Config,
    autocast: torch.autocast,
) -> torch.Tensor:
    """One step of D on real (N, C, H, W) and generated images, then `generator_steps` steps of G against that D.

    Returns D's loss, G's last loss, P(real) and P(fake) as (4,), on the device: nothing here waits for a GPU. G and D
    may be wrapped in DistributedDataParallel, which averages the gradients of their own steps over the processes.
    """
    judge = getattr(discriminator, "module", discriminator)  # D in G's steps, where it has no gradients to average

    def generate() -> torch.Tensor:
        return generator(torch.randn(len(real), config.latent_dim, device=real.device))

    with autocast:
        fake = generate()
        # the losses are computed in full precision again
        real_logits, fake_logits = discriminator(real).to(real.dtype), discriminator(fake.detach()).to(real.dtype)
    loss_d = util.discriminator_loss(real_logits, fake_logits)
    optimizer_d.zero_grad()
    loss_d.backward()
    optimizer_d.step()

    discriminator.requires_grad_(False)  # G's steps need no gradient for D's weights: a sixth of their work
    for step in range(config.generator_steps):
        with autocast:
            if step > 0:  # the first step takes the images that D has just seen
                fake = generate()
            loss_g = util.generator_loss(judge(fake).to(real.dtype))
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
    discriminator.requires_grad_(True)
    return torch.stack([loss_d, loss_g, real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()]).detach()


def main(config: Config) -> None:
    """Check what was asked for, read the images, and train in the run folder."""
    training.check_config(config)
    util.check_at_least(config, 1, "latent_dim", "ngf", "ndf", "generator_steps")
    try:
        channel_multipliers(config.image_size)
    except ValueError as error:
        raise util.InputError(f"--image-size: {error}") from error
    device = util.pick_device(config.device)
    if config.sync_batchnorm and device.type != "cuda":
        raise util.InputError("--sync-batchnorm works on GPUs only: leave it out")
    config = replace(config, normal_class=default_class(config))
    if Path(config.dataset).is_dir() and config.dataset not in datasets.EMBEDDED:
        config = replace(config, dataset=str(Path(config.dataset).resolve()))  # the other scripts may run elsewhere
    with util.processes(device) as (_, processes):
        normal = datasets.open_split(config.dataset, "train", config.normal_class)
        images = training.load_training_images(normal, config.image_size, 3, config.skip_unreadable, processes)
        if (images[:, :1] == images[:, 1:]).all():  # every one of them is grey
            images = images[:, :1].contiguous()
        # For the check at the end; an unreadable one must not end it after hours
        validation = datasets.open_split(config.dataset, "validation", config.normal_class)
        some = validation.take(np.unique(np.linspace(0, len(validation) - 1, 32).round().astype(np.int64)))
        unseen, _ = datasets.load_images(some, config.image_size, images.shape[1], config.skip_unreadable)
        run_dir = config.run_dir or Path("outputs") / f"{normal.name}-{normal.classes[normal.label[0]]}"
        run_dir.mkdir(parents=True, exist_ok=True)
        with runs.run_folder(run_dir):
            train(config, normal, images, run_dir, device, processes)
            if util.rank() == 0 and len(unseen) > 0:
                check_reconstruction(run_dir, images, unseen, device)
            print(f"next: python fit_latent.py --run-dir {util.quoted(run_dir)}")


def default_class(config: Config) -> str:
    """The class to call normal if none is named: of a folder the only one in train/, else number 1.

    Raises InputError if train/ has several, or none.
    """
    if config.normal_class is not None or config.dataset in datasets.EMBEDDED:
        return config.normal_class or "1"
    images = datasets.open_dataset(config.dataset, "train")
    names = [images.classes[label] for label in np.unique(images.label)]
    if not names:
        raise util.InputError(
            f"{config.dataset}/train holds no pictures: put normal ones into a folder there, train/good"
        )
    if len(names) > 1:
        raise util.InputError(
            f"{config.dataset}/train has pictures of {', '.join(names)}: name one with --normal-class"
        )
    return names[0]


def train(
    config: Config,
    normal: datasets.ImageSet,
    images: torch.Tensor,
    run_dir: Path,
    device: torch.device,
    processes: int,
) -> None:
    """Train G and D on uint8 images (N, C, H, W) in a run folder."""
    normal_class = normal.classes[normal.label[0]]
    channels = images.shape[1]
    precision = util.pick_precision(config.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    settings = training.weight_settings(config, normal_class, precision, processes, training.checksum(images))

    # Networks
    torch.manual_seed(config.seed)
    generator = Generator(config.image_size, channels, config.latent_dim, config.ngf).apply(initialise_weights)
    discriminator = Discriminator(config.image_size, channels, config.ndf).apply(initialise_weights)
    if config.sync_batchnorm:
        generator, discriminator = map(SyncBatchNorm.convert_sync_batchnorm, (generator, discriminator))
    if config.compile:
        generator.compile()
        discriminator.compile()
    optimizer_g, scheduler_g = training.prepare(generator, config, device)
    optimizer_d, scheduler_d = training.prepare(discriminator, config, device)
    random = torch.Generator().manual_seed(util.seed_of(config.seed, training.FIXED_Z))
    fixed_z = torch.randn(64, config.latent_dim, generator=random).to(device)

    training.train(
        "train_gan",
        config,
        run_dir / "gan.pt",
        images.to(device),
        settings,
        parts={
            "generator": generator,
            "discriminator": discriminator,
            "optimizer_g": optimizer_g,
            "optimizer_d": optimizer_d,
            "scheduler_g": scheduler_g,
            "scheduler_d": scheduler_d,
        },
        train_step=lambda networks, real: train_step(*networks, optimizer_g, optimizer_d, real, config, autocast),
        curves=CURVES,
        draw_samples=lambda: training.draw(generator, lambda: generator(fixed_z)),
        about={
            "classes": normal.classes,
            "normal_class": normal_class,
            "image_channels": channels,
            "training_set": normal.fingerprint(),
        },
    )


def check_reconstruction(run_dir: Path, images: torch.Tensor, unseen: torch.Tensor, device: torch.device) -> None:
    """Search some validation normals as fit_latent.py does, from fewer candidates, and say how well G draws them.

    `images` are those of the training and `unseen` those to draw, uint8 (N, C, H, W) and (M, C, H, W). What G leaves of
    them is set against what the median of the training images leaves, the best that one picture for all can do.
    """
    gan = runs.load_gan(run_dir, device)
    x = datasets.to_model(unseen, device).contiguous(memory_format=torch.channels_last)
    start = nearest_candidates(x, draw_candidates(gan.generator, gan.latent_dim, count=1000, seed=0))
    z, residual, _ = search_latents(
        gan.generator, gan.discriminator, x, start, steps=100, lr=0.4, discrimination_weight=0.1
    )
    median = datasets.to_model(images[:: 1 + len(images) // 2000].median(0, keepdim=True).values, device)
    # shares of the range from black to white, which is 2, a pixel
    left, left_by_median = (float(sums.mean()) / x[0].numel() / 2 for sums in (residual, util.residual_loss(x, median)))
    explained = 1 - left / left_by_median if left_by_median > 0 else 0.0
    real, drawn = (plots.grid(datasets.to_display(each)) for each in (x, gan.generator(z)))
    plots.samples(run_dir / "reconstructions.png", real, drawn, f"{run_dir.name}: normal images that G has not seen")
    print(
        f"reconstruction check: G(z) leaves {left:.3f} of the range from black to white in {len(x)} validation "
        f"normals, the median picture leaves {left_by_median:.3f}: G explains {explained:.0%}, see "
        f"{run_dir / 'reconstructions.png'}"
    )
    if explained <= 0:
        print("G is not good enough: one picture for all would explain more. See docs/your-own-images.md")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
