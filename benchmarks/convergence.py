"""How far the search comes: mean loss against Adam steps, for several step sizes and three starts.

    python -m benchmarks.convergence --run-dir outputs/cifar10-automobile

The run folder must hold encoder.pt, for the start at E(x), see detectors/f_anogan.py. It searches validation normals
only, so nothing here sees a label of the test split. Prints one table and writes it to
benchmarks/results/convergence.json, with the curves in docs/convergence.png.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

import fit_latent
import util
from anogan import files, plots, runs
from anogan.candidates import draw_candidates, nearest
from benchmarks import measure
from detectors import f_anogan

OURS = fit_latent.Config()


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    images: int = 128  # validation images to search, the first ones
    steps: tuple[int, ...] = (0, 25, 50, 100, 200, 400)  # every number of steps is a search of its own
    lr: tuple[float, ...] = (2e-4, 0.05, 0.1, 0.2, 0.4, 0.8)  # Adam's largest step sizes
    seed: int = 0  # of the starting latents
    device: str = OURS.device  # auto, cuda, cuda:1, mps, cpu, ...


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
    x = measure.validation_images(gan, config.images)
    candidates = draw_candidates(gan.generator, gan.latent_dim, OURS.candidates, config.seed)
    starts = {
        "random": candidates.z[: len(x)],
        f"nearest of {OURS.candidates}": nearest(x, candidates),
        "E(x)": f_anogan.load(gan).network(x),
    }

    table: dict[str, dict[str, dict[str, float]]] = {name: {} for name in starts}
    for name, lr, steps in tqdm([(name, lr, steps) for name in starts for lr in config.lr for steps in config.steps]):
        settings = replace(OURS, steps=steps, lr=lr, precision=precision)
        batches = zip(x.split(measure.BATCH_SIZE), starts[name].split(measure.BATCH_SIZE), strict=True)
        losses = [measure.search_loss(gan, batch, z, settings) for batch, z in batches]
        table[name].setdefault(f"{lr:g}", {})[str(steps)] = torch.cat(losses).mean().item()

    print(f"mean loss over {len(x)} validation images of {run_dir}, {device}, {precision}")
    print(f"{'start':<18} {'lr':>6} " + "".join(f"{steps:>6} steps" for steps in config.steps))
    for name, rows in table.items():
        for lr, losses in rows.items():
            print(f"{name:<18} {lr:>6} " + "".join(f"{loss:>12.1f}" for loss in losses.values()))
    about = measure.about_gan(gan)
    files.write_json(
        measure.RESULTS / "convergence.json",
        {
            **about,
            "images": len(x),
            "seed": config.seed,
            **measure.about(device),
            "precision": precision,
            "mean_loss": table,
        },
    )

    curves = {f"start: {name}": {f"lr {lr}": losses for lr, losses in rows.items()} for name, rows in table.items()}
    curves[f"lr {OURS.lr:g}"] = {name: rows[f"{OURS.lr:g}"] for name, rows in table.items()}
    figure = Figure(figsize=(11, 8), layout="constrained")
    grid = figure.subplots(2, 2, sharey=True)
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
        f"{plots.shown(about['dataset'])}, {plots.shown(gan.normal_class)}, {gan.image_size}x{gan.image_size}, "
        f"{len(x)} validation images"
    )
    plots.save(figure, measure.DOCS / "convergence.png")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
