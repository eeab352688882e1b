"""2. For every image x, search the latent z whose G(z) is closest: Adam over z, with G and D frozen.

    python fit_latent.py                                      # the run trained last, its validation and test images
    python fit_latent.py --max-images 1000                    # a thousand images of each split, all classes alike
    python fit_latent.py --splits train_anomalies --run-dir outputs/cifar10-automobile
    python fit_latent.py --discrimination reference           # GAN_R: guided by D's own verdict, beside the others
    python fit_latent.py --init encoder                       # starts at E(x), see train_encoder.py
    python fit_latent.py --images my/pictures                 # your own pictures, without labels
    torchrun --standalone --nproc-per-node=8 fit_latent.py    # on eight GPUs: each takes its share of the shards

Writes latents-<split>.npz to the run folder: z, residual and discrimination of every image. Until all are found, what
is done lies in shards in latents-<split>/: however it was stopped, the same command does only what is missing.
Next: python evaluate.py
"""

import json
import shlex
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

import datasets
import runs
import util
from search import Discrimination, draw_candidates, nearest_candidates, search_latents

Init = Literal["candidates", "encoder"]


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    splits: tuple[str, ...] = ("validation", "test")  # any of train, validation, test, train_anomalies
    images: tuple[str, ...] | None = None  # instead of splits: pictures without labels, folders or glob patterns
    max_images: int | None = None  # take only so many images of a split, each class in its proportion
    steps: int = 100  # Adam steps for each image; fewer than 25 can end higher than they start
    lr: float = 0.4  # Adam's largest step size: up to it over the first fifth of the steps, down over the last
    discrimination: Discrimination = "features"  # feature matching, or reference: -log D(G(z)), Yeh et al. 2016
    discrimination_weight: float = 0.1  # lambda: the loss is (1 - lambda) residual + lambda discrimination
    init: Init = "candidates"  # where a search starts: at the nearest of --candidates, or at E(x), see train_encoder.py
    candidates: int = 4000  # generated images among which a search starts at the nearest; with 1, at the same z for all
    batch_size: int | None = None  # images at once, by default 64 on a CPU and 512 on a GPU; it changes no result
    shard_size: int = 1024  # images between two writes: what a crash can cost each process
    seed: int = 0  # of the candidates and of the choice of --max-images
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda, cuda:1, cpu, ...
    precision: util.Precision = "auto"  # of the steps; auto: bf16 where the hardware multiplies it faster
    skip_unreadable: bool = False  # go on without the images that cannot be read


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


def why_redo(
    path: Path, split: str, gan: runs.TrainedGAN, search: dict, images: datasets.ImageSet, skip_unreadable: bool
) -> str | None:
    """What keeps a file of latents from being that of these images and settings; None if nothing does."""
    try:
        latents = runs.read_latents(path, split, gan)
    except util.InputError as error:
        return str(error)
    if latents["search"] != search:
        return f"{path} was fitted with other settings"
    if latents["asked_for"] != images.fingerprint():
        return f"{path} holds other images"
    if len(latents["index"]) < len(images) and not skip_unreadable:
        return f"{path} lacks images that could not be read"
    return None


def chosen_images(gan: runs.TrainedGAN, split: str, config: Config) -> datasets.ImageSet:
    """The images of a split or of --images, or --max-images of them.

    Raises InputError if there are none, or as `runs.open_split` does.
    """
    images = datasets.open_pictures(config.images) if split == "images" else runs.open_split(gan, split)
    if config.max_images is not None:
        images = images.take(stratified_subset(images.label, config.max_images, config.seed))
    if len(images) == 0:
        raise util.InputError(f"the split {split} of {gan.dataset} holds no images: choose other --splits")
    return images


def check_same_search(run_dir: Path, gan: runs.TrainedGAN, search: dict) -> None:
    """Raise InputError, naming the settings, unless the validation images were searched in the same way.

    A verdict compares with them, so other pictures are not to be searched for hours in vain.
    """
    normals = runs.read_fits(run_dir, gan, ["validation"])["validation"]["search"]
    if differing := runs.differing_settings(normals, search):
        settings = ", ".join(f"{name} {normals.get(name)}" for name in differing)
        raise util.InputError(f"the validation images were searched with {settings}: use the same for --images")


def missing_shards(
    path: Path,
    shards: dict[Path, range],
    split: str,
    gan: runs.TrainedGAN,
    search: dict,
    image_set: datasets.ImageSet,
    skip_unreadable: bool,
) -> dict[Path, range] | None:
    """Those of the shards that are still to do, a line for each that must be done again; None if `path` is complete."""
    folder = path.with_suffix("")
    if path.exists():
        reason = why_redo(path, split, gan, search, image_set, skip_unreadable)
        if reason is None:
            if folder.exists():  # a run was killed before it came to this
                shutil.rmtree(folder)
            return None
        print(f"{reason}: searching again, and replacing it at the end")
    folder.mkdir(exist_ok=True)
    missing = {}
    for shard, rows in shards.items():
        if shard.exists():
            reason = why_redo(shard, split, gan, search, image_set.take(rows), skip_unreadable)
            if reason is None:
                continue
            print(f"{reason}: searching it again")
            shard.unlink()
        missing[shard] = rows
    if len(missing) < len(shards):
        print(f"{split}: {len(shards) - len(missing)} of {len(shards)} shards are done, going on with the others")
    return missing


