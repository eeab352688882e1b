"""The loop that the training scripts share: checkpoints, going on from them, signals, several processes."""

import contextlib
import csv
import hashlib
import io
import math
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import datasets
import plots
import runs
import util

ORDER, NOISE, FIXED_Z = range(3)  # kinds of random draws, each with seeds of its own


def check_config(config: Any) -> None:
    """Raise InputError, naming the flag, if a value that every training has cannot be used."""
    util.check_at_least(config, 1, "epochs", "batch_size")
    util.check_at_least(config, 0, "lr", "weight_decay")
    util.check_seed(config.seed)
    checkpoint_interval(config.checkpoint_every)
    if config.tensorboard and find_spec("tensorboard") is None:
        raise util.InputError("--tensorboard needs a package that is not installed: pip install tensorboard")


def checkpoint_interval(text: str) -> tuple[float, float]:
    """Seconds and steps between two checkpoints, one of them infinite: "10m" is 600 seconds, "500" is 500 steps.

    Raises InputError if the text is neither.
    """
    if re.fullmatch(r"[1-9]\d*", text):
        return float("inf"), int(text)
    if re.fullmatch(r"\d+(\.\d+)?m", text) and float(text[:-1]) > 0:
        return 60 * float(text[:-1]), float("inf")
    raise util.InputError(f"--checkpoint-every must be minutes such as 10m, or steps such as 500, not {text!r}")


def load_training_images(
    images: datasets.ImageSet, image_size: int, image_channels: int, skip_unreadable: bool, processes: int
) -> torch.Tensor:
    """A set's images as uint8 (N, C, H, W). Raises InputError if there are none that can be read, or too few."""
    pixels, _ = datasets.load_images(images, image_size, image_channels, skip_unreadable)
    if len(pixels) == 0:
        raise util.InputError(f"none of the {len(images)} training images can be read")
    if skipped := len(images) - len(pixels):
        print(f"skipped {skipped} of {len(images)} images, which cannot be read")
    if len(pixels) < processes:
        raise util.InputError(f"{len(pixels)} training images are too few for {processes} processes: start fewer")
    return pixels


def images_of_gan(gan: runs.TrainedGAN, skip_unreadable: bool, processes: int) -> torch.Tensor:
    """The images that gan.pt was trained on, uint8 (N, C, H, W). Raises InputError if they have changed since."""
    images = datasets.open_split(gan.dataset, "train", gan.normal_class)
    pixels = load_training_images(images, gan.image_size, gan.image_channels, skip_unreadable, processes)
    if (found := checksum(pixels)) != gan.training_images:
        raise util.InputError(
            f"the training images of {gan.dataset} are not those of gan.pt ({found}, not "
            f"{gan.training_images}): put those back, or start over with train_gan.py --fresh"
        )
    return pixels


@dataclass(frozen=True)
class BesideGAN:
    """What a network that is trained beside a GAN starts from."""

    gan: runs.TrainedGAN
    config: Any  # the script's, with the GAN's own epochs and batch size where it left them open
    path: Path  # of its checkpoint
    images: torch.Tensor  # uint8 (N, C, H, W) on the device, those that the GAN was trained on
    settings: dict[str, Any]  # see `weight_settings`
    autocast: torch.autocast


@contextlib.contextmanager
def beside_gan(
    config: Any, name: str, load: Callable[[Path, runs.TrainedGAN, torch.device], object]
) -> Iterator[BesideGAN]:
    """Hold the run folder, read its GAN and the GAN's images, and seed the first weights of what `name`.pt will hold.

    `load` reads a checkpoint that is there already, and refuses one that does not belong to this GAN. Raises InputError
    for a value of the config that cannot be used, or as `runs.find_run`, `load` and `images_of_gan` do.
    """
    check_config(config)
    device = util.pick_device(config.device)
    run_dir = runs.find_run(config.run_dir)
    with util.processes(device) as (_, processes), runs.run_folder(run_dir):
        gan = runs.load_gan(run_dir, device)
        config = replace(
            config,
            epochs=math.ceil(gan.epoch) if config.epochs is None else config.epochs,
            batch_size=gan.batch_size if config.batch_size is None else config.batch_size,
        )
        path = run_dir / f"{name}.pt"
        if path.exists() and not config.fresh:
            load(run_dir, gan, device)
        images = images_of_gan(gan, config.skip_unreadable, processes)
        precision = util.pick_precision(config.precision, device)
        settings = weight_settings(config, gan.normal_class, precision, processes, gan.training_images)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        torch.manual_seed(config.seed)
        yield BesideGAN(gan, config, path, images.to(device), settings, autocast)


def checksum(images: torch.Tensor) -> str:
    """How many images these are, uint8 (N, C, H, W), and a checksum of their pixels."""
    return f"{len(images)} with checksum {hashlib.sha256(images.numpy()).hexdigest()[:16]}"


