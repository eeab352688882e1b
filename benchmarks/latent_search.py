"""The latent search against the usual AnoGAN loop: one process, alternating, the same images, CPU or CUDA.

    python -m benchmarks.latent_search                                  # the run trained last
    python -m benchmarks.latent_search --run-dir outputs/cifar10-jpeg-automobile-64

The usual loop takes one image at a time, computes f(x) and the gradients of G's and D's weights anew at every step,
keeps NCHW and fp32, and does 401 steps of 2e-4 from a random z. Only validation normals are searched. Prints two tables
and writes benchmarks/results/latent_search.json.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch.optim import Adam
from tqdm import tqdm

import fit_latent
import util
from benchmarks import measure
from network import Discriminator, Generator

OURS = fit_latent.Config()
USUAL_STEPS, USUAL_LR = 401, 2e-4


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    images: int = OURS.batch_size  # validation normals that our search takes at once
    usual_images: int = 3  # the first of them, which the usual loop searches too, with each step size
    usual_tuned_lr: float = 0.2  # what suits 401 steps best, of 0.05, 0.1, 0.2 and 0.4
    steps: tuple[int, ...] = (0, 10, 25, 50, 75, 100, 125, 150, 250)  # searches of ours to compare with the usual
    reference_images: int = 16  # the first of them, searched for --reference-steps
    reference_steps: int = 1000  # what the loss of fewer steps is compared with
    repeats: int = 5  # of the timing of single steps
    device: str = OURS.device  # cuda, cuda:1, cpu, ...


def usual_search(
    generator: Generator, discriminator: Discriminator, x: torch.Tensor, steps: int, lr: float, seed: int
) -> float:
    """Search for one image (1, C, H, W) as AnoGAN implementations usually do; the loss at the end."""
    z = torch.randn(1, generator.layers[0].in_channels, generator=torch.Generator().manual_seed(seed))
    z = z.to(x.device).requires_grad_()
    optimizer = Adam([z], lr=lr)

    def loss() -> torch.Tensor:
        generated = generator(z)
        residual = torch.sum(torch.abs(x - generated))
        discrimination = torch.sum(torch.abs(discriminator.features(x) - discriminator.features(generated)))
        return 0.9 * residual + 0.1 * discrimination

    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return loss().item()


def usual_networks(run_dir: Path, device: torch.device) -> tuple[Generator, Discriminator]:
    """G and D of a run in eval mode as training left them: BatchNorm in place, parameters not frozen, NCHW."""
    state = torch.load(run_dir / "gan.pt", map_location="cpu", weights_only=True)
    config, channels = state["config"], state["image_channels"]
    generator = Generator(config["image_size"], channels, config["latent_dim"], config["ngf"])
    discriminator = Discriminator(config["image_size"], channels, config["ndf"])
    generator.load_state_dict(state["generator"])
    discriminator.load_state_dict(state["discriminator"])
    return generator.to(device).eval(), discriminator.to(device).eval()


def fit_memory_mib(run_dir: Path, count: int, config: Config) -> int:
    """Most memory that fit_latent.py held while it searched `count` training images, one step each."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "gan.pt").symlink_to((run_dir / "gan.pt").resolve())
        flags = ["--splits", "train", "--max-images", str(count), "--steps", "1", "--candidates", "64"]
        flags += ["--batch-size", str(config.images), "--device", config.device, "--run-dir", folder]
        subprocess.run([sys.executable, "fit_latent.py", *flags], check=True, capture_output=True)
        record = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))["fit_latent"]
    return record["peak_gpu_memory_mib"] or record["peak_memory_mib"]


