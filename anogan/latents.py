"""Latents of a run: what the search has found, what is missing, and what G draws from them."""

import io
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anogan import files, images, loading, patches, processes, runs
from util import InputError, anomaly_score, quoted

# Arrays of latents-<split>.npz: a row a picture, and a row a patch, of which a whole picture has one. `picture` is the
# position of a patch's picture among the former; the patches of a picture lie together
PER_PICTURE = ("class_name", "index", "source")
PER_PATCH = ("z", "residual", "discrimination", "picture", "top", "left")
COMMAND = "fit_latent.py"


def latents_path(run_dir: Path, split: str, discrimination: str = "features") -> Path:
    """Where the latents of a split are, those of a search by feature matching or by another discrimination loss."""
    return run_dir / f"latents-{split}{'' if discrimination == 'features' else f'-{discrimination}'}.npz"


class Latents:
    """The latents of one set of pictures: patches still to be searched, batch by batch, and one file of all at the end.

    What is done lies in shards of whole pictures in a folder, each written when its last patch was added. Every process
    takes its share of the missing ones. Every process must make this object, and call `merge` when it is done.
    """

    def __init__(
        self,
        gan: runs.TrainedGAN,
        image_set: images.ImageSet,
        split: str,
        search: dict[str, Any],
        shard_size: int,
        skip_unreadable: bool,
    ) -> None:
        """`search` are the settings that decide what is found; latents of others are searched again.

        Raises InputError if the processes do not agree.
        """
        self.path = latents_path(gan.run_dir, split, search["discrimination"])
        self.image_set, self.split = image_set, split
        self._gan, self._search, self._skip_unreadable = gan, search, skip_unreadable
        self._counts = self._patch_counts()
        folder, rows = self.path.with_suffix(""), whole_pictures(self._counts, shard_size)
        self._shards = {folder / f"{i:06d}.npz": part for i, part in enumerate(rows)}
        processes.check_agreement(gan=gan.fingerprint, settings=search, images=image_set.fingerprint())
        missing = self._missing_shards() if processes.rank() == 0 else None
        missing = processes.from_all(missing)[0]  # rank 0 decides
        self.was_complete = missing is None
        self._mine = dict(list((missing or {}).items())[processes.rank() :: processes.count()])
        self._unreadable: list[Path] = []  # shards of which no image can be read, and which are not written
        self._found: list[dict[str, np.ndarray]] = []  # of the shard that is being searched
        self._loss_sum, self._searched = 0.0, 0

    @property
    def missing(self) -> int:
        """How many patches this process has still to search."""
        return sum(int(self._counts[rows.start : rows.stop].sum()) for rows in self._mine.values())

    def _patch_counts(self) -> np.ndarray:
        """How many patches each picture has (N,); 0 for one of which not even the size can be read."""
        if not self._gan.view.has_patches:
            return np.ones(len(self.image_set), np.int64)
        sizes = loading.seen_sizes(self.image_set, self._gan.view)
        return np.array([len(self._grid(size)) if size[0] else 0 for size in sizes.tolist()], np.int64)

    def _grid(self, size: tuple[int, int]) -> patches.Corners:
        return patches.grid(size, self._gan.image_size, self._search["stride"])

    def missing_batches(self, batch_size: int) -> Iterator[tuple[patches.Patches, torch.Tensor]]:
        """Patches that are to be searched, and what the networks see of them: (N, C, H, H) in [-1, 1], on the device.

        What was found must be handed to `add` before the next batch. No batch reaches over the end of a shard, so a
        shard does not depend on which process did the others. Raises InputError for a picture that cannot be read,
        unless they are to be skipped; finished shards stay.
        """
        if not self._mine:
            return
        view, size = self._gan.view, 1 if self._gan.view.has_patches else batch_size
        to_decode = {path: loading.chunks(rows, size) for path, rows in self._mine.items()}
        in_order = list(chain(*to_decode.values()))
        decoded = loading.image_batches(self.image_set, in_order, view, self._skip_unreadable)
        bar_format = "{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        unit = " patches" if view.has_patches else " images"
        with processes.progress_bar(self.missing, unit, desc=self.split, bar_format=bar_format) as self._bar:
            done = 0
            for path, rows in self._mine.items():
                pictures = one_by_one(islice(decoded, len(to_decode[path])))
                for some in patches.batches(pictures, lambda _, size: self._grid(size), view.size, batch_size):
                    yield some, self._gan.to_model(some.pixels)
                    done += len(some)
                    self._bar.n = done  # whole patches again, after fractions of a batch
                self._write_shard(path, rows)
        next(decoded, None)  # at its end it says what was lost of the pictures

    def advance(self, count: float) -> None:
        """Move the progress bar on by so many images, or fractions of one."""
        self._bar.update(min(count, self._bar.total - self._bar.n))  # rounding must not go beyond the end

    def add(self, some: patches.Patches, z: torch.Tensor, residual: torch.Tensor, discrimination: torch.Tensor) -> None:
        """Keep what was found for these patches: z (N, latent_dim), residual and discrimination (N,).

        Raises InputError if a number is not finite.
        """
        found = {"z": z.cpu(), "residual": residual.cpu(), "discrimination": discrimination.cpu()}
        if not all(values.isfinite().all() for values in found.values()):
            raise InputError(f"the search of {self.split} diverged or gan.pt did: lower --lr, or train again")
        arrays = {name: values.numpy() for name, values in found.items()}
        self._found.append(arrays | {"row": some.row, "top": some.corners[:, 0], "left": some.corners[:, 1]})
        weight = self._search["discrimination_weight"]
        self._loss_sum += float(anomaly_score(arrays["residual"], arrays["discrimination"], weight).sum())
        self._searched += len(some)
        self._bar.set_postfix_str(f"mean loss {self._loss_sum / self._searched:.1f}", refresh=False)

    def merge(self) -> dict[str, Any] | None:
        """The latents of all shards, as `read_latents` returns them, written to one file; None if not on rank 0.

        Raises InputError if no image could be read, or a shard is not what it was when it was written.
        """
        unreadable = set(chain(*processes.from_all(self._unreadable)))
        if processes.rank() > 0:
            return None
        if not self.was_complete:
            done = [shard for shard in self._shards if shard not in unreadable]
            if not done:
                raise InputError(f"none of the {len(self.image_set)} images of the split {self.split} can be read")
            self._write(self.path, joined([read_latents(shard, self.split, self._gan) for shard in done]))
            shutil.rmtree(self.path.with_suffix(""))
        latents = read_latents(self.path, self.split, self._gan)
        if skipped := len(self.image_set) - len(latents["index"]):
            print(f"skipped {skipped} of {len(self.image_set)} images, which cannot be read")
        return latents

    def _missing_shards(self) -> dict[Path, range] | None:
        """The shards still to do, with a line for each that must be done again; None if the file is complete."""
        folder = self.path.with_suffix("")
        if self.path.exists():
            reason = self._why_redo(self.path, self.image_set)
            if reason is None:
                if folder.exists():  # an earlier run was killed before it did this
                    shutil.rmtree(folder)
                print(f"{self.path} is complete: nothing to search")
                return None
            print(f"{reason}: searching again, and replacing it at the end")
        files.make_folder(folder)
        missing = {}
        for shard, rows in self._shards.items():
            if shard.exists():
                reason = self._why_redo(shard, self.image_set.take(rows))
                if reason is None:
                    continue
                print(f"{reason}: searching it again")
                shard.unlink()
            missing[shard] = rows
        if len(missing) < len(self._shards):
            done = len(self._shards) - len(missing)
            print(f"{self.split}: {done} of {len(self._shards)} shards are done, going on with the others")
        return missing

    def _why_redo(self, path: Path, image_set: images.ImageSet) -> str | None:
        """What keeps a file of latents from being that of these images and settings; None if nothing does."""
        try:
            latents = read_latents(path, self.split, self._gan)
        except InputError as error:
            return str(error)
        if latents["search"] != self._search:
            return f"{path} was fitted with other settings"
        if latents["asked_for"] != image_set.fingerprint():
            return f"{path} holds other images"
        if len(latents["index"]) < len(image_set) and not self._skip_unreadable:
            return f"{path} lacks images that could not be read"
        return None

    def _write_shard(self, path: Path, rows: range) -> None:
        if not self._found:
            self._unreadable.append(path)
            return
        arrays = {name: np.concatenate([part[name] for part in self._found]) for name in self._found[0]}
        self._found = []
        pictures, arrays["picture"] = np.unique(arrays.pop("row"), return_inverse=True)  # those that could be read
        arrays |= {name: getattr(self.image_set, name)[pictures] for name in PER_PICTURE}
        self._write(path, arrays, self.image_set.take(rows))

    def _write(self, path: Path, arrays: dict[str, np.ndarray], asked_for: images.ImageSet | None = None) -> None:
        """A file that `read_latents` reads; `asked_for` are the images it was made for, unreadable ones included."""
        about = {
            "split": self.split,
            "gan": self._gan.fingerprint,
            "search": json.dumps(self._search),
            "asked_for": (self.image_set if asked_for is None else asked_for).fingerprint(),
        }
        files.write_arrays(path, **arrays, **about)


