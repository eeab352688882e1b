"""Latents of a run: what the search has found, what is missing, and what G draws from them."""

import io
import json
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anogan import files, images, loading, processes, runs
from util import InputError, anomaly_score, quoted

PER_IMAGE = ("z", "residual", "discrimination", "class_name", "index", "source")  # arrays of latents-<split>.npz
COMMAND = "fit_latent.py"


def latents_path(run_dir: Path, split: str, discrimination: str = "features") -> Path:
    """Where the latents of a split are, those of a search by feature matching or by another discrimination loss."""
    return run_dir / f"latents-{split}{'' if discrimination == 'features' else f'-{discrimination}'}.npz"


class Latents:
    """The latents of one set of images: those still to be searched, batch by batch, and one file of all at the end.

    What is done lies in shards in a folder, each written when its last image was added. Every process takes its share
    of the missing ones. Every process must make this object, and call `merge` when it is done.
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
        self._gan, self._set, self._split, self._search = gan, image_set, split, search
        self._skip_unreadable = skip_unreadable
        folder, rows = self.path.with_suffix(""), loading.chunks(range(len(image_set)), shard_size)
        self._shards = {folder / f"{i:06d}.npz": part for i, part in enumerate(rows)}
        processes.check_agreement(gan=gan.fingerprint, settings=search, images=image_set.fingerprint())
        missing = self._missing_shards() if processes.rank() == 0 else None
        missing = processes.from_all(missing)[0]  # rank 0 decides
        self.was_complete = missing is None
        self._mine = dict(list((missing or {}).items())[processes.rank() :: processes.count()])
        self._unreadable: list[Path] = []  # shards of which no image can be read, and which are not written
        self._found: list[tuple] = []  # of the shard that is being searched
        self._loss_sum, self._searched = 0.0, 0

    def missing_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Positions in the set (N,) and images (N, C, H, W) in [-1, 1], on the device, of what is to be searched.

        What was found must be handed to `add` before the next batch. No batch reaches over the end of a shard, so a
        shard does not depend on which process did the others. Raises InputError for an image that cannot be read,
        unless they are to be skipped; finished shards stay.
        """
        if not self._mine:
            return
        gan = self._gan
        batches = {path: loading.chunks(rows, batch_size) for path, rows in self._mine.items()}
        all_batches = list(chain(*batches.values()))
        decoded = loading.image_batches(self._set, all_batches, gan.view, self._skip_unreadable)
        bar_format = "{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        total = sum(map(len, all_batches))
        with processes.progress_bar(total, " images", desc=self._split, bar_format=bar_format) as self._bar:
            done = 0
            for path in self._mine:
                for rows in batches[path]:
                    pixels, positions = next(decoded)
                    if len(pixels) > 0:
                        x = images.to_model(pixels, gan.device).contiguous(memory_format=torch.channels_last)
                        yield positions, x
                    done += len(rows)
                    self._bar.n = done  # whole images again, after fractions of a batch
                self._write_shard(path)
        next(decoded, None)  # at its end it says what was lost of the pictures

    def advance(self, count: float) -> None:
        """Move the progress bar on by so many images, or fractions of one."""
        self._bar.update(count)

    def add(self, rows: np.ndarray, z: torch.Tensor, residual: torch.Tensor, discrimination: torch.Tensor) -> None:
        """Keep what was found for the images at these positions: z (N, latent_dim), residual and discrimination (N,).

        Raises InputError if a number is not finite.
        """
        found = (z.cpu(), residual.cpu(), discrimination.cpu())
        if not all(values.isfinite().all() for values in found):
            raise InputError(f"the search of {self._split} diverged or gan.pt did: lower --lr, or train again")
        self._found.append((*found, torch.from_numpy(rows)))
        weight = self._search["discrimination_weight"]
        self._loss_sum += anomaly_score(residual, discrimination, weight).sum().item()
        self._searched += len(rows)
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
                raise InputError(f"none of the {len(self._set)} images of the split {self._split} can be read")
            parts = [read_latents(shard, self._split, self._gan) for shard in done]
            self._write(self.path, {name: np.concatenate([part[name] for part in parts]) for name in PER_IMAGE})
            shutil.rmtree(self.path.with_suffix(""))
        latents = read_latents(self.path, self._split, self._gan)
        if skipped := len(self._set) - len(latents["index"]):
            print(f"skipped {skipped} of {len(self._set)} images, which cannot be read")
        return latents

    def _missing_shards(self) -> dict[Path, range] | None:
        """The shards still to do, with a line for each that must be done again; None if the file is complete."""
        folder = self.path.with_suffix("")
        if self.path.exists():
            reason = self._why_redo(self.path, self._set)
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
                reason = self._why_redo(shard, self._set.take(rows))
                if reason is None:
                    continue
                print(f"{reason}: searching it again")
                shard.unlink()
            missing[shard] = rows
        if len(missing) < len(self._shards):
            done = len(self._shards) - len(missing)
            print(f"{self._split}: {done} of {len(self._shards)} shards are done, going on with the others")
        return missing

    def _why_redo(self, path: Path, image_set: images.ImageSet) -> str | None:
        """What keeps a file of latents from being that of these images and settings; None if nothing does."""
        try:
            latents = read_latents(path, self._split, self._gan)
        except InputError as error:
            return str(error)
        if latents["search"] != self._search:
            return f"{path} was fitted with other settings"
        if latents["asked_for"] != image_set.fingerprint():
            return f"{path} holds other images"
        if len(latents["index"]) < len(image_set) and not self._skip_unreadable:
            return f"{path} lacks images that could not be read"
        return None

    def _write_shard(self, path: Path) -> None:
        if not self._found:
            self._unreadable.append(path)
            return
        z, residual, discrimination, rows = (torch.cat(part).numpy() for part in zip(*self._found, strict=True))
        self._found = []
        arrays = {"z": z, "residual": residual, "discrimination": discrimination}
        arrays |= {name: getattr(self._set, name)[rows] for name in ("class_name", "index", "source")}
        self._write(path, arrays, self._set.take(self._shards[path]))

    def _write(self, path: Path, arrays: dict[str, np.ndarray], asked_for: images.ImageSet | None = None) -> None:
        """A file that `read_latents` reads; `asked_for` are the images it was made for, unreadable ones included."""
        about = {
            "split": self._split,
            "gan": self._gan.fingerprint,
            "search": json.dumps(self._search),
            "asked_for": (self._set if asked_for is None else asked_for).fingerprint(),
        }
        files.write_arrays(path, **arrays, **about)


