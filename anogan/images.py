"""Images in: the data sets, their four splits, and decoding to uint8, batch by batch in worker processes."""

import dataclasses
import glob
import hashlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision.datasets.folder import make_dataset
from torchvision.transforms import CenterCrop, Compose, Resize
from tqdm import tqdm

from anogan import files, processes
from util import InputError

EMBEDDED = ("cifar10", "digits")  # data sets that are no folder
SPLITS = ("train", "validation", "test", "train_anomalies")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Which images a split holds. `load_images` decodes them."""

    name: str  # of the data set: cifar10, digits or the folder's own name
    classes: list[str]
    index: np.ndarray  # (N,) int64, position in the data set's training or test part, see also `open_pictures`
    label: np.ndarray  # (N,) int64, position of the image's class in `classes`
    source: np.ndarray  # (N,) str, the image's name: its path inside the folder, or cifar10/test/00042
    open_image: Callable[[int, str], Image.Image]  # by index and source; a worker process gets it pickled

    def __len__(self) -> int:
        return len(self.index)

    def fingerprint(self) -> str:
        """SHA-256 of which images these are, in this order; not of their pixels."""
        names = "\n".join(self.source).encode("utf-8", "surrogateescape")
        return hashlib.sha256(self.index.tobytes() + self.label.tobytes() + names).hexdigest()

    def open(self, row: int) -> Image.Image:
        """The image at this position of the set, as Pillow opens it."""
        return self.open_image(self.index[row], self.source[row])

    def picture(self, row: int) -> Image.Image:
        """The image at this position at its own size, turned as its EXIF tag says, in RGB with 8 bits."""
        return _to_8_bit(self.open(row), 3)

    def take(self, positions: np.ndarray | slice | range) -> "ImageSet":
        """The images at these positions (integers, a mask, a slice or a range) of this set, in that order."""
        return dataclasses.replace(
            self, index=self.index[positions], label=self.label[positions], source=self.source[positions]
        )


def open_dataset(dataset: str, part: str) -> ImageSet:
    """The training or test part ("train" or "test") of `cifar10`, `digits` or a folder in ImageFolder layout.

    Raises InputError if CIFAR-10 cannot be downloaded, or the folder is missing, lacks train/ or test/, or has an empty
    class.
    """
    if dataset == "cifar10":
        return _open_cifar10(part)
    if dataset == "digits":
        return _open_digits(part)
    return _open_folder(Path(dataset), part)


def _open_cifar10(part: str) -> ImageSet:
    try:
        with processes.first_here_first():
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
        open_image=partial(_open_pixels, cifar10.data),
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
        open_image=partial(_open_pixels, pixels[members]),
    )


def _open_folder(root: Path, part: str) -> ImageSet:
    with files.reading(root):
        is_folder = root.is_dir()
    if not is_folder:
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
    samples = make_dataset(
        str(root / part),
        class_to_idx={name: label for label, name in enumerate(classes)},
        is_valid_file=_is_picture,
        allow_empty=True,
    )
    label = np.array([label for _, label in samples], dtype=np.int64)
    for folder in _subfolders(root / part):
        if classes.index(folder.name) not in label:
            raise InputError(f"the class folder {folder} holds no images: put some in, or remove the folder")
    return ImageSet(
        name=root.resolve().name,
        classes=classes,
        index=np.arange(len(samples), dtype=np.int64),
        label=label,
        source=np.array([Path(path).relative_to(root).as_posix() for path, _ in samples], dtype=np.str_),
        open_image=partial(_open_file, root),
    )


def open_pictures(paths: Sequence[str]) -> ImageSet:
    """Pictures without labels: files, folders of any depth and glob patterns, each picture once.

    A picture's source is its path, relative if it lies below the working directory, its label -1, and its index a
    number that is another one when the file is replaced or changed. The set has the name of the folder that was given
    or that holds them all, or of the only picture. Raises InputError, naming the path, if one holds or matches no
    picture.
    """
    if not paths:
        raise InputError("--images names no picture: give pictures, folders or glob patterns")
    found: dict[str, str] = {}  # by where a file really is
    for path in map(str, paths):
        matches = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
        below = [each for match in matches for each in _pictures_at(match)]
        if not below:
            raise InputError(
                f"--images {path}: no such picture, folder with pictures, or glob pattern that matches some (in a "
                "folder those count whose name has the ending of a picture and no leading dot)"
            )
        for each in below:
            found.setdefault(os.path.realpath(each), each)
    real = sorted(found)
    if len(paths) == 1 and Path(paths[0]).is_dir():
        name = Path(paths[0]).resolve().name
    elif len(real) == 1:
        name = Path(real[0]).stem
    else:
        name = Path(os.path.commonpath(real)).name
    return ImageSet(
        name=name or "root",
        classes=[],
        index=np.array([_file_number(path) for path in real], dtype=np.int64),
        label=np.full(len(real), -1, np.int64),
        source=np.array([_short(found[path]) for path in real], dtype=np.str_),
        open_image=partial(_open_file, Path()),
    )


def _pictures_at(path: str) -> list[str]:
    """A file itself, whatever its ending, or the pictures below a folder, where links may lead back to it."""
    if not os.path.isdir(path):
        return [path]
    pictures, seen = [], set()
    for here, folders, names in os.walk(path, followlinks=True):
        seen.add(os.path.realpath(here))
        inner = (name for name in sorted(folders) if not name.startswith("."))
        folders[:] = [name for name in inner if os.path.realpath(os.path.join(here, name)) not in seen]
        pictures += [os.path.join(here, name) for name in sorted(names) if _is_picture(name)]
    return pictures


def _short(path: str) -> str:
    """An absolute path, or a relative one to what lies below the working directory."""
    path = os.path.realpath(path) if ".." in Path(path).parts else os.path.abspath(path)
    return os.path.relpath(path) if Path(path).is_relative_to(os.getcwd()) else path


def _file_number(path: str) -> int:
    """63 bits of a checksum over a file's path, size and time of change; of the path alone if it cannot be read."""
    try:
        about = os.stat(path)
        stamp = f"{about.st_size} {about.st_mtime_ns}"
    except OSError:  # a link to nothing, which the decoder will name
        stamp = ""
    return int.from_bytes(hashlib.sha256(os.fsencode(f"{stamp} {path}")).digest()[:8]) >> 1


