"""The loop of every training: `with Loop(...) as loop: for real in loop:`, with the algorithm as its body.

The loop gives the next batch. Around the body it does what makes a training of days safe: it goes on from the last
checkpoint, keeps the order of the images and seeds each step, writes checkpoints, samples and losses, stops at a
signal, and keeps several processes in step. The body says what it measured with `loop.log`.
"""

import contextlib
import csv
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
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import util
from anogan import files, images, plots, processes, runs
from anogan.pictures import Pictures

ENDS = 15, 45, 105  # epochs at whose end the step size is 0: the first cycle has 15, each next twice as many
ORDER, NOISE, FIXED_Z, PLACES = range(4)  # kinds of random draws, each with seeds of its own


class TrainingConfig(Protocol):
    """The hyperparameters that every training has, whatever else its script has."""

    epochs: int
    batch_size: int  # in each process
    lr: float
    weight_decay: float
    checkpoint_every: str
    fresh: bool
    tensorboard: bool
    seed: int
    device: str
    precision: util.Precision
    dataset: str | None
    run_dir: Path | None
    skip_unreadable: bool


@dataclass(frozen=True)
class Training:
    """What a training starts from."""

    command: str  # as a person types it
    path: Path  # of the checkpoint
    config: TrainingConfig
    pictures: Pictures
    device: torch.device
    settings: dict[str, Any]  # all that decides the weights, see `weight_settings`: a checkpoint of others is refused

    @property
    def batch_size(self) -> int:
        """Images a step in each process: a batch that is larger than the set is cut to it."""
        return min(self.config.batch_size, len(self.pictures.turns) // self.settings["processes"])

    @property
    def steps_per_epoch(self) -> int:
        """The rest at the end of an epoch is left out, see `real_batches`."""
        return len(self.pictures.turns) // (self.batch_size * self.settings["processes"])

    def of_about(self, steps: int) -> "Training":
        """The same with as many epochs, of those that end with a step size of 0, as come nearest to so many steps, by
        their ratio."""
        epochs = min(ENDS, key=lambda end: abs(math.log(end * self.steps_per_epoch / steps)))
        settings = self.settings | {"epochs": epochs}
        return replace(self, config=replace(self.config, epochs=epochs), settings=settings)


class Loop:
    """The batches of a training, from the last checkpoint or the first step to the last step."""

    def __init__(
        self,
        training: Training,
        parts: dict[str, Any],
        curves: dict[str, dict[str, str]],
        draw: Callable[[], Image.Image] | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        """`parts` are networks and their optimizers, in the checkpoint by these names, with `about`.

        The step size of each optimizer follows a cosine with warm restarts, whose ends are epochs 15, 45 and 105.
        `curves` names what the body logs: for each panel of the losses' picture, its columns in losses.csv with their
        labels. `draw`, of a network that makes images, draws a grid of 64. It is shown next to the first 64 real ones,
        and in a film of the epochs. Raises InputError if the checkpoint cannot be gone on with.
        """
        config, settings = training.config, training.settings
        if config.tensorboard:
            _check_tensorboard_can_write(training.path)
        self._training, self._curves, self._draw, self._about = training, curves, draw, about or {}
        self._parts = parts | {
            name.replace("optimizer", "scheduler"): CosineAnnealingWarmRestarts(part, T_0=ENDS[0], T_mult=2)
            for name, part in parts.items()
            if isinstance(part, Adam)
        }
        self._labels = dict(chain(*(panel.items() for panel in curves.values())))
        self._batch_size, self._steps_per_epoch = training.batch_size, training.steps_per_epoch
        self._steps = config.epochs * self._steps_per_epoch
        self._seconds_between, self._steps_between = checkpoint_interval(config.checkpoint_every)
        # the context in which the body runs the networks, in bf16 or fp32
        self.autocast = torch.autocast(training.device.type, torch.bfloat16, enabled=settings["precision"] == "bf16")
        self._step, self._started, self._seconds_before = 0, time.monotonic(), 0.0
        self._history: list[torch.Tensor] = []  # blocks (steps, M) of what every step measured
        self._recent: list[torch.Tensor] = []  # rows of the history, still on the device: reading them waits for a GPU
        self._frames: list[bytes] = []  # PNG files: the samples as training goes on
        pictures, side = training.pictures, training.pictures.view.size
        count, patches = len(pictures), len(pictures.turns)
        seen = f", {patches} patches of {side}x{side} an epoch" if pictures.view.has_patches else ""
        print(
            f"run: {training.path.parent}   normal class: {settings['normal_class']} ({count} images{seen})   "
            f"device: {util.in_words(training.device, settings['precision'])}   processes: {settings['processes']}"
        )
        processes.check_agreement(training_so_far=(settings, self._go_on()))
        self._saved, self._saved_at = self._step, time.monotonic()
        self._asked, self._asked_at, self._next_question = self._step, time.monotonic(), self._step + 1
        self._writer = None

    def _go_on(self) -> str | None:
        """Read the last checkpoint, if there is one; its fingerprint."""
        path, config = self._training.path, self._training.config
        if not path.exists():
            return None
        if config.fresh:
            print(f"starting over: the first checkpoint replaces {path}; what was made with the old one will not fit")
            return None
        with runs.reading_checkpoint(path, self._training.command) as (state, fingerprint):
            self._step, self._seconds_before = state["step"], state["seconds"]
            self._history, self._frames = [state["history"]], state["frames"]
            _check_same_settings(path, state["config"], self._training.settings)
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
                if isinstance(part, Adam):  # where it was saved a CUDA graph may have had its step size
                    for group in part.param_groups:
                        group.update(lr=float(group["lr"]), capturable=False)
        print(f"{path} holds {self._step} steps ({self._epoch:.4g} epochs): ", end="")
        finished = self._step >= self._steps
        print("nothing left to train; --fresh starts over" if finished else f"going on to {self._steps}")
        return fingerprint

    def share(self, network: nn.Module) -> nn.Module:
        """The network with the mean of all processes' gradients after each backward pass, or itself if it is alone."""
        if processes.count() == 1:
            return network
        device = self._training.device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch have another name for the flag
            return DistributedDataParallel(
                network,
                device_ids=[device] if device.type == "cuda" else None,
                # BatchNorm's stored statistics serve the search, for which those of rank 0 are enough
                broadcast_buffers=False,
            )

    def __enter__(self) -> "Loop":
        with contextlib.ExitStack() as stack:
            self._bar = stack.enter_context(processes.progress_bar(self._steps, " steps", initial=self._step))
            self._signals = stack.enter_context(processes.noted_signals())
            if self._training.config.tensorboard and processes.rank() == 0:
                from torch.utils.tensorboard import SummaryWriter  # a slow import that only this flag needs

                path = self._training.path
                writer = SummaryWriter(path.parent / "tensorboard" / path.stem, purge_step=self._step)
                self._writer = stack.enter_context(writer)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._exit.close()

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The batches (B, C, H, W) in [-1, 1]; after the last one the losses and samples are drawn.

        Raises InputError if the training diverges, and SystemExit at Ctrl-C or SIGTERM, once all is saved.
        """
        training, rank = self._training, processes.rank()
        seed, together = training.config.seed, training.settings["processes"]
        batches = real_batches(training.pictures, self._batch_size, seed, self._step, rank, together)
        while self._step < self._steps:
            # what a step draws depends on seed, step and rank alone, so a checkpoint need not hold a generator's state
            torch.manual_seed(util.seed_of(seed, NOISE, self._step, rank))
            real = images.to_model(next(batches), training.device, training.pictures.view.normalise)
            yield real.contiguous(memory_format=torch.channels_last)
            self._end_step()
        self._exit.close()  # the bar ends its line, and Ctrl-C ends the process again
        if rank == 0:
            self._write_pictures()  # with nothing left to train too: the last start may have been killed before this
        written = " ".join(path.name for path in self._pictures().values())
        print(f"wrote {training.path.parent}/: {training.path.name} {written} run.json")

    def captured(self, body: Callable[..., util.Result]) -> Callable[..., util.Result]:
        """The body as `util.captured` leaves it: on a GPU a CUDA graph, of which the optimizers are part."""
        found = util.captured(body, self._training.device)
        if found is not body:
            for part in self._parts.values():
                if isinstance(part, Adam):
                    make_capturable(part, self._training.device)
        return found

    def log(self, **values: torch.Tensor) -> None:
        """Keep what a step measured, a number for each column of `curves`: copies, since a captured step writes to the
        same places again. Nothing here waits for a GPU."""
        self._recent.append(torch.stack([values[name].detach() for name in self._labels]))

    @property
    def _epoch(self) -> float:
        return self._step / self._steps_per_epoch

    def _end_step(self) -> None:
        """What follows the body: step sizes, the bar, samples at an epoch's end, a checkpoint if one is due."""
        for part in self._parts.values():
            if isinstance(part, CosineAnnealingWarmRestarts):
                change_step_size(part, self._epoch)
        self._step += 1
        is_over, is_last = self._step % self._steps_per_epoch == 0, self._step == self._steps
        must_stop, must_save = self._agree()
        must_save |= must_stop or is_last or self._step - self._saved >= self._steps_between
        if self._bar.update() or is_over or must_save:  # the bar redraws ten times a second at most
            self._read_recent()
        epoch, between = self._step // self._steps_per_epoch, self._training.config.epochs // 50 + 1
        # 50 frames at most, or the GIF grows too large
        if self._draw and is_over and ((epoch - 1) % between == 0 or is_last):
            self._frames.append(plots.to_png(self._draw()))
        if must_save:
            if processes.rank() == 0:
                self._save()
                if not is_last:
                    self._write_pictures()
            self._saved, self._saved_at = self._step, time.monotonic()
        if must_stop:
            self._stop()

    def _agree(self) -> tuple[bool, bool]:
        """Whether a signal came to any process, and whether minutes have passed that make a checkpoint due.

        One process asks itself at each step. Several ask one another once a second, or every 50 steps: for a GPU that
        is ahead of Python each question is a wait.
        """
        now = time.monotonic()
        is_due = processes.rank() == 0 and now - self._saved_at >= self._seconds_between
        if processes.count() == 1:
            return bool(self._signals), is_due
        if self._step < self._next_question:
            return False, False
        steps = self._step - self._asked
        stop, due, seconds = processes.largest(bool(self._signals), is_due, (now - self._asked_at) / steps)
        self._asked, self._asked_at = self._step, now
        self._next_question = self._step + max(1, round(1 / max(seconds, 0.02)))
        return stop > 0, due > 0

    def _read_recent(self) -> None:
        """Move the newest rows to the history, the bar and TensorBoard. Raises InputError if one is not finite."""
        rows = torch.stack(self._recent).cpu()
        self._recent.clear()
        first = self._step - len(rows)
        if not rows.isfinite().all():
            raise self._diverged("a loss", first + (~rows.isfinite()).any(1).nonzero()[0].item() + 1)
        self._history.append(rows)
        if self._writer:
            for at, row in enumerate(rows.tolist(), first):
                for name, value in zip(self._labels, row, strict=True):
                    self._writer.add_scalar(name, value, at)
        newest = zip(self._labels.values(), rows[-1].tolist(), strict=True)
        self._bar.set_description(f"epoch {self._epoch:.1f}", refresh=False)
        self._bar.set_postfix_str(", ".join(f"{label} {value:.3f}" for label, value in newest), refresh=False)

    def _save(self) -> None:
        """Write the checkpoint; run.json comes first, so that it is there whenever the checkpoint is."""
        training, settings = self._training, self._training.settings
        networks = [part for part in self._parts.values() if isinstance(part, nn.Module)]
        if not all(tensor.isfinite().all() for network in networks for tensor in network.state_dict().values()):
            raise self._diverged("a weight", self._step)
        seconds = self._seconds_before + time.monotonic() - self._started
        facts = {name: settings[name] for name in ("precision", "processes", "training_images")}
        runs.record_run(
            training.path.parent,
            script_name(training.command),
            training.config,
            training.device,
            seconds,
            steps=self._step,
            **facts,
        )
        state = {
            "config": settings,
            "epoch": self._epoch,
            "step": self._step,
            "seconds": seconds,
            "history": torch.cat(self._history),
            "frames": self._frames,
            **self._about,
            **{name: part.state_dict() for name, part in self._parts.items()},
        }
        runs.write_checkpoint(training.path, state)

    def _pictures(self) -> dict[str, Path]:
        """The other files: those of gan.pt have plain names, those of encoder.pt begin with encoder-."""
        path = self._training.path
        names = ("losses.csv", "losses.png", *(("samples.png", "samples.gif") if self._draw else ()))
        return {name: path.with_name(name if path.stem == "gan" else f"{path.stem}-{name}") for name in names}

    def _write_pictures(self) -> None:
        """Write the losses and the samples."""
        training, values, paths = self._training, torch.cat(self._history).numpy(), self._pictures()
        _write_losses(paths["losses.csv"], values, list(self._labels), self._steps_per_epoch)
        plots.losses(paths["losses.png"], values, self._curves, self._steps_per_epoch)
        if self._draw is None:
            return
        x = images.to_model(training.pictures.some(64), normalise=training.pictures.view.normalise)
        real, title = plots.grid(images.to_display(x)), plots.shown(training.path.parent.name)
        plots.samples(paths["samples.png"], real, self._draw(), f"{title}, epoch {self._epoch:.4g}")
        if self._frames:  # the first one comes with the first whole epoch
            plots.film(paths["samples.gif"], self._frames)

    def _stop(self) -> None:
        processes.wait_for_all()  # torchrun ends the others when one is gone, and rank 0 may be writing still
        again = "the same command" + (" without --fresh" if self._training.config.fresh else "")
        held = f"after step {self._step} of {self._steps}, which {self._training.path} holds"
        print(f"stopped {held}: {again} goes on from there")
        sys.exit(128 + (self._signals or [signal.SIGTERM])[0])

    def _diverged(self, what: str, at_step: int) -> util.InputError:
        kept = f"{self._training.path} keeps step {self._saved}" if self._saved else "nothing was written"
        return util.InputError(
            f"the training diverged at step {at_step} ({what} is not finite): lower --lr and use --fresh; {kept}"
        )


# ---- before the loop ------------------------------------------------------------------------------------------------


def check_config(config: TrainingConfig) -> None:
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
        return math.inf, int(text)
    if re.fullmatch(r"\d+(\.\d+)?m", text) and float(text[:-1]) > 0:
        return 60 * float(text[:-1]), math.inf
    raise util.InputError(f"--checkpoint-every must be minutes such as 10m, or steps such as 500, not {text!r}")


def _check_tensorboard_can_write(path: Path) -> None:
    """Raise InputError if a path has bytes that are no UTF-8, which TensorBoard's writer does not take."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise util.InputError(
            f"--tensorboard cannot write to {path.parent}, whose name is not UTF-8: name another folder with --run-dir"
        ) from error


def script_name(command: str) -> str:
    """What run.json calls a script: train_gan for "train_gan.py", rotnet for "python -m detectors.rotnet"."""
    return command.removesuffix(".py").split(".")[-1]


def weight_settings(config: TrainingConfig, normal_class: str, precision: str, training_images: str) -> dict[str, Any]:
    """All that decides what the weights become, hardware aside; the images by their `ImageSet.checksum`."""
    elsewhere = {"device", "compile", "checkpoint_every", "fresh", "run_dir", "skip_unreadable", "tensorboard"}
    elsewhere |= {"dataset", "max_megapixels"}  # the training images have a checksum
    return {name: value for name, value in asdict(config).items() if name not in elsewhere} | {
        "normal_class": normal_class,
        "precision": precision,
        "processes": processes.count(),
        "training_images": training_images,
    }


def _check_same_settings(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError, naming the fields, if a checkpoint has other settings.

    More epochs are fine. A setting of an older version that exists no more does not count.
    """
    differing = [
        f"{name} {before.get(name)}, not {now.get(name)}"
        for name in runs.differing_settings(before, now)
        if name in now and name != "epochs"
    ]
    if differing:
        raise util.InputError(
            f"{path} was trained with {'; '.join(differing)}: go on with its settings, start over with --fresh, "
            "or name another run with --run-dir"
        )


@contextlib.contextmanager
def detector_training(
    config: TrainingConfig,
    command: str,
    file: str,
    load: Callable[[runs.TrainedGAN], object],
    same: tuple[str, ...],
    check: Callable[[runs.TrainedGAN], None] = lambda gan: None,
) -> Iterator[tuple[runs.TrainedGAN, Training]]:
    """Hold the run folder, and read its GAN and the GAN's images, for the training of a detector into `file`.

    Seeds the first weights, which the block makes. Epochs and batch size that the config leaves open are the GAN's,
    unless the block takes others, see `Training.of_about`. `check` refuses a GAN on whose images the detector cannot
    learn. `load` reads a checkpoint that is there already, and refuses one that does not belong to this GAN: one of
    other `same` fields of TrainedGAN (`gan` is its fingerprint), which become part of the settings. Raises InputError
    for a value of the config that cannot be used, or as `runs.find_run`, `check`, `load` and `runs.images_of_gan` do.
    """
    check_config(config)
    device = util.pick_device(config.device)
    run_dir = runs.find_run(config.run_dir)
    with processes.join(device), runs.run_folder(run_dir):
        gan = runs.load_gan(run_dir, device, config.dataset)
        check(gan)
        config = replace(
            config,
            epochs=math.ceil(gan.epoch) if config.epochs is None else config.epochs,
            batch_size=gan.batch_size if config.batch_size is None else config.batch_size,
        )
        if (run_dir / file).exists() and not config.fresh:
            load(gan)
        pictures = runs.images_of_gan(gan, config.skip_unreadable)
        precision = util.pick_precision(config.precision, device)
        settings = weight_settings(config, gan.normal_class, precision, gan.training_images)
        settings |= {name: gan.fingerprint if name == "gan" else getattr(gan, name) for name in same}
        torch.manual_seed(config.seed)
        yield gan, Training(command, run_dir / file, config, pictures, device, settings)


def prepare(network: nn.Module, config: TrainingConfig, device: torch.device) -> Adam:
    """Move a network to the device, and give it its optimizer."""
    network.to(device, memory_format=torch.channels_last)  # 1.3x to 1.9x faster than NCHW on a CPU
    return Adam(network.parameters(), lr=config.lr, betas=(0.5, 0.999), weight_decay=config.weight_decay, fused=True)


def make_capturable(optimizer: Adam, device: torch.device) -> None:
    """Let a CUDA graph hold an optimizer's steps: their size lies in a tensor, which the graph reads anew each time."""
    for group in optimizer.param_groups:
        group.update(lr=torch.tensor(float(group["lr"]), device=device), capturable=True)


def change_step_size(scheduler: CosineAnnealingWarmRestarts, epoch: float) -> None:
    """Give a scheduler's optimizer the step size of an epoch, in the same tensor if it lies in one."""
    groups = scheduler.optimizer.param_groups
    places = [group["lr"] for group in groups]
    scheduler.step(epoch)
    for group, place in zip(groups, places, strict=True):
        if isinstance(place, torch.Tensor) and group["lr"] is not place:  # PyTorch 2.6 has put a float there
            group["lr"] = place.fill_(group["lr"])


def real_batches(
    pictures: Pictures, batch_size: int, seed: int, first_step: int = 0, rank: int = 0, processes: int = 1
) -> Iterator[torch.Tensor]:
    """The batches uint8 (batch_size, C, H, H) that training sees from `first_step` on, without end.

    Pictures are shuffled again for each epoch, by seed and epoch alone, and shared among the processes. Where patches
    are cut from them, and how these are turned, depends on seed, step and rank alone. The rest at the end of an epoch
    is left out: BatchNorm would see too few.
    """
    together = batch_size * processes
    order_of = None
    for step in count(first_step):
        epoch, i = divmod(step, len(pictures.turns) // together)
        if epoch != order_of:
            random = torch.Generator().manual_seed(util.seed_of(seed, ORDER, epoch))
            order, order_of = torch.randperm(len(pictures.turns), generator=random).numpy(), epoch
        first = i * together + rank * batch_size
        rows = pictures.turns[order[first : first + batch_size]]
        yield pictures.draw(rows, np.random.default_rng(util.seed_of(seed, PLACES, step, rank)))


# ---- after it -------------------------------------------------------------------------------------------------------


def _write_losses(path: Path, values: np.ndarray, columns: list[str], steps_per_epoch: int) -> None:
    """losses.csv, a row a step; values (steps, M) has a column for each name."""
    with files.replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", *columns])
        for step, row in enumerate(values):
            writer.writerow([step, step // steps_per_epoch, *(f"{value:.6g}" for value in row)])


@torch.no_grad()
def sample_grid(network: nn.Module, generate: Callable[[], torch.Tensor]) -> Image.Image:
    """A grid of what is generated, images in [-1, 1], with the network in training as scores use it: in eval mode."""
    network.eval()
    generated = generate()
    network.train()
    return plots.grid(images.to_display(generated))