# ---- reading --------------------------------------------------------------------------------------------------------


def read_latents(path: Path, split: str, gan: runs.TrainedGAN) -> dict[str, Any]:
    """Read and check a file of latents: what PER_IMAGE names, a row an image, `search`, a dict, and `asked_for`.

    Raises InputError, see `read_arrays`.
    """
    shapes = {name: (gan.latent_dim,) if name == "z" else () for name in PER_IMAGE}
    latents = read_arrays(path, COMMAND, split, gan, shapes)
    try:
        latents["search"], latents["asked_for"] = json.loads(str(latents["search"])), str(latents["asked_for"])
        str(latents["search"]["discrimination"]), float(latents["search"]["discrimination_weight"])  # evaluate.py's
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} was not written by this {COMMAND} ({error})") from error
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
    z: np.ndarray | None,
    batch_size: int,
    skip_unreadable: bool = False,
    quiet: bool = True,
) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor | None]]:
    """A set's images with what G draws from their z (M, latent_dim), batch by batch.

    Yields positions in the set (N,), x and G(z), each (N, C, H, W) in [-1, 1], on the device; without z, None for
    G(z). Raises InputError for an image that cannot be read, unless they are to be skipped.
    """
    batches = loading.chunks(range(len(image_set)), batch_size)
    for pixels, rows in loading.image_batches(image_set, batches, gan.view, skip_unreadable, quiet):
        x = images.to_model(pixels, gan.device).contiguous(memory_format=torch.channels_last)
        yield rows, x, None if z is None else gan.generator(torch.from_numpy(z[rows]).to(gan.device))