def weight_settings(
    config: Any, normal_class: str, precision: str, processes: int, training_images: str
) -> dict[str, object]:
    """All that decides what the weights become, hardware aside; the images by their `checksum`."""
    elsewhere = ("device", "compile", "checkpoint_every", "fresh", "run_dir", "skip_unreadable", "tensorboard")
    return {name: value for name, value in asdict(config).items() if name not in elsewhere} | {
        "normal_class": normal_class,
        "precision": precision,
        "processes": processes,
        "training_images": training_images,
    }


def check_same_settings(path: Path, before: dict[str, object], now: dict[str, object]) -> None:
    """Raise InputError, naming the fields, if a checkpoint has other settings.

    More epochs are fine, and so is another path to a data set that holds the same training images.
    """
    differing = [
        f"{name} {before.get(name)}, not {now.get(name)}"
        for name in runs.differing_settings(before, now)
        if name not in ("epochs", "dataset")
    ]
    if differing:
        raise util.InputError(
            f"{path} was trained with {'; '.join(differing)}: go on with its settings, start over with --fresh, "
            "or name another run with --run-dir"
        )


def prepare(network: nn.Module, config: Any, device: torch.device) -> tuple[Adam, CosineAnnealingWarmRestarts]:
    """Move a network to the device, and give it its optimizer and the cosine of its step size."""
    network.to(device, memory_format=torch.channels_last)  # 1.3x to 1.9x faster than NCHW on a CPU
    optimizer = Adam(
        network.parameters(), lr=config.lr, betas=(0.5, 0.999), weight_decay=config.weight_decay, fused=True
    )
    return optimizer, CosineAnnealingWarmRestarts(optimizer, T_0=15, T_mult=2)


def share_gradients(network: nn.Module, device: torch.device, processes: int) -> nn.Module:
    """The network with the mean of all processes' gradients after each backward pass, or itself if there is but one."""
    if processes == 1:
        return network
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