def fit_shards(
    shards: dict[Path, range],
    split: str,
    image_set: datasets.ImageSet,
    gan: runs.TrainedGAN,
    start: Callable[[torch.Tensor], torch.Tensor],
    search: dict,
    config: Config,
) -> tuple[list[Path], int, float]:
    """Search the images at these positions of the set, and write each shard when it is done.

    `start` takes images (N, C, H, W) in [-1, 1] to the z (N, latent_dim) that their searches start from.
    Returns the shards of which no image can be read, and which are not written; how many images were searched; and the
    seconds that took, decoding included. Raises InputError for an image that cannot be read, unless they are to be
    skipped, and for a search that diverges.
    """
    device = next(gan.generator.parameters()).device
    # No batch reaches over the end of a shard, so its results do not depend on who did the others
    batch_size = config.batch_size or (512 if device.type == "cuda" else 64)
    batches = {path: datasets.chunks(rows, batch_size) for path, rows in shards.items()}
    size, channels, skip = gan.image_size, gan.image_channels, config.skip_unreadable
    decode = partial(datasets.image_batches, image_set, list(chain(*batches.values())), size, channels, skip)
    if not skip:  # a damaged image must not end this search after hours: read all before the first step
        for _ in tqdm(decode(), f"reading {split}", leave=False, delay=1, disable=True if util.rank() else None):
            pass

    bar_format = "{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    begun, decoded, unreadable = time.monotonic(), decode(), []
    loss_sum, searched = 0.0, 0
    with util.progress_bar(sum(map(len, shards.values())), " images", desc=split, bar_format=bar_format) as bar:
        for path in shards:
            found = []
            for rows, (images, positions, faults) in zip(
                batches[path], islice(decoded, len(batches[path])), strict=True
            ):
                datasets.name_skipped(faults)
                if len(images) == 0:
                    continue
                x = datasets.to_model(images, device).contiguous(memory_format=torch.channels_last)
                z, residual, discrimination = search_latents(
                    gan.generator,
                    gan.discriminator,
                    x,
                    start(x),
                    search["steps"],
                    search["lr"],
                    search["discrimination_weight"],
                    search["precision"],
                    search["discrimination"],
                    after_step=partial(bar.update, len(rows) / search["steps"]),
                )
                found.append((z.cpu(), residual.cpu(), discrimination.cpu(), torch.from_numpy(positions)))
                bar.n = round(bar.n)  # whole images again, after fractions of a batch
                loss_sum += util.anomaly_score(residual, discrimination, search["discrimination_weight"]).sum().item()
                searched += len(images)
                bar.set_postfix_str(f"mean loss {loss_sum / searched:.1f}", refresh=False)
            if not found:
                unreadable.append(path)
                continue
            z, residual, discrimination, positions = (torch.cat(part).numpy() for part in zip(*found, strict=True))
            if not all(np.isfinite(values).all() for values in (z, residual, discrimination)):
                raise util.InputError(f"the search of {split} diverged or gan.pt did: lower --lr, or train again")
            arrays = {"z": z, "residual": residual, "discrimination": discrimination}
            arrays |= {name: getattr(image_set, name)[positions] for name in ("label", "index", "source")}
            asked_for = image_set.take(shards[path]).fingerprint()
            runs.write_latents(
                path, arrays, split=split, gan=gan.fingerprint, search=json.dumps(search), asked_for=asked_for
            )
    return unreadable, searched, time.monotonic() - begun