def _is_picture(path: str | Path) -> bool:
    # a leading dot marks what file managers leave behind, such as ._photo.jpg
    return not Path(path).name.startswith(".") and Path(path).suffix.lower() in _endings()


@cache
def _endings() -> set[str]:
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _open_pixels(pixels: np.ndarray, index: int, source: str) -> Image.Image:
    return Image.fromarray(pixels[index])


def _open_file(root: Path, index: int, source: str) -> Image.Image:
    return Image.open(root / source)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def class_label(classes: list[str], name: str) -> int:
    """The label of a class given by its name or, if no class has that name, by its index as text. Raises InputError."""
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    raise InputError(f"unknown class {name!r}: choose --normal-class from {', '.join(classes)}, or an index from 0")


def default_class(dataset: str) -> str:
    """The class to call normal if none is named: of a folder the only one in train/, else number 1.

    Raises InputError if train/ has several, or none.
    """
    if dataset in EMBEDDED:
        return "1"
    images = open_dataset(dataset, "train")
    names = [images.classes[label] for label in np.unique(images.label)]
    if not names:
        raise InputError(f"{dataset}/train holds no pictures: put normal ones into a folder there, train/good")
    if len(names) > 1:
        raise InputError(f"{dataset}/train has pictures of {', '.join(names)}: name one with --normal-class")
    return names[0]


def check_splits(splits: Sequence[str]) -> None:
    """Raise InputError unless these are splits, one at least."""
    if not splits:
        raise InputError(f"--splits names no split: choose from {', '.join(SPLITS)}")
    if unknown := set(splits) - set(SPLITS):
        raise InputError(f"unknown split {min(unknown)!r}: choose --splits from {', '.join(SPLITS)}")


def open_split(dataset: str, split: str, normal_class: str) -> ImageSet:
    """One of the four splits of a data set, in the data set's own order.

    `train` is the first 80% of the normal class's training images and `validation` the other 20%; `train_anomalies` is
    every training image of another class; `test` is the data set's own test part. Raises InputError for an unknown
    split, data set or class, and for a normal class with fewer than five training images.
    """
    check_splits([split])
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
            f"class {images.classes[label]!r} has {len(normal)} training images in {dataset} and needs 5 or more: add "
            f"some, or choose --normal-class from those with training images ({with_images or 'there are none'})"
        )
    first = int(0.8 * len(normal))
    return images.take(normal[:first] if split == "train" else normal[first:])


def stratified_subset(label: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted positions of `count` of the labels (N,), every class in its proportion; all of them if N <= count.

    A smaller subset of the same seed lies inside a larger one.
    """
    order = np.random.default_rng(seed).permutation(len(label))
    place = np.empty(len(label))  # where in its class's shuffled line an image stands, in (0, 1)
    for value in np.unique(label):
        members = order[label[order] == value]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(order[np.argsort(place[order], kind="stable")][:count])


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """Positions of at most `count` of `length` rows, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, count).round().astype(np.int64))