def train(
    script: str,
    config: Any,
    path: Path,
    images: torch.Tensor,
    settings: dict[str, Any],
    parts: dict[str, Any],
    train_step: Callable[[list[nn.Module], torch.Tensor], torch.Tensor],
    curves: dict[str, dict[str, str]],
    draw_samples: Callable[[], Image.Image] | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """From the last checkpoint at `path`, or the first step, to the last step.

    `images` are uint8 (N, C, H, W) on the device. `parts` are the networks, optimizers and schedulers, which the
    checkpoint holds by these names, beside `about`. `train_step` takes the networks, wrapped if several processes
    average their gradients, and a batch (B, C, H, W) in [-1, 1], and returns what it measured, (M,), on the device.
    `curves` names these: for each panel of the losses' picture, its columns in losses.csv with their labels.
    `settings` are those that may not change, see `weight_settings`. `draw_samples`, of a network that makes images,
    draws a grid of 64, which is shown beside the first 64 real ones, and in a film of the epochs. Raises InputError if
    the checkpoint cannot be gone on with, or the training diverges.
    """
    started = time.monotonic()
    rank, processes, device, run_dir = util.rank(), settings["processes"], images.device, path.parent
    print(
        f"run: {run_dir}   normal class: {settings['normal_class']} ({len(images)} images)   "
        f"device: {device}, {settings['precision']}   processes: {processes}"
    )
    # What belongs to gan.pt has plain names, what belongs to encoder.pt begins with encoder-
    beside = {
        name: path.with_name(name if path.stem == "gan" else f"{path.stem}-{name}")
        for name in ("losses.csv", "losses.png", *(("samples.png", "samples.gif") if draw_samples else ()))
    }
    networks = [part for part in parts.values() if isinstance(part, nn.Module)]
    schedulers = [part for part in parts.values() if isinstance(part, CosineAnnealingWarmRestarts)]
    batch_size = min(config.batch_size, len(images) // processes)
    steps_per_epoch = len(images) // (batch_size * processes)
    steps = config.epochs * steps_per_epoch
    checkpoint_seconds, checkpoint_steps = checkpoint_interval(config.checkpoint_every)
    labels = dict(chain(*(panel.items() for panel in curves.values())))

    # Go on from the last checkpoint
    step, seconds_before, fingerprint = 0, 0.0, None
    history: list[torch.Tensor] = []  # blocks (steps, M) of what every step measured
    frames: list[bytes] = []  # PNG files: the samples as training goes on
    if path.exists() and config.fresh:
        print(f"starting over: the first checkpoint replaces {path}; what was made with the old one will not fit it")
    elif path.exists():
        with runs.reading_checkpoint(path, f"{script}.py") as (state, fingerprint):
            step, seconds_before, history, frames = state["step"], state["seconds"], [state["history"]], state["frames"]
            check_same_settings(path, state["config"], settings)
            for name, part in parts.items():
                part.load_state_dict(state[name])
        print(f"{path} holds {step} steps ({step / steps_per_epoch:.4g} epochs): ", end="")
        print("nothing left to train; --fresh starts over" if step >= steps else f"going on to {steps}")
    util.check_agreement(training_so_far=(settings, fingerprint))
    shared = [share_gradients(network, device, processes) for network in networks]

    def save() -> None:
        """Write the checkpoint; run.json comes first, so that it is there whenever the checkpoint is."""
        if not all(tensor.isfinite().all() for network in networks for tensor in network.state_dict().values()):
            raise diverged("a weight", step)
        seconds = seconds_before + time.monotonic() - started
        facts = {name: settings[name] for name in ("precision", "processes", "training_images")}
        runs.record_run(run_dir, script, config, device, seconds, steps=step, **facts)
        state = {
            "config": settings,
            "epoch": step / steps_per_epoch,
            "step": step,
            "seconds": seconds,
            "history": torch.cat(history),
            "frames": frames,
            **(about or {}),
            **{name: part.state_dict() for name, part in parts.items()},
        }
        content = io.BytesIO()  # torch.save to a path reports a full disk as something else than an OSError
        torch.save(state, content)
        with runs.replacing(path) as partial:
            partial.write_bytes(content.getbuffer())

    def write_pictures() -> None:
        """Write the losses and the samples."""
        values = torch.cat(history).numpy()
        write_losses(beside["losses.csv"], values, list(labels), steps_per_epoch)
        plots.losses(beside["losses.png"], values, curves, steps_per_epoch)
        if draw_samples is None:
            return
        real, title = plots.grid(images[:64] / 255), f"{run_dir.name}, epoch {step / steps_per_epoch:.4g}"
        plots.samples(beside["samples.png"], real, draw_samples(), title)
        if frames:  # the first one comes with the first whole epoch
            plots.film(beside["samples.gif"], frames)

    def diverged(what: str, at_step: int) -> util.InputError:
        kept = f"{path} keeps step {saved}" if saved else "nothing was written"
        return util.InputError(
            f"the training diverged at step {at_step} ({what} is not finite): lower --lr and use --fresh; {kept}"
        )

    writer = None
    if config.tensorboard and rank == 0:
        from torch.utils.tensorboard import SummaryWriter  # a slow import that only this flag needs

        writer = SummaryWriter(run_dir / "tensorboard" / path.stem, purge_step=step)

    # Training
    saved, saved_at = step, time.monotonic()
    recent: list[torch.Tensor] = []  # rows of the history, still on the device: reading them waits for the GPU
    real = real_batches(images, batch_size, config.seed, step, rank, processes)
    with util.progress_bar(steps, " steps", initial=step) as bar, util.noted_signals() as signals:
        while step < steps:
            # What a step draws depends on seed, step and rank alone, so a checkpoint need not hold a generator's state
            torch.manual_seed(util.seed_of(config.seed, NOISE, step, rank))
            recent.append(train_step(shared, next(real)))
            for scheduler in schedulers:
                scheduler.step(step / steps_per_epoch)
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
                if writer:
                    for at, row in enumerate(rows.tolist(), step - len(rows)):
                        for name, value in zip(labels, row, strict=True):
                            writer.add_scalar(name, value, at)
                bar.set_description(f"epoch {step / steps_per_epoch:.1f}", refresh=False)
                newest = zip(labels.values(), rows[-1].tolist(), strict=True)
                bar.set_postfix_str(", ".join(f"{label} {value:.3f}" for label, value in newest), refresh=False)
            # 50 frames at most, or the GIF grows too large
            if draw_samples and is_over and ((epoch - 1) % (config.epochs // 50 + 1) == 0 or step == steps):
                frames.append(plots.to_png(draw_samples()))
            if must_save:
                if rank == 0:
                    save()
                    if step < steps:
                        write_pictures()
                saved, saved_at = step, time.monotonic()
            if must_stop:
                util.wait_for_all()  # torchrun ends the others when one is gone, and rank 0 may be writing still
                again = "the same command" + (" without --fresh" if config.fresh else "")
                print(f"stopped after step {step} of {steps}, which {path} holds: {again} goes on from there")
                sys.exit(128 + (signals or [signal.SIGTERM])[0])
    if writer:
        writer.close()
    if rank == 0:
        write_pictures()  # with nothing left to train too: the last start may have been killed before it came here
    print(f"wrote {run_dir}/: {path.name} {' '.join(each.name for each in beside.values())} run.json")


def write_losses(path: Path, values: np.ndarray, columns: list[str], steps_per_epoch: int) -> None:
    """losses.csv, a row a step; values (steps, M) has a column for each name."""
    with runs.replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", *columns])
        for step, row in enumerate(values):
            writer.writerow([step, step // steps_per_epoch, *(f"{value:.6g}" for value in row)])


@torch.no_grad()
def draw(network: nn.Module, generate: Callable[[], torch.Tensor]) -> Image.Image:
    """A grid of what is generated, images in [-1, 1], with the network in training as scores use it: in eval mode."""
    network.eval()
    images = generate()
    network.train()
    return plots.grid(datasets.to_display(images))
