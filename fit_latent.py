"""2. For every image or patch x, search the latent z whose G(z) is closest: Adam over z, with G and D frozen.

    python fit_latent.py                                      # the run trained last, its validation and test images
    python fit_latent.py --max-images 1000                    # a thousand images of each split, all classes alike
    python fit_latent.py --splits train_anomalies --run-dir outputs/cifar10-automobile
    python fit_latent.py --discrimination reference           # GAN_R: guided by D's output, kept apart from the others
    python fit_latent.py --init encoder                       # starts at E(x), see detectors/f_anogan.py
    python fit_latent.py --images my/pictures                 # your own pictures, without labels
    torchrun --standalone --nproc-per-node=8 fit_latent.py    # on eight GPUs: each takes its share of the shards

Writes latents-<split>.npz to the run folder: z, residual and discrimination of every image, or of every patch of a grid
that covers it; and reconstructions.png, which shows how well G draws normal images that it has not seen. Stop it at any
time: unfinished work is in latents-<split>/, and the same command searches only what is missing. Next: python
evaluate.py

Measured: `make demo` searches 478 digits (32x32, ngf 16, 100 steps) in 23 s on one thread of an AMD EPYC without
AVX-512, shared with other jobs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.optim import Adam

import util
from anogan import images, processes, reconstruction, runs
from anogan.candidates import candidates_of, nearest
from anogan.latents import Latents, batch_and_shard, check_same_search, stride_of
from detectors import f_anogan
from network import Discriminator, Generator

# What decides which z is found; latents of other settings are searched again
SEARCH_SETTINGS = ("steps", "lr", "ball", "discrimination", "discrimination_weight", "candidates", "seed")


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    dataset: str | None = None  # where the pictures of the run lie now, if they were moved
    splits: tuple[str, ...] = ("validation", "test")  # any of train, validation, test, train_anomalies
    images: tuple[str, ...] | None = None  # instead of splits: pictures without labels, folders or glob patterns
    max_images: int | None = None  # take only so many pictures of a split, each class in its proportion
    stride: int | None = None  # pixels from a patch to the next, for a GAN of patches; by default half their side
    steps: int = 100  # Adam steps for each image; fewer than 25 can end higher than they start
    lr: float = 0.4  # Adam's largest step size: up to it over the first fifth of the steps, down over the last
    ball: bool = True  # keep z as near to 0 as drawn ones are, |z| <= sqrt(latent_dim); --no-ball: as in the paper
    discrimination: Literal["features", "reference"] = "features"  # or reference: -log D(G(z)), Yeh et al. 2016
    discrimination_weight: float = 0.1  # lambda: the loss is (1 - lambda) residual + lambda discrimination
    init: Literal["candidates", "encoder"] = "candidates"  # where a search starts: the nearest candidate, or E(x)
    candidates: int = 4000  # generated images; a search starts at the nearest of them; 1: the same start for all
    batch_size: int | None = None  # images at once; by default 512 on cuda, else 64, or --shard-size if that is less
    shard_size: int = 1024  # images or patches between two writes, rounded up to whole batches: a crash costs these
    seed: int = 0  # of the candidates and of the choice of --max-images
    device: str = "auto"  # cuda, cuda:1, mps, cpu, ...; auto: the first there is of cuda, mps and cpu
    precision: util.Precision = "auto"  # of the steps; auto: bf16 where the hardware has it natively
    max_megapixels: float | None = None  # larger pictures are refused; by default as in training
    skip_unreadable: bool = False  # go on without the images that cannot be read


def search(
    networks: tuple[Generator, Discriminator],
    x: torch.Tensor,
    z: torch.Tensor,
    config: Config,
    after_step: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minimise (1 - λ) R(z) + λ D(z) over z by Adam, equation 5 of Schlegl et al. 2017; with D̂(z) for D(z) it is GAN_R.

    By default z stays in a ball, see `shorten`.

    x (N, C, H, W) in [-1, 1] and starting z (N, latent_dim) to the z found (N, latent_dim), its residual (N,) and its
    discrimination (N,). G and D must be as `runs.freeze` leaves them. Then no image sees another: Adam's moments belong
    to single coordinates, and the gradient of a sum is each image's own. So a batch is N separate searches: exactly on
    a CPU; on a GPU, where the batch size decides in which order sums are formed, up to what docs/results.md says. With
    precision "bf16" the steps run in bf16; what is returned is measured in fp32.
    """
    precision = util.pick_precision(config.precision, x.device)
    in_steps = networks if precision == "fp32" else runs.cast(networks, torch.bfloat16)
    z = z.clone().requires_grad_()
    # a tensor, which a captured step reads anew; Adam takes it in float64 on a CPU, as it does a float
    lr = torch.zeros((), dtype=torch.float64 if x.device.type == "cpu" else torch.float32, device=x.device)
    optimizer = Adam([z], lr, fused=True, capturable=x.device.type == "cuda")
    with torch.no_grad(), util.full_precision():
        f_x = networks[1].features(x)  # f(x) stays the same throughout

    def losses(generator: Generator, discriminator: Discriminator) -> tuple[torch.Tensor, torch.Tensor]:
        """R(z) and D(z), (N,) each."""
        generated = generator(z)  # (N, C, H, W)
        residual = util.residual_loss(x, generated)
        if config.discrimination == "reference":
            return residual, util.reference_loss(discriminator(generated).to(x.dtype))
        return residual, util.discrimination_loss(f_x, discriminator.features(generated))

    def descend() -> None:
        loss = util.anomaly_score(*losses(*in_steps), config.discrimination_weight)  # (N,)
        util.take_step(optimizer, loss.sum())
        if config.ball:
            shorten(z, z.shape[1] ** 0.5)

    descend = util.captured(descend, x.device)
    for step in range(config.steps):
        # the step size goes up from 0 over the first fifth of the steps, and down to 0 over the last
        ramp = min(1, 5 * (step + 1) / config.steps, 5 * (config.steps - step) / config.steps)
        lr.fill_(config.lr * ramp)
        descend()
        after_step()
    z = z.detach()
    with torch.no_grad(), util.full_precision():
        return z, *losses(*networks)


