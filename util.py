"""What two or more scripts share: errors, devices and processes, the losses, run files out and checked back in."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision
from filelock import FileLock, Timeout
from torch import distributed
from torch.nn.functional import softplus
from tqdm import tqdm

from network import Discriminator, Generator, fold_batchnorm

Precision = Literal["auto", "bf16", "fp32"]
PARTIAL = ".partial-"  # how the names of half-written files begin
PER_IMAGE = ("z", "residual", "discrimination", "label", "index", "source")  # arrays of latents-<split>.npz ...
ABOUT = ("split", "gan", "search", "asked_for")  # ... and what it says about them all
BASELINES = ("oc_svm", "kde", "isolation_forest")  # scores in baselines-<split>.npz


# ---- errors ---------------------------------------------------------------------------------------------------------


class InputError(Exception):
    """Bad input. The message is one line that names what is wrong and what to do about it."""


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End the process with one line on stderr: exit code 1 on bad input or lack of disk or memory, 130 on Ctrl-C."""
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


def check_at_least(config: Any, minimum: float, *names: str) -> None:
    """Raise InputError, naming the flag, if one of these fields of a config is less than `minimum`."""
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:  # also catches NaN
            raise InputError(f"--{name.replace('_', '-')} must be at least {minimum:g}, not {value}")


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


# ---- losses (Schlegl et al. 2017) -----------------------------------------------------------------------------------


def residual_loss(x: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """R(z) = Σ|x - G(z)| over an image's pixels, equation 2: (N, C, H, W) twice to (N,)."""
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


# ---- run files out, and checked back in -----------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` when the block ends, and is removed if the block fails.

    `path` is whole at any moment, after a power cut too. Raises InputError if it cannot be written.
    """
    # The ending stays as it is, because np.savez and savefig go by it.
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # the content must be on the disk before the name is
        os.replace(partial, path)
    except OSError as error:  # disk full, read-only, ...: some of these do not name the file
        raise InputError(f"cannot write {path} ({error.strerror or error}); what stood there is unchanged") from error
    finally:
        with contextlib.suppress(OSError):  # what a read-only folder refuses to remove was never there
            partial.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # not every network file system can; there the new name is on the disk later
            os.fsync(folder)
        os.close(folder)


@contextlib.contextmanager
def run_folder(run_dir: Path) -> Iterator[None]:
    """Hold a run folder for this process (with torchrun, rank 0 does it for all), and clear away what killed ones left.

    Raises InputError if another process holds it, or its run.json, which every script adds to at its end, is damaged.
    """
    if rank() > 0:
        yield
        return
    try:
        lock = FileLock(run_dir / ".lock", blocking=False).acquire()
    except Timeout as error:
        raise InputError(
            f"another process is at work in {run_dir}: wait for it to end, or name another run with --run-dir"
        ) from error
    with lock:
        for pattern in ("", "latents-*/"):
            for partial in run_dir.glob(f"{pattern}{PARTIAL}[0-9]*-*"):
                partial.unlink()
        read_record(run_dir)
        yield


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def find_run(run_dir: Path | None) -> Path:
    """`run_dir`, or the folder under outputs/ whose gan.pt is newest. Raises InputError if there is no gan.pt."""
    if run_dir is None:
        trained = sorted(Path("outputs").glob("*/gan.pt"), key=lambda path: path.stat().st_mtime)
        if not trained:
            raise InputError("no outputs/*/gan.pt here: run train_gan.py first, or name a run with --run-dir")
        return trained[-1].parent
    if not (run_dir / "gan.pt").is_file():
        raise InputError(f"{run_dir} has no gan.pt: run train_gan.py --run-dir {run_dir} first, or name another run")
    return run_dir


@dataclasses.dataclass(frozen=True)
class TrainedGAN:
    """What gan.pt holds for the search and the scores; both networks are frozen, their BatchNorm folded away."""

    generator: Generator
    discriminator: Discriminator
    dataset: str
    classes: list[str]
    normal_class: str
    image_size: int
    image_channels: int
    latent_dim: int
    epoch: float  # how many epochs it was trained for
    fingerprint: str  # SHA-256 of the file: what was fitted with it names it


@contextlib.contextmanager
def reading_gan(run_dir: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The content of `run_dir`/gan.pt and its fingerprint. Raises InputError if it is damaged, foreign, or holds more
    than plain data, whether that shows at once or when the block uses it."""
    path = run_dir / "gan.pt"
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        yield state, hashlib.sha256(content).hexdigest()
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch.load raises almost anything on bytes that are not its own
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'}"
        raise InputError(
            f"{path} is damaged or was not written by this train_gan.py, and nothing in it was run ({reason}): "
            "start over with train_gan.py --fresh, or name another run with --run-dir"
        ) from error


def load_gan(run_dir: Path, device: torch.device) -> TrainedGAN:
    """G and D of `run_dir`/gan.pt as search and scores use them. Raises InputError, see `reading_gan`."""
    with reading_gan(run_dir) as (state, fingerprint):
        config, channels = state["config"], state["image_channels"]
        generator = Generator(config["image_size"], channels, config["latent_dim"], config["ngf"])
        generator.load_state_dict(state["generator"])
        discriminator = Discriminator(config["image_size"], channels, config["ndf"])
        discriminator.load_state_dict(state["discriminator"])
        gan = TrainedGAN(
            generator=generator,
            discriminator=discriminator,
            dataset=config["dataset"],
            classes=state["classes"],
            normal_class=state["normal_class"],
            image_size=config["image_size"],
            image_channels=channels,
            latent_dim=config["latent_dim"],
            epoch=state["epoch"],
            fingerprint=fingerprint,
        )
    for network in (generator, discriminator):
        network.eval().requires_grad_(False)
    generator.layers, discriminator.body = fold_batchnorm(generator.layers), fold_batchnorm(discriminator.body)
    for network in (generator, discriminator):
        network.to(device, memory_format=torch.channels_last)
    return gan


def latents_path(run_dir: Path, split: str, discrimination: str = "features") -> Path:
    """Where the latents of a split are: those of a search by feature matching, or beside them those of another."""
    return run_dir / f"latents-{split}{'' if discrimination == 'features' else f'-{discrimination}'}.npz"


def write_latents(path: Path, arrays: dict[str, np.ndarray], **about: str) -> None:
    """Write a file of latents: of each image what PER_IMAGE names, and about them all what ABOUT names.

    z is (N, latent_dim), the others are (N,). `search` are settings as JSON; `gan` and `asked_for` are fingerprints,
    of gan.pt and of the set of images, which has more than N if some could not be read.
    """
    with replacing(path) as partial:
        np.savez(partial, **{name: arrays[name] for name in PER_IMAGE}, **{name: about[name] for name in ABOUT})


def read_latents(path: Path, split: str, gan: TrainedGAN) -> dict[str, Any]:
    """Read and check what `write_latents` wrote, with `search` as a dict. Raises InputError, see `read_arrays`."""
    shapes = {name: (gan.latent_dim,) if name == "z" else () for name in PER_IMAGE}
    latents = read_arrays(path, "fit_latent.py", split, gan, shapes)
    try:
        latents["search"], latents["asked_for"] = json.loads(str(latents["search"])), str(latents["asked_for"])
        str(latents["search"]["discrimination"]), float(latents["search"]["discrimination_weight"])  # evaluate.py's
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} was not written by this fit_latent.py ({error})") from error
    return latents


