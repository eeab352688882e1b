"""A run folder: who holds it, its gan.pt and the images of that GAN, and run.json, how each script ran."""

import contextlib
import copy
import dataclasses
import hashlib
import io
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision
from filelock import FileLock, Timeout
from torch import nn

from anogan import files, images, kept, loading, pictures, processes
from anogan.decoding import View
from network import Discriminator, Generator, fold_batchnorm
from util import InputError, full_precision, quoted


@contextlib.contextmanager
def run_folder(run_dir: Path) -> Iterator[None]:
    """Hold a run folder for this process (with torchrun, rank 0 does it for all), and remove partial files in it.

    Raises InputError if another process holds it, or its run.json, which every script adds to at its end, is damaged.
    """
    if processes.rank() > 0:
        yield
        return
    with files.writing(run_dir / ".lock"):
        try:
            lock = FileLock(run_dir / ".lock", blocking=False).acquire()
        except Timeout as error:
            raise InputError(
                f"another process is at work in {run_dir}: wait for it to end, or name another run with --run-dir"
            ) from error
    with lock:
        for pattern in ("", "latents-*/"):
            for partial in run_dir.glob(f"{pattern}{files.PARTIAL}[0-9]*-*"):
                partial.unlink()
        read_record(run_dir)
        yield


