"""The training loop against the usual DCGAN loop: one process, alternating, the same images, CPU or CUDA.

    python -m benchmarks.training                                                       # digits
    python -m benchmarks.training --dataset data/cifar10-jpeg --normal-class automobile

The usual loop decodes pictures in a DataLoader with two workers, keeps NCHW and fp32, computes gradients for D's
weights in G's steps too, and reads the losses at every step. Both do one D step and three G steps on 64 images, from
the same first weights. Prints one table, writes benchmarks/results/<name>.json and the loss curves to
docs/<name>_curves.png.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

import train_gan
import util
from anogan import files, images, loop, pictures, plots
from anogan.decoding import View
from benchmarks import measure
from network import Discriminator, Generator, initialise_weights

BETAS = (0.5, 0.999)
LATENT_DIM = 128


@dataclass
class Config:
    dataset: str = "digits"  # cifar10, digits, or a folder with train/<class>/ and test/<class>/
    normal_class: str = "1"  # name or index of the class to train on
    image_size: int = 64  # side in pixels
    ngf: int = 64  # width of G, and of D
    batch_size: int = 64  # images a step
    steps: int = 4  # steps of each loop before the next one's turn
    repeats: int = 5  # turns
    seed: int = 0  # of the first weights, the order of the images and the latents
    device: str = "auto"  # cuda, cuda:1, mps, cpu, ...; auto: the first there is of cuda, mps and cpu
    name: str = "training"  # of the files it writes


class Pictures(Dataset):
    """The pictures of a split, decoded and transformed one by one."""

    def __init__(self, image_set: images.ImageSet, image_size: int) -> None:
        self.image_set = image_set
        self.transform = Compose(
            [Resize(image_size), CenterCrop(image_size), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)]
        )

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.transform(self.image_set.open(row).convert("RGB"))


def networks(config: Config, device: torch.device) -> tuple[Generator, Discriminator]:
    """G and D with the first weights of the seed."""
    torch.manual_seed(config.seed)
    generator = Generator(config.image_size, ngf=config.ngf).apply(initialise_weights)
    discriminator = Discriminator(config.image_size, ndf=config.ngf).apply(initialise_weights)
    return generator.to(device), discriminator.to(device)


def usual_steps(image_set: images.ImageSet, config: Config, device: torch.device) -> Iterator[list[float]]:
    """The usual loop, without end: yields D's and G's loss after each step."""
    generator, discriminator = networks(config, device)
    optimizer_g = Adam(generator.parameters(), lr=2e-4, betas=BETAS, weight_decay=1e-5)
    optimizer_d = Adam(discriminator.parameters(), lr=2e-4, betas=BETAS, weight_decay=1e-5)
    dataset = Pictures(image_set, config.image_size)
    endless = RandomSampler(dataset, replacement=True, num_samples=2**40)  # or workers start anew at every epoch
    for real in DataLoader(dataset, config.batch_size, sampler=endless, num_workers=2):
        real = real.to(device)
        fake = generator(torch.randn(len(real), LATENT_DIM, device=device))
        loss_d = util.discriminator_loss(discriminator(real), discriminator(fake.detach()))
        optimizer_d.zero_grad()
        loss_d.backward()
        optimizer_d.step()
        for _ in range(3):
            fake = generator(torch.randn(len(real), LATENT_DIM, device=device))
            loss_g = util.generator_loss(discriminator(fake))
            optimizer_g.zero_grad()
            loss_g.backward()
            optimizer_g.step()
        yield [loss_d.item(), loss_g.item()]


class Turns:
    """What train_gan.train sees of a loop: in each turn the next `steps` of endless batches (B, C, H, W)."""

    def __init__(
        self, batches: Iterator[torch.Tensor], steps: int, autocast: torch.autocast, device: torch.device
    ) -> None:
        self.batches, self.steps, self.autocast, self.device = batches, steps, autocast, device
        self.losses: list[torch.Tensor] = []  # D's and G's (2,) of every step so far, on the device
        self._graph: Callable[..., Any] | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from islice(self.batches, self.steps)

    def captured(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """The body; if it becomes a CUDA graph, then that of the first turn for all turns."""
        found = util.captured(body, self.device)
        if found is body:
            return body
        self._graph = self._graph or found
        return self._graph

    def log(self, loss_d: torch.Tensor, loss_g: torch.Tensor, **_: torch.Tensor) -> None:
        self.losses.append(torch.stack([loss_d.detach(), loss_g.detach()]))


def our_training(
    seen: pictures.Pictures, precision: str, config: Config, device: torch.device
) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """A turn of the loop of train_gan.py, and the losses that it adds to."""
    ours = train_gan.Config(batch_size=config.batch_size, generator_steps=3)
    generator, discriminator = networks(config, device)
    optimizers = loop.prepare(generator, ours, device), loop.prepare(discriminator, ours, device)
    if device.type == "cuda":
        for optimizer in optimizers:
            loop.make_capturable(optimizer, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    batches = (images.to_model(batch, device) for batch in loop.real_batches(seen, config.batch_size, config.seed))
    batches = (x.contiguous(memory_format=torch.channels_last) for x in batches)
    turns = Turns(batches, config.steps, autocast, device)
    settings = (generator, discriminator, optimizers, ours.latent_dim, ours.generator_steps)
    return partial(train_gan.train, turns, *settings), turns.losses


def main(config: Config) -> None:
    """Let the loops take turns; print, write the JSON file, draw the curves."""
    device = util.pick_device(config.device)
    image_set = images.open_split(config.dataset, "train", config.normal_class)
    seen = pictures.load(image_set, View(config.image_size, 3))
    if len(seen) < config.batch_size:
        raise util.InputError(f"{len(seen)} training images are less than a batch: lower --batch-size")
    about = {
        "dataset": config.dataset,
        "normal_class": image_set.classes[image_set.label[0]],
        "training_images": len(seen),
        "image_size": config.image_size,
        "ngf": config.ngf,
        "batch_size": config.batch_size,
        "seed": config.seed,
        **measure.about(device),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))

    usual, usual_losses = usual_steps(image_set, config, device), []
    image_steps = config.steps * config.batch_size
    turns = {"usual loop": (lambda: usual_losses.extend(islice(usual, config.steps)), image_steps, "fp32")}
    losses: dict[str, list] = {"usual loop": usual_losses}
    for precision in dict.fromkeys(("fp32", util.pick_precision("auto", device))):  # bf16 too where it is faster
        turn, losses[f"ours, {precision}"] = our_training(seen, precision, config, device)
        turns[f"ours, {precision}"] = (turn, image_steps, precision)
    table = measure.take_turns(turns, config.repeats, device)
    for row in table.values():
        row["images_per_second"] = 1e3 / row["ms_per_image_step"]["median"]
    measure.print_turns(table)

    curves = {name: np.array([[float(value) for value in step] for step in rows]) for name, rows in losses.items()}
    for name, curve in curves.items():
        last = curve[len(curve) // 2 :].mean(0)
        table[name]["mean_loss_of_the_second_half"] = {"d": last[0], "g": last[1]}
        print(f"{name:<14} mean loss of the second half of {len(curve)} steps: D {last[0]:.3f}, G {last[1]:.3f}")
    ours = list(table.values())[-1]
    files.write_json(measure.RESULTS / f"{config.name}.json", {**about, "images_ratio": ours["ratio"], "loops": table})
    draw_curves(measure.DOCS / f"{config.name}_curves.png", curves, config)


def draw_curves(path: Path, curves: dict[str, np.ndarray], config: Config) -> None:
    """D's and G's loss against steps, a line a loop, averaged over 1/50 of the steps."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for column, (axes, network) in enumerate(zip(figure.subplots(1, 2), "DG", strict=True)):
        for name, curve in curves.items():
            window = max(1, len(curve) // 50)
            means = curve[: len(curve) // window * window, column].reshape(-1, window).mean(1)
            axes.plot((np.arange(len(means)) + 0.5) * window, means, label=name, alpha=0.8)
        axes.set(xlabel="step", ylabel=f"loss of {network}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        f"{plots.shown(config.dataset)}, {plots.shown(config.normal_class)}, {config.image_size}x{config.image_size}, "
        f"ngf {config.ngf}"
    )
    plots.save(figure, path)


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
