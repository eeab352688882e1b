"""2. For every image x, search the latent z whose G(z) is closest: Adam over z, with G and D frozen.

    python fit_latent.py                                      # the run trained last, its validation and test images
    python fit_latent.py --max-images 1000                    # a thousand images of each split, all classes alike
    python fit_latent.py --splits train_anomalies --run-dir outputs/cifar10-automobile

Writes latents-<split>.npz to the run folder: z, residual and discrimination of every image.
Next: python evaluate.py
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.nn.functional import adaptive_avg_pool2d
from torch.optim import Adam

import util
from network import Discriminator, Generator


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    splits: tuple[str, ...] = ("validation", "test")  # any of train, validation, test, train_anomalies
    max_images: int | None = None  # take only so many images of a split, each class in its proportion
    steps: int = 100  # Adam steps for each image; fewer than 25 can end higher than they start
    lr: float = 0.4  # Adam's largest step size: up to it over the first fifth of the steps, down over the last
    discrimination_weight: float = 0.1  # lambda: the loss is (1 - lambda) residual + lambda discrimination
    candidates: int = 4000  # generated images among which a search starts at the nearest; with 1, at the same z for all
    batch_size: int | None = None  # images at once, by default 64 on a CPU and 512 on a GPU; it changes no result
    seed: int = 0  # of the candidates and of the choice of --max-images
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda, cuda:1, cpu, ...
    precision: util.Precision = "auto"  # of the steps; auto: bf16 where the hardware multiplies it faster
    skip_unreadable: bool = False  # go on without the images that cannot be read


@dataclass(frozen=True)
class Candidates:
    """Latents that a search may start from, and what G draws for them."""

    z: torch.Tensor  # (M, latent_dim)
    thumbnails: torch.Tensor  # (M, C * 16 * 16), of G(z)


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) averaged down to 16x16 and flattened: (N, C * 16 * 16)."""
    return adaptive_avg_pool2d(images, 16).flatten(1)


@torch.no_grad()
def draw_candidates(generator: Generator, latent_dim: int, count: int, seed: int) -> Candidates:
    """`count` latents z ~ N(0, I), which depend on the seed alone, and the thumbnails of G(z)."""
    device = next(generator.parameters()).device
    z = torch.randn(count, latent_dim, generator=torch.Generator().manual_seed(seed)).to(device)
    return Candidates(z, torch.cat([thumbnails(generator(batch)) for batch in z.split(64)]))