@torch.no_grad()
def shorten(z: torch.Tensor, longest: float) -> None:
    """Bring each z (N, latent_dim) that is longer than `longest` to that length, in place.

    A drawn z has a length of about sqrt(latent_dim): farther out lies what G was not trained to draw.
    """
    z *= (longest / z.norm(dim=1, keepdim=True)).clamp(max=1)


def main(config: Config) -> dict[str, dict[str, Any]]:
    """Search, and write latents-<split>.npz of every split asked for; returns them by split, on rank 0."""
    started, by_split, fitted = time.monotonic(), {}, {}
    check(config)
    device = util.pick_device(config.device)
    run_dir = runs.find_run(config.run_dir)
    with processes.join(device), runs.run_folder(run_dir):
        gan = runs.load_gan(run_dir, device, config.dataset, config.max_megapixels)
        precision = util.pick_precision(config.precision, device)
        print(
            f"run: {run_dir}   normal class: {gan.normal_class}   epochs: {gan.epoch:.4g}   "
            f"device: {util.in_words(device, precision)}   processes: {processes.count()}"
        )
        settings = {name: getattr(config, name) for name in SEARCH_SETTINGS} | {"precision": precision}
        settings["stride"] = stride_of(gan, config.stride)
        encoder = f_anogan.load(gan) if config.init == "encoder" else None
        if encoder is not None:
            settings["encoder"] = encoder.fingerprint
        # only if there is something to search
        candidates = cache(partial(candidates_of, gan, config.candidates, config.seed))
        if config.images is not None:
            check_same_search(gan, settings)

        todos, (batch_size, shard_size) = [], batch_and_shard(config.batch_size, config.shard_size, device)
        for split in config.splits if config.images is None else ("images",):
            image_set = chosen_images(gan, split, config)
            if image_set is not None:
                image_set = runs.keep_decoded(gan, image_set, split, config.skip_unreadable)
                todos.append(Latents(gan, image_set, split, settings, shard_size, config.skip_unreadable))
        shares = processes.from_all(sum(todo.missing for todo in todos))  # what each process has to search
        for todo in todos:
            for patches, x in todo.missing_batches(batch_size):
                z = nearest(x, candidates()) if encoder is None else encoder.network(x)
                since, after_step = time.monotonic(), partial(todo.advance, len(x) / config.steps)
                todo.add(patches, *search((gan.generator, gan.discriminator), x, z, config, after_step))
                if max(shares) > len(x):
                    processes.say_how_long(shares, len(x) / (time.monotonic() - since), gan.sees)
                shares = [0]  # it is said once
            latents = todo.merge()
            is_check = todo.split == "validation" and config.discrimination == "features"
            # opening CIFAR-10 takes every process
            training = images.list_split(gan.dataset, "train", gan.normal_class, gan.group_by) if is_check else None
            if processes.rank() > 0:
                continue
            by_split[todo.split] = latents
            if is_check and not (todo.was_complete and (run_dir / "reconstructions.png").exists()):
                reconstruction.check(gan, training, todo.image_set, latents)
            if not todo.was_complete:
                loss = util.anomaly_score(latents["residual"], latents["discrimination"], config.discrimination_weight)
                print(f"{todo.split}: {len(loss)} {gan.sees}, mean loss {loss.mean():.1f}")
                fitted[todo.path.name] = {gan.sees: len(loss), "mean_loss": float(loss.mean())}
        if fitted:
            name = "fit_latent" if config.images is None else "fit_latent_images"
            name += "" if config.discrimination == "features" else f"_{config.discrimination}"
            facts = {"precision": precision, "processes": processes.count(), "fitted": fitted}
            runs.record_run(run_dir, name, config, device, time.monotonic() - started, **facts)
            print(f"wrote {run_dir}/: {' '.join(fitted)} run.json")
        print(f"next: {next_command(run_dir, config.images)}")
    return by_split


