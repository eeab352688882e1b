"""2. For every image x, search the latent z whose G(z) is closest: Adam over z, with G and D frozen.

    python fit_latent.py                                      # the run trained last, its validation and test images
    python fit_latent.py --max-images 1000                    # a thousand images of each split, all classes alike
    python fit_latent.py --splits train_anomalies --run-dir outputs/cifar10-automobile

Writes latents-<split>.npz to the run folder: z, residual and discrimination of every image.
Next: python evaluate.py
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.optim import Adam

import util
from network import Discriminator, Generator


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    splits: tuple[str, ...] = ("validation", "test")  # any of train, validation, test, train_anomalies
    max_images: int | None = None  # take only so many images of a split, each class in its proportion
    steps: int = 100  # Adam steps for each image
    lr: float = 0.2  # Adam's step size, the same throughout; the README shows why these two
    discrimination_weight: float = 0.1  # lambda: the loss is (1 - lambda) residual + lambda discrimination
    batch_size: int = 64  # images searched at once; up to rounding it does not change what is found
    seed: int = 0  # of the starting latents and of the choice of --max-images
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda, cuda:1, cpu, ...
    skip_unreadable: bool = False  # go on without the images that cannot be read


def search_latents(
    generator: Generator,
    discriminator: Discriminator,
    x: torch.Tensor,
    z: torch.Tensor,
    steps: int,
    lr: float,
    discrimination_weight: float,
    after_step: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minimise (1 - λ) R(z) + λ D(z) over z by Adam (Schlegl et al. 2017, section 2.2).

    x (N, C, H, W) in [-1, 1] and starting z (N, latent_dim) to the z found (N, latent_dim), its residual (N,) and its
    discrimination (N,). G and D must be frozen and in eval mode. Then no image sees another: BatchNorm uses its stored
    statistics, Adam's moments belong to single coordinates, and the gradient of a sum is each image's own. So a batch
    is exactly N separate searches.
    """
    z = z.clone().requires_grad_()
    optimizer = Adam([z], lr=lr)
    with torch.no_grad():
        features = discriminator.features(x)  # f(x) stays the same throughout

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        generated = generator(z)
        residual = util.residual_loss(x, generated)
        return residual, util.discrimination_loss(features, discriminator.features(generated))

    for _ in range(steps):
        optimizer.zero_grad()
        util.anomaly_score(*losses(), discrimination_weight).sum().backward()
        optimizer.step()
        after_step()
    with torch.no_grad():
        return z.detach(), *losses()


def starting_latents(images: torch.Tensor, latent_dim: int, seed: int) -> torch.Tensor:
    """z ~ N(0, I) for each uint8 image (N, C, H, W), from the seed and that image's pixels alone: (N, latent_dim).

    So what is found does not change with batch size, order, or how the work is shared.
    """
    latents = []
    for image in images:
        digest = hashlib.blake2b(image.numpy().tobytes(), digest_size=8, salt=seed.to_bytes(8, "little"))
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little") >> 1)
        latents.append(torch.randn(latent_dim, generator=generator))
    return torch.stack(latents)


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
    util.check_at_least(config, 1, "steps", "batch_size")
    util.check_at_least(config, 0, "lr", "discrimination_weight")
    util.check_seed(config.seed)
    if config.max_images is not None:
        util.check_at_least(config, 1, "max_images")
    if config.discrimination_weight > 1:
        raise util.InputError(f"--discrimination-weight must be at most 1, not {config.discrimination_weight}")
    if not config.splits:
        raise util.InputError(f"--splits names no split: choose from {', '.join(util.SPLITS)}")
    if unknown := set(config.splits) - set(util.SPLITS):
        raise util.InputError(f"unknown split {min(unknown)!r}: choose --splits from {', '.join(util.SPLITS)}")
    device = util.pick_device(config.device)
    run_dir = util.find_run(config.run_dir)
    gan = util.load_gan(run_dir, device)
    print(f"run: {run_dir}   normal class: {gan.normal_class}   trained for {gan.epoch} epochs   device: {device}")

    search = {name: getattr(config, name) for name in ("steps", "lr", "discrimination_weight", "seed")}
    fitted = {}
    for split in config.splits:
        image_set = util.open_split(gan.dataset, split, gan.normal_class)
        if image_set.classes != gan.classes:
            raise util.InputError(
                f"{gan.dataset} has other classes than {run_dir / 'gan.pt'} was trained with: train again"
            )
        if config.max_images is not None:
            image_set = image_set.take(stratified_subset(image_set.label, config.max_images, config.seed))
        images, image_set = util.load_images(image_set, gan.image_size, gan.image_channels, config.skip_unreadable)
        if len(images) == 0:
            raise util.InputError(f"the split {split} of {gan.dataset} holds no images: choose other --splits")

        # Batch by batch: start, search, keep
        bar = util.progress_bar(
            len(images),
            " images",
            desc=split,
            bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )
        found, loss_sum = [], 0.0
        for batch in images.split(config.batch_size):
            z, residual, discrimination = search_latents(
                gan.generator,
                gan.discriminator,
                util.to_model(batch, device).contiguous(memory_format=torch.channels_last),
                starting_latents(batch, gan.latent_dim, config.seed).to(device),
                config.steps,
                config.lr,
                config.discrimination_weight,
                after_step=partial(bar.update, len(batch) / config.steps),
            )
            found.append((z.cpu(), residual.cpu(), discrimination.cpu()))
            loss_sum += util.anomaly_score(residual, discrimination, config.discrimination_weight).sum().item()
            bar.n = round(bar.n)  # whole images again, after fractions of a batch
            bar.set_postfix_str(f"mean loss {loss_sum / bar.n:.1f}", refresh=bar.n == len(images))
        bar.close()
        z, residual, discrimination = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        if not (np.isfinite(z).all() and np.isfinite(residual).all() and np.isfinite(discrimination).all()):
            raise util.InputError(
                f"the search of {split} diverged or {run_dir / 'gan.pt'} did: lower --lr, or train again"
            )
        util.write_latents(
            run_dir, split, gan, image_set, search, z=z, residual=residual, discrimination=discrimination
        )
        fitted[split] = {"images": len(images), "mean_loss": loss_sum / len(images)}

    util.record_run(run_dir, "fit_latent", config, device, time.monotonic() - started, fitted=fitted)
    print(f"wrote {run_dir}/: {' '.join(f'latents-{split}.npz' for split in config.splits)} run.json")
    print(f"next: python evaluate.py --run-dir {run_dir}")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=__doc__))
