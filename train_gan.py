"""1. Learn what normal looks like: a DCGAN on the normal class only.

    python train_gan.py                                     # CIFAR-10, automobile is normal
    python train_gan.py --dataset digits --image-size 32    # no download
    python train_gan.py --dataset DIR --normal-class good   # your own pictures: DIR/train/good/, DIR/test/good/, ...

Writes gan.pt, losses.csv, losses.png, samples.png, samples.gif and run.json to outputs/<data set>-<normal class>/.
Next: python fit_latent.py
"""

import csv
import io
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from PIL import Image
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

import util
from network import Discriminator, Generator, channel_multipliers, initialise_weights

matplotlib.use("Agg")  # files, not windows: a server has no screen
import matplotlib.pyplot as plt


@dataclass
class Config:
    dataset: str = "cifar10"  # cifar10, digits, or a folder with train/<class>/ and test/<class>/
    normal_class: str = "1"  # name or index of the class to call normal; in CIFAR-10, 1 is automobile
    image_size: int = 64  # side in pixels, a power of two from 32 up; images are resized and cut to it
    latent_dim: int = 128  # length of z
    ngf: int = 64  # width of the generator's last hidden layer
    ndf: int = 64  # width of the discriminator's first hidden layer
    epochs: int = 100  # passes over the training images
    batch_size: int = 64  # images a step
    generator_steps: int = 3  # G steps after each D step; at 32x32 with ngf 32, 1 drew better images
    lr: float = 2e-4  # Adam's step size, for G and D
    weight_decay: float = 1e-5  # Adam's pull of the weights towards 0
    save_every: int = 10  # epochs between two writes of gan.pt, losses and samples
    seed: int = 0  # of the first weights, the order of the images and the latents
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda, cuda:1, cpu, ...
    precision: util.Precision = "auto"  # of the convolutions; auto: bf16 where the hardware multiplies it faster
    compile: bool = False  # torch.compile G and D, for a GPU: a later start; on a CPU it was slower
    run_dir: Path | None = None  # where to write; by default outputs/<data set>-<normal class>
    skip_unreadable: bool = False  # go on without the images that cannot be read


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """-log D(x) - log(1 - D(G(z))), each averaged over its batch (N,), as one number."""
    real = binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    fake = binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return real + fake


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """-log D(G(z)), the non-saturating loss of Goodfellow et al. 2014, averaged over the batch (N,), as one number."""
    return binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


def prepare(
    network: Generator | Discriminator, config: Config, device: torch.device
) -> tuple[Adam, CosineAnnealingWarmRestarts]:
    """Move a network to the device, and give it its optimizer and the cosine of its step size."""
    network.to(device, memory_format=torch.channels_last)  # 1.3x to 1.9x faster than NCHW on a CPU
    if config.compile:
        network.compile()
    optimizer = Adam(
        network.parameters(), lr=config.lr, betas=(0.5, 0.999), weight_decay=config.weight_decay, fused=True
    )
    return optimizer, CosineAnnealingWarmRestarts(optimizer, T_0=15, T_mult=2)