def stride_of(gan: runs.TrainedGAN, stride: int | None = None) -> int | None:
    """How far apart the patches of a picture are, by default half their side; None for a GAN of whole pictures.

    Raises InputError if some pixels would lie in no patch, or there are no patches.
    """
    if not gan.view.has_patches:
        if stride is not None:
            raise InputError("--stride is for a GAN of patches (train_gan.py --picture-size): leave it out")
        return None
    stride = gan.image_size // 2 if stride is None else stride  # each pixel but those at the edge lies in four patches
    if not 1 <= stride <= gan.image_size:
        raise InputError(f"--stride must lie between 1 and the side of a patch, {gan.image_size}, not {stride}")
    return stride


def batch_and_shard(batch_size: int | None, shard_size: int, device: torch.device) -> tuple[int, int]:
    """Images at once, by default as many as suit the device, and images between two writes: the size of a shard.

    A shard is rounded up to whole batches, since no batch reaches over its end: a larger batch would be cut.
    """
    batch_size = batch_size or min(512 if device.type == "cuda" else 64, shard_size)
    return batch_size, math.ceil(shard_size / batch_size) * batch_size


def whole_pictures(counts: np.ndarray, shard_size: int) -> list[range]:
    """Pictures with so many patches each (N,) in consecutive ranges of at least `shard_size` patches, but the last."""
    before = np.append(0, np.cumsum(counts))
    ranges, first = [], 0
    while first < len(counts):
        last = min(max(int(np.searchsorted(before, before[first] + shard_size)), first + 1), len(counts))
        ranges.append(range(first, last))
        first = last
    return ranges


