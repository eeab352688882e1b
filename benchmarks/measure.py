"""What the speed benchmarks share: seconds, FLOP, the machine's peak and peak memory, measured in the run itself."""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

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
    rows: dict[str, tuple[Callable[[], object], int]], repeats: int, device: torch.device
) -> dict[str, dict]:
    """Time pieces of work one after the other, `repeats` times over; a table row each, compared with the first.

    `rows` has a piece of work and its number of image-steps (images times steps) by name; a name that ends with "bf16"
    is compared with the peak in bf16. Each piece runs twice before it is timed.
    """
    flop = {name: count_flop(work) / image_steps for name, (work, image_steps) in rows.items()}
    memory = {name: peak_memory_mib(work, device) for name, (work, _) in rows.items()}
    precision = {name: "bf16" if name.endswith("bf16") else "fp32" for name in rows}
    times: dict[str, list[float]] = {name: [] for name in rows}
    peaks: dict[str, list[float]] = {name: [] for name in dict.fromkeys(precision.values())}
    for _ in tqdm(range(repeats), "turns", leave=False):
        for name, measured in peaks.items():
            measured.append(peak_flop_rate(name, device))
        for name, (work, image_steps) in rows.items():
            times[name].append(timed(work, device)[0] / image_steps)
    usual = next(iter(times.values()))
    table = {}
    for name, values in times.items():
        peak, rate = statistics.median(peaks[precision[name]]), flop[name] / statistics.median(values)
        table[name] = {
            "ms_per_image_step": spread([1e3 * value for value in values]),
            "gflop_per_image_step": flop[name] / 1e9,
            "gflop_per_second": rate / 1e9,
            "peak_gflop_per_second": peak / 1e9,
            "share_of_peak": rate / peak,
            "peak_memory_mib": memory[name],
            "ratio": spread([theirs / ours for theirs, ours in zip(usual, values, strict=True)]),
        }
    return table


def print_turns(table: dict[str, dict]) -> None:
    """The table of `take_turns`."""
    print("per image-step      ms  GFLOP  GFLOP/s  share of peak  peak MiB  times faster [min, max]")
    for name, row in table.items():
        ratio = row["ratio"]
        print(
            f"{name:<14} {row['ms_per_image_step']['median']:>7.2f} {row['gflop_per_image_step']:>6.2f} "
            f"{row['gflop_per_second']:>8.0f} {row['share_of_peak']:>14.2f} {row['peak_memory_mib'] or 0:>9} "
            f"{ratio['median']:>8.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]"
        )


def count_flop(work: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions and matrix products in a piece of work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_flop_rate(precision: str, device: torch.device) -> float:
    """FLOP/s of the best of a matrix product and four convolutions of DCGAN's sizes, channels_last, batch 64."""
    options = {"dtype": DTYPES[precision], "device": device}
    matrix = torch.randn(2048, 2048, **options)
    pieces = [(lambda: matrix @ matrix, 2 * 2048**3)]
    # channels in, channels out, side of the input, kernel, stride
    for narrow, wide, side, kernel, stride in (
        (64, 128, 32, 4, 2),
        (128, 256, 16, 4, 2),
        (256, 512, 8, 4, 2),
        (256, 256, 16, 3, 1),
    ):
        x = torch.randn(64, narrow, side, side, **options).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(wide, narrow, kernel, kernel, **options).contiguous(memory_format=torch.channels_last)
        flop = 2 * 64 * (side // stride) ** 2 * kernel**2 * narrow * wide
        pieces.append((lambda x=x, weight=weight, stride=stride: conv2d(x, weight, stride=stride, padding=1), flop))
    with torch.no_grad():
        return max(flop / min(timed(work, device)[0] for _ in range(4)) for work, flop in pieces)


def peak_memory_mib(work: Callable[[], object], device: torch.device) -> int | None:
    """Most memory held during a piece of work: the GPU's, or on Linux this process's; None elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) // 2**20
    if sys.platform != "linux":
        return None
    Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
    work()
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) // 2**10


def hardware(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0].split(':')[1].strip()}, {torch.backends.cpu.get_cpu_capability()}"
