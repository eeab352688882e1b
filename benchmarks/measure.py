"""What the benchmarks share: seconds, FLOP, the machine's peak, the end of a search, what a run folder says, and the
half of its test pictures that figures are of."""

import contextlib
import csv
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import evaluate
import fit_latent
import util
from anogan import files, images, loading, runs, scores, scoring
from anogan.scoring import ScoredSplit

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs"  # where the benchmarks write
BATCH_SIZE = 64  # images that are searched at once
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """How many seconds a piece of work takes, on the device too, and what it returns."""
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def take_turns(
    rows: dict[str, tuple[Callable[[], object], int, str]], repeats: int, device: torch.device
) -> dict[str, dict]:
    """Time pieces of work one after the other, `repeats` times over; a table row each, compared with the first.

    `rows` has by name a piece of work, its number of image-steps (images times steps) and its precision, which says
    the peak that it is compared with. Each piece runs once before it is timed, on a GPU twice: the second time it makes
    its CUDA graph.
    """
    flop = {name: count_flop(work) / image_steps for name, (work, image_steps, _) in rows.items()}
    if device.type == "cuda":
        for work, _, _ in rows.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in rows}
    peaks: dict[str, list[dict[str, float]]] = {precision: [] for _, _, precision in rows.values()}
    for _ in tqdm(range(repeats), "turns", leave=False):
        for precision, measured in peaks.items():
            measured.append(peak_flop_rates(precision, device))
        for name, (work, image_steps, _) in rows.items():
            times[name].append(timed(work, device)[0] / image_steps)
    usual = next(iter(times.values()))
    table = {}
    for name, values in times.items():
        measured, rate = peaks[rows[name][2]], flop[name] / statistics.median(values)
        peak = {kind: statistics.median(rates[kind] for rates in measured) for kind in measured[0]}
        table[name] = {
            "ms_per_image_step": spread([1e3 * value for value in values]),
            "gflop_per_image_step": flop[name] / 1e9,
            "gflop_per_second": rate / 1e9,
            "peak_gflop_per_second": max(peak.values()) / 1e9,
            "share_of_peak": rate / max(peak.values()),
            "share_of_convolution_peak": rate / peak["convolution"],
            "ratio": spread([theirs / ours for theirs, ours in zip(usual, values, strict=True)]),
        }
    return table


def print_turns(table: dict[str, dict]) -> None:
    """The table of `take_turns`."""
    width = max(map(len, (*table, "per image-step")))
    print(f"{'per image-step':<{width}}      ms  GFLOP  GFLOP/s  share of peak  times faster [min, max]")
    for name, row in table.items():
        ratio = row["ratio"]
        print(
            f"{name:<{width}} {row['ms_per_image_step']['median']:>7.3g} {row['gflop_per_image_step']:>6.2f} "
            f"{row['gflop_per_second']:>8.0f} {row['share_of_peak']:>14.2f} "
            f"{ratio['median']:>8.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]",
            flush=True,
        )


def without_graphs() -> contextlib.AbstractContextManager:
    """Inside, no step becomes a CUDA graph."""
    return patch.object(util, "captured", lambda step, device: step)