def nearest_candidates(x: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """The candidate z of the smallest residual between thumbnails, for each image (N, C, H, W): (N, latent_dim).

    Each distance is a sum of its own, so a start depends on seed, model and that image alone. On whole images and
    with the discrimination in it, the choice was 0.1% better and 30 times dearer (benchmarks/README.md).
    """
    return candidates.z[torch.cdist(thumbnails(x), candidates.thumbnails, p=1).argmin(1)]


def search_latents(
    generator: Generator,
    discriminator: Discriminator,
    x: torch.Tensor,
    z: torch.Tensor,
    steps: int,
    lr: float,
    discrimination_weight: float,
    precision: str = "fp32",
    after_step: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minimise (1 - λ) R(z) + λ D(z) over z by Adam (Schlegl et al. 2017, section 2.2).

    x (N, C, H, W) in [-1, 1] and starting z (N, latent_dim) to the z found (N, latent_dim), its residual (N,) and its
    discrimination (N,). G and D must be frozen and in eval mode. Then no image sees another: BatchNorm uses its stored
    statistics, Adam's moments belong to single coordinates, and the gradient of a sum is each image's own. So a batch
    is exactly N separate searches. With precision "bf16" the steps run in bf16; what is returned is measured in fp32.
    """
    autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16")
    z = z.clone().requires_grad_()
    optimizer = Adam([z], lr=lr, fused=True)
    with torch.no_grad():
        features = discriminator.features(x)  # f(x) stays the same throughout

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        generated = generator(z)
        residual = util.residual_loss(x, generated)
        return residual, util.discrimination_loss(features, discriminator.features(generated))

    for step in range(steps):
        # up from 0 over the first fifth of the steps, down to 0 over the last
        optimizer.param_groups[0]["lr"] = lr * min(1, 5 * (step + 1) / steps, 5 * (steps - step) / steps)
        optimizer.zero_grad()
        with autocast:
            loss = util.anomaly_score(*losses(), discrimination_weight).sum()
        loss.backward()
        optimizer.step()
        after_step()
    z = z.detach()
    with torch.no_grad():
        return z, *losses()


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


def main(config: Config) -> None:
    """Search, and write latents-<split>.npz of every split asked for."""
    started = time.monotonic()
    util.check_at_least(config, 1, "steps", "candidates")
    util.check_at_least(config, 0, "lr", "discrimination_weight")
    util.check_seed(config.seed)
    for name in ("max_images", "batch_size"):
        if getattr(config, name) is not None:
            util.check_at_least(config, 1, name)
    if config.discrimination_weight > 1:
        raise util.InputError(f"--discrimination-weight must be at most 1, not {config.discrimination_weight}")
    if not config.splits:
        raise util.InputError(f"--splits names no split: choose from {', '.join(util.SPLITS)}")
    if unknown := set(config.splits) - set(util.SPLITS):
        raise util.InputError(f"unknown split {min(unknown)!r}: choose --splits from {', '.join(util.SPLITS)}")
    device = util.pick_device(config.device)
    precision = util.pick_precision(config.precision, device)
    batch_size = config.batch_size or (512 if device.type == "cuda" else 64)
    run_dir = util.find_run(config.run_dir)
    gan = util.load_gan(run_dir, device)
    print(f"run: {run_dir}   normal class: {gan.normal_class}   epochs: {gan.epoch}   device: {device}, {precision}")

    search = {name: getattr(config, name) for name in ("steps", "lr", "discrimination_weight", "candidates", "seed")}
    search["precision"] = precision
    candidates = draw_candidates(gan.generator, gan.latent_dim, config.candidates, config.seed)
    fitted = {}
    for split in config.splits:
        image_set = util.open_split(gan.dataset, split, gan.normal_class)
        if image_set.classes != gan.classes:
            raise util.InputError(
                f"{gan.dataset} has other classes than {run_dir / 'gan.pt'} was trained with: train again"
            )
        if config.max_images is not None:
            image_set = image_set.take(stratified_subset(image_set.label, config.max_images, config.seed))
        if len(image_set) == 0:
            raise util.InputError(f"the split {split} of {gan.dataset} holds no images: choose other --splits")

        def batches(image_set: util.ImageSet) -> list[util.ImageSet]:
            return [image_set.take(slice(i, i + batch_size)) for i in range(0, len(image_set), batch_size)]

        # Read every image once before the first step: a damaged file must not end a search after hours
        size, channels = gan.image_size, gan.image_channels
        readable = [util.load_images(part, size, channels, config.skip_unreadable)[1] for part in batches(image_set)]
        skipped = len(image_set) - sum(map(len, readable))
        if skipped == len(image_set):
            raise util.InputError(f"none of the {skipped} images of the split {split} can be read")
        if skipped:
            print(f"skipped {skipped} of {len(image_set)} images, which cannot be read")
            image_set = image_set.take(np.isin(image_set.index, np.concatenate([part.index for part in readable])))

        # Batch by batch: read, start, search, keep
        bar = util.progress_bar(
            len(image_set),
            " images",
            desc=split,
            bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )
        found, loss_sum = [], 0.0
        for batch in batches(image_set):
            images, _ = util.load_images(batch, size, channels)
            x = util.to_model(images, device).contiguous(memory_format=torch.channels_last)
            z, residual, discrimination = search_latents(
                gan.generator,
                gan.discriminator,
                x,
                nearest_candidates(x, candidates),
                config.steps,
                config.lr,
                config.discrimination_weight,
                precision,
                after_step=partial(bar.update, len(batch) / config.steps),
            )
            found.append((z.cpu(), residual.cpu(), discrimination.cpu()))
            loss_sum += util.anomaly_score(residual, discrimination, config.discrimination_weight).sum().item()
            bar.n = round(bar.n)  # whole images again, after fractions of a batch
            bar.set_postfix_str(f"mean loss {loss_sum / bar.n:.1f}", refresh=bar.n == len(image_set))
        bar.close()
        z, residual, discrimination = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        if not (np.isfinite(z).all() and np.isfinite(residual).all() and np.isfinite(discrimination).all()):
            raise util.InputError(
                f"the search of {split} diverged or {run_dir / 'gan.pt'} did: lower --lr, or train again"
            )
        util.write_latents(
            run_dir, split, gan, image_set, search, z=z, residual=residual, discrimination=discrimination
        )
        fitted[split] = {"images": len(z), "mean_loss": loss_sum / len(z)}

    util.record_run(
        run_dir, "fit_latent", config, device, time.monotonic() - started, precision=precision, fitted=fitted
    )
    print(f"wrote {run_dir}/: {' '.join(f'latents-{split}.npz' for split in config.splits)} run.json")
    print(f"next: python evaluate.py --run-dir {run_dir}")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=__doc__))
