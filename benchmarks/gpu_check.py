"""Is a GPU right, and how fast is it? One command of some minutes, without a data set and without a download.

    make gpu-check
    python -m benchmarks.gpu_check --parts search --out /tmp/again    # one part only
    python -m benchmarks.gpu_check --device cpu --quick               # what the test suite runs

`agreement` trains, searches and scores on the GPU and on the CPU, kills a training and continues it, and says of each
comparison whether it holds. `search` and `training` time our loops against the usual ones at 64x64, ngf 64. `scripts`
times train_gan.py for some epochs of 4,000 pictures, and fit_latent.py on 10,000. Writes gpu_check.json and
gpu_check.md to benchmarks/results/, anew after each figure: a run that is cut short leaves what it has measured. The
exit code is 1 if a comparison does not hold. What the scripts print goes to stderr.
"""

import contextlib
import copy
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args
from unittest.mock import patch

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image

import evaluate
import fit_latent
import train_gan
import util
from anogan import files, images, pictures, plots, runs
from anogan.candidates import draw_candidates, nearest
from anogan.decoding import View
from benchmarks import latent_search, measure, training

Part = Literal["agreement", "search", "training", "scripts"]
CPU = torch.device("cpu")
KILLED_EPOCHS = 30  # of the training that is killed at its first checkpoint: 155 steps before its end


@dataclass
class Config:
    parts: tuple[Part, ...] = get_args(Part)
    quick: bool = False  # networks and pictures so small that a CPU takes seconds
    out: Path = measure.RESULTS  # the folder to write to
    device: str = fit_latent.Config.device  # auto, cuda, cuda:1, mps, cpu, ...


@dataclass(frozen=True)
class Sizes:
    """How much is trained, searched and timed."""

    # agreement, at 32x32
    width: int = 32  # ngf and ndf
    epochs: int = 4
    searched_sets: tuple[str, ...] = ("digits", "pictures")
    searched: int = 128  # images
    steps: int = 100
    pictures: int = 128  # generated, to train on
    # search, training and scripts
    image_size: int = 64
    timed_width: int = 64
    search_batches: tuple[int, ...] = (64, 512, 2048)
    training_batches: tuple[int, ...] = (64, 256, 512)
    training_steps: int = 16  # of a turn: the usual loop's workers have decoded four of them before it
    candidates: int = fit_latent.Config.candidates
    timed_steps: int = fit_latent.Config.steps
    repeats: int = 3
    script_epochs: int = 5
    script_pictures: tuple[int, int] = (4000, 10_000)  # to train on, and to search


QUICK = Sizes(
    width=4,
    epochs=2,
    searched_sets=("pictures",),
    searched=16,
    steps=10,
    pictures=40,
    image_size=32,
    timed_width=4,
    search_batches=(2,),
    training_batches=(4,),
    training_steps=4,  # a graph is made at the fourth
    candidates=20,
    timed_steps=5,
    repeats=1,
    script_epochs=1,
    script_pictures=(20, 10),
)


@dataclass
class Findings:
    """What was found so far, in files that are whole at any moment."""

    out: Path
    about: dict[str, Any]
    checks: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str, found: float, limit: float, reason: str) -> None:
        """Keep and print a comparison: it holds if `found` is a number of at most `limit`."""
        number = float(found) if math.isfinite(found) else None  # JSON has no others
        row = {"name": name, "holds": bool(found <= limit), "found": number, "limit": limit, "reason": reason}
        self.checks.append(row)
        print(check_line(row), flush=True)
        self.write()

    def write(self) -> None:
        """Both files."""
        files.make_folder(self.out)
        content = {**self.about, "checks": self.checks, **self.tables}
        files.write_json(self.out / "gpu_check.json", content)
        with files.replacing(self.out / "gpu_check.md") as path:
            path.write_text(to_markdown(content), encoding="utf-8")