def shuffled_batches(images: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """One epoch: uint8 (N, C, H, W) in a random order, as batches (batch_size, C, H, W) in [-1, 1] on their device.

    The last, smaller batch is left out: BatchNorm would see too few.
    """
    order = torch.randperm(len(images)).to(images.device)
    for rows in order[: len(images) // batch_size * batch_size].split(batch_size):
        yield util.to_model(images[rows]).contiguous(memory_format=torch.channels_last)


def train_step(
    generator: Generator,
    discriminator: Discriminator,
    optimizer_g: Adam,
    optimizer_d: Adam,
    real: torch.Tensor,
    config: Config,
    autocast: torch.autocast,
) -> torch.Tensor:
    """One step of D on real (N, C, H, W) and generated images, then `generator_steps` steps of G against that D.

    Returns D's loss, G's last loss, P(real) and P(fake) as (4,), on the device: nothing here waits for a GPU.
    """

    def generate() -> torch.Tensor:
        return generator(torch.randn(len(real), config.latent_dim, device=real.device))

    with autocast:
        fake = generate()
        # the losses are computed in full precision again
        real_logits, fake_logits = discriminator(real).to(real.dtype), discriminator(fake.detach()).to(real.dtype)
    loss_d = discriminator_loss(real_logits, fake_logits)
    optimizer_d.zero_grad()
    loss_d.backward()
    optimizer_d.step()

    discriminator.requires_grad_(False)  # G's steps need no gradient for D's weights: a sixth of their work
    for step in range(config.generator_steps):
        with autocast:
            if step > 0:  # the first step takes the images that D has just seen
                fake = generate()
            loss_g = generator_loss(discriminator(fake).to(real.dtype))
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
    discriminator.requires_grad_(True)
    return torch.stack([loss_d, loss_g, real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()]).detach()


def main(config: Config) -> None:
    """Train, and write the run folder."""
    started = time.monotonic()
    util.check_at_least(config, 1, "latent_dim", "ngf", "ndf", "epochs", "batch_size", "generator_steps", "save_every")
    util.check_at_least(config, 0, "lr", "weight_decay")
    util.check_seed(config.seed)
    try:
        channel_multipliers(config.image_size)
    except ValueError as error:
        raise util.InputError(f"--image-size: {error}") from error
    device = util.pick_device(config.device)
    precision = util.pick_precision(config.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    torch.manual_seed(config.seed)

    # Networks
    normal = util.open_split(config.dataset, "train", config.normal_class)
    normal_class = normal.classes[normal.label[0]]
    images = load_normal_images(normal, config).to(device)  # uint8 (N, C, H, W), held on the device
    channels = images.shape[1]
    generator = Generator(config.image_size, channels, config.latent_dim, config.ngf).apply(initialise_weights)
    discriminator = Discriminator(config.image_size, channels, config.ndf).apply(initialise_weights)
    optimizer_g, scheduler_g = prepare(generator, config, device)
    optimizer_d, scheduler_d = prepare(discriminator, config, device)

    run_dir = config.run_dir or Path("outputs") / f"{normal.name}-{normal_class}"
    run_dir.mkdir(parents=True, exist_ok=True)
    batch_size = min(config.batch_size, len(images))
    steps_per_epoch = len(images) // batch_size
    if (run_dir / "gan.pt").exists():
        print(
            f"this training will replace {run_dir / 'gan.pt'}: latents and scores of the old one no longer belong to it"
        )
    print(f"run: {run_dir}   normal class: {normal_class} ({len(images)} images)   device: {device}, {precision}")

    # Training
    history: list[list[float]] = []  # D loss, G loss, P(real), P(fake) of every step
    frames: list[Image.Image] = []  # G of the same 64 latents as training goes on
    fixed_z = torch.randn(64, config.latent_dim, device=device)
    bar = util.progress_bar(config.epochs * steps_per_epoch, " steps")
    for epoch in range(config.epochs):
        recent = []  # stays on the device: reading it would wait for the GPU at every step
        for i, real in enumerate(shuffled_batches(images, batch_size)):
            recent.append(train_step(generator, discriminator, optimizer_g, optimizer_d, real, config, autocast))
            scheduler_d.step(epoch + i / steps_per_epoch)
            scheduler_g.step(epoch + i / steps_per_epoch)
            if bar.update():  # the bar redraws ten times a second at most
                show(bar, epoch, recent[-1].tolist())

        history += torch.stack(recent).tolist()
        if not np.isfinite(history[-steps_per_epoch:]).all():
            raise util.InputError(f"the training diverged in epoch {epoch + 1} (a loss is not finite): lower --lr")
        show(bar, epoch, history[-1])
        is_last = epoch + 1 == config.epochs
        if epoch % (config.epochs // 50 + 1) == 0 or is_last:  # 50 frames at most, or the GIF grows too large
            frames.append(draw_samples(generator, fixed_z))
        if (epoch + 1) % config.save_every == 0 or is_last:
            state = {
                "config": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(config).items()},
                "classes": normal.classes,
                "normal_class": normal_class,
                "image_channels": channels,
                "epoch": epoch + 1,
                "generator": generator.state_dict(),
                "discriminator": discriminator.state_dict(),
                "optimizer_g": optimizer_g.state_dict(),
                "optimizer_d": optimizer_d.state_dict(),
                "scheduler_g": scheduler_g.state_dict(),
                "scheduler_d": scheduler_d.state_dict(),
                "rng": torch.get_rng_state(),
                "rng_cuda": torch.cuda.get_rng_state_all() if device.type == "cuda" else [],
            }
            content = io.BytesIO()  # torch.save to a path reports a full disk as something else than an OSError
            torch.save(state, content)
            with util.replacing(run_dir / "gan.pt") as partial:
                partial.write_bytes(content.getbuffer())
            write_losses(run_dir, history, steps_per_epoch)
            write_samples(run_dir, images[:64], frames, f"{run_dir.name}, epoch {epoch + 1}")
    bar.close()
    facts = {"training_images": len(images), "precision": precision}
    util.record_run(run_dir, "train_gan", config, device, time.monotonic() - started, **facts)
    print(f"wrote {run_dir}/: gan.pt losses.csv losses.png samples.png samples.gif run.json")
    print(f"next: python fit_latent.py --run-dir {run_dir}")


def load_normal_images(normal: util.ImageSet, config: Config) -> torch.Tensor:
    """The training images as uint8 (N, 1 or 3, H, W): one channel if every one of them is grey."""
    images, _ = util.load_images(normal, config.image_size, 3, config.skip_unreadable)
    if len(images) == 0:
        raise util.InputError(f"none of the {len(normal)} training images can be read")
    if skipped := len(normal) - len(images):
        print(f"skipped {skipped} of {len(normal)} images, which cannot be read")
    is_grey = (images[:, :1] == images[:, 1:]).all()
    return images[:, :1].contiguous() if is_grey else images


def show(bar: tqdm, epoch: int, row: list[float]) -> None:
    """Put the newest row of the history beside the bar."""
    loss_d, loss_g, p_real, p_fake = row
    bar.set_description(f"epoch {epoch + 1}", refresh=False)
    bar.set_postfix_str(
        f"D loss {loss_d:.3f}, G loss {loss_g:.3f}, P(real) {p_real:.2f}, P(fake) {p_fake:.2f}", refresh=False
    )


@torch.no_grad()
def draw_samples(generator: Generator, z: torch.Tensor) -> Image.Image:
    """A grid of G(z), eight in a row, from G as the search uses it: in eval mode."""
    images = generator.eval()(z)
    generator.train()
    return draw_grid(util.to_display(images))


def draw_grid(images: torch.Tensor) -> Image.Image:
    """Images (N, C, H, W) in [0, 1] as one picture, eight in a row."""
    return to_pil_image(make_grid(images.cpu(), nrow=8, padding=1))


def write_losses(run_dir: Path, history: list[list[float]], steps_per_epoch: int) -> None:
    """losses.csv, a row a step, and losses.png."""
    names = ["loss_d", "loss_g", "p_real", "p_fake"]
    with util.replacing(run_dir / "losses.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", *names])
        for step, row in enumerate(history):
            writer.writerow([step, step // steps_per_epoch, *(f"{value:.6g}" for value in row)])

    values = np.array(history)  # (steps, 4)
    window = max(1, len(values) // 200)  # averaged to about 200 points, or the noise hides the trend
    means = values[: len(values) // window * window].reshape(-1, window, 4).mean(1)
    epochs = (np.arange(len(means)) + 0.5) * window / steps_per_epoch
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(epochs, means[:, 0], label="D loss")
    left.plot(epochs, means[:, 1], label="G loss")
    left.set(xlabel="epoch", ylabel="loss", title="Losses")
    right.plot(epochs, means[:, 2], label="P(real): D on real images")
    right.plot(epochs, means[:, 3], label="P(fake): D on generated images")
    right.set(xlabel="epoch", ylabel="probability of being real", ylim=(0, 1), title="What D believes")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    with util.replacing(run_dir / "losses.png") as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)


def write_samples(run_dir: Path, real: torch.Tensor, frames: list[Image.Image], title: str) -> None:
    """samples.png, real images beside generated ones, and samples.gif, how the same latents changed over the epochs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6), layout="constrained")
    left.imshow(draw_grid(util.to_display(util.to_model(real))))
    left.set_title("real")
    right.imshow(frames[-1])
    right.set_title("generated")
    for axes in (left, right):
        axes.axis("off")
    figure.suptitle(title)
    with util.replacing(run_dir / "samples.png") as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)
    with util.replacing(run_dir / "samples.gif") as partial:
        frames = [frame.quantize(64) for frame in frames]  # fewer colours, a smaller file
        duration = max(50, 6000 // len(frames))  # milliseconds a frame: about six seconds in all
        frames[0].save(partial, save_all=True, append_images=frames[1:], duration=duration, loop=0)


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=__doc__))
