"""What two or more scripts share: images in (data sets and their four splits), the losses, run files out."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.datasets.folder import make_dataset
from torchvision.transforms import CenterCrop, Compose, Resize
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from network import Discriminator, Generator, fold_batchnorm

SPLITS = ("train", "validation", "test", "train_anomalies")
Precision = Literal["auto", "bf16", "fp32"]


# ---- errors ---------------------------------------------------------------------------------------------------------


class InputError(Exception):
    """Bad input. The message is one line that names what is wrong and what to do about it."""


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End the process with one line on stderr and exit code 1 on bad input or file-system trouble (disk full, ...)."""
    try:
        yield
    except (InputError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


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
    """The device of that name (cpu, cuda, cuda:1, ...). Raises InputError if it is not there."""
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
    """A bar on stderr: redrawn ten times a second on a terminal, every half minute in a log file."""
    return tqdm(total=total, unit=unit, mininterval=0.1 if sys.stderr.isatty() else 30, **options)


# ---- images in ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Which images a split holds. `load_images` decodes them."""

    name: str  # of the data set: cifar10, digits or the folder's own name
    classes: list[str]
    index: np.ndarray  # (N,) int64, position in the data set's training or test part
    label: np.ndarray  # (N,) int64, position of the image's class in `classes`
    source: np.ndarray  # (N,) str, the image's name: its path inside the folder, or cifar10/test/00042
    open_image: Callable[[int], Image.Image]  # by index

    def __len__(self) -> int:
        return len(self.index)

    def take(self, positions: np.ndarray | slice) -> "ImageSet":
        """The images at these positions (integers, a mask or a slice) of this set, in that order."""
        return dataclasses.replace(
            self, index=self.index[positions], label=self.label[positions], source=self.source[positions]
        )


def open_dataset(dataset: str, part: str) -> ImageSet:
    """The training or test part ("train" or "test") of `cifar10`, `digits` or a folder in ImageFolder layout.

    Raises InputError if CIFAR-10 cannot be had, or the folder is missing, lacks train/ or test/, or has an empty class.
    """
    if dataset == "cifar10":
        return _open_cifar10(part)
    if dataset == "digits":
        return _open_digits(part)
    return _open_folder(Path(dataset), part)


def _open_cifar10(part: str) -> ImageSet:
    try:
        cifar10 = torchvision.datasets.CIFAR10(root="data", train=part == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"CIFAR-10 is not in data/ and cannot be downloaded ({error}): put cifar-10-python.tar.gz into data/ "
            "and run again, or try --dataset digits, which needs no download"
        ) from error
    return ImageSet(
        name="cifar10",
        classes=cifar10.classes,
        index=np.arange(len(cifar10), dtype=np.int64),
        label=np.array(cifar10.targets, dtype=np.int64),
        source=np.array([f"cifar10/{part}/{i:05d}" for i in range(len(cifar10))]),
        open_image=lambda i: Image.fromarray(cifar10.data[i]),
    )


def _open_digits(part: str) -> ImageSet:
    from sklearn.datasets import load_digits  # a slow import that only this data set needs
    from sklearn.model_selection import train_test_split

    digits = load_digits()  # 1,797 scans of 8x8, grey levels 0 to 16
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    train, test = train_test_split(np.arange(len(pixels)), test_size=0.25, stratify=digits.target, random_state=0)
    members = np.sort(train if part == "train" else test)
    return ImageSet(
        name="digits",
        classes=[str(name) for name in digits.target_names],
        index=np.arange(len(members), dtype=np.int64),
        label=digits.target[members].astype(np.int64),
        source=np.array([f"digits/{part}/{i:04d}" for i in range(len(members))]),
        open_image=lambda i: Image.fromarray(pixels[members[i]]),
    )


def _open_folder(root: Path, part: str) -> ImageSet:
    if not root.is_dir():
        raise InputError(
            f"unknown dataset {str(root)!r}: it must be cifar10, digits or a folder DIR that holds "
            "DIR/train/<class>/ and DIR/test/<class>/"
        )
    for side in ("train", "test"):
        if not (root / side).is_dir():
            raise InputError(
                f"{root} has no folder {side!r}: it must hold {root / 'train'}/<class>/ and {root / 'test'}/<class>/"
            )
    # One numbering for both parts: in MVTec's layout train/ has the class `good` alone.
    classes = sorted({folder.name for side in ("train", "test") for folder in _subfolders(root / side)})
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    samples = make_dataset(
        str(root / part),
        class_to_idx={name: label for label, name in enumerate(classes)},
        # a leading dot marks what file managers leave behind, such as ._photo.jpg
        is_valid_file=lambda path: not Path(path).name.startswith(".") and Path(path).suffix.lower() in endings,
        allow_empty=True,
    )
    paths = [Path(path) for path, _ in samples]
    label = np.array([label for _, label in samples], dtype=np.int64)
    for folder in _subfolders(root / part):
        if classes.index(folder.name) not in label:
            raise InputError(f"the class folder {folder} holds no images: put some in, or remove the folder")
    return ImageSet(
        name=root.resolve().name,
        classes=classes,
        index=np.arange(len(paths), dtype=np.int64),
        label=label,
        source=np.array([path.relative_to(root).as_posix() for path in paths], dtype=np.str_),
        open_image=lambda i: Image.open(paths[i]),
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def class_label(classes: list[str], name: str) -> int:
    """The label of a class given by its name or, if no class has that name, by its index as text. Raises InputError."""
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    raise InputError(f"unknown class {name!r}: choose --normal-class from {', '.join(classes)}, or an index from 0")


def open_split(dataset: str, split: str, normal_class: str) -> ImageSet:
    """One of the four splits of a data set, in the data set's own order.

    `train` is the first 80% of the normal class's training images and `validation` the other 20%; `train_anomalies` is
    every training image of another class; `test` is the data set's own test part. Raises InputError for an unknown
    split, data set or class, and for a normal class with fewer than five training images.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    images = open_dataset(dataset, "test" if split == "test" else "train")
    label = class_label(images.classes, normal_class)
    if split == "test":
        return images
    if split == "train_anomalies":
        return images.take(images.label != label)
    normal = np.flatnonzero(images.label == label)
    if len(normal) < 5:
        with_images = ", ".join(images.classes[i] for i in np.unique(images.label))
        raise InputError(
            f"class {images.classes[label]!r} has {len(normal)} training images in {dataset} and needs 5 or more: "
            f"choose --normal-class from those with training images ({with_images})"
        )
    first = int(0.8 * len(normal))
    return images.take(normal[:first] if split == "train" else normal[first:])


def load_images(
    image_set: ImageSet, image_size: int, image_channels: int, skip_unreadable: bool = False
) -> tuple[torch.Tensor, ImageSet]:
    """Decode images to uint8 (N, image_channels, image_size, image_size); also returns the set of those N images.

    The shorter side is resized to `image_size` (antialiased bilinear), then the centre is cut out. Raises InputError
    for an image that cannot be read, or with `skip_unreadable` names it on stderr and leaves it out.
    """
    to_square = Compose([Resize(image_size), CenterCrop(image_size)])
    pixels = torch.empty(len(image_set), image_channels, image_size, image_size, dtype=torch.uint8)
    readable = []
    rows = enumerate(zip(image_set.index, image_set.source, strict=True))
    bar = {"leave": False, "delay": 1, "disable": None}  # only on a terminal, and if it takes longer than a second
    for row, (index, source) in tqdm(rows, "reading", len(image_set), unit=" images", **bar):
        try:
            image = _to_8_bit(image_set.open_image(index), image_channels)
        except Exception as error:  # a damaged file can make a decoder raise anything
            if not skip_unreadable:
                raise InputError(
                    f"cannot read the image {source} ({error}): mend it, or use --skip-unreadable"
                ) from error
            tqdm.write(f"skipped, cannot be read: {source} ({error})", file=sys.stderr)
            continue
        pixels[len(readable)] = pil_to_tensor(to_square(image))
        readable.append(row)
    return pixels[: len(readable)], image_set.take(np.array(readable, dtype=np.int64))


def _to_8_bit(image: Image.Image, image_channels: int) -> Image.Image:
    """Any image Pillow opens as 8-bit grey or RGB: upright by its EXIF tag, transparent parts on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert("L") would clip at 255 instead of scaling
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its grey levels lie outside 0 to 65535")
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("L" if image_channels == 1 else "RGB")


def to_model(images: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """uint8 images in [0, 255] to float32 in [-1, 1], the range of G's tanh, on `device`."""
    return images.to(device, non_blocking=True).float() / 127.5 - 1


def to_display(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] back to [0, 1], as plots want them."""
    return (images + 1) / 2


# ---- losses (Schlegl et al. 2017) -----------------------------------------------------------------------------------


def residual_loss(x: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """R(z) = Σ|x - G(z)| over an image's pixels, equation 2: (N, C, H, W) twice to (N,)."""
    return (x - generated).abs().sum((1, 2, 3))


def discrimination_loss(features: torch.Tensor, generated_features: torch.Tensor) -> torch.Tensor:
    """D(z) = Σ|f(x) - f(G(z))| over an image's features, equation 4 (feature matching): (N, F, 4, 4) twice to (N,)."""
    return (features - generated_features).abs().sum((1, 2, 3))


def anomaly_score(residual: Any, discrimination: Any, discrimination_weight: float) -> Any:
    """A(x) = (1 - λ) R + λ D, equation 6, of tensors or arrays of one shape; what the search minimises, equation 5."""
    return (1 - discrimination_weight) * residual + discrimination_weight * discrimination


# ---- run files out, and checked back in -----------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` when the block ends, and is removed if the block fails."""
    # The ending stays as it is, because np.savez and savefig go by it.
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
    epoch: int
    fingerprint: str  # SHA-256 of the file: what was fitted with it names it


def load_gan(run_dir: Path, device: torch.device) -> TrainedGAN:
    """Read and check `run_dir`/gan.pt. Raises InputError if it is cut short, foreign, or holds more than plain data."""
    path = run_dir / "gan.pt"
    content = path.read_bytes()
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
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
            fingerprint=hashlib.sha256(content).hexdigest(),
        )
    except Exception as error:  # torch.load raises almost anything on bytes that are not its own
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'}"
        raise InputError(
            f"{path} is cut short or was not written by train_gan.py, and nothing in it was run ({reason}): "
            "train again, or name another run with --run-dir"
        ) from error
    for network in (generator, discriminator):
        network.eval().requires_grad_(False)
    generator.layers, discriminator.body = fold_batchnorm(generator.layers), fold_batchnorm(discriminator.body)
    for network in (generator, discriminator):
        network.to(device, memory_format=torch.channels_last)
    return gan


def write_latents(run_dir: Path, split: str, gan: TrainedGAN, image_set: ImageSet, search: dict, **found: Any) -> None:
    """Write latents-<split>.npz: `found` is z (N, latent_dim), residual (N,) and discrimination (N,)."""
    with replacing(run_dir / f"latents-{split}.npz") as partial:
        np.savez(
            partial,
            **found,
            label=image_set.label,
            index=image_set.index,
            source=image_set.source,
            gan=gan.fingerprint,
            search=json.dumps(search),
        )


def read_latents(run_dir: Path, split: str, gan: TrainedGAN) -> dict[str, Any]:
    """Read and check latents-<split>.npz: the arrays of `write_latents`, `search` as a dict.

    Raises InputError if the file is missing, damaged or foreign, or was fitted with another gan.pt.
    """
    path = run_dir / f"latents-{split}.npz"
    again = f"run fit_latent.py --run-dir {run_dir} --splits {split}"
    if not path.is_file():
        raise InputError(f"{path} is missing: {again} first")
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            latents = {name: file[name] for name in file.files}
        latents["search"] = json.loads(str(latents["search"]))
        float(latents["search"]["discrimination_weight"])  # evaluate.py weighs with it
        shapes = {name: latents[name].shape for name in ("residual", "discrimination", "label", "index", "source")}
        count = len(latents["z"])
        whole = latents["z"].shape == (count, gan.latent_dim) and set(shapes.values()) == {(count,)} and count > 0
        whole = whole and all(np.isfinite(latents[name]).all() for name in ("z", "residual", "discrimination"))
        fingerprint = str(latents["gan"])
    except Exception as error:  # zipfile and numpy raise almost anything on damaged bytes
        raise InputError(f"{path} is damaged or was not written by fit_latent.py ({error}): {again} again") from error
    if fingerprint != gan.fingerprint:
        raise InputError(f"{path} belongs to another gan.pt than {run_dir / 'gan.pt'}: {again} again, or remove it")
    if not whole:
        raise InputError(
            f"{path} holds arrays of the wrong shape, no image, or numbers that are not finite: {again} again"
        )
    return latents


def record_run(run_dir: Path, script: str, config: Any, device: torch.device, seconds: float, **facts: Any) -> None:
    """Add to `run_dir`/run.json how `script` ran: hyperparameters, versions, device, commit, seconds, peak memory."""
    path = run_dir / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): remove it and run again") from error
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
    write_json(path, record)


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