def check_line(row: dict[str, Any]) -> str:
    """A comparison in a line."""
    verdict = "holds" if row["holds"] else "FAILS"
    return f"{verdict}: {row['name']}: {found_in(row)}, at most {row['limit']:.3g} ({row['reason']})"


def found_in(row: dict[str, Any]) -> str:
    """What a comparison found, as it is shown."""
    return "no number" if row["found"] is None else f"{row['found']:.3g}"


def main(config: Config) -> None:
    """Run each part, whatever became of the one before; end with exit code 1 if a comparison does not hold."""
    started = time.monotonic()
    device = util.pick_device(config.device)
    sizes = QUICK if config.quick else Sizes()
    best = util.pick_precision("auto", device)
    precisions = tuple(dict.fromkeys((best, "fp32")))  # bf16 first, where the hardware has it
    about = {**measure.about(device), "quick": config.quick, "training_steps": sizes.training_steps}
    about |= {"cudnn": torch.backends.cudnn.version(), "auto_precision": best}
    findings = Findings(config.out, about)
    print(", ".join(f"{name} {value}" for name, value in findings.about.items()), flush=True)
    works = {"agreement": check_agreement, "search": time_search, "training": time_training, "scripts": time_scripts}
    # figures that nobody looks at would take longer than the networks
    with tempfile.TemporaryDirectory() as folder, patch.object(plots, "save", leave_blank):
        make_pictures(Path(folder), sizes)
        for part in config.parts:
            print(f"\n{part}, {time.monotonic() - started:.0f} s after the start", flush=True)
            with named_fault(findings, part):
                works[part](findings, sizes, precisions, device, Path(folder))
    findings.about["seconds"] = round(time.monotonic() - started, 1)
    findings.write()
    print(f"\nwrote {config.out}/: gpu_check.json gpu_check.md, after {findings.about['seconds']:.0f} s")
    if failed := [row["name"] for row in findings.checks if not row["holds"]]:
        raise util.InputError(f"{len(failed)} of {len(findings.checks)} comparisons do not hold: {'; '.join(failed)}")


def leave_blank(_: Figure, path: Path) -> None:
    """What stands in for `plots.save`."""
    Image.new("L", (1, 1)).save(path)


@contextlib.contextmanager
def named_fault(findings: Findings, what: str) -> Iterator[None]:
    """A fault inside is printed and becomes a comparison that does not hold, so that the figures after it are made."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        findings.check(f"{what} runs", math.nan, 0.0, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def make_pictures(folder: Path, sizes: Sizes) -> None:
    """Two data sets like CIFAR-10: small pictures in colour of a disc (normal) or a square on a shaded ground.

    `pictures` is for agreement, `many` for the time: of it only 600 pictures differ, which lie there under many names.
    """
    count, side = sizes.pictures * 5 // 4, sizes.image_size  # a fifth is for validation
    for name, number in (("train/disc", count), ("test/disc", 40), ("test/square", 40)):
        draw_pictures(folder / "pictures" / name, number, 32)
    most = max(*sizes.training_batches, sizes.script_pictures[0]) * 5 // 4 + 1
    draw_pictures(folder / "many/train/disc", min(600, most), side)
    drawn = sorted((folder / "many/train/disc").iterdir())
    (folder / "many/test/disc").mkdir(parents=True)
    for split, number in (("train", most), ("test", sizes.script_pictures[1])):
        for i in range(len(drawn) if split == "train" else 0, number):
            os.link(drawn[i % len(drawn)], folder / "many" / split / f"disc/{i:05d}.png")


def draw_pictures(folder: Path, count: int, side: int) -> None:
    """Pictures of a square, if the folder has its name, or of a disc."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    across, down = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side))
    for i in range(count):
        colours, slope, middle = random.uniform(0, 255, (2, 3)), random.uniform(-40, 40, 2), random.normal(0, 0.2, 2)
        x, y = across - middle[0], down - middle[1]
        inside = np.maximum(abs(x), abs(y)) < 0.5 if folder.name == "square" else x**2 + y**2 < 0.3
        shade = (slope[0] * across + slope[1] * down)[..., None] + random.normal(0, 4, (side, side, 3))
        picture = np.where(inside[..., None], colours[0], colours[1]) + shade
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.png")


