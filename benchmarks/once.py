"""What it saves to decode once, to cast once, and to stay warm: before and after, in turn, on one run.

    python -m benchmarks.once --run-dir outputs/digits-1

- evaluate.py with the pictures decoded in the run folder, and without, as before
- steps of the search in bf16 with weights that were cast once, and under autocast, which casts them at each step
- milliseconds a picture of `detector.Detector`, and seconds of fit_latent.py --images and evaluate.py --images, which
  start from nothing: with the search, and with f-AnoGAN's start and a quarter of the steps if there is an encoder.pt

Works on a copy of the run, whose pictures are searched anew for the last. Prints a table and adds it to
benchmarks/results/once.json, by the run's name.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import tyro
from torch import nn
from tqdm import tqdm

import evaluate
import fit_latent
import util
from anogan import files, images, runs
from benchmarks import measure
from detector import Detector

CPU = torch.device("cpu")
# of a run: other pictures, and what would have to be searched anew with the rest
LEFT_OUT = ("images-*", "pictures-*", ".lock", "latents-train*", "latents-*-reference.npz", "baselines-*")


@dataclass
class Config:
    run_dir: Path | None = None  # an evaluated run; by default the one trained last
    images: int = 64  # that are searched at once, to compare steps
    steps: int = 10  # of such a search
    searched: int = 64  # pictures of each split that are searched anew, to compare new ones with
    repeats: int = 5  # of each measurement, but for the two commands, which are run once


class Autocast(nn.Module):
    """A network under autocast, which casts all weights of a frozen network each time that it is used."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return self.network(x)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return self.network.features(x)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed inside."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def in_turn(before: Callable[[], object], after: Callable[[], object], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of two pieces of work, one after the other `repeats` times over, and how many times as fast the second
    is, pair by pair."""
    pairs = [[measure.timed(work, CPU)[0] for work in (before, after)] for _ in tqdm(range(repeats), leave=False)]
    return {
        "before": measure.spread([one for one, _ in pairs]),
        "after": measure.spread([two for _, two in pairs]),
        "ratio": measure.spread([one / two for one, two in pairs]),
    }


def decoded_once(run_dir: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of evaluate.py with and without the decoded pictures in the run folder."""
    config = evaluate.Config(run_dir=run_dir, device="cpu", bootstrap=100)

    def after() -> None:
        with quiet():
            evaluate.main(config)

    def before() -> None:
        with patch.object(runs, "keep_decoded", lambda gan, image_set, *_: image_set):
            after()

    after()  # decodes
    return in_turn(before, after, repeats)


def cast_once(gan: runs.TrainedGAN, config: Config) -> dict[str, dict[str, float]]:
    """Seconds of some steps of the search in bf16."""
    x = measure.validation_images(gan, config.images)
    z = torch.zeros(len(x), gan.latent_dim)
    settings = fit_latent.Config(steps=config.steps, precision="bf16")

    def after() -> None:
        measure.search_loss(gan, x, z, settings)

    def before() -> None:
        with patch.object(runs, "cast", lambda networks, to: [Autocast(network) for network in networks]):
            after()

    after()
    return in_turn(before, after, config.repeats)


def warm(run_dir: Path, init: str, steps: int, config: Config) -> dict[str, float | dict[str, float]]:
    """Seconds of the two commands for one picture, and milliseconds of a detector that was loaded before."""
    gan = runs.load_gan(run_dir, CPU)
    test = runs.open_split(gan, "test")
    path = run_dir / "new.png"
    test.picture(0, gan.view).save(path)
    search = ("--init", init, "--steps", str(steps), "--device", "cpu")
    _command("fit_latent.py", run_dir, "--max-images", str(config.searched), *search)
    _command("evaluate.py", run_dir, "--score", "anomaly_score", "--device", "cpu")
    new = ("--images", str(path))

    def commands() -> None:
        _command("fit_latent.py", run_dir, *new, *search)
        _command("evaluate.py", run_dir, *new, "--device", "cpu")

    seconds, _ = measure.timed(commands, CPU)
    loading, detector = measure.timed(lambda: Detector.load(run_dir, device="cpu"), CPU)
    detector.judge([path])
    each = [1000 * measure.timed(lambda: detector.judge([path]), CPU)[0] for _ in range(4 * config.repeats)]
    return {
        "steps": steps,
        "seconds_of_two_commands": seconds,
        "seconds_of_loading": loading,
        "ms_a_picture": measure.spread(each),
    }


def _command(script: str, run_dir: Path, *flags: str) -> None:
    command = [sys.executable, measure.ROOT / script, "--run-dir", run_dir, *flags]
    if (done := subprocess.run(command, capture_output=True, text=True)).returncode != 0:
        raise util.InputError(f"{script} failed: {done.stderr.strip().splitlines()[-1]}")


def main(config: Config) -> None:
    """Measure, print, and add to the JSON file."""
    util.check_at_least(config, 1, "images", "steps", "searched", "repeats")
    run_dir = runs.find_run(config.run_dir)
    measure.read_metrics(run_dir)  # raises if the run was not evaluated
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / run_dir.name
        shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        gan = runs.load_gan(copy, CPU)
        pictures = len(images.open_split(gan.dataset, "test", gan.normal_class, gan.group_by))
        about = {**measure.about_gan(gan), "test_pictures": pictures, **measure.about(CPU)}
        about["threads"] = torch.get_num_threads()
        found = {
            "decoded once, evaluate.py": decoded_once(copy, config.repeats),
            "cast once, steps in bf16": cast_once(gan, config),
        }
        ours = fit_latent.Config().steps
        waits = {"AnoGAN": warm(copy, "candidates", ours, config)}
        if (copy / "encoder.pt").is_file():
            waits["f-AnoGAN's start"] = warm(copy, "encoder", ours // 4, config)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'':<28} {'before, s':>10} {'after, s':>10} {'times as fast':>15}")
    for name, of in found.items():
        ratio = of["ratio"]
        spread = f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]"
        print(f"{name:<28} {of['before']['median']:>10.3f} {of['after']['median']:>10.3f} {spread:>20}")
    for name, of in waits.items():
        print(
            f"{name}, {of['steps']} steps: {of['ms_a_picture']['median']:.0f} ms a picture, loaded in "
            f"{of['seconds_of_loading']:.1f} s; the two commands take {of['seconds_of_two_commands']:.1f} s"
        )
    path = measure.RESULTS / "once.json"
    files.write_json(path, files.read_json(path) | {run_dir.name: {**about, **found, "warm": waits}})


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
