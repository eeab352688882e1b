"""What two or more scripts share: errors, devices and processes, the losses."""

import contextlib
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from tqdm import tqdm

Precision = Literal["auto", "bf16", "fp32"]


# ---- errors ---------------------------------------------------------------------------------------------------------


class InputError(Exception):
    """Bad input. The message is one line that names what is wrong and what to do about it."""


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End the process with one line on stderr: exit code 1 on bad input or lack of disk or memory, 130 on Ctrl-C."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be text that the terminal knows
    try:
        yield
    except (InputError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {str(error).splitlines()[0]} Lower --batch-size")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # torch's way to say, at any moment, that one of them was killed
            raise
        sys.exit(f"error: a process that decodes images ended ({error}): is there enough memory?")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; every file written is whole", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def help_text(doc: str) -> str:
    """A script's docstring for --help: its paragraphs wrapped to the terminal, its examples as they are.

    The space before each line keeps tyro from joining the lines again.
    """
    width = max(40, min(120, shutil.get_terminal_size().columns)) - 1
    paragraphs = (
        part if part.startswith(" ") else textwrap.fill(part, width, initial_indent=" ", subsequent_indent=" ")
        for part in doc.strip().split("\n\n")
    )
    return "\n\n".join(paragraphs)


def quoted(path: Path) -> str:
    """A path as it must be typed in a shell, for the commands that messages name."""
    return shlex.quote(str(path))


def check_at_least(config: Any, minimum: float, *names: str) -> None:
    """Raise InputError, naming the flag, if one of these fields of a config is less than `minimum`, or infinite.

    None is neither: it stands for a value that a script finds for itself.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not minimum <= value < math.inf:  # also catches NaN
            finite = " and finite" if value == math.inf else ""
            raise InputError(f"--{name.replace('_', '-')} must be at least {minimum:g}{finite}, not {value}")


def check_seed(seed: int) -> None:
    """Raise InputError unless every generator takes this seed."""
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must lie between 0 and 2**63 - 1, not {seed}")


def pick_device(name: str) -> torch.device:
    """The device of that name (cpu, cuda, cuda:1, ...); `cuda` under torchrun is the GPU that belongs to this process.

    Raises InputError if it is not there.
    """
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here ({reason}); --device cpu always works") from error
    return device


def pick_precision(name: Precision, device: torch.device) -> str:
    """What convolutions run in, "bf16" or "fp32": weights, losses and optimizers stay fp32 in both.

    `auto` is bf16 where the hardware multiplies it faster: NVIDIA from Ampere on, x86 with AVX512-BF16 or AMX. On
    these GPUs PyTorch computes fp32 convolutions in TF32, with 10 bits of mantissa, unless it is told otherwise.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    is_faster = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and is_faster else "fp32"


def progress_bar(total: int, unit: str, **options: Any) -> tqdm:
    """Rank 0's bar on stderr: redrawn ten times a second on a terminal, every half minute in a log file."""
    return tqdm(total=total, unit=unit, mininterval=0.1 if sys.stderr.isatty() else 30, disable=rank() > 0, **options)


# ---- processes ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(device: torch.device, patience: timedelta = timedelta(minutes=30)) -> Iterator[tuple[int, int]]:
    """(rank, how many): (0, 1), or what torchrun started, joined to a group. Rank 0 alone prints to stdout.

    `patience` is how long a process waits for another. Raises InputError when another has ended.
    """
    if not distributed.is_torchelastic_launched():
        yield 0, 1
        return
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # for what lies on the CPU, and for gradients
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, timeout=patience)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
            yield rank(), distributed.get_world_size()
    except RuntimeError as error:
        if not any(word in str(error) for word in ("gloo", "Gloo", "NCCL")):
            raise
        raise InputError("another process of this group has ended or cannot be reached: see what it says") from error
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number, from 0; 0 if there is one process only."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def any_process(*flags: bool) -> list[bool]:
    """For each flag, whether it is set in this process or in any other; every process must ask."""
    if not distributed.is_initialized():
        return list(flags)
    numbers = torch.tensor(flags, dtype=torch.int32)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return numbers.bool().tolist()


