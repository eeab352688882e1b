"""Images in: the data sets and their four splits. `loading` reads their pixels."""

import dataclasses
import glob
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from anogan import decoding, files, folders, processes
from anogan.decoding import View
from anogan.kept import Kept
from util import InputError

EMBEDDED = ("cifar10", "digits")  # data sets that are no folder
SPLITS = ("train", "validation", "test", "train_anomalies")
SPAN = 4.0  # standard deviations of a normalised image on either side of its mean that are told apart
FLOOR = 0.04  # the smallest standard deviation that an image is divided by: 5 of 255 levels


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Which images a split holds. `loading` decodes them."""

    name: str  # of the data set: cifar10, digits or the folder's own name
    classes: list[str]
    # (N,) int64, what the image is: for files a checksum of their bytes, else the position in the training or test part
    index: np.ndarray
    label: np.ndarray  # (N,) int64, position of the image's class in `classes`
    source: np.ndarray  # (N,) str, the image's name: its path inside the folder, or cifar10/test/00042
    open_image: Callable[[int, str], Image.Image]  # by index and source; a worker process gets it pickled
    kept: Kept | None = None  # where its pictures are, decoded already

    def __len__(self) -> int:
        return len(self.index)

    @property
    def class_name(self) -> np.ndarray:
        """(N,) str, "" for a picture without a label."""
        return np.array([*self.classes, ""])[self.label]

    def fingerprint(self) -> str:
        """SHA-256 of which images these are, in this order: their names, and for files their bytes."""
        names = "\n".join(self.source).encode("utf-8", "surrogateescape")
        return hashlib.sha256(self.index.tobytes() + names).hexdigest()

    def checksum(self) -> str:
        """How many images these are, and the beginning of their fingerprint, to be read by a person."""
        return f"{len(self)} with checksum {self.fingerprint()[:16]}"

    def open(self, row: int) -> Image.Image:
        """The image at this position of the set, as Pillow opens it."""
        return self.open_image(self.index[row], self.source[row])

    def picture(self, row: int, view: View) -> Image.Image:
        """The image at this position at its own size, turned as its EXIF tag says, in RGB with 8 bits."""
        return decoding.at_own_size(self.open(row), view)

    def take(self, positions: np.ndarray | slice | range) -> "ImageSet":
        """The images at these positions (integers, a mask, a slice or a range) of this set, in that order."""
        return dataclasses.replace(
            self, index=self.index[positions], label=self.label[positions], source=self.source[positions]
        )


def open_dataset(dataset: str, part: str) -> ImageSet:
    """The part "train", "validation" or "test" of `cifar10`, `digits` or a folder in ImageFolder layout.

    Of a folder it lists the files, and reads none: `with_pages` makes the images of them. The parts validation and
    test may be empty; only a folder has validation. Raises InputError if CIFAR-10 cannot be downloaded, or the folder
    is missing, lacks train/, or has an empty class.
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
            f"unknown dataset {str(root)!r}: it must be cifar10, digits or a folder DIR that holds normal pictures in "
            "DIR/train/<class>/"
        )
    if not (root / "train").is_dir():
        raise InputError(f"{root} has no folder 'train': put normal pictures into {root / 'train' / 'good'}/")
    by_part = {each: folders.class_folders(root, each) for each in ("train", "validation", "test")}
    # One numbering for all parts: in MVTec's layout train/ has the class `good` alone
    classes = sorted({name for of_part in by_part.values() for name in of_part})
    folders.check_class_names(classes, root)
    source, label = [], []
    for name, folder in by_part[part].items():
        below = folders.pictures_below(folder)
        if not below:
            raise InputError(f"the class folder {folder} holds no images: put some in, or remove the folder")
        source += [Path(path).relative_to(root).as_posix() for path in below]
        label += [classes.index(name)] * len(below)
    return ImageSet(
        name=root.resolve().name,
        classes=classes,
        index=np.full(len(source), -1, np.int64),
        label=np.array(label, dtype=np.int64),
        source=np.array(source, dtype=np.str_),
        open_image=partial(_open_file, root),
    )