def load_images(
    image_set: ImageSet, image_size: int, image_channels: int, skip_unreadable: bool = False
) -> tuple[torch.Tensor, ImageSet]:
    """Decode a whole set to uint8 (N, image_channels, image_size, image_size); also returns the set of those N images.

    See `image_batches`, which holds no more than a few batches.
    """
    batches = chunks(range(len(image_set)), 64)
    # a bar only on a terminal, and if it takes longer than a second
    bar = {"leave": False, "delay": 1, "disable": True if processes.rank() else None}
    decoded = image_batches(image_set, batches, image_size, image_channels, skip_unreadable)
    pixels = torch.empty(len(image_set), image_channels, image_size, image_size, dtype=torch.uint8)
    count, readable = 0, [np.empty(0, np.int64)]
    for batch, positions, faults in tqdm(decoded, "reading", len(batches), **bar):
        pixels[count : count + len(batch)] = batch
        count += len(batch)
        readable.append(positions)
        if processes.rank() == 0:  # the others read the same
            name_skipped(faults)
    return pixels[:count], image_set.take(np.concatenate(readable))


def chunks(rows: range, size: int) -> list[range]:
    """These rows in consecutive ranges of `size`, the last one shorter if need be."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def image_batches(
    image_set: ImageSet,
    batches: Sequence[range],
    image_size: int,
    image_channels: int,
    skip_unreadable: bool = False,
) -> Iterator[tuple[torch.Tensor, np.ndarray, list[str]]]:
    """Decode these rows of a set, in order, in worker processes that run a few batches ahead.

    Yields for each the uint8 (N, image_channels, image_size, image_size), the images' positions in the set (N,), and
    what is wrong with those that are left out. The shorter side is resized to `image_size` (antialiased bilinear), then
    the centre is cut out. Raises InputError for an image that cannot be read, unless `skip_unreadable` leaves it out.
    """
    decode = _Decoder(image_set, image_size, image_channels, skip_unreadable)
    workers = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), len(batches) - 1)
    # Arrays come through pipes: tensors would take /dev/shm, of which a container may have next to nothing
    loader = DataLoader(
        decode,
        batch_size=None,
        sampler=batches,
        collate_fn=_as_it_is,
        num_workers=max(0, workers),
        worker_init_fn=_end_with_parent,
    )
    for pixels, positions, faults in loader:
        if faults and not skip_unreadable:
            raise InputError(f"cannot read the image {faults[0]}: replace it, or use --skip-unreadable")
        yield torch.from_numpy(pixels), positions, faults


def name_skipped(faults: list[str]) -> None:
    """Name on stderr the images that `image_batches` has left out."""
    for fault in faults:
        tqdm.write(f"skipped, cannot be read: {fault}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """What DataLoader calls a data set: decodes some rows of a set, in any process."""

    image_set: ImageSet
    image_size: int
    image_channels: int
    skip_unreadable: bool

    def __getitem__(self, rows: range) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Pixels (N, C, H, W) and positions (N,) of the images that can be read, and what is wrong with the others."""
        to_square = Compose([Resize(self.image_size), CenterCrop(self.image_size)])
        pixels, positions, faults = [], [], []
        for row in rows:
            try:
                image = _to_8_bit(self.image_set.open(row), self.image_channels)
            except NameError:  # a fault of this file
                raise
            except Exception as error:  # a damaged file can make a decoder raise anything
                faults.append(f"{self.image_set.source[row]} ({error})")
                if not self.skip_unreadable:
                    break
                continue
            side = self.image_size
            pixels.append(np.asarray(to_square(image)).reshape(side, side, self.image_channels).transpose(2, 0, 1))
            positions.append(row)
        shape = (len(pixels), self.image_channels, self.image_size, self.image_size)
        return np.array(pixels, np.uint8).reshape(shape), np.array(positions, np.int64), faults


def _as_it_is(batch: tuple) -> tuple:
    return batch


def _end_with_parent(worker: int) -> None:
    """Let a worker end with the process that started it, even if that one is killed.

    DataLoader's own watch does not help a worker that is writing into a pipe that nobody reads any more.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _to_8_bit(image: Image.Image, image_channels: int) -> Image.Image:
    """Any image Pillow opens as 8-bit grey or RGB: turned as its EXIF tag says, transparent parts on white."""
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