def main(config: Config) -> None:
    """Time single steps, then whole searches down to a loss; print, and write the JSON file."""
    device = util.pick_device(config.device)
    run_dir = util.find_run(config.run_dir)
    gan = util.load_gan(run_dir, device)
    usual_gan = usual_networks(run_dir, device)
    validation = util.open_split(gan.dataset, "validation", gan.normal_class).take(slice(config.images))
    images, _ = util.load_images(validation, gan.image_size, gan.image_channels)
    x_nchw = util.to_model(images, device)
    x = x_nchw.contiguous(memory_format=torch.channels_last)
    about = {
        "dataset": gan.dataset,
        "normal_class": gan.normal_class,
        "image_size": gan.image_size,
        "ngf": gan.generator.layers[-2].in_channels,
        "epochs": gan.epoch,
        "images": len(images),
        "usual_images": config.usual_images,
        "hardware": measure.hardware(device),
        "torch": torch.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    draw = partial(fit_latent.draw_candidates, gan.generator, gan.latent_dim, OURS.candidates, config.images, seed=0)
    candidates_seconds, candidates = measure.timed(draw, device)

    def our_steps(z: torch.Tensor, steps: int, precision: str) -> torch.Tensor:
        """Our steps from z (count, latent_dim) for the first `count` images: their losses (count,)."""
        _, *found = fit_latent.search_latents(
            gan.generator, gan.discriminator, x[: len(z)], z, steps, OURS.lr, OURS.discrimination_weight, precision
        )
        return util.anomaly_score(*found, OURS.discrimination_weight)

    def our_search(count: int, steps: int, precision: str) -> torch.Tensor:
        """The whole of our search for the first `count` images, start included: their losses (count,)."""
        return our_steps(fit_latent.nearest_candidates(x[:count], candidates), steps, precision)

    # Single steps, the usual loop and ours in turn
    few = 25
    turns: dict[str, tuple[Callable[[], object], int]] = {
        "usual loop": (lambda: usual_search(*usual_gan, x_nchw[:1], 2 * few, USUAL_LR, seed=0), 2 * few)
    }
    best = util.pick_precision("auto", device)
    for precision in dict.fromkeys(("fp32", best)):  # bf16 too where it is faster
        turns[f"ours, {precision}"] = (partial(our_steps, candidates.z[: len(x)], few, precision), few * len(x))
    table = measure.take_turns(turns, config.repeats, device)
    measure.print_turns(table)

    # Whole searches: how fast each comes down to a loss
    usual: dict[str, dict] = {}
    for name, lr in (("usual", USUAL_LR), ("usual, tuned", config.usual_tuned_lr)):
        times, losses = [], []
        for i in tqdm(range(config.usual_images), name, leave=False):
            search = partial(usual_search, *usual_gan, x_nchw[i : i + 1], USUAL_STEPS, lr, seed=i)
            duration, loss = measure.timed(search, device)
            times.append(duration)
            losses.append(loss)
        usual[name] = {"lr": lr, "seconds_per_image": measure.spread(times), "mean_loss": statistics.mean(losses)}
    ours: dict[int, dict] = {}
    for steps in tqdm(config.steps, "ours", leave=False):
        duration, losses = measure.timed(partial(our_search, len(x), steps, best), device)
        ours[steps] = {
            "seconds_per_image": duration / len(x),
            "mean_loss": losses[: config.usual_images].mean().item(),
            "mean_loss_of_reference_images": losses[: config.reference_images].mean().item(),
        }
    reference = our_search(config.reference_images, config.reference_steps, "fp32").mean().item()

    ratios = {}
    for name, theirs in usual.items():
        reached = [steps for steps, row in ours.items() if row["mean_loss"] <= theirs["mean_loss"]]
        if reached:  # the fewest of our steps that end as low
            of = ours[reached[0]]["seconds_per_image"]
            ratios[name] = {
                "our_steps": reached[0],
                **measure.spread([theirs["seconds_per_image"][which] / of for which in ("min", "median", "max")]),
            }
    close = [steps for steps, row in ours.items() if row["mean_loss_of_reference_images"] <= 1.05 * reference]
    counts = (100, 1000)
    memory = {count: fit_memory_mib(run_dir, count, config) for count in counts}

    print("\nwhole searches           seconds an image   mean loss")
    for name, row in usual.items():
        label = f"{name}: {USUAL_STEPS} steps of {row['lr']:g}"
        print(f"{label:<32} {row['seconds_per_image']['median']:>9.3f} {row['mean_loss']:>11.0f}")
    for steps, row in ours.items():
        label = f"ours, {best}: {steps} steps"
        print(f"{label:<32} {row['seconds_per_image']:>9.4f} {row['mean_loss']:>11.0f}")
    for name, row in ratios.items():
        print(f"as low as {name}: {row['our_steps']} of our steps, {row['median']:.0f} times more images a second")
    print(
        f"within 5% of {config.reference_steps} steps ({reference:.0f}, {config.reference_images} images): "
        f"{close[0] if close else 'none of these'} steps; candidates: {candidates_seconds:.1f} s once a run; "
        + ", ".join(f"{count} images: {mib} MiB" for count, mib in memory.items())
    )
    per_step = table[f"ours, {best}"]
    util.write_json(
        Path(__file__).parent / "results/latent_search.json",
        {
            **about,
            "per_step_ratio": table["ours, fp32"]["ratio"],
            f"per_step_ratio_{best}": per_step["ratio"],
            "share_of_peak": table["ours, fp32"]["share_of_peak"],
            "images_ratio": ratios.get("usual"),
            "images_ratio_tuned": ratios.get("usual, tuned"),
            "steps_within_5_percent": close[0] if close else None,
            "reference": {"steps": config.reference_steps, "images": config.reference_images, "mean_loss": reference},
            "candidates_seconds": candidates_seconds,
            "fit_latent_peak_memory_mib": memory,
            "single_steps": table,
            "usual_searches": usual,
            "our_searches": ours,
        },
    )


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=__doc__))