def with_pages(listed: ImageSet, root: Path) -> ImageSet:
    """The images in a set of files below `root`: one for each page of a file, with its checksum as its index.

    Raises InputError for a DICOM file if pydicom is not installed.
    """
    paths = [root / source for source in listed.source]
    pages_of, contents = folders.read_pages(paths)
    rows = np.repeat(np.arange(len(paths)), [len(pages) for pages in pages_of])
    index, source = [], []
    for name, pages, content in zip(listed.source, pages_of, contents, strict=True):
        index += [folders.content_number(content, page, name) for page in pages]
        source += [folders.page_name(name, page, pages) for page in pages]
    return dataclasses.replace(
        listed.take(rows), index=np.array(index, dtype=np.int64), source=np.array(source, dtype=np.str_)
    )


def open_pictures(paths: Sequence[str]) -> ImageSet:
    """Pictures without labels: files, folders of any depth and glob patterns, each picture once.

    A picture's source is its path, relative if it lies below the working directory, and its label -1. The set has the
    name of the folder that was given or that holds them all, or of the only picture. Raises InputError, naming the
    path, if one holds or matches no picture, and as `with_pages` does.
    """
    if not paths:
        raise InputError("--images names no picture: give pictures, folders or glob patterns")
    found: dict[str, str] = {}  # by where a file really is
    for path in map(str, paths):
        matches = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
        # a file itself counts whatever its ending
        below = [
            each for match in matches for each in (folders.pictures_below(match) if os.path.isdir(match) else [match])
        ]
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
    listed = ImageSet(
        name=name or "root",
        classes=[],
        index=np.full(len(real), -1, np.int64),
        label=np.full(len(real), -1, np.int64),
        source=np.array([_short(found[path]) for path in real], dtype=np.str_),
        open_image=partial(_open_file, Path()),
    )
    return with_pages(listed, Path())


def _short(path: str) -> str:
    """An absolute path, or a relative one to what lies below the working directory."""
    path = os.path.realpath(path) if ".." in Path(path).parts else os.path.abspath(path)
    return os.path.relpath(path) if Path(path).is_relative_to(os.getcwd()) else path


def _open_pixels(pixels: np.ndarray, index: int, source: str) -> Image.Image:
    return Image.fromarray(pixels[index])


def _open_file(root: Path, index: int, source: str) -> Image.Image:
    return decoding.open_file(*folders.file_and_page(root, source))


def class_label(classes: list[str], name: str) -> int:
    """The label of a class given by its name or, where no class has a number for a name, by its index from 0.

    Raises InputError if it is neither.
    """
    if name in classes:
        return classes.index(name)
    are_numbers = any(map(_is_number, classes))
    if not are_numbers and name in map(str, range(len(classes))):
        return int(name)
    index = "" if are_numbers else ", or an index from 0"
    raise InputError(f"unknown class {name!r}: choose --normal-class from {', '.join(classes)}{index}")


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


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


def whole_path(dataset: str) -> str:
    """A data set with the whole path of a folder, since other scripts may run elsewhere."""
    with files.reading(Path(dataset)):
        is_folder = dataset not in EMBEDDED and Path(dataset).is_dir()
    return str(Path(dataset).resolve()) if is_folder else dataset


def check_splits(splits: Sequence[str]) -> None:
    """Raise InputError unless these are splits, one at least."""
    if not splits:
        raise InputError(f"--splits names no split: choose from {', '.join(SPLITS)}")
    if unknown := set(splits) - set(SPLITS):
        raise InputError(f"unknown split {min(unknown)!r}: choose --splits from {', '.join(SPLITS)}")


def open_split(dataset: str, split: str, normal_class: str, group_by: str | None = None) -> ImageSet:
    """One of the four splits of a data set, see `list_split`; of a folder its files are read. Raises InputError."""
    listed = list_split(dataset, split, normal_class, group_by)
    return listed if dataset in EMBEDDED else with_pages(listed, Path(dataset))