def check(config: Config) -> None:
    """Raise InputError, naming the flag, if a value cannot be used."""
    util.check_at_least(config, 1, "steps", "candidates", "shard_size", "max_images", "batch_size", "max_megapixels")
    util.check_at_least(config, 0, "lr", "discrimination_weight")
    util.check_seed(config.seed)
    if config.discrimination_weight > 1:
        raise util.InputError(f"--discrimination-weight must be at most 1, not {config.discrimination_weight}")
    images.check_splits(config.splits)
    if config.images is not None and (config.splits != Config.splits or config.discrimination != "features"):
        raise util.InputError("--images goes with neither --splits nor --discrimination reference: leave them out")


def chosen_images(gan: runs.TrainedGAN, split: str, config: Config) -> images.ImageSet | None:
    """The images of a split or of --images, or --max-images of them; None, if no split was named, for an empty one.

    Raises InputError if there are none, or as `runs.open_split` does.
    """
    image_set = images.open_pictures(config.images) if split == "images" else runs.open_split(gan, split)
    if config.max_images is not None:
        image_set = image_set.take(images.stratified_subset(image_set.label, config.max_images, config.seed))
    if len(image_set) == 0 and config.splits == Config.splits:
        print(f"{gan.dataset} has no {split} pictures: none are searched")
        return None
    if len(image_set) == 0:
        raise util.InputError(f"the split {split} of {gan.dataset} holds no images: choose other --splits")
    return image_set


def next_command(run_dir: Path, pictures: tuple[str, ...] | None) -> str:
    """The command that scores what was found, as it can be pasted."""
    flags = [] if pictures is None else ["--images", *pictures[:6]]
    more = " ... and the others" if pictures is not None and len(pictures) > 6 else ""
    return " ".join(map(util.quoted, ["python", "evaluate.py", "--run-dir", run_dir, *flags])) + more


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