def one_by_one(decoded: Iterable[tuple[list[np.ndarray], np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """What `loading.image_batches` yields, picture by picture: its position, and uint8 (C, height, width)."""
    for pictures, rows in decoded:
        yield from zip(rows.tolist(), pictures, strict=True)


# ---- reading --------------------------------------------------------------------------------------------------------


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The latents of several sets of pictures as those of one."""
    before = np.cumsum([0, *(len(part["index"]) for part in parts)])
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in (*PER_PICTURE, *PER_PATCH)}
    arrays["picture"] = np.concatenate([part["picture"] + at for part, at in zip(parts, before, strict=False)])
    return arrays


def first_patches(latents: dict[str, Any]) -> np.ndarray:
    """(N + 1,) where the patches of each picture begin, and where the last one's end."""
    return np.searchsorted(latents["picture"], np.arange(len(latents["index"]) + 1))


def taken(latents: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """The latents of the pictures at these positions (M,), in that order."""
    first = first_patches(latents)
    counts = np.diff(first)[rows]
    which = np.concatenate([np.empty(0, np.int64), *(np.arange(first[row], first[row + 1]) for row in rows)])
    found = latents | {name: latents[name][which.astype(np.int64)] for name in PER_PATCH}
    found |= {name: latents[name][rows] for name in PER_PICTURE}
    return found | {"picture": np.repeat(np.arange(len(rows)), counts)}


def of_patches(latents: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """The latents of some patches alone (M,), in ascending order, and of their pictures."""
    pictures, picture = np.unique(latents["picture"][rows], return_inverse=True)
    found = latents | {name: latents[name][rows] for name in PER_PATCH}
    return found | {name: latents[name][pictures] for name in PER_PICTURE} | {"picture": picture}


def read_latents(path: Path, split: str, gan: runs.TrainedGAN) -> dict[str, Any]:
    """Read and check a file of latents: what PER_PICTURE and PER_PATCH name, `search`, a dict, and `asked_for`.

    Raises InputError, see `read_arrays`.
    """
    latents = read_arrays(path, COMMAND, split, gan, dict.fromkeys(PER_PICTURE, ()))
    try:
        shapes = [latents[name].shape[1:] for name in PER_PATCH]
        pictures, lengths = latents["picture"], {len(latents[name]) for name in PER_PATCH}
        if shapes != [(gan.latent_dim,), *[()] * (len(PER_PATCH) - 1)] or len(lengths) > 1:
            raise ValueError("arrays of the wrong shape")
        if not all(np.isfinite(latents[name]).all() for name in PER_PATCH):
            raise ValueError("numbers that are not finite")
        if not np.array_equal(np.unique(pictures), np.arange(len(latents["index"]))) or (np.diff(pictures) < 0).any():
            raise ValueError("pictures without patches")
        latents["search"], latents["asked_for"] = json.loads(str(latents["search"])), str(latents["asked_for"])
        str(latents["search"]["discrimination"]), float(latents["search"]["discrimination_weight"])  # evaluate.py's
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged or was not written by this {COMMAND} ({error})") from error
    return latents


def read_arrays(
    path: Path, command: str, split: str, gan: runs.TrainedGAN, shapes: dict[str, tuple[int, ...]]
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
        raise InputError(f"{path} is damaged or was not written by this {command} ({error})") from error
    if arrays["gan"] != gan.fingerprint:
        raise InputError(f"{path} belongs to another gan.pt than the one that is there now")
    if arrays["split"] != split:
        raise InputError(f"{path} holds the split {arrays['split']!r}, not {split!r}")
    if not whole:
        raise InputError(f"{path} holds arrays of the wrong shape, no image, or numbers that are not finite")
    return arrays


def read_fits(gan: runs.TrainedGAN, splits: list[str], discrimination: str = "features") -> dict[str, dict[str, Any]]:
    """The latents of these splits, found with this discrimination loss.

    Raises InputError if one is missing or not what its name says, or unless all are of the search of `validation`.
    """

    def again(split: str) -> str:
        guided = "" if discrimination == "features" else f" --discrimination {discrimination}"
        which = " --images with your pictures" if split == "images" else f" --splits {split}" if guided else ""
        return f"run {COMMAND} --run-dir {quoted(gan.run_dir)}{guided}{which}"

    latents = {}
    for split in dict.fromkeys(["validation", *splits]):
        path = latents_path(gan.run_dir, split, discrimination)
        try:
            latents[split] = read_latents(path, split, gan)
        except InputError as error:
            raise InputError(f"{error}: {again(split)}") from error
        if latents[split]["search"]["discrimination"] != discrimination:
            raise InputError(f"{path} was not guided by the {discrimination} loss: {again(split)} again")
    expected = latents["validation"]["search"]
    for split, found in latents.items():
        if differing := runs.differing_settings(expected, found["search"]):
            values = "; ".join(f"{name} {expected.get(name)} and {found['search'].get(name)}" for name in differing)
            raise InputError(
                f"validation and {split} were fitted with different settings ({', '.join(differing)}): {values}; "
                f"{again(split)} with the same flags for both"
            )
    return {split: latents[split] for split in splits}


def check_same_search(gan: runs.TrainedGAN, search: dict[str, Any]) -> None:
    """Raise InputError, naming the settings, unless the validation images were searched in the same way.

    A verdict compares with them: other pictures must not be searched for hours first.
    """
    normals = read_fits(gan, ["validation"])["validation"]["search"]
    if differing := runs.differing_settings(normals, search):
        settings = ", ".join(f"{name} {normals.get(name)}" for name in differing)
        flag = f" (--init {'encoder' if 'encoder' in normals else 'candidates'})" if "encoder" in differing else ""
        raise InputError(f"the validation images were searched with {settings}: use the same{flag} for --images")


def fitted_images(image_set: images.ImageSet, split: str, latents: dict[str, Any]) -> images.ImageSet:
    """Those images of a set that these latents belong to. Raises InputError if the set has changed since."""
    if split == "images":  # from another working directory the same pictures have other sources
        fitted = image_set.take(np.isin(image_set.index, latents["index"]))
        differs = "" if np.array_equal(fitted.index, latents["index"]) else "other pictures"
        again = "--images with these pictures"
    else:
        fitted = image_set.take(np.isin(image_set.source, latents["source"]))  # both in the data set's order
        differs = "" if np.array_equal(fitted.index, latents["index"]) else "other contents"
        differs = differs if np.array_equal(fitted.source, latents["source"]) else "other names"
        again = f"--splits {split}"
    if differs:
        raise InputError(
            f"the images of {image_set.name} are not those that latents-{split}.npz was fitted to ({differs}): run "
            f"{COMMAND} {again} again"
        )
    return fitted


@torch.no_grad()
def drawn(
    gan: runs.TrainedGAN,
    image_set: images.ImageSet,
    searched: dict[str, Any] | int | None,
    batch_size: int,
    skip_unreadable: bool = False,
    quiet: bool = True,
) -> Iterator[tuple[patches.Patches, torch.Tensor, torch.Tensor | None]]:
    """A set's patches with what G draws from their latents, batch by batch.

    `searched` are the latents; where there are none, the stride of the patches' grid, see `stride_of`. Yields the
    patches, x and G(z), each (N, C, H, H) in [-1, 1], on the device; without latents, None for G(z). Raises InputError
    for a picture that cannot be read, unless they are to be skipped.
    """
    latents = searched if isinstance(searched, dict) else None
    first = None if latents is None else first_patches(latents)

    def corners_of(row: int, size: tuple[int, int]) -> patches.Corners:
        if latents is None:
            return patches.grid(size, gan.image_size, searched)
        return np.stack([latents[name][first[row] : first[row + 1]] for name in ("top", "left")], 1)

    batches = loading.decode_batches(len(image_set), gan.view)
    decoded = loading.image_batches(image_set, batches, gan.view, skip_unreadable, quiet)
    for some in patches.batches(one_by_one(decoded), corners_of, gan.image_size, batch_size):
        generated = None
        if latents is not None:
            generated = gan.generator(torch.from_numpy(latents["z"][first[some.row] + some.number]).to(gan.device))
        yield some, gan.to_model(some.pixels), generated
