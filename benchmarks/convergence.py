"""How far the search comes: mean loss against Adam steps, for several step sizes, constant and with a cosine decay.

    python -m benchmarks.convergence --run-dir outputs/cifar10-automobile

It searches validation normals only, so nothing here sees a label of the test split. Prints one table and writes it to
benchmarks/results/convergence.json, with the curves in docs/convergence.png.
"""

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import torch
import tyro
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import fit_latent
import util

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    images: int = 128  # validation images to search, the first ones
    steps: tuple[int, ...] = (25, 50, 100, 200, 400)  # every number of steps is a search of its own
    lr: tuple[float, ...] = (2e-4, 0.01, 0.05, 0.1, 0.2, 0.4)  # Adam's step sizes
    discrimination_weight: float = 0.1  # lambda
    seed: int = 0  # of the starting latents
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda, cuda:1, cpu, ...


def cosine_adam(parameters: list[torch.Tensor], lr: float, steps: int) -> Adam:
    """Adam whose step size falls from `lr` to 0 over `steps` steps along a cosine."""
    optimizer = Adam(parameters, lr=lr)
    schedule = CosineAnnealingLR(optimizer, T_max=steps)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


def main(config: Config) -> None:
    """Search with every setting, print the table, draw the curves."""
    device = util.pick_device(config.device)
    run_dir = util.find_run(config.run_dir)
    gan = util.load_gan(run_dir, device)
    validation = util.open_split(gan.dataset, "validation", gan.normal_class)
    few = validation.take(np.arange(min(config.images, len(validation))))
    images, _ = util.load_images(few, gan.image_size, gan.image_channels)
    x = util.to_model(images, device).contiguous(memory_format=torch.channels_last)
    start = fit_latent.starting_latents(images, gan.latent_dim, config.seed).to(device)

    schedules = ("constant", "cosine")
    settings = [(schedule, lr, steps) for schedule in schedules for lr in config.lr for steps in config.steps]
    table: dict[str, dict[str, dict[str, float]]] = {schedule: {} for schedule in schedules}
    started = time.monotonic()
    for schedule, lr, steps in tqdm(settings):
        losses = []
        optimizer = Adam if schedule == "constant" else functools.partial(cosine_adam, steps=steps)
        with mock.patch.object(fit_latent, "Adam", optimizer):
            for batch, z in zip(x.split(64), start.split(64), strict=True):
                _, *found = fit_latent.search_latents(
                    gan.generator, gan.discriminator, batch, z, steps, lr, config.discrimination_weight
                )
                losses.append(util.anomaly_score(*found, config.discrimination_weight))
        table[schedule].setdefault(f"{lr:g}", {})[str(steps)] = torch.cat(losses).mean().item()

    print(f"mean loss over {len(images)} validation images of {run_dir}, {device}")
    print(f"{'schedule':<10} {'lr':>6} " + "".join(f"{steps:>6} steps" for steps in config.steps))
    for schedule, rows in table.items():
        for lr, losses in rows.items():
            print(f"{schedule:<10} {lr:>6} " + "".join(f"{loss:>12.1f}" for loss in losses.values()))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    Path("docs").mkdir(exist_ok=True)
    util.write_json(
        results / "convergence.json",
        {
            "dataset": gan.dataset,
            "normal_class": gan.normal_class,
            "image_size": gan.image_size,
            "epochs": gan.epoch,
            "images": len(images),
            "seed": config.seed,
            "device": str(device),
            "seconds": round(time.monotonic() - started, 1),
            "mean_loss": table,
        },
    )

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axes, (schedule, rows) in zip(panels, table.items(), strict=True):
        for lr, losses in rows.items():
            axes.plot(config.steps, losses.values(), marker="o", label=f"lr {lr}")
        axes.set(xscale="log", xlabel="Adam steps", title=f"{schedule} step size")
        axes.set_xticks(config.steps, config.steps)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean loss of the search")
    panels[0].legend()
    figure.suptitle(
        f"{gan.dataset}, {gan.normal_class}, {gan.image_size}x{gan.image_size}, {len(images)} validation images"
    )
    with util.replacing(Path("docs") / "convergence.png") as partial:
        figure.savefig(partial, dpi=100)


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=__doc__))