# ---- agreement ------------------------------------------------------------------------------------------------------


def check_agreement(
    findings: Findings, sizes: Sizes, precisions: tuple[str, ...], device: torch.device, folder: Path
) -> None:
    """Train, search, score, kill and continue on the device, and compare with the CPU."""
    sets = {"digits": ("digits", "1"), "pictures": (str(folder / "pictures"), "disc")}
    shape = {"image_size": 32, "ngf": sizes.width, "ndf": sizes.width, "batch_size": 16}
    for name, (dataset, normal_class) in sets.items():
        config = train_gan.Config(dataset, normal_class, **shape, epochs=sizes.epochs, run_dir=folder / name)
        with named_fault(findings, f"{name}: training"):
            compare_trainings(findings, name, config, precisions, device)
        if name not in sizes.searched_sets:
            continue
        with named_fault(findings, f"{name}: search"):
            compare_searches(findings, name, folder / f"{name}-cpu-fp32", sizes, precisions, device)
        with named_fault(findings, f"{name}: scores"):
            compare_scores(findings, name, folder / f"{name}-cpu-fp32", device)
    with named_fault(findings, "a checkpoint of the device on the CPU"):
        compare_reading(findings, folder / f"pictures-{device.type}-{precisions[0]}", device)
    for precision in precisions:
        with named_fault(findings, f"a training that was killed, {precision}"):
            config = train_gan.Config("digits", "1", **shape, epochs=KILLED_EPOCHS, precision=precision)
            config = replace(config, device=str(device), checkpoint_every="25", run_dir=folder / f"killed-{precision}")
            compare_continued(findings, config)


def compare_trainings(
    findings: Findings, name: str, config: train_gan.Config, precisions: tuple[str, ...], device: torch.device
) -> None:
    """The losses of a training on the CPU in fp32, and of the same one on the device."""
    wanted = dict.fromkeys([(CPU, "fp32"), *((device, precision) for precision in precisions)])
    rows = {}
    for where, precision in wanted:
        run_dir = config.run_dir.with_name(f"{name}-{where.type}-{precision}")
        with util.full_precision(), drawn_on_the_cpu(), quiet():
            train_gan.main(replace(config, run_dir=run_dir, device=str(where), precision=precision))
        rows[where, precision] = np.loadtxt(run_dir / "losses.csv", delimiter=",", skiprows=1)[:, 2:]
    expected = rows[CPU, "fp32"]
    for precision in precisions:
        # D's and G's loss, what D believes of real and of generated images
        found, what = rows[device, precision], f"{name}: training in {precision} against fp32 on a CPU"
        first = relative(found[0, [0, 2, 3]], expected[0, [0, 2, 3]]).max()
        mean = relative(found[:, :2].mean(0), expected[:, :2].mean(0)).max()
        limits = (1e-4, 0.02) if precision == "fp32" else (0.01, 0.05)
        steps = f"mean losses of {len(found)} steps"
        findings.check(f"{what}, first losses", first, limits[0], "the same sums in another order or precision")
        findings.check(f"{what}, {steps}", mean, limits[1], "Adam makes steps of lr out of rounding")


def quiet() -> contextlib.AbstractContextManager:
    """Inside, what a script prints goes to stderr."""
    return contextlib.redirect_stdout(sys.stderr)


@contextlib.contextmanager
def drawn_on_the_cpu() -> Iterator[None]:
    """Inside, torch.randn draws on the CPU, and moves what it drew: each kind of device draws other numbers. A CUDA
    graph would not draw again, so there are none."""
    draw = torch.randn

    def randn(*size: int, device: torch.device | None = None, **options: Any) -> torch.Tensor:
        return draw(*size, **options).to(device)

    with patch.object(torch, "randn", randn), measure.without_graphs():
        yield


