"""How far the search comes: mean loss against Adam steps, for several step sizes and three starts.

    python -m benchmarks.convergence --run-dir outputs/cifar10-automobile

The run folder must hold encoder.pt, for the start at E(x), see train_encoder.py.
It searches validation normals only, so nothing here sees a label of the test split. Prints one table and writes it to
benchmarks/results/convergence.json, with the curves in docs/convergence.png.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import tyro
from tqdm import tqdm

import datasets
import fit_latent
import runs
import search
import util
from benchmarks import measure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS = fit_latent.Config()
BATCH_SIZE = 64


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    images: int = 128  # validation images to search, the first ones
    steps: tuple[int, ...] = (0, 25, 50, 100, 200, 400)  # every number of steps is a search of its own
    lr: tuple[float, ...] = (2e-4, 0.05, 0.1, 0.2, 0.4, 0.8)  # Adam's largest step sizes
    seed: int = 0  # of the starting latents
    device: str = OURS.device  # cuda, cuda:1, cpu, ...


def main(config: Config) -> None:
    """Search with every setting, print the table, draw the curves."""
    if OURS.lr not in config.lr or len(config.steps) < 2 or list(config.steps) != sorted(config.steps):
        raise util.InputError(
            f"--lr must have the default {OURS.lr:g} in it, and --steps two numbers or more, in order"
        )
    device = util.pick_device(config.device)
    precision = util.pick_precision("auto", device)
    run_dir = runs.find_run(config.run_dir)
    gan = runs.load_gan(run_dir, device)
    validation = datasets.open_split(gan.dataset, "validation", gan.normal_class).take(slice(config.images))
    images, _ = datasets.load_images(validation, gan.image_size, gan.image_channels)
    x = datasets.to_model(images, device).contiguous(memory_format=torch.channels_last)
    candidates = search.draw_candidates(gan.generator, gan.latent_dim, OURS.candidates, config.seed)
    starts = {
        "random": candidates.z[: len(x)],
        f"nearest of {OURS.candidates}": search.nearest_candidates(x, candidates),
        "E(x)": runs.load_encoder(run_dir, gan, device).encoder(x),
    }

    table: dict[str, dict[str, dict[str, float]]] = {name: {} for name in starts}
    for name, lr, steps in tqdm([(name, lr, steps) for name in starts for lr in config.lr for steps in config.steps]):
        losses = []
        for batch, z in zip(x.split(BATCH_SIZE), starts[name].split(BATCH_SIZE), strict=True):
            _, *found = search.search_latents(
                gan.generator, gan.discriminator, batch, z, steps, lr, OURS.discrimination_weight, precision
            )
            losses.append(util.anomaly_score(*found, OURS.discrimination_weight))
        table[name].setdefault(f"{lr:g}", {})[str(steps)] = torch.cat(losses).mean().item()

    print(f"mean loss over {len(images)} validation images of {run_dir}, {device}, {precision}")
    print(f"{'start':<18} {'lr':>6} " + "".join(f"{steps:>6} steps" for steps in config.steps))
    for name, rows in table.items():
        for lr, losses in rows.items():
            print(f"{name:<18} {lr:>6} " + "".join(f"{loss:>12.1f}" for loss in losses.values()))
    about = measure.about_gan(gan)
    runs.write_json(
        Path(__file__).parent / "results/convergence.json",
        {
            **about,
            "images": len(images),
            "seed": config.seed,
            **measure.about(device),
            "precision": precision,
            "mean_loss": table,
        },
    )

    curves = {f"start: {name}": {f"lr {lr}": losses for lr, losses in rows.items()} for name, rows in table.items()}
    curves[f"lr {OURS.lr:g}"] = {name: rows[f"{OURS.lr:g}"] for name, rows in table.items()}
    figure, grid = plt.subplots(2, 2, figsize=(11, 8), layout="constrained", sharey=True)
    for axes, (title, lines) in zip(grid.flat, curves.items(), strict=True):
        for label, losses in lines.items():
            axes.plot(config.steps, losses.values(), marker="o", label=label)
        axes.set_xscale("symlog", base=2, linthresh=config.steps[1])  # with a place for no step at all
        axes.set(xlabel="Adam steps", title=title)
        axes.set_xticks(config.steps, config.steps)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in grid[:, 0]:
        axes.set_ylabel("mean loss of the search")
    figure.suptitle(
        f"{about['dataset']}, {gan.normal_class}, {gan.image_size}x{gan.image_size}, {len(images)} validation images"
    )
    with runs.replacing(Path(__file__).parents[1] / "docs/convergence.png") as partial:
        figure.savefig(partial, dpi=100)


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
