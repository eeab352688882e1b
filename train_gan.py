"""1. Learn what normal looks like: a DCGAN on the normal class only.

    python train_gan.py                                     # CIFAR-10, automobile is normal
    python train_gan.py --dataset digits --image-size 32    # no download
    python train_gan.py --dataset DIR --normal-class good   # your own pictures: DIR/train/good/, DIR/test/good/, ...
    torchrun --standalone --nproc-per-node=8 train_gan.py   # on eight GPUs

Writes gan.pt, losses.csv, losses.png, samples.png, samples.gif and run.json to outputs/<data set>-<normal class>/.
However it was stopped, the same command goes on from the last gan.pt to the same weights. Next: python fit_latent.py
"""

import csv
import hashlib
import io
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch.nn import SyncBatchNorm
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from tqdm import tqdm

import datasets
import plots
import util
from network import Discriminator, Generator, channel_multipliers, initialise_weights

ORDER, NOISE, FIXED_Z = range(3)  # kinds of random draws, each with seeds of its own


@dataclass
class Config:
    dataset: str = "cifar10"  # cifar10, digits, or a folder with train/<class>/ and test/<class>/
    normal_class: str = "1"  # name or index of the class to call normal; in CIFAR-10, 1 is automobile
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
    sync_batchnorm: bool = False  # under torchrun on GPUs, BatchNorm over all processes; alone each is faster
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