def from_all(value: Any) -> list[Any]:
    """Every process's value, by rank; every process must ask."""
    if not distributed.is_initialized():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def check_agreement(**facts: Any) -> None:
    """Raise InputError, naming the fact, unless it is the same in every process; every process must ask."""
    for name in facts:
        if len({repr(each[name]) for each in from_all(facts)}) > 1:
            raise InputError(
                f"the processes do not have the same {name.replace('_', ' ')}: every machine needs the same run "
                "folder and data, and --precision as its hardware allows"
            )


def wait_for_all() -> None:
    """Go on when every process has come this far."""
    if distributed.is_initialized():
        distributed.barrier()


@contextlib.contextmanager
def first_here_first() -> Iterator[None]:
    """Let the first process of each machine do this, such as a download, before the others; every process must."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_first:
        wait_for_all()
    yield
    if is_first:
        wait_for_all()


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM only add their number to this list, for a loop to stop where nothing is half done.

    A second one stops at once; under torchrun it does not, since there one Ctrl-C comes twice.
    """
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        if noted and not distributed.is_initialized():
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seed_of(seed: int, *place: int) -> int:
    """A seed of its own for each place of a run (which kind of draw, which step, ...), from the run's seed."""
    return int(np.random.SeedSequence(seed, spawn_key=place).generate_state(1, np.uint64)[0])


# ---- losses ---------------------------------------------------------------------------------------------------------


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """-log D(x) - log(1 - D(G(z))), each averaged over its batch (N,), as one number."""
    real = binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    fake = binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return real + fake


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """-log D(G(z)), the non-saturating loss of Goodfellow et al. 2014, averaged over the batch (N,), as one number."""
    return binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


def residual_loss(x: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """R(z) = Σ|x - G(z)| over an image's pixels, equation 2 of Schlegl et al. 2017: (N, C, H, W) twice to (N,)."""
    return (x - generated).abs().sum((1, 2, 3))


def discrimination_loss(features: torch.Tensor, generated_features: torch.Tensor) -> torch.Tensor:
    """D(z) = Σ|f(x) - f(G(z))| over an image's features, equation 4 (feature matching): (N, F, 4, 4) twice to (N,)."""
    return (features - generated_features).abs().sum((1, 2, 3))


def reference_loss(logits: torch.Tensor) -> torch.Tensor:
    """D̂(z) = -log D(G(z)), equation 3 (Yeh et al. 2016): sigmoid cross-entropy of logits (N,) with the label "real"."""
    return softplus(-logits)


def anomaly_score(residual: Any, discrimination: Any, discrimination_weight: float) -> Any:
    """A(x) = (1 - λ) R + λ D, equation 6, of tensors or arrays of one shape; what the search minimises, equation 5."""
    return (1 - discrimination_weight) * residual + discrimination_weight * discrimination


def izi_f_loss(
    encoder: nn.Module, generator: nn.Module, discriminator: nn.Module, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts of izi_f and of f-AnoGAN's anomaly score (Schlegl et al. 2019): x (N, C, H, W) to (N,) twice.

    A_R = |x - G(E(x))|² / n, over an image's n pixels, and A_D = |f(x) - f(G(E(x)))|² / n_d, over its n_d features. E
    learns to make A_R + κ A_D small for normal images, and the same sum is the score.
    """
    generated = generator(encoder(x))
    features, generated_features = discriminator.features(x), discriminator.features(generated)
    # in the precision of x again, if the networks run in a lower one
    difference = (features.to(x.dtype) - generated_features.to(x.dtype)).square().mean((1, 2, 3))
    return (x - generated.to(x.dtype)).square().mean((1, 2, 3)), difference