def find_run(run_dir: Path | None) -> Path:
    """`run_dir`, or the folder under outputs/ whose gan.pt is newest. Raises InputError if there is no gan.pt."""
    if run_dir is None:
        trained = sorted(Path("outputs").glob("*/gan.pt"), key=lambda path: path.stat().st_mtime)
        if not trained:
            raise InputError("no outputs/*/gan.pt here: run train_gan.py first, or name a run with --run-dir")
        return trained[-1].parent
    with files.reading(run_dir):
        is_there = (run_dir / "gan.pt").is_file()
    if not is_there:
        raise InputError(
            f"{run_dir} has no gan.pt: run train_gan.py --run-dir {quoted(run_dir)} first, or name another run"
        )
    return run_dir


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading_checkpoint(path: Path, command: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The content of what `command` wrote, and its fingerprint. Raises InputError if it is damaged, foreign, or holds
    more than plain data, whether that shows at once or when the block uses it."""
    with files.reading(path):
        content = path.read_bytes()
    with naming_damage(path, command):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        yield state, hashlib.sha256(content).hexdigest()


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write plain data and tensors, whole or not at all."""
    content = io.BytesIO()  # torch.save to a path reports a full disk as something else than an OSError
    torch.save(state, content)
    with files.replacing(path) as partial:
        partial.write_bytes(content.getbuffer())


@contextlib.contextmanager
def naming_damage(path: Path, command: str) -> Iterator[None]:
    """Raise InputError, naming the file and the command that writes it, for whatever the block raises."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch.load raises almost anything on bytes that are not its own
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'}"
        raise InputError(
            f"{path} is damaged or was not written by this {command}, and nothing in it was run ({reason}): "
            f"remove {path.name} and run {command} again, or name another run with --run-dir"
        ) from error


def freeze(network: nn.Module, device: torch.device) -> None:
    """Make a network ready for search and scores: eval mode, no gradients, BatchNorm folded away, on the device."""
    network.eval().requires_grad_(False)
    _fold_ladders(network)
    network.to(device, memory_format=torch.channels_last)


def cast(networks: Sequence[nn.Module], to: torch.dtype) -> list[nn.Module]:
    """Copies of frozen networks whose weights are of another type, for all steps of a batch: the gradients are those of
    autocast, which casts all weights of a frozen network anew at each step."""
    return [copy.deepcopy(network).to(to) for network in networks]


def _fold_ladders(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential):
            setattr(module, name, fold_batchnorm(child))
        else:
            _fold_ladders(child)


@dataclasses.dataclass(frozen=True)
class TrainedGAN:
    """What gan.pt holds for the search and the scores; both networks are as `freeze` leaves them."""

    run_dir: Path
    generator: Generator
    discriminator: Discriminator
    dataset: str  # where it lies now
    normal_class: str
    group_by: str | None  # what kept pictures together when validation was chosen, see `images.list_split`
    image_size: int
    image_channels: int
    levels: tuple[float, float] | None  # this and the next four: see `decoding.View`
    max_megapixels: float
    picture_size: int | Literal["own"] | None
    fit: Literal["crop", "stretch", "pad"]
    normalise: bool
    augment: pictures.Augment | None  # how pictures or patches were turned at random in training
    latent_dim: int
    ngf: int
    ndf: int
    batch_size: int
    epoch: float  # how many epochs it was trained for
    training_images: str  # how many, and a checksum of the names and bytes of the files
    fingerprint: str  # SHA-256 of the file: what was made with it names it

    @property
    def device(self) -> torch.device:
        """Where both networks are."""
        return next(self.generator.parameters()).device

    @property
    def view(self) -> View:
        """How both networks see a picture."""
        seen = {name: getattr(self, name) for name in ("levels", "max_megapixels", "fit", "picture_size", "normalise")}
        return View(self.image_size, self.image_channels, **seen)

    @property
    def sees(self) -> str:
        """What one image of both networks is."""
        return "patches" if self.view.has_patches else "images"

    def to_model(self, images_or_patches: torch.Tensor) -> torch.Tensor:
        """uint8 (N, C, H, W) as both networks take them, on their device, see `images.to_model`."""
        x = images.to_model(images_or_patches, self.device, self.view.normalise)
        return x.contiguous(memory_format=torch.channels_last)


def load_gan(
    run_dir: Path, device: torch.device, dataset: str | None = None, max_megapixels: float | None = None
) -> TrainedGAN:
    """G and D of `run_dir`/gan.pt, frozen.

    `dataset` says where its data set lies now, which the run folder then remembers; `max_megapixels` replaces the limit
    of the training. Raises InputError if the training images there are others, and as `reading_checkpoint` does.
    """
    with reading_checkpoint(run_dir / "gan.pt", "train_gan.py") as (state, fingerprint):
        config = state["config"]
        weights = state["generator"], state["discriminator"]
        names = ("group_by", "image_size", "latent_dim", "ngf", "ndf", "batch_size", "training_images")
        about = {
            **{name: config[name] for name in (*names, "picture_size", "fit", "augment")},
            **{name: state[name] for name in ("dataset", "normal_class", "epoch", "levels")},
            "normalise": config["normalise"] is not None,
            "max_megapixels": max_megapixels or state["max_megapixels"],
            "image_channels": state["image_channels"],
            "fingerprint": fingerprint,
        }
    # outside the block above: a fault in network.py is not a damaged gan.pt
    channels = about["image_channels"]
    generator = Generator(about["image_size"], channels, about["latent_dim"], about["ngf"])
    discriminator = Discriminator(about["image_size"], channels, about["ndf"])
    for network, state in zip((generator, discriminator), weights, strict=True):
        with naming_damage(run_dir / "gan.pt", "train_gan.py"):
            network.load_state_dict(state)
        freeze(network, device)
    gan = TrainedGAN(run_dir, generator, discriminator, **about)
    return _at_its_data(gan, dataset)


# What a detector that trains on the GAN's images must share with it, apart from the sizes of its own network
SAME_IMAGES = ("training_images", "image_size", "image_channels", "picture_size", "fit", "normalise", "augment")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a detector's checkpoint holds for its scores."""

    network: nn.Module  # as `freeze` leaves it
    settings: dict[str, Any]  # those that it was trained with
    fingerprint: str  # SHA-256 of the file


def load_trained(
    gan: TrainedGAN, file: str, command: str, part: str, network: nn.Module, same: tuple[str, ...]
) -> Trained:
    """Fill a network from `file` in the run folder of a GAN, where `command` wrote it as `part`, and freeze it.

    `same` are the fields of TrainedGAN that the settings in the file must agree with; `gan` is its fingerprint. Raises
    InputError if one differs or the file is missing, or as `reading_checkpoint` does.
    """
    path, where = gan.run_dir / file, f"--run-dir {quoted(gan.run_dir)}"
    if not path.is_file():
        raise InputError(f"{path} is missing: run {command} {where} first")
    with reading_checkpoint(path, command) as (state, fingerprint):
        settings = state["config"]
        of_gan = {name: gan.fingerprint if name == "gan" else getattr(gan, name) for name in same}
        if other := [name for name in same if settings[name] != of_gan[name]]:
            raise InputError(
                f"{path} was trained for another gan.pt than the one that is there now (other {', '.join(other)}): "
                f"remove {path.name}, and run {command} {where} again"
            )
        network.load_state_dict(state[part])
    freeze(network, gan.device)
    return Trained(network, settings, fingerprint)


def differing_settings(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of the settings that are not the same in both, sorted; one that is missing counts as None."""
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


# ---- the images of a GAN --------------------------------------------------------------------------------------------

MOST_KEPT = 2**33  # bytes of decoded pictures of a split that lie in the run folder at most


def open_split(gan: TrainedGAN, split: str) -> images.ImageSet:
    """A split of the data set that this GAN was trained on.

    Raises InputError if the data set is not where it was, or for `train` and `validation` if it has other training
    images, so that pictures that the GAN has seen may be among `validation`.
    """
    if not data_is_there(gan):
        raise InputError(f"the data set of this run is not in {gan.dataset}: say where it is with --dataset DIR")
    which = gan.normal_class, gan.group_by
    opened = images.open_split(gan.dataset, split, *which)
    if split in ("train", "validation"):
        training = opened if split == "train" else images.open_split(gan.dataset, "train", *which)
        if (found := training.checksum()) != gan.training_images:
            raise InputError(
                f"the training images of {gan.dataset} are not those of gan.pt ({found}, not {gan.training_images}; "
                "some were added, removed, renamed or replaced): put those back, or train again with "
                "train_gan.py --fresh"
            )
    return opened


def keep_decoded(
    gan: TrainedGAN, image_set: images.ImageSet, split: str, skip_unreadable: bool = False
) -> images.ImageSet:
    """A set of pictures of a split whose pixels lie in the run folder, as the networks see them: decoded now, unless
    they were before. More than MOST_KEPT bytes, or than half of what is free on the disk, are not kept, but decoded by
    each script that needs them.

    Every process must call this. Raises InputError for a picture that cannot be read, unless they are to be skipped, or
    if the file cannot be written.
    """
    path = gan.run_dir / f"pictures-{split}.bin"
    found = kept.read(path, gan.fingerprint, gan.view)
    if any(processes.largest(found is None or not found.covers(image_set.index))):
        most = min(MOST_KEPT, shutil.disk_usage(gan.run_dir).free // 2)
        if any(processes.largest(_bytes(gan, image_set) > most)):
            print(f"{split}: more than {most / 2**30:.3g} GiB of pictures are not kept: they are decoded each time")
            return image_set
        if processes.rank() == 0:
            batches = loading.decode_batches(len(image_set), gan.view)
            decoded = loading.seen_batches(image_set, batches, gan.view, skip_unreadable, quiet=True)
            seen = chain.from_iterable(each.items() for each in loading.with_bar(decoded, len(batches)))
            numbered = ((int(image_set.index[row]), each) for row, each in seen)
            kept.write(path, gan.fingerprint, gan.view, image_set.index, numbered)
        processes.wait_for_all()
        # None on another machine without this run folder: it decodes them itself
        found = kept.read(path, gan.fingerprint, gan.view)
    return dataclasses.replace(image_set, kept=found)


def _bytes(gan: TrainedGAN, image_set: images.ImageSet) -> int:
    """How many bytes the pictures of a set have as the networks see them, whether or not they can be read."""
    if not gan.view.has_patches:
        return len(image_set) * gan.image_channels * gan.image_size**2
    return int(loading.seen_sizes(image_set, gan.view).prod(1).sum()) * gan.image_channels


def data_is_there(gan: TrainedGAN) -> bool:
    """Whether the data set of a run is where it was, or where it was said to be; CIFAR-10 and digits need no folder."""
    return gan.dataset in images.EMBEDDED or Path(gan.dataset).is_dir()


def load_training_images(
    image_set: images.ImageSet, view: View, run_dir: Path, skip_unreadable: bool, find_channels: bool = False
) -> pictures.Pictures:
    """A set's pictures, see `pictures.load`. Raises InputError if fewer can be read than a training needs."""
    found = pictures.load(image_set, view, run_dir / pictures.FILE, skip_unreadable, find_channels)
    if len(found) == 0:
        raise InputError(f"none of the {len(image_set)} training images can be read")
    if skipped := len(image_set) - len(found):
        print(f"skipped {skipped} of {len(image_set)} images, which cannot be read")
    if len(found) < min(5, len(image_set)):
        raise InputError(f"{len(found)} of {len(image_set)} training images can be read, too few: replace the others")
    if len(found.turns) < (count := processes.count()):
        raise InputError(f"{len(found)} training images are too few for {count} processes: start fewer")
    return found


def images_of_gan(gan: TrainedGAN, skip_unreadable: bool = False) -> pictures.Pictures:
    """The pictures that gan.pt was trained on.

    Raises InputError if they have changed since, or as `open_split` and `load_training_images` do.
    """
    found = load_training_images(open_split(gan, "train"), gan.view, gan.run_dir, skip_unreadable)
    return dataclasses.replace(found, augment=gan.augment)


@torch.no_grad()
def remembered(
    gan: TrainedGAN,
    name: str,
    fingerprint: str,
    make: Callable[[Iterable[torch.Tensor]], dict[str, torch.Tensor]],
    most: int,
    training: pictures.Pictures | None = None,
) -> dict[str, torch.Tensor]:
    """What a detector makes of its training images or patches, `most` of them, evenly spaced if there are more.

    `make` takes batches of (N, C, H, H) in [-1, 1]. What it returns is kept in <name>-normals.npz in the run folder, so
    that the training images are needed once, by default read from the data set. It is made again for another
    `fingerprint`, that of the checkpoint and of what else it rests on. Raises InputError as `images_of_gan` does.
    """
    path = gan.run_dir / f"{name}-normals.npz"
    kept = _read_normals(path, name, fingerprint)
    if kept is None:
        training = images_of_gan(gan, skip_unreadable=True) if training is None else training
        with full_precision():
            made = make(map(gan.to_model, training.some(most).split(256)))
        kept = {each: value.cpu().numpy() for each, value in made.items()}
        files.write_arrays(path, **kept, **{name: fingerprint})
    return {each: torch.from_numpy(value).to(gan.device) for each, value in kept.items()}


def _read_normals(path: Path, name: str, fingerprint: str) -> dict[str, np.ndarray] | None:
    """What `remembered` has kept; None if nothing, or of another checkpoint, or if the file is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {each: file[each] for each in file.files}
    except Exception as error:  # zipfile and numpy raise almost anything on damaged bytes
        print(f"{path} is damaged ({error}): making it again")
        return None
    return arrays if str(arrays.pop(name, "")) == fingerprint else None


def keep_place(run_dir: Path, dataset: str, training_images: str) -> None:
    """Remember in dataset.json where a run's data set lies, for as long as its training images are these."""
    if processes.rank() == 0:
        files.write_json(run_dir / "dataset.json", {"dataset": dataset, "training_images": training_images})


def _at_its_data(gan: TrainedGAN, dataset: str | None) -> TrainedGAN:
    """The GAN with its data set where it is now: where `dataset` says, else where the run folder remembers it."""
    if dataset is None:
        kept = files.read_json(gan.run_dir / "dataset.json")
        is_ours = kept.get("training_images") == gan.training_images
        return dataclasses.replace(gan, dataset=kept["dataset"]) if is_ours else gan
    if dataset != gan.dataset and (dataset in images.EMBEDDED or gan.dataset in images.EMBEDDED):
        raise InputError(f"--dataset {dataset} is not where the pictures of this run lie now: it is of {gan.dataset}")
    moved = dataclasses.replace(gan, dataset=images.whole_path(dataset))
    open_split(moved, "train")  # raises if it is another one
    keep_place(gan.run_dir, moved.dataset, gan.training_images)
    return moved


# ---- run.json -------------------------------------------------------------------------------------------------------


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
    files.write_json(run_dir / "run.json", record)


def read_record(run_dir: Path) -> dict[str, dict]:
    """What `record_run` wrote to `run_dir`/run.json, by script. Raises InputError if it is damaged."""
    return files.read_json(run_dir / "run.json")


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
    """The commit of this code, with -dirty if it was edited since; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