def merge_shards(path: Path, shards: list[Path], split: str, gan: runs.TrainedGAN, asked_for: str) -> np.ndarray:
    """Write the latents of all shards, in this order, to one file that `runs.read_latents` reads; their A(x) (N,).

    Never holds more than one shard. Raises InputError if a shard is not what it was when it was written.
    """
    scores, shapes, kinds = [], [], []
    for shard in shards:
        latents = runs.read_latents(shard, split, gan)
        scores.append(runs.fitted_score(latents))
        shapes.append({name: latents[name].shape for name in runs.PER_IMAGE})
        kinds.append({name: latents[name].dtype for name in runs.PER_IMAGE})
    about = {"split": split, "gan": gan.fingerprint, "search": json.dumps(latents["search"]), "asked_for": asked_for}
    with runs.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as merged:
        for name in runs.ABOUT:
            with merged.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.array(about[name]))
        for name in runs.PER_IMAGE:
            kind = np.result_type(*(each[name] for each in kinds))  # names are as long as the longest
            shape = (sum(each[name][0] for each in shapes), *shapes[0][name][1:])
            header = {"shape": shape, "descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False}
            with merged.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for shard in shards:
                    member.write(runs.read_latents(shard, split, gan)[name].astype(kind).tobytes())
    return np.concatenate(scores)


def main(config: Config) -> None:
    """Search, and write latents-<split>.npz of every split asked for."""
    started = time.monotonic()
    util.check_at_least(config, 1, "steps", "candidates", "shard_size", "max_images", "batch_size")
    util.check_at_least(config, 0, "lr", "discrimination_weight")
    util.check_seed(config.seed)
    if config.discrimination_weight > 1:
        raise util.InputError(f"--discrimination-weight must be at most 1, not {config.discrimination_weight}")
    datasets.check_splits(config.splits)
    if config.images is not None and (config.splits != Config.splits or config.discrimination != "features"):
        raise util.InputError("--images goes with neither --splits nor --discrimination reference: leave them out")
    device = util.pick_device(config.device)
    precision = util.pick_precision(config.precision, device)
    run_dir = runs.find_run(config.run_dir)
    settings = ("steps", "lr", "discrimination", "discrimination_weight", "candidates", "seed")
    search = {name: getattr(config, name) for name in settings} | {"precision": precision}
    # With slower machines among them, who is done first waits long for the last
    with util.processes(device, patience=timedelta(days=1)) as (rank, processes), runs.run_folder(run_dir):
        gan = runs.load_gan(run_dir, device)
        print(
            f"run: {run_dir}   normal class: {gan.normal_class}   epochs: {gan.epoch:.4g}   "
            f"device: {device}, {precision}   processes: {processes}"
        )
        start, fitted = None, {}
        if config.init == "encoder":
            trained = runs.load_encoder(run_dir, gan, device)
            start, search["encoder"] = trained.encoder, trained.fingerprint
        if config.images is not None:
            check_same_search(run_dir, gan, search)
        for split in config.splits if config.images is None else ("images",):
            path = runs.latents_path(run_dir, split, config.discrimination)
            folder = path.with_suffix("")  # of the shards
            image_set = chosen_images(gan, split, config)
            rows = datasets.chunks(range(len(image_set)), config.shard_size)
            shards = {folder / f"{i:06d}.npz": part for i, part in enumerate(rows)}

            # Rank 0 says what is missing, and every process takes its share
            asked_for = image_set.fingerprint()
            util.check_agreement(gan=gan.fingerprint, settings=search, images=asked_for)
            missing: dict[Path, range] | None = None
            if rank == 0:
                missing = missing_shards(path, shards, split, gan, search, image_set, config.skip_unreadable)
            missing = util.from_all(missing)[0]
            if missing is None:
                print(f"{path} is complete: nothing to search")
                continue
            mine = dict(list(missing.items())[rank::processes])
            if start is None:
                candidates = draw_candidates(gan.generator, gan.latent_dim, config.candidates, config.seed)
                start = partial(nearest_candidates, candidates=candidates)
            done_by_all = util.from_all(fit_shards(mine, split, image_set, gan, start, search, config))
            unreadable, searched, seconds = zip(*done_by_all, strict=True)

            # Rank 0 makes one file of the shards
            if rank == 0:
                done = [shard for shard in shards if shard not in chain(*unreadable)]
                if not done:
                    raise util.InputError(f"none of the {len(image_set)} images of the split {split} can be read")
                scores = merge_shards(path, done, split, gan, asked_for)
                shutil.rmtree(folder)
                if skipped := len(image_set) - len(scores):
                    print(f"skipped {skipped} of {len(image_set)} images, which cannot be read")
                print(f"{split}: {len(scores)} images, mean loss {scores.mean():.1f}")
                fitted[path.name] = {
                    "images": len(scores),
                    "searched": sum(searched),  # the others were done before
                    "seconds": round(max(seconds), 2),
                    "mean_loss": float(scores.mean()),
                }
        if rank == 0 and fitted:
            name = "fit_latent" if config.images is None else "fit_latent_images"
            name += "" if config.discrimination == "features" else f"_{config.discrimination}"
            seconds = time.monotonic() - started
            runs.record_run(
                run_dir, name, config, device, seconds, precision=precision, processes=processes, fitted=fitted
            )
            print(f"wrote {run_dir}/: {' '.join(fitted)} run.json")
        images = [] if config.images is None else ["--images", *config.images]
        command = shlex.join(["python", "evaluate.py", "--run-dir", str(run_dir), *images[:6]])
        print(f"next: {command}{' ... and the others' if len(images) > 6 else ''}")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
