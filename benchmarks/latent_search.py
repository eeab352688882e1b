"""The latent search against the usual AnoGAN loop: one process, single steps in turn, the same images, CPU or CUDA.

    python -m benchmarks.latent_search                                  # the run trained last
    python -m benchmarks.latent_search --run-dir outputs/cifar10-jpeg-automobile-64

The usual loop takes one image at a time, computes f(x) and the gradients of G's and D's weights anew at every step,
keeps NCHW and fp32, and does 401 steps of 2e-4 from a random z. It keeps z in no ball, so ours does not either.
Validation normals are searched; memory is measured on training images. Prints two tables and writes
benchmarks/results/latent_search.json.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import tyro
from torch.optim import Adam
from tqdm import tqdm

import fit_latent
import util
from anogan import files, runs
from anogan.candidates import draw_candidates, nearest
from benchmarks import measure
from network import Discriminator, Generator

OURS = replace(fit_latent.Config(), ball=False)  # as in the usual loop: both minimise the same
USUAL_STEPS, USUAL_LR = 401, 2e-4


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    images: int = 512 if torch.cuda.is_available() else 64  # validation normals that our search takes at once
    usual_images: int = 3  # the first of them, which the usual loop searches too, with each step size
    usual_tuned_lr: float = 0.2  # the step size that suits the usual loop's 401 steps best (docs/experiments.md)
    steps: tuple[int, ...] = (0, 25, 50, 100, 150, 200, 250)  # searches of ours to compare with the usual loop's
    archive: int = 10_000  # images of a run, over which the time to draw the candidates is spread
    reference_images: int = 16  # the first of them, searched for --reference-steps
    reference_steps: int = 1000  # what the loss of fewer steps is compared with
    repeats: int = 5  # of the timing of single steps
    device: str = OURS.device  # auto, cuda, cuda:1, mps, cpu, ...


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
        script = Path(fit_latent.__file__)
        subprocess.run([sys.executable, script, *flags], check=True, capture_output=True)
        record = runs.read_record(Path(folder))["fit_latent"]
    return record["peak_gpu_memory_mib"] or record["peak_memory_mib"]


def main(config: Config) -> None:
    """Time single steps, then whole searches down to a loss; print, and write the JSON file."""
    device = util.pick_device(config.device)
    run_dir = runs.find_run(config.run_dir)
    gan = runs.load_gan(run_dir, device)
    usual_gan = usual_networks(run_dir, device)
    x = measure.validation_images(gan, config.images)
    x_nchw = x.contiguous()
    about = {
        **measure.about_gan(gan),
        "images": len(x),
        "usual_images": config.usual_images,
        **measure.about(device),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    draw = partial(draw_candidates, gan.generator, gan.latent_dim, OURS.candidates, seed=0)
    candidates_seconds, candidates = measure.timed(draw, device)

    def our_steps(z: torch.Tensor, steps: int, precision: str) -> torch.Tensor:
        """Our steps from z (count, latent_dim) for the first `count` images: their losses (count,)."""
        return measure.search_loss(gan, x[: len(z)], z, replace(OURS, steps=steps, precision=precision))

    def our_search(count: int, steps: int, precision: str) -> torch.Tensor:
        """The whole of our search for the first `count` images, start included: their losses (count,)."""
        return our_steps(nearest(x[:count], candidates), steps, precision)

    # Single steps, the usual loop and ours in turn
    few = 25
    turns: dict[str, tuple[Callable[[], object], int, str]] = {
        "usual loop": (lambda: usual_search(*usual_gan, x_nchw[:1], 2 * few, USUAL_LR, seed=0), 2 * few, "fp32")
    }
    best = util.pick_precision("auto", device)
    for precision in dict.fromkeys(("fp32", best)):  # bf16 too where it is faster
        ours = partial(our_steps, candidates.z[: len(x)], few, precision)
        turns[f"ours, {precision}"] = (ours, few * len(x), precision)
    table = measure.take_turns(turns, config.repeats, device)
    measure.print_turns(table)

    # What our steps come down to
    ours: dict[int, dict] = {}
    for steps in tqdm(config.steps, "ours", leave=False):
        seconds, losses = measure.timed(partial(our_search, len(x), steps, best), device)
        ours[steps] = {
            "seconds_per_image": seconds / len(x) + candidates_seconds / config.archive,
            "mean_loss": losses[: config.usual_images].mean().item(),
            "mean_loss_of_reference_images": losses[: config.reference_images].mean().item(),
        }
    reference = our_search(config.reference_images, config.reference_steps, "fp32").mean().item()
    close = [steps for steps, row in ours.items() if row["mean_loss_of_reference_images"] <= 1.05 * reference]

    # The usual loop's whole searches, and right after them ours of the fewest steps that end as low
    usual: dict[str, dict] = {}
    for name, lr in (("usual", USUAL_LR), ("usual, tuned", config.usual_tuned_lr)):
        searches = [
            measure.timed(partial(usual_search, *usual_gan, x_nchw[i : i + 1], USUAL_STEPS, lr, seed=i), device)
            for i in tqdm(range(config.usual_images), name, leave=False)
        ]
        row = {
            "lr": lr,
            "seconds_per_image": measure.spread([seconds for seconds, _ in searches]),
            "mean_loss": statistics.mean(loss for _, loss in searches),
        }
        usual[name] = row
        if enough := [steps for steps in ours if ours[steps]["mean_loss"] <= row["mean_loss"]]:
            again = [measure.timed(partial(our_search, len(x), enough[0], best), device)[0] for _ in range(3)]
            mine = measure.spread([seconds / len(x) + candidates_seconds / config.archive for seconds in again])
            theirs = row["seconds_per_image"]
            row["ours"] = {
                "steps": enough[0],
                "seconds_per_image": mine,
                "images_ratio": {
                    "median": theirs["median"] / mine["median"],
                    "min": theirs["min"] / mine["max"],
                    "max": theirs["max"] / mine["min"],
                },
            }
    memory = {count: fit_memory_mib(run_dir, count, config) for count in (100, 1000)}

    print("\nwhole searches                    s an image   mean loss")
    for name, row in usual.items():
        label = f"{name}: {USUAL_STEPS} steps of {row['lr']:g}"
        print(f"{label:<34} {row['seconds_per_image']['median']:>9.4f} {row['mean_loss']:>11.0f}")
    for steps, row in ours.items():
        label = f"ours, {best}: {steps} steps"
        print(f"{label:<34} {row['seconds_per_image']:>9.4f} {row['mean_loss']:>11.0f}")
    for name, row in usual.items():
        if mine := row.get("ours"):
            ratio = mine["images_ratio"]
            print(
                f"as low as {name}: {mine['steps']} of our steps, {ratio['median']:.1f} times as many images a second "
                f"[{ratio['min']:.1f}, {ratio['max']:.1f}]"
            )
    print(
        f"candidates: {candidates_seconds:.1f} s, spread above over {config.archive} images\n"
        f"within 5% of {config.reference_steps} steps ({reference:.0f}, {config.reference_images} images): "
        f"{close[0] if close else 'none of these'} steps\n"
        f"memory of fit_latent.py: {', '.join(f'{mib} MiB for {count} images' for count, mib in memory.items())}"
    )
    files.write_json(
        measure.RESULTS / "latent_search.json",
        {
            **about,
            "per_step_ratio": table["ours, fp32"]["ratio"],
            f"per_step_ratio_{best}": table[f"ours, {best}"]["ratio"],
            "share_of_peak": table["ours, fp32"]["share_of_peak"],
            "images_ratio": usual["usual"].get("ours"),
            "images_ratio_tuned": usual["usual, tuned"].get("ours"),
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
        main(tyro.cli(Config, description=util.help_text(__doc__)))
