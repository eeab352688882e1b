"""The paper's losses and score; then what every script needs: seeds, device, precision, clear errors."""

import contextlib
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import distributed
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torch.optim import Optimizer

Precision = Literal["auto", "bf16", "fp32"]
Result = TypeVar("Result")  # of a step


# ---- losses and score -----------------------------------------------------------------------------------------------


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


def take_step(optimizer: Optimizer, loss: torch.Tensor) -> None:
    """One step of an optimizer down the gradient of a loss, a tensor of one number."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# ---- seeds, device, precision ---------------------------------------------------------------------------------------


def seed_of(seed: int, *place: int) -> int:
    """A seed of its own for each place of a run (which kind of draw, which step, ...), from the run's seed."""
    return int(np.random.SeedSequence(seed, spawn_key=place).generate_state(1, np.uint64)[0])


def cores() -> int:
    """CPU cores that this process may use: under taskset, or in a container with a cpuset, fewer than the machine has.
    A container's quota does not count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(name: str) -> torch.device:
    """The device of that name: auto, cuda, cuda:1, mps, cpu, ...; `auto` is the first there is of cuda, mps and cpu.

    Under torchrun `cuda` is the GPU that belongs to this process. Raises InputError if this machine does not have the
    device, or if it is a numbered GPU under torchrun, which all processes would share.
    """
    with_torchrun = distributed.is_available() and distributed.is_torchelastic_launched()
    if name == "auto":
        # processes cannot average gradients on mps
        on_mac = torch.backends.mps.is_available() and not with_torchrun
        name = "cuda" if torch.cuda.is_available() else "mps" if on_mac else "cpu"
    if with_torchrun and name.startswith("cuda:"):
        raise InputError(f"--device {name} would put every process of torchrun on one GPU: use --device cuda")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here ({reason}); --device cpu always works") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and nccl go by it
        # or the same command would end in other weights, in fp32 at least; for this reason cudnn.benchmark stays off
        # too: of two deterministic algorithms it chooses the one that happened to be faster
        torch.backends.cudnn.deterministic = True
    return device


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Inside, a GPU computes fp32 in fp32, and not in TF32 with its 10 bits of mantissa: for what is measured."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def pick_precision(name: Precision, device: torch.device) -> str:
    """What convolutions run in, "bf16" or "fp32": weights, losses and optimizers stay fp32 in both.

    `auto` is bf16 where the hardware has native bf16: NVIDIA from Ampere on, x86 with AVX512-BF16 or AMX. On these
    GPUs PyTorch computes fp32 convolutions in TF32, with 10 bits of mantissa, but for what `full_precision` holds.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and has_bf16 else "fp32"


def captured(step: Callable[..., Result], device: torch.device) -> Callable[..., Result]:
    """The same step for many calls: on a CUDA device its kernels are launched as one, a CUDA graph, from the fourth on.

    Small batches keep a GPU busy for less time than Python needs to launch their kernels. A graph knows addresses and
    nothing else. So the step's arguments, tensors of the same shapes at each call, are copied to where the graph finds
    them, and whatever else differs from call to call must lie in tensors that stay. What a call returns is overwritten
    by the next one. On other devices it is the step itself, and with torchrun, where a graph was not tried.
    """
    if device.type != "cuda" or (distributed.is_available() and distributed.is_initialized()):
        return step
    stream, graph, number = torch.cuda.Stream(device), torch.cuda.CUDAGraph(), count(1)
    places: list[torch.Tensor] = []
    result = None

    def call(*arguments: torch.Tensor) -> Result:
        nonlocal result
        if not places:
            places.extend(torch.empty_like(argument) for argument in arguments)
        for place, argument in zip(places, arguments, strict=True):
            place.copy_(argument)
        call_number = next(number)
        if call_number <= 3:  # as they are: libraries and optimizers allocate on their first calls, which no graph may
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                result = step(*places)
            torch.cuda.current_stream(device).wait_stream(stream)
            return result
        if call_number == 4:
            with torch.cuda.graph(graph, stream=stream):  # notes the step, and does nothing
                result = step(*places)
        graph.replay()
        return result

    return call


def in_words(device: torch.device, precision: str) -> str:
    """A device and what `pick_precision` chose on it, for the first line that a script prints."""
    is_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return f"{device}, {precision}{' (no fast bf16 on this GPU)' if is_old else ''}"


# ---- clear errors ---------------------------------------------------------------------------------------------------


class InputError(Exception):
    """Bad input. The message is one line that names what is wrong and what to do about it."""


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End the process with one line on stderr: exit code 1 on bad input or lack of memory, 130 on Ctrl-C.

    Whatever is not understood keeps its traceback.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be text that the terminal knows
    try:
        yield
    except (InputError, BrokenPipeError) as error:  # the second: `python evaluate.py | head`
        sys.exit(f"error: {' '.join(str(error).split())}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {str(error).splitlines()[0]} Lower --batch-size")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # torch's message, at any moment, that one of them was killed
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


def quoted(path: Path | str) -> str:
    """A path as it must be typed in a shell, for the commands that messages name."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    # what cannot be printed cannot be typed either: its bytes, as bash and zsh read them
    plain = set(range(32, 127)) - set(b"'\\")
    return "$'" + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(text)) + "'"


def printable(text: str) -> str:
    """A text in one line, with an escape such as \\n, \\x1b or \\udcff for each character that is none to print: a name
    of a file or a folder may hold any."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def check_at_least(config: Any, minimum: float, *names: str) -> None:
    """Raise InputError, naming the flag, if one of these fields of a config is less than `minimum`, or infinite.

    None is neither: it stands for a value that a script finds for itself.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not minimum <= value < math.inf:  # also catches NaN
            finite = " and finite" if value == math.inf else ""
            raise InputError(f"--{name.replace('_', '-')} must be at least {minimum:g}{finite}, not {value}")


def check_share(config: Any, *names: str) -> None:
    """Raise InputError, naming the flag, if one of these fields of a config does not lie between 0 and 1. None may."""
    for name in names:
        if (share := getattr(config, name)) is not None and not 0 < share < 1:
            raise InputError(f"--{name.replace('_', '-')} must lie between 0 and 1, not {share}")


def check_seed(seed: int, flag: str = "--seed") -> None:
    """Raise InputError, naming the flag, unless every generator takes this seed."""
    if not 0 <= seed < 2**63:
        raise InputError(f"{flag} must lie between 0 and 2**63 - 1, not {seed}")