def fitted_score(latents: dict[str, Any]) -> np.ndarray:
    """A(x) of what `read_latents` returned (N,), with the λ of its search."""
    weight = latents["search"]["discrimination_weight"]
    return anomaly_score(latents["residual"], latents["discrimination"], weight)


def read_arrays(
    path: Path, script: str, split: str, gan: TrainedGAN, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Read and check an .npz file with arrays of a row an image, of these shapes, and what it says about them all.

    Raises InputError if the file is missing, damaged or foreign, or of another split or gan.pt.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:  # checksums included
            arrays = {name: file[name] for name in file.files}
        count = len(arrays["index"])
        whole = count > 0 and all(arrays[name].shape == (count, *shape) for name, shape in shapes.items())
        whole = whole and all(np.isfinite(arrays[name]).all() for name in shapes if arrays[name].dtype.kind == "f")
        arrays |= {name: str(arrays[name]) for name in ("split", "gan")}
    except Exception as error:  # zipfile and numpy raise almost anything on damaged bytes
        raise InputError(f"{path} is damaged or was not written by this {script} ({error})") from error
    if arrays["gan"] != gan.fingerprint:
        raise InputError(f"{path} belongs to another gan.pt than the one that is there now")
    if arrays["split"] != split:
        raise InputError(f"{path} holds the split {arrays['split']!r}, not {split!r}")
    if not whole:
        raise InputError(f"{path} holds arrays of the wrong shape, no image, or numbers that are not finite")
    return arrays


def record_run(run_dir: Path, script: str, config: Any, device: torch.device, seconds: float, **facts: Any) -> None:
    """Add to `run_dir`/run.json how `script` ran: hyperparameters, versions, device, commit, seconds, peak memory."""
    record = read_record(run_dir)
    record[script] = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 1),
        "hyperparameters": {name: str(v) if isinstance(v, Path) else v for name, v in vars(config).items()},
        "device": _device_name(device),
        "cpu_threads": torch.get_num_threads(),
        "peak_memory_mib": _peak_memory_mib(),
        "peak_gpu_memory_mib": torch.cuda.max_memory_allocated(device) // 2**20 if device.type == "cuda" else None,
        "git_commit": git_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
        },
        **facts,
    }
    write_json(run_dir / "run.json", record)


def read_record(run_dir: Path) -> dict[str, dict]:
    """What `record_run` wrote to `run_dir`/run.json, by script. Raises InputError if it is damaged."""
    path = run_dir / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(record, dict):
            raise ValueError(f"it holds a {type(record).__name__}")
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): remove it and run again") from error
    return record


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})"


def _peak_memory_mib() -> int | None:
    """Most memory this process ever held, or None on Windows, which has no `resource` module."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 2**20 if sys.platform == "darwin" else peak // 2**10  # bytes on macOS, KiB elsewhere


def git_commit() -> str | None:
    """The commit these scripts stand at, with -dirty if they were edited since; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