def list_split(dataset: str, split: str, normal_class: str, group_by: str | None = None) -> ImageSet:
    """One of the four splits of a data set, in the data set's own order; of a folder, its files, see `open_dataset`.

    `train` and `validation` share the normal class's training images. Of cifar10 and digits the first 80% train; of a
    folder a hash of each file's name decides, or of what the regular expression `group_by` finds in it, see
    `folders.in_validation`. Where the folder has a part validation/, that is it, and all of train/ trains.
    `train_anomalies` is every training image of another class; `test` is the data set's own test part. Raises
    InputError for an unknown split, data set or class, and for a normal class with fewer than five training images.
    """
    check_splits([split])
    listed = open_dataset(dataset, "test" if split == "test" else "train")
    label = class_label(listed.classes, normal_class)
    if split == "train_anomalies":
        listed = listed.take(listed.label != label)
    elif split != "test":
        normal = listed.take(listed.label == label)
        if len(normal) < 5:
            kind = "images" if dataset in EMBEDDED else "files"
            with_images = ", ".join(listed.classes[i] for i in np.unique(listed.label)) or "there are none"
            raise InputError(
                f"class {listed.classes[label]!r} has {len(normal)} training {kind} in {dataset} and needs 5 or more: "
                f"add some, or choose --normal-class from those with training images ({with_images})"
            )
        listed = _one_side(dataset, normal, split, group_by)
    return listed


def _one_side(dataset: str, normal: ImageSet, split: str, group_by: str | None) -> ImageSet:
    """Those of the normal class's training images that train, or those that validate."""
    if dataset in EMBEDDED:
        if group_by is not None:
            raise InputError(f"--group-by is for folders: the split of {dataset} is fixed")
        first = int(0.8 * len(normal))
        return normal.take(slice(first) if split == "train" else slice(first, None))
    validation = open_dataset(dataset, "validation")
    if (Path(dataset) / "validation").is_dir():
        if group_by is not None:
            raise InputError(f"--group-by has no use where {dataset}/validation says which pictures validate")
        validation = validation.take(validation.label == normal.label[0])
        if len(validation) == 0:
            name = normal.classes[normal.label[0]]
            raise InputError(f"{dataset}/validation has no pictures of the normal class: put some into {name}/ there")
        return normal if split == "train" else validation
    validates = folders.in_validation([group_of(source, group_by) for source in normal.source])
    return normal.take(~validates if split == "train" else validates)


def group_of(source: str, group_by: str | None) -> str:
    """What a file must stay together with: by default itself alone, so that its pages do.

    `group_by` looks in its path below train/. Its first group counts if it has one. Raises InputError if it finds
    nothing, or is no regular expression.
    """
    name = source.removeprefix("train/")
    if group_by is None:
        return name
    try:
        found = re.search(group_by, name)
    except re.error as error:
        raise InputError(f"--group-by {group_by!r} is no regular expression ({error})") from error
    if found is None:
        raise InputError(f"--group-by {group_by!r} finds nothing in {name}: each picture needs a group")
    return found[1] or "" if found.re.groups else found[0]


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


def to_model(images: torch.Tensor, device: torch.device | None = None, normalise: bool = False) -> torch.Tensor:
    """uint8 images (N, C, H, W) to float32 in [-1, 1], the range of G's tanh, on `device`.

    With `normalise` each image is `contrast_normalised`.
    """
    if device is not None and device.type == "cuda":
        images = images.pin_memory()  # so that the GPU need not be waited for
    x = images.to(device, non_blocking=True).float() / 127.5 - 1
    return contrast_normalised(x) if normalise else x


def contrast_normalised(x: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) in [-1, 1], each minus its mean, over its standard deviation, of all its pixels and colours.

    -1 and 1 are SPAN deviations, and what lies beyond is cut off. A deviation counts as FLOOR at least, or the noise of
    an even surface would fill the range.
    """
    mean, deviation = _mean_and_deviation(x)
    return ((x - mean) / (SPAN * deviation)).clamp(-1, 1)


def to_levels(x: torch.Tensor, images: torch.Tensor, normalise: bool = False) -> torch.Tensor:
    """Images (N, C, H, W) in the range of `to_model` to [-1, 1] from black to white, given the uint8 images that they
    are drawn for."""
    if not normalise:
        return x
    mean, deviation = _mean_and_deviation(images.to(x.device).float() / 127.5 - 1)
    return (SPAN * deviation * x + mean).clamp(-1, 1)


def _mean_and_deviation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each image (N, C, H, W), over all its pixels and colours: (N, 1, 1, 1) each."""
    deviation, mean = torch.std_mean(x, (1, 2, 3), correction=0, keepdim=True)
    return mean, deviation.clamp(min=FLOOR)


def to_display(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] back to [0, 1], as plots want them."""
    return (images + 1) / 2