def relative(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|found - expected| / |expected|."""
    return np.abs(found - expected) / np.abs(expected)


def compare_searches(
    findings: Findings, name: str, run_dir: Path, sizes: Sizes, precisions: tuple[str, ...], device: torch.device
) -> None:
    """The same images of a run searched on the CPU in fp32, and on the device."""

    def searched(path: Path, where: torch.device, precision: str) -> np.ndarray:
        settings = {"max_images": sizes.searched, "steps": sizes.steps, "candidates": 500}
        with util.full_precision(), quiet():
            config = fit_latent.Config(path, **settings, precision=precision, device=str(where))
            latents = fit_latent.main(config)["test"]
        return util.anomaly_score(latents["residual"], latents["discrimination"], 0.1)

    copies = {precision: run_dir.with_name(f"{run_dir.name}-searched-{precision}") for precision in precisions}
    for path in copies.values():
        shutil.copytree(run_dir, path)
    expected = searched(run_dir, CPU, "fp32")
    reason = "rounding grows over the steps; another seed of the candidates changes 0.015"
    for precision, path in copies.items():
        found = searched(path, device, precision)
        what = f"{name}: A(x) after a search of {sizes.steps} steps in {precision} against fp32 on a CPU"
        findings.check(f"{what}, median", float(np.median(relative(found, expected))), 0.015, reason)
        findings.check(f"{what}, of the mean", float(relative(found.mean(), expected.mean())), 0.01, reason)


def compare_scores(findings: Findings, name: str, run_dir: Path, device: torch.device) -> None:
    """The scores of the same latents on the CPU and on the device, of a run that was searched."""
    same, scores = run_dir.with_name(f"{run_dir.name}-scored"), []
    shutil.copytree(run_dir, same)
    for where, path in ((device, same), (CPU, run_dir)):
        with quiet():
            evaluate.main(evaluate.Config(path, bootstrap=20, device=str(where)))
        rows = measure.test_rows(path)[0]
        names = [score.name for score in evaluate.SCORES if score.name in rows[0]]
        scores.append({key: np.array([float(row[key]) for row in rows]) for key in names})
    for key, of_cpu in scores[1].items():
        difference = np.median(relative(scores[0][key], of_cpu))
        findings.check(f"{name}: {key} of the same z", difference, 1e-4, "both in fp32; the sums are in another order")


def compare_reading(findings: Findings, run_dir: Path, device: torch.device) -> None:
    """What G draws on the device, and on the CPU from the same gan.pt."""
    drawn, found = [], []
    z = torch.randn(64, train_gan.Config.latent_dim, generator=torch.Generator().manual_seed(0))
    for where in (device, CPU):
        gan = runs.load_gan(run_dir, where)
        with util.full_precision(), torch.no_grad():
            drawn.append(gan.generator(z.to(where)))
            found.append(gan.discriminator(drawn[-1]).cpu())
    difference = (drawn[0].cpu() - drawn[1]).abs().max().item()
    findings.check("G(z) of a checkpoint of the device, on the CPU", difference, 1e-3, "both in fp32, in [-1, 1]")
    difference = (found[0] - found[1]).abs().max().item() / found[1].abs().max().item()
    findings.check("D(G(z)) of a checkpoint of the device, on the CPU", difference, 1e-3, "both in fp32")


def compare_continued(findings: Findings, config: train_gan.Config) -> None:
    """A training that is killed and continued ends with the same weights, bit by bit, as one that nothing disturbed."""
    whole = config.run_dir.with_name(f"{config.run_dir.name}-not")
    flags = ["dataset", "normal_class", "image_size", "ngf", "ndf", "batch_size", "epochs", "precision", "device"]
    flags += ["checkpoint_every", "run_dir"]
    command = [sys.executable, str(measure.ROOT / "train_gan.py")]
    for flag in flags:
        command += [f"--{flag.replace('_', '-')}", str(getattr(config, flag))]
    process = subprocess.Popen(command, stdout=sys.stderr)
    while process.poll() is None and not (config.run_dir / "gan.pt").exists():
        time.sleep(0.005)
    process.kill()
    code, path = process.wait(), config.run_dir / "gan.pt"
    step = torch.load(path, map_location="cpu", weights_only=True)["step"] if path.exists() else 0
    was_killed = code == -signal.SIGKILL and step > 0
    name = f"a training in {config.precision} that was killed after its checkpoint of step {step}"
    findings.check(name, float(not was_killed), 0, "it must not have ended by itself")
    for run_dir in (config.run_dir, whole):
        with quiet():
            train_gan.main(replace(config, run_dir=run_dir, checkpoint_every="10m"))
    states = [torch.load(each / "gan.pt", map_location="cpu", weights_only=True) for each in (config.run_dir, whole)]
    weights = [
        state["generator"] | {f"d.{key}": value for key, value in state["discriminator"].items()} for state in states
    ]
    other = sum(not torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    findings.check(f"{name} and continued: tensors that differ", other, 0, f"bitwise, of {len(weights[0])} tensors")


# ---- time -----------------------------------------------------------------------------------------------------------


def time_search(
    findings: Findings, sizes: Sizes, precisions: tuple[str, ...], device: torch.device, folder: Path
) -> None:
    """Whole searches of a batch, from the nearest candidate on, with and without a CUDA graph, and the usual loop."""
    shape = training.Config(image_size=sizes.image_size, ngf=sizes.timed_width)
    usual = training.networks(shape, device)
    generator, discriminator = copy.deepcopy(usual)
    for network in usual:
        network.eval()
    for network in (generator, discriminator):
        runs.freeze(network, device)
    x = torch.rand(max(sizes.search_batches), 3, sizes.image_size, sizes.image_size, device=device) * 2 - 1
    x = x.contiguous(memory_format=torch.channels_last)
    candidates = draw_candidates(generator, training.LATENT_DIM, sizes.candidates, seed=0)

    def ours(batch: int, precision: str, steps: int = sizes.timed_steps) -> tuple[torch.Tensor, ...]:
        config = fit_latent.Config(precision=precision, steps=steps)
        start = nearest(x[:batch], candidates)
        return fit_latent.search((generator, discriminator), x[:batch], start, config)

    if device.type == "cuda":
        for precision in precisions:
            with named_fault(findings, f"a search as a CUDA graph, {precision}"):
                compare_graphs(findings, partial(ours, min(sizes.search_batches), precision), precision)
    tables = findings.tables["search"] = {}
    usual_work = partial(latent_search.usual_search, *usual, x[:1].contiguous(), 25, lr=2e-4, seed=0)
    for batch in sizes.search_batches:
        turns: dict[str, tuple[Callable[[], object], int, str]] = {"usual loop, one image": (usual_work, 25, "fp32")}
        kinds = [(precision, *kind) for precision in precisions for kind in graph_kinds(device).items()]
        if device.type == "cuda" and batch == sizes.search_batches[len(sizes.search_batches) // 2]:
            kinds += [(precisions[0], *kind) for kind in cudnn_kinds(", graph").items()]
        for precision, kind, inside in kinds:
            work = partial(within, inside, partial(ours, batch, precision))
            turns[f"ours, {precision}{kind}"] = (work, batch * sizes.timed_steps, precision)
        table = measure.take_turns(turns, sizes.repeats, device)
        for row in table.values():
            row["images_per_second"] = 1e3 / row["ms_per_image_step"]["median"] / fit_latent.Config.steps
            row["seconds_for_10000_images"] = 10_000 / row["images_per_second"]
        keep_table(findings, tables, f"batches of {batch}", table)


def graph_kinds(device: torch.device) -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    """By what is added to a row's name: what makes a search or a training run with a CUDA graph, and without."""
    kinds = {"": measure.without_graphs}
    return kinds | {", graph": contextlib.nullcontext} if device.type == "cuda" else kinds


def cudnn_kinds(before: str = "") -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    """By what is added to a row's name: other ways for cuDNN to choose than ours, deterministic and without a trial."""
    return {
        f"{before}, cudnn.benchmark": partial(cudnn, benchmark=True, deterministic=True),
        f"{before}, not deterministic": partial(cudnn, benchmark=False, deterministic=False),
        f"{before}, cudnn.benchmark, not deterministic": partial(cudnn, benchmark=True, deterministic=False),
    }


@contextlib.contextmanager
def cudnn(benchmark: bool, deterministic: bool) -> Iterator[None]:
    """Inside, cuDNN tries the algorithms or does not, and may choose any or deterministic ones only."""
    backend = torch.backends.cudnn
    before = backend.benchmark, backend.deterministic
    backend.benchmark, backend.deterministic = benchmark, deterministic
    try:
        yield
    finally:
        backend.benchmark, backend.deterministic = before


def within(inside: Callable[[], contextlib.AbstractContextManager], work: Callable[[], Any]) -> Any:
    """What a piece of work returns inside a context."""
    with inside():
        return work()


def compare_graphs(findings: Findings, search: Callable[..., tuple[torch.Tensor, ...]], precision: str) -> None:
    """The latents that a search finds with a CUDA graph and without."""
    for steps, limit in ((10, 1e-3), (fit_latent.Config.steps, 0.015)):
        with measure.without_graphs():
            plain = search(steps=steps)
        graph = search(steps=steps)
        what = f"a search of {steps} steps in {precision} with a CUDA graph against one without"
        if steps == 10:
            difference = (graph[0] - plain[0]).abs().max().item()
            findings.check(
                f"{what}, z", difference, limit, "the same kernels: 0 is expected, and no less than rounding"
            )
        else:
            scores = [util.anomaly_score(*found[1:], 0.1) for found in (graph, plain)]
            difference = ((scores[0] - scores[1]).abs() / scores[1]).max().item()
            findings.check(f"{what}, A(x)", difference, limit, "the change of another seed of the candidates")


def compare_training_graphs(
    findings: Findings, begin: Callable[[], tuple[Callable[[], None], list[torch.Tensor]]], precision: str
) -> None:
    """The losses of a training with a CUDA graph and without; both draw the same noise."""
    found = []
    for inside in graph_kinds(torch.device("cuda")).values():
        with inside():
            turn, losses = begin()
            torch.manual_seed(0)
            for _ in range(4):
                turn()
        found.append(torch.stack(losses))  # (steps, 2)
    difference = ((found[1] - found[0]).abs() / found[0].abs()).max().item()
    what = f"{len(found[0])} training steps in {precision} with a CUDA graph against those without, losses"
    findings.check(what, difference, 1e-3, "the same kernels: 0 is expected, and no less than rounding")


def time_training(
    findings: Findings, sizes: Sizes, precisions: tuple[str, ...], device: torch.device, folder: Path
) -> None:
    """Training steps of a batch, ours and the usual loop's, which decodes pictures from the disk."""
    image_set = images.open_split(str(folder / "many"), "train", "disc")
    seen = pictures.load(image_set, View(sizes.image_size, 3))
    if device.type == "cuda":
        config = training.Config(image_size=sizes.image_size, ngf=sizes.timed_width, steps=4)
        for precision in precisions:
            with named_fault(findings, f"a training as a CUDA graph, {precision}"):
                compare_training_graphs(
                    findings, partial(training.our_training, seen, precision, config, device), precision
                )
    tables = findings.tables["training"] = {}
    for batch in sizes.training_batches:
        config = training.Config(image_size=sizes.image_size, ngf=sizes.timed_width, batch_size=batch)
        config = replace(config, steps=sizes.training_steps)
        usual, image_steps = training.usual_steps(image_set, config, device), batch * config.steps
        turns = {"usual loop": (lambda usual=usual: list(islice(usual, sizes.training_steps)), image_steps, "fp32")}
        kinds = [(precision, *kind) for precision in precisions for kind in graph_kinds(device).items()]
        if device.type == "cuda":
            kinds += [(precisions[0], *kind) for kind in cudnn_kinds(", graph").items()]
        for precision, kind, inside in kinds:
            work = partial(within, inside, training.our_training(seen, precision, config, device)[0])
            turns[f"ours, {precision}{kind}"] = (work, image_steps, precision)
        table = measure.take_turns(turns, sizes.repeats, device)
        for row in table.values():
            row["images_per_second"] = 1e3 / row["ms_per_image_step"]["median"]
            row["seconds_for_100_epochs_of_4000"] = 400_000 / row["images_per_second"]
        keep_table(findings, tables, f"batches of {batch}", table)


def time_scripts(
    findings: Findings, sizes: Sizes, precisions: tuple[str, ...], device: torch.device, folder: Path
) -> None:
    """Seconds of the scripts themselves, with all that they read and write, in the first precision."""
    run_dir = folder / "many-run"
    shape = {"image_size": sizes.image_size, "ngf": sizes.timed_width, "ndf": sizes.timed_width, "generator_steps": 3}
    config = train_gan.Config(str(folder / "many"), "disc", **shape, epochs=sizes.script_epochs, run_dir=run_dir)
    config = replace(config, device=str(device), precision=precisions[0])
    settings = {"splits": ("test",), "candidates": sizes.candidates, "steps": sizes.timed_steps}
    search = fit_latent.Config(run_dir, **settings, device=str(device), precision=precisions[0])
    table = findings.tables["scripts"] = {}
    for script, work, images_seen in (
        ("train_gan.py", partial(train_gan.main, config), sizes.script_epochs * sizes.script_pictures[0]),
        ("fit_latent.py", partial(fit_latent.main, search), sizes.script_pictures[1]),
    ):
        with quiet():
            seconds = measure.timed(work, device)[0]
        table[script] = {"images": images_seen, "seconds": seconds}
        print(f"{script}: {images_seen} images in {seconds:.1f} s", flush=True)
        findings.write()


def keep_table(findings: Findings, tables: dict[str, Any], name: str, table: dict[str, dict]) -> None:
    """Print a table of `measure.take_turns`, and write it among these."""
    print(name)
    measure.print_turns(table)
    tables[name] = table
    findings.write()


# ---- the table ------------------------------------------------------------------------------------------------------


def to_markdown(content: dict[str, Any]) -> str:
    """All that was found, as gpu_check.md shows it."""
    lines = [f"{content['hardware']}, PyTorch {content['torch']}, commit {content['git_commit']}", ""]
    if content["checks"]:
        lines += ["| comparison | holds | found | at most | because |", "|---|---|---|---|---|"]
        for row in content["checks"]:
            holds = "yes" if row["holds"] else "**no**"
            lines.append(f"| {row['name']} | {holds} | {found_in(row)} | {row['limit']:.3g} | {row['reason']} |")
        lines.append("")
    tables = {(part, name): table for part in ("search", "training") for name, table in content.get(part, {}).items()}
    for (part, name), table in tables.items():
        whole = "10,000 images in" if part == "search" else "100 epochs of 4,000 in"
        shares = "peak GFLOP/s | share of it | share of the convolutions' peak"
        lines += ["", f"| {part}, {name} | images/s | times the usual loop | GFLOP/s | {shares} | {whole} |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        for name, row in table.items():
            seconds = row.get("seconds_for_10000_images") or row["seconds_for_100_epochs_of_4000"]
            lines.append(
                f"| {name} | {row['images_per_second']:.4g} | {row['ratio']['median']:.3g} | "
                f"{row['gflop_per_second']:.4g} | {row['peak_gflop_per_second']:.4g} | {row['share_of_peak']:.2f} | "
                f"{row['share_of_convolution_peak']:.2f} | {seconds:.4g} s |"
            )
    if "scripts" in content:
        lines += ["", "| script | images | seconds |", "|---|---|---|"]
        for script, row in content["scripts"].items():
            lines.append(f"| `{script}` | {row['images']} | {row['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
