"""Run files out, whole or not at all, and checked back in: the networks, latents, run.json."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from filelock import FileLock, Timeout
from torch import nn

import datasets
import util
from network import Discriminator, Encoder, Generator, RotNet, fold_batchnorm
from util import InputError

PARTIAL = ".partial-"  # how the names of half-written files begin
PER_IMAGE = ("z", "residual", "discrimination", "label", "index", "source")  # arrays of latents-<split>.npz ...
ABOUT = ("split", "gan", "search", "asked_for")  # ... and what it says about them all
SIZES = ("image_size", "image_channels", "latent_dim", "ngf", "ndf")  # fields of TrainedGAN that shape the aCAE ...
ROTNET_SIZES = ("image_size", "image_channels", "ndf")  # ... and RotNet
BASELINES = ("oc_svm", "kde", "isolation_forest")  # scores in baselines-<split>.npz


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
    if util.rank() > 0:
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
        raise InputError(
            f"{run_dir} has no gan.pt: run train_gan.py --run-dir {util.quoted(run_dir)} first, or name another run"
        )
    return run_dir


@dataclasses.dataclass(frozen=True)
class TrainedGAN:
    """What gan.pt holds for the search and the scores; both networks are as `freeze` leaves them."""

    generator: Generator
    discriminator: Discriminator
    dataset: str
    classes: list[str]
    normal_class: str
    image_size: int
    image_channels: int
    latent_dim: int
    ngf: int
    ndf: int
    batch_size: int
    epoch: float  # how many epochs it was trained for
    training_set: str  # fingerprint of the split it was trained on, by the images' names
    training_images: str  # how many, and their checksum
    fingerprint: str  # SHA-256 of the file: what was fitted with it names it


@contextlib.contextmanager
def reading_checkpoint(path: Path, script: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The content of what `script` wrote, and its fingerprint. Raises InputError if it is damaged, foreign, or holds
    more than plain data, whether that shows at once or when the block uses it."""
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
            f"{path} is damaged or was not written by this {script}, and nothing in it was run ({reason}): "
            f"start over with {script} --fresh, or name another run with --run-dir"
        ) from error


def freeze(network: Generator | Discriminator | Encoder | RotNet, device: torch.device) -> None:
    """Make a network ready for search and scores: eval mode, no gradients, BatchNorm folded away, on the device."""
    network.eval().requires_grad_(False)
    for name, layers in network.named_children():
        if isinstance(layers, nn.Sequential):
            setattr(network, name, fold_batchnorm(layers))
    network.to(device, memory_format=torch.channels_last)


def load_gan(run_dir: Path, device: torch.device) -> TrainedGAN:
    """G and D of `run_dir`/gan.pt, frozen. Raises InputError, see `reading_checkpoint`."""
    with reading_checkpoint(run_dir / "gan.pt", "train_gan.py") as (state, fingerprint):
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
            ngf=config["ngf"],
            ndf=config["ndf"],
            batch_size=config["batch_size"],
            epoch=state["epoch"],
            training_set=state["training_set"],
            training_images=config["training_images"],
            fingerprint=fingerprint,
        )
    for network in (generator, discriminator):
        freeze(network, device)
    return gan


@dataclasses.dataclass(frozen=True)
class TrainedEncoder:
    """What encoder.pt holds for f-AnoGAN's score and for `fit_latent.py --init encoder`."""

    encoder: Encoder  # as `freeze` leaves it
    kappa: float  # weight of the features in its loss and in the score
    epoch: float
    fingerprint: str  # SHA-256 of the file


def load_encoder(run_dir: Path, gan: TrainedGAN, device: torch.device) -> TrainedEncoder:
    """E of `run_dir`/encoder.pt, frozen. Raises InputError if there is none, or one for another gan.pt, or as
    `reading_checkpoint` does."""
    path = run_dir / "encoder.pt"
    if not path.is_file():
        raise InputError(f"{path} is missing: run train_encoder.py --run-dir {util.quoted(run_dir)} first")
    with reading_checkpoint(path, "train_encoder.py") as (state, fingerprint):
        if state["config"]["gan"] != gan.fingerprint:
            raise InputError(
                f"{path} was trained for another gan.pt than the one that is there now: run train_encoder.py "
                f"--run-dir {util.quoted(run_dir)} --fresh, or remove it"
            )
        encoder = Encoder(gan.image_size, gan.image_channels, gan.latent_dim, gan.ndf)
        encoder.load_state_dict(state["encoder"])
        trained = TrainedEncoder(encoder, float(state["config"]["kappa"]), state["epoch"], fingerprint)
    freeze(encoder, device)
    return trained


@dataclasses.dataclass(frozen=True)
class TrainedBeside:
    """What acae.pt or rotnet.pt holds for the scores of its network."""

    network: nn.Module  # as `freeze` leaves it
    epoch: float
    fingerprint: str  # SHA-256 of the file


def build_acae(gan: TrainedGAN) -> nn.Sequential:
    """E and a decoder like G, of the GAN's sizes: images in [-1, 1] to their reconstructions."""
    return nn.Sequential(
        Encoder(gan.image_size, gan.image_channels, gan.latent_dim, gan.ndf),
        Generator(gan.image_size, gan.image_channels, gan.latent_dim, gan.ngf),
    )


def load_acae(run_dir: Path, gan: TrainedGAN, device: torch.device) -> TrainedBeside:
    """The aCAE of `run_dir`/acae.pt, frozen. Raises InputError, see `_load_beside`."""
    trained = _load_beside(run_dir / "acae.pt", "train_acae.py", "autoencoder", build_acae(gan), SIZES, gan)
    for half in trained.network:
        freeze(half, device)
    return trained