def share_gradients(network: Generator | Discriminator, device: torch.device) -> DistributedDataParallel:
    """The network with the mean of all processes' gradients after each backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch have another name for the flag
        return DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            # BatchNorm's stored statistics serve the search, for which those of rank 0 will do
            broadcast_buffers=False,
        )


def real_batches(
    images: torch.Tensor, batch_size: int, seed: int, first_step: int = 0, rank: int = 0, processes: int = 1
) -> Iterator[torch.Tensor]:
    """The batches (batch_size, C, H, W) in [-1, 1] that training sees from `first_step` on, without end.

    uint8 images (N, C, H, W) are shuffled anew for each epoch, by seed and epoch alone, and shared out among the
    processes. What is left at the end of an epoch is left out: BatchNorm would see too few.
    """
    together = batch_size * processes
    order_of = None
    for step in count(first_step):
        epoch, i = divmod(step, len(images) // together)
        if epoch != order_of:
            random = torch.Generator().manual_seed(util.seed_of(seed, ORDER, epoch))
            order, order_of = torch.randperm(len(images), generator=random).to(images.device), epoch
        first = i * together + rank * batch_size
        real = images[order[first : first + batch_size]]
        yield datasets.to_model(real).contiguous(memory_format=torch.channels_last)


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
    loss_d = discriminator_loss(real_logits, fake_logits)
    optimizer_d.zero_grad()
    loss_d.backward()
    optimizer_d.step()

    discriminator.requires_grad_(False)  # G's steps need no gradient for D's weights: a sixth of their work
    for step in range(config.generator_steps):
        with autocast:
            if step > 0:  # the first step takes the images that D has just seen
                fake = generate()
            loss_g = generator_loss(judge(fake).to(real.dtype))
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
    discriminator.requires_grad_(True)
    return torch.stack([loss_d, loss_g, real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()]).detach()


def checkpoint_interval(text: str) -> tuple[float, float]:
    """Seconds and steps between two checkpoints, one of them infinite: "10m" is 600 seconds, "500" is 500 steps.

    Raises InputError if the text is neither.
    """
    if re.fullmatch(r"[1-9]\d*", text):
        return float("inf"), int(text)
    if re.fullmatch(r"\d+(\.\d+)?m", text) and float(text[:-1]) > 0:
        return 60 * float(text[:-1]), float("inf")
    raise util.InputError(f"--checkpoint-every must be minutes such as 10m, or steps such as 500, not {text!r}")


def main(config: Config) -> None:
    """Check what was asked for, read the images, and train in the run folder."""
    util.check_at_least(config, 1, "latent_dim", "ngf", "ndf", "epochs", "batch_size", "generator_steps")
    util.check_at_least(config, 0, "lr", "weight_decay")
    util.check_seed(config.seed)
    checkpoint_interval(config.checkpoint_every)
    try:
        channel_multipliers(config.image_size)
    except ValueError as error:
        raise util.InputError(f"--image-size: {error}") from error
    device = util.pick_device(config.device)
    if config.sync_batchnorm and device.type != "cuda":
        raise util.InputError("--sync-batchnorm works on GPUs only: leave it out")
    with util.processes(device) as (rank, processes):
        normal = datasets.open_split(config.dataset, "train", config.normal_class)
        images = load_normal_images(normal, config)
        if len(images) < processes:
            raise util.InputError(f"{len(images)} training images are too few for {processes} processes: start fewer")
        run_dir = config.run_dir or Path("outputs") / f"{normal.name}-{normal.classes[normal.label[0]]}"
        run_dir.mkdir(parents=True, exist_ok=True)
        with util.run_folder(run_dir):
            train(config, normal, images, run_dir, device, rank, processes)


def train(
    config: Config,
    normal: datasets.ImageSet,
    images: torch.Tensor,
    run_dir: Path,
    device: torch.device,
    rank: int,
    processes: int,
) -> None:
    """From the last checkpoint, or the first step, to the last step: uint8 images (N, C, H, W) to a run folder."""
    started = time.monotonic()
    normal_class = normal.classes[normal.label[0]]
    channels = images.shape[1]
    precision = util.pick_precision(config.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    batch_size = min(config.batch_size, len(images) // processes)
    steps_per_epoch = len(images) // (batch_size * processes)
    steps = config.epochs * steps_per_epoch
    checkpoint_seconds, checkpoint_steps = checkpoint_interval(config.checkpoint_every)
    settings = weight_settings(config, normal_class, precision, processes, images)
    images = images.to(device)
    print(
        f"run: {run_dir}   normal class: {normal_class} ({len(images)} images)   device: {device}, {precision}   "
        f"processes: {processes}"
    )

    # Networks
    torch.manual_seed(config.seed)
    generator = Generator(config.image_size, channels, config.latent_dim, config.ngf).apply(initialise_weights)
    discriminator = Discriminator(config.image_size, channels, config.ndf).apply(initialise_weights)
    if config.sync_batchnorm:
        generator, discriminator = map(SyncBatchNorm.convert_sync_batchnorm, (generator, discriminator))
    optimizer_g, scheduler_g = prepare(generator, config, device)
    optimizer_d, scheduler_d = prepare(discriminator, config, device)
    parts = {
        "generator": generator,
        "discriminator": discriminator,
        "optimizer_g": optimizer_g,
        "optimizer_d": optimizer_d,
        "scheduler_g": scheduler_g,
        "scheduler_d": scheduler_d,
    }
    random = torch.Generator().manual_seed(util.seed_of(config.seed, FIXED_Z))
    fixed_z = torch.randn(64, config.latent_dim, generator=random).to(device)

    # Go on from the last checkpoint
    path = run_dir / "gan.pt"
    step, seconds_before = 0, 0.0
    history: list[torch.Tensor] = []  # blocks (steps, 4): D loss, G loss, P(real) and P(fake) of every step
    frames: list[bytes] = []  # PNG files: G of the same 64 latents as training goes on
    if path.exists() and config.fresh:
        print(f"starting over: the first checkpoint replaces {path}, and latents fitted with it will no longer do")
    elif path.exists():
        with util.reading_gan(run_dir) as (state, _):
            step, seconds_before, history, frames = state["step"], state["seconds"], [state["history"]], state["frames"]
            check_same_settings(path, state["config"], settings)
            for name, part in parts.items():
                part.load_state_dict(state[name])
        print(f"{path} holds {step} steps ({step / steps_per_epoch:.4g} epochs): ", end="")
        print("nothing left to train; --fresh starts over" if step >= steps else f"going on to {steps}")
    util.check_agreement(training_so_far=(settings, step))
    if processes > 1:
        generator, discriminator = (share_gradients(network, device) for network in (generator, discriminator))

    def save() -> None:
        """Write the checkpoint; run.json comes first, so that it is there whenever gan.pt is."""
        networks = parts["generator"], parts["discriminator"]
        if not all(tensor.isfinite().all() for network in networks for tensor in network.state_dict().values()):
            raise diverged("a weight", step)
        seconds = seconds_before + time.monotonic() - started
        facts = {name: settings[name] for name in ("precision", "processes", "training_images")}
        util.record_run(run_dir, "train_gan", config, device, seconds, steps=step, **facts)
        state = {
            "config": settings,
            "classes": normal.classes,
            "normal_class": normal_class,
            "image_channels": channels,
            "epoch": step / steps_per_epoch,
            "step": step,
            "seconds": seconds,
            "history": torch.cat(history),
            "frames": frames,
            **{name: part.state_dict() for name, part in parts.items()},
        }
        content = io.BytesIO()  # torch.save to a path reports a full disk as something else than an OSError
        torch.save(state, content)
        with util.replacing(path) as partial:
            partial.write_bytes(content.getbuffer())

    def draw() -> None:
        """Write the losses and the samples."""
        values = torch.cat(history).numpy()
        write_losses(run_dir / "losses.csv", values, steps_per_epoch)
        plots.losses(run_dir / "losses.png", values, steps_per_epoch)
        real, generated = plots.grid(images[:64] / 255), draw_samples(parts["generator"], fixed_z)
        plots.samples(run_dir / "samples.png", real, generated, f"{run_dir.name}, epoch {step / steps_per_epoch:.4g}")
        if frames:  # the first one comes with the first whole epoch
            plots.film(run_dir / "samples.gif", frames)

    def diverged(what: str, at_step: int) -> util.InputError:
        kept = f"{path} keeps step {saved}" if saved else "nothing was written"
        return util.InputError(
            f"the training diverged at step {at_step} ({what} is not finite): lower --lr and use --fresh; {kept}"
        )

    # Training
    saved, saved_at = step, time.monotonic()
    recent: list[torch.Tensor] = []  # rows of the history, still on the device: reading them waits for the GPU
    real = real_batches(images, batch_size, config.seed, step, rank, processes)
    with util.progress_bar(steps, " steps", initial=step) as bar, util.noted_signals() as signals:
        while step < steps:
            # What a step draws depends on seed, step and rank alone, so a checkpoint need not hold a generator's state
            torch.manual_seed(util.seed_of(config.seed, NOISE, step, rank))
            recent.append(train_step(generator, discriminator, optimizer_g, optimizer_d, next(real), config, autocast))
            scheduler_d.step(step / steps_per_epoch)
            scheduler_g.step(step / steps_per_epoch)
            step += 1

            epoch, is_over = step // steps_per_epoch, step % steps_per_epoch == 0
            is_due = step - saved >= checkpoint_steps or time.monotonic() - saved_at >= checkpoint_seconds
            must_stop, must_save = util.any_process(bool(signals), rank == 0 and is_due)
            must_save |= must_stop or step == steps
            if bar.update() or is_over or must_save:  # the bar redraws ten times a second at most
                rows = torch.stack(recent).cpu()
                recent.clear()
                if not rows.isfinite().all():
                    first = (~rows.isfinite()).any(1).nonzero()[0].item()
                    raise diverged("a loss", step - len(rows) + first + 1)
                history.append(rows)
                show(bar, step / steps_per_epoch, rows[-1].tolist())
            # 50 frames at most, or the GIF grows too large
            if is_over and ((epoch - 1) % (config.epochs // 50 + 1) == 0 or step == steps):
                frames.append(plots.to_png(draw_samples(parts["generator"], fixed_z)))
            if must_save:
                if rank == 0:
                    save()
                    if step < steps:
                        draw()
                saved, saved_at = step, time.monotonic()
            if must_stop:
                util.wait_for_all()  # torchrun ends the others when one is gone, and rank 0 may be writing still
                again = "the same command" + (" without --fresh" if config.fresh else "")
                print(f"stopped after step {step} of {steps}, which {path} holds: {again} goes on from there")
                sys.exit(128 + (signals or [signal.SIGTERM])[0])
    if rank == 0:
        draw()  # with nothing left to train too: the last start may have been killed before it came here
    print(f"wrote {run_dir}/: gan.pt losses.csv losses.png samples.png samples.gif run.json")
    print(f"next: python fit_latent.py --run-dir {run_dir}")


def weight_settings(
    config: Config, normal_class: str, precision: str, processes: int, images: torch.Tensor
) -> dict[str, object]:
    """All that decides what the weights become, hardware aside; uint8 images (N, C, H, W) by number and checksum."""
    elsewhere = ("device", "compile", "checkpoint_every", "fresh", "run_dir", "skip_unreadable")
    checksum = hashlib.sha256(images.numpy()).hexdigest()[:16]
    return {name: value for name, value in asdict(config).items() if name not in elsewhere} | {
        "normal_class": normal_class,
        "precision": precision,
        "processes": processes,
        "training_images": f"{len(images)} with checksum {checksum}",
    }


def check_same_settings(path: Path, before: dict[str, object], now: dict[str, object]) -> None:
    """Raise InputError, naming the fields, if a checkpoint has other settings.

    More epochs are fine, and so is another path to a data set that holds the same training images.
    """
    differing = [
        f"{name} {before.get(name)}, not {now.get(name)}"
        for name in sorted({*before, *now} - {"epochs", "dataset"})
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise util.InputError(
            f"{path} was trained with {'; '.join(differing)}: go on with its settings, start over with --fresh, "
            "or name another run with --run-dir"
        )


def load_normal_images(normal: datasets.ImageSet, config: Config) -> torch.Tensor:
    """The training images as uint8 (N, 1 or 3, H, W): one channel if every one of them is grey."""
    images, _ = datasets.load_images(normal, config.image_size, 3, config.skip_unreadable)
    if len(images) == 0:
        raise util.InputError(f"none of the {len(normal)} training images can be read")
    if skipped := len(normal) - len(images):
        print(f"skipped {skipped} of {len(normal)} images, which cannot be read")
    is_grey = (images[:, :1] == images[:, 1:]).all()
    return images[:, :1].contiguous() if is_grey else images


def show(bar: tqdm, epoch: float, row: list[float]) -> None:
    """Put the newest row of the history beside the bar."""
    loss_d, loss_g, p_real, p_fake = row
    bar.set_description(f"epoch {epoch:.1f}", refresh=False)
    bar.set_postfix_str(
        f"D loss {loss_d:.3f}, G loss {loss_g:.3f}, P(real) {p_real:.2f}, P(fake) {p_fake:.2f}", refresh=False
    )


@torch.no_grad()
def draw_samples(generator: Generator, z: torch.Tensor) -> Image.Image:
    """A grid of G(z), from G as the search uses it: in eval mode."""
    images = generator.eval()(z)
    generator.train()
    return plots.grid(datasets.to_display(images))


def write_losses(path: Path, values: np.ndarray, steps_per_epoch: int) -> None:
    """losses.csv, a row a step; values (steps, 4) are D loss, G loss, P(real) and P(fake)."""
    with util.replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", "loss_d", "loss_g", "p_real", "p_fake"])
        for step, row in enumerate(values):
            writer.writerow([step, step // steps_per_epoch, *(f"{value:.6g}" for value in row)])


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=__doc__))