def count_flop(work: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions and matrix products in a piece of work."""
    with FlopCounterMode(display=False) as counter, without_graphs():
        work()  # the operations of a graph do not pass through PyTorch
    return counter.get_total_flops()


def peak_flop_rates(precision: str, device: torch.device) -> dict[str, float]:
    """FLOP/s of a matrix product, and of the best of four convolutions of DCGAN's sizes in channels_last."""
    options = {"dtype": DTYPES[precision], "device": device}
    side_of_matrix, batch = (8192, 1024) if device.type == "cuda" else (2048, 64)  # small ones keep no GPU busy
    matrix = torch.randn(side_of_matrix, side_of_matrix, **options)
    product = best_flop_rate(lambda: matrix @ matrix, 2 * side_of_matrix**3, device)
    convolutions = []
    # channels in, channels out, side of the input, kernel, stride
    for narrow, wide, side, kernel, stride in (
        (64, 128, 32, 4, 2),
        (128, 256, 16, 4, 2),
        (256, 512, 8, 4, 2),
        (256, 256, 16, 3, 1),
    ):
        x = torch.randn(batch, narrow, side, side, **options).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(wide, narrow, kernel, kernel, **options).contiguous(memory_format=torch.channels_last)
        flop = 2 * batch * (side // stride) ** 2 * kernel**2 * narrow * wide
        convolutions.append(best_flop_rate(partial(conv2d, x, weight, stride=stride, padding=1), flop, device))
    return {"matrix product": product, "convolution": max(convolutions)}


@torch.no_grad()
def best_flop_rate(work: Callable[[], Any], flop: int, device: torch.device) -> float:
    """FLOP/s of the fastest of four runs of a piece of work."""
    return flop / min(timed(work, device)[0] for _ in range(4))


def validation_images(gan: runs.TrainedGAN, count: int) -> torch.Tensor:
    """The first `count` validation normals (N, C, H, W) in [-1, 1], in channels_last on the GAN's device."""
    validation = runs.open_split(gan, "validation").take(slice(count))
    pixels, _ = loading.load_images(validation, gan.view)
    return images.to_model(pixels, gan.device).contiguous(memory_format=torch.channels_last)


def search_loss(gan: runs.TrainedGAN, x: torch.Tensor, z: torch.Tensor, config: fit_latent.Config) -> torch.Tensor:
    """The loss (N,) that our search for images x (N, C, H, W) ends at, from z (N, latent_dim)."""
    _, *found = fit_latent.search((gan.generator, gan.discriminator), x, z, config)
    return util.anomaly_score(*found, config.discrimination_weight)


def test_rows(run_dir: Path) -> tuple[list[dict[str, str]], np.ndarray]:
    """The rows of the test split in a run's scores.csv, and which are anomalies (N,). Raises InputError without one."""
    if not (run_dir / "scores.csv").is_file():
        raise util.InputError(f"{run_dir} has no scores.csv: run evaluate.py first")
    with (run_dir / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    return rows, np.array([row["is_anomaly"] == "1" for row in rows])


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """A run's metrics.json, {} without one. Raises InputError if it is of other files than those in the folder now."""
    metrics = files.read_json(run_dir / "metrics.json")
    for name, fingerprint in metrics.get("files", {}).items():
        path = run_dir / name
        if not path.is_file() or files.fingerprint(path) != fingerprint:
            raise util.InputError(f"{run_dir}/metrics.json is of another {name}: run evaluate.py again")
    return metrics


def read_verdict(run_dir: Path) -> dict[str, Any]:
    """What evaluate.py last judged a run by, with which alpha. Raises InputError without it, or as `read_metrics`."""
    verdict = read_metrics(run_dir).get("threshold")
    if verdict is None:
        raise util.InputError(
            f"{run_dir} was not evaluated, it has no metrics.json with a verdict: run evaluate.py first"
        )
    return verdict


def score_again(gan: runs.TrainedGAN, score: str, skip_unreadable: bool) -> dict[str, ScoredSplit]:
    """Validation and test pictures of a run with what a score needs, and their heat maps.

    Raises InputError without heat maps, or as `scoring.score_run` does.
    """
    judged = next(each for each in scores.declared_for(gan, evaluate.SCORES) if each.name == score)
    needed = (score, judged.pooled_of, *judged.parts)
    declared = [each for each in evaluate.SCORES if each.name in needed or each.map is not None]
    image_sets = {split: runs.open_split(gan, split) for split in ("validation", "test")}
    scored = scoring.score_run(gan, image_sets, declared, scoring.Request(score, True, 256, skip_unreadable))
    if scored["test"].map is None:
        raise util.InputError(f"{gan.run_dir} has no heat maps: see docs/scores.md for what makes them")
    return scored


def seeded_half(label: np.ndarray) -> np.ndarray:
    """The report half (N,) bool of CIFAR-10's test pictures, given their labels (N,): every class in its proportion.

    Scores were chosen on the other half.
    """
    return ~np.isin(np.arange(len(label)), images.stratified_subset(label, len(label) // 2, seed=0))


def report_half(rows: list[dict[str, str]], group_by: str | None) -> np.ndarray:
    """The report half (N,) bool of a run's test pictures, given their rows in scores.csv.

    Of CIFAR-10 it is the seeded one. Of a run whose `group_by` keeps pictures together it is every other group, else
    every other picture, from the second on. Settings were chosen on the other half.
    """
    if {row["class_name"] for row in rows} == set(CIFAR10):
        return seeded_half(np.array([int(row["label"]) for row in rows]))
    place = np.arange(len(rows))
    if group_by is not None:
        _, place = np.unique([images.group_of(row["source"], group_by) for row in rows], return_inverse=True)
    return place % 2 == 1


def aucs_of_halves(
    rows: list[dict[str, str]], is_anomaly: np.ndarray, in_report: np.ndarray
) -> dict[str, tuple[float, float]]:
    """ROC-AUC of each score in rows of scores.csv, on the report half and on the other, the development half."""
    about = {"split", "index", "source", "label", "class_name", "is_anomaly", "p_value", "flagged"}
    return {
        name: tuple(
            float(roc_auc_score(is_anomaly[half], np.array([float(row[name]) for row in rows])[half]))
            for half in (in_report, ~in_report)
        )
        for name in rows[0]
        if name not in about
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table that were measured so far."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    """All rows of a table, whole or not at all."""
    with files.replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def about(device: torch.device) -> dict[str, str | None]:
    """What a figure depends on, apart from the work itself: hardware, PyTorch and the commit."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")  # Linux only; the name of the processor is in the line "model name"
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor() or platform.machine()
        hardware = f"{util.cores()} cores, {name}, {torch.backends.cpu.get_cpu_capability()}"
    return {"hardware": hardware, "torch": torch.__version__, "git_commit": runs.git_commit()}


def about_gan(gan: runs.TrainedGAN) -> dict[str, Any]:
    """Which GAN a figure belongs to."""
    return {
        "dataset": Path(gan.dataset).name,  # where a folder stood says nothing about the figures
        "normal_class": gan.normal_class,
        "image_size": gan.image_size,
        "ngf": gan.ngf,
        "epochs": gan.epoch,
        "gan": gan.fingerprint[:12],
    }