def load_rotnet(run_dir: Path, gan: TrainedGAN, device: torch.device) -> TrainedBeside:
    """RotNet of `run_dir`/rotnet.pt, frozen. Raises InputError, see `_load_beside`."""
    rotnet = RotNet(gan.image_size, gan.image_channels, gan.ndf)
    trained = _load_beside(run_dir / "rotnet.pt", "train_rotnet.py", "rotnet", rotnet, ROTNET_SIZES, gan)
    freeze(rotnet, device)
    return trained


def _load_beside(
    path: Path, script: str, name: str, network: nn.Module, sizes: tuple[str, ...], gan: TrainedGAN
) -> TrainedBeside:
    """Fill a network with what `script` wrote under `name`.

    Raises InputError if its images, or these of its sizes, are others than those of gan.pt, or as `reading_checkpoint`
    does.
    """
    with reading_checkpoint(path, script) as (state, fingerprint):
        if any(state["config"][field] != getattr(gan, field) for field in ("training_images", *sizes)):
            raise InputError(
                f"{path} was trained on other images or with other sizes than gan.pt: run {script} --run-dir "
                f"{path.parent} --fresh, or remove it"
            )
        network.load_state_dict(state[name])
        return TrainedBeside(network, state["epoch"], fingerprint)


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
    return util.anomaly_score(latents["residual"], latents["discrimination"], weight)


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


def differing_settings(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of the settings that are not the same in both, sorted; one that is missing counts as None."""
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def read_fits(run_dir: Path, gan: TrainedGAN, splits: list[str], discrimination: str = "features") -> dict[str, dict]:
    """The latents of these splits, found by feature matching or another discrimination loss.

    Raises InputError if one is missing or not what its name says, or unless all are of one search.
    """

    def again(split: str) -> str:
        guided = "" if discrimination == "features" else f" --discrimination {discrimination}"
        which = " --images with your pictures" if split == "images" else f" --splits {split}" if guided else ""
        return f"run fit_latent.py --run-dir {util.quoted(run_dir)}{guided}{which}"

    latents = {}
    for split in splits:
        path = latents_path(run_dir, split, discrimination)
        try:
            latents[split] = read_latents(path, split, gan)
        except InputError as error:
            raise InputError(f"{error}: {again(split)}") from error
        if latents[split]["search"]["discrimination"] != discrimination:
            raise InputError(f"{path} was not guided by the {discrimination} loss: {again(split)} again")
    expected = latents["validation"]["search"]
    for split, found in latents.items():
        if differing := differing_settings(expected, found["search"]):
            raise InputError(
                f"validation and {split} were fitted with different settings ({', '.join(differing)}): "
                f"{again('validation')} and {again(split)} with the same, or remove the older"
            )
    return latents


def read_baselines(run_dir: Path, gan: TrainedGAN, split: str, index: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of the baselines for the images of these indices (N,), by name, each (N,); none if none were fitted.

    Raises InputError if a file is not what its name says, or lacks one of the images.
    """
    path = run_dir / f"baselines-{split}.npz"
    if not path.is_file():
        return {}
    again = f"run fit_baselines.py --run-dir {util.quoted(run_dir)} --splits {split}"
    try:
        found = read_arrays(path, "fit_baselines.py", split, gan, dict.fromkeys(BASELINES, ()))
    except InputError as error:
        raise InputError(f"{error}: {again} again, or remove it") from error
    rows = np.isin(found["index"], index)  # both in the data set's order
    if not np.array_equal(found["index"][rows], index):
        raise InputError(f"{path} lacks some of the images that were searched: {again} again")
    return {name: found[name][rows] for name in BASELINES}


def open_split(gan: TrainedGAN, split: str) -> datasets.ImageSet:
    """A split of the data set that this GAN was trained on.

    Raises InputError if the classes or the training images' names have changed since, which would move pictures that
    the GAN has seen into `validation`.
    """
    images = datasets.open_split(gan.dataset, split, gan.normal_class)
    if images.classes != gan.classes:
        raise InputError(f"{gan.dataset} has other classes than gan.pt was trained with: train again")
    if split != "test":
        training = images if split == "train" else datasets.open_split(gan.dataset, "train", gan.normal_class)
        if training.fingerprint() != gan.training_set:
            raise InputError(
                f"the training part of {gan.dataset} has other pictures than when gan.pt was trained, so that "
                "validation would not be new to it: put them back, or train again with train_gan.py --fresh"
            )
    return images


def fitted_images(image_set: datasets.ImageSet, split: str, latents: dict) -> datasets.ImageSet:
    """Those images of a set that these latents belong to. Raises InputError if the set has changed since."""
    fitted = image_set.take(np.isin(image_set.index, latents["index"]))  # both in the data set's order
    # from another working directory the same pictures have other sources
    for name in ("index", "label") if split == "images" else ("index", "label", "source"):
        if not np.array_equal(getattr(fitted, name), latents[name]):
            again = "--images with these pictures" if split == "images" else f"--splits {split}"
            raise InputError(
                f"the images of {image_set.name} are not those that latents-{split}.npz was fitted to (other {name}): "
                f"run fit_latent.py {again} again"
            )
    return fitted


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
    return read_json(run_dir / "run.json")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote, {} if there is no such file. Raises InputError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): remove it and run again") from error
    return content


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
