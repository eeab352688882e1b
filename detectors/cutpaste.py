"""CutPaste: learn to tell a normal picture from one with a piece pasted into it. For defects of parts and surfaces.

    python -m detectors.cutpaste                                     # on the images of the run trained last
    python -m detectors.cutpaste --run-dir outputs/washers-good --epochs 15
    torchrun --standalone --nproc-per-node=8 -m detectors.cutpaste   # on eight GPUs

What is added, torn or moved breaks the order of a normal surface, and so does a piece of it in another place (Li et
al. 2021). From gan.pt it takes the data set, the normal class and the sizes, no weights; nothing needs to be searched.
Writes cutpaste.pt, cutpaste-losses.csv and .png to the run folder, and adds to its run.json. Stop it at any time: the
same command continues from the last cutpaste.pt. evaluate.py then has the scores `pasted`, `cutpaste` and
`cutpaste_peak`, and a heat map; `cutpaste` is part of `combined`. Next: python evaluate.py
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import nn
from torch.nn.functional import cross_entropy, grid_sample, interpolate
from torch.optim import Adam

import util
from anogan import processes, runs
from anogan.gaussians import Gaussian, fit
from anogan.images import contrast_normalised
from anogan.loop import Loop, detector_training, prepare
from anogan.pictures import Pictures
from anogan.scores import HeatMap, Score, Source, peak
from network import channel_multipliers, downward_ladder, initialise_weights, rung_outputs

COMMAND = "python -m detectors.cutpaste"
CURVES = {"Cross-entropy with the version": {"loss": "loss"}, "Share of versions told right": {"accuracy": "accuracy"}}
SAME = (*runs.SAME_IMAGES, "ndf")  # what a checkpoint must share with the GAN
VERSIONS = 3  # of a picture: as it is, with a piece, with a scar
STEPS = 1500  # of a training, about: far fewer learn too little, and more made the scores worse
MEMORY = 2000  # training images or patches at most that the scores compare with
SHRINKAGE = 0.03  # of their features' covariance, at least
VERSION = 2  # of the scores, see `Source`: it says whether what a run folder keeps is of this code


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    dataset: str | None = None  # where the pictures of the run lie now, if they were moved
    epochs: int | None = None  # passes over the GAN's training images; by default 15, 45 or 105, for about 1,500 steps
    batch_size: int = 32  # images a step, each in three versions, in each process
    lr: float = 1e-3  # Adam's step size
    weight_decay: float = 1e-5  # Adam's pull of the weights towards 0
    fade: float = 0.0  # pixels over which a piece fades at its edge; 13 for diffuse defects, as in X-rays
    checkpoint_every: str = "10m"  # how often to save cutpaste.pt and losses: minutes (10m) or steps (500)
    fresh: bool = False  # start over and replace cutpaste.pt, instead of continuing it
    tensorboard: bool = False  # also log the losses to tensorboard/ in the run folder, if tensorboard is installed
    seed: int = 0  # of the first weights, the order of the images and what is pasted
    device: str = "auto"  # cuda, cuda:1, mps, cpu, ...; auto: the first there is of cuda, mps and cpu
    precision: util.Precision = "auto"  # of the convolutions; auto: bf16 where the hardware has it natively
    skip_unreadable: bool = False  # go on without the images that cannot be read


# ---- network and training -------------------------------------------------------------------------------------------


class CutPaste(nn.Module):
    """An image in [-1, 1] to three logits: is it as it was, has it a piece, has it a scar?

    D's hidden layers, each rung with a second convolution, averaged over the image. They see the image twice: as it is,
    and with its contrast normalised, in which a dark image has as much structure as a bright one. Raises ValueError
    unless `image_size` is a power of two from 32 up.
    """

    def __init__(self, image_size: int = 64, image_channels: int = 3, ndf: int = 64) -> None:
        super().__init__()
        self.body = downward_ladder(image_size, 2 * image_channels, ndf, deep=True)
        self.head = nn.Linear(ndf * channel_multipliers(image_size)[-1], VERSIONS)

    def rungs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What each rung makes of images (N, image_channels, image_size, image_size) in [-1, 1], see `rung_outputs`."""
        twice = torch.cat([x, contrast_normalised(x)], 1)  # (N, 2 image_channels, image_size, image_size)
        return rung_outputs(self.body, twice.contiguous(memory_format=torch.channels_last))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, image_channels, image_size, image_size) in [-1, 1] to logits (N, 3)."""
        return self.head(self.rungs(x)[-1].mean((2, 3)))


def uniform(count: int, low: float, high: float, device: torch.device) -> torch.Tensor:
    """Random numbers (count, 1, 1) between two."""
    return low + (high - low) * torch.rand(count, 1, 1, device=device)


def pasted(x: torch.Tensor, is_scar: bool, fade: float) -> torch.Tensor:
    """Images (N, C, H, H) in [-1, 1], each with a piece of itself or of the next one in another place, at random.

    A piece has 2% to 15% of the image's area; a scar is 3% to 12% of its side wide and 15% to 50% long, and turned.
    Both are up to 0.6 of the image's standard deviations brighter or darker, with up to 30% more or less contrast. At
    their edge they go from 90% to 10% within `fade` pixels.
    """
    count, side, device = len(x), x.shape[-1], x.device
    if is_scar:
        half_width, half_height = uniform(count, 0.03, 0.12, device), uniform(count, 0.15, 0.5, device)
        angle = uniform(count, -torch.pi, torch.pi, device)
    else:
        area, ratio = uniform(count, 0.02, 0.15, device), uniform(count, -1.2, 1.2, device).exp()
        half_width, half_height = (area * ratio).sqrt(), (area / ratio).sqrt()
        angle = torch.zeros(count, 1, 1, device=device)
    # coordinates from -1 to 1, as `grid_sample` has them; those of a pixel along and across the piece: (N, H, H)
    axis = torch.linspace(-1, 1, side, device=device)
    right, down = axis - uniform(count, -0.8, 0.8, device), axis[:, None] - uniform(count, -0.8, 0.8, device)
    across, along = right * angle.cos() + down * angle.sin(), down * angle.cos() - right * angle.sin()
    inwards = side / 2 * torch.stack([half_width - across.abs(), half_height - along.abs()])  # pixels (2, N, H, H)
    # sigmoid(±2.2) is 90% and 10%
    share = (inwards > 0).float() if fade == 0 else (4.4 / fade * inwards).sigmoid()
    share = share.prod(0)[:, None]  # of the piece: (N, 1, H, H)
    is_other = torch.rand(count, 1, 1, 1, device=device) < 0.5
    source = torch.where(is_other, x.roll(1, 0), x)
    taken_at = [across + uniform(count, -0.8, 0.8, device), along + uniform(count, -0.8, 0.8, device)]
    piece = grid_sample(source, torch.stack(taken_at, -1), padding_mode="reflection", align_corners=True)
    mean, deviation = piece.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
    contrast, brightness = uniform(count, 0.7, 1.3, device)[..., None], uniform(count, -0.6, 0.6, device)[..., None]
    piece = contrast * (piece - mean) + mean + brightness * deviation
    return x.lerp(piece.clamp(-1, 1), share)


def train(loop: Loop, cutpaste: nn.Module, optimizer: Adam, fade: float) -> None:
    """Steps on batches (B, C, H, H) in [-1, 1], each image in three versions: as it is, with a piece, with a scar."""
    for x in loop:
        versions = torch.cat([x, pasted(x, is_scar=False, fade=fade), pasted(x, is_scar=True, fade=fade)])  # (3 B, ...)
        version = torch.arange(VERSIONS, device=x.device).repeat_interleave(len(x))  # (3 B,)
        with loop.autocast:
            logits = cutpaste(versions)  # (3 B, 3)
        loss = cross_entropy(logits.to(x.dtype), version)
        util.take_step(optimizer, loss)
        loop.log(loss=loss, accuracy=(logits.argmax(1) == version).float().mean())


def build(gan: runs.TrainedGAN) -> CutPaste:
    """CutPaste's network of the GAN's sizes."""
    return CutPaste(gan.image_size, gan.image_channels, gan.ndf)


def load(gan: runs.TrainedGAN) -> runs.Trained:
    """The network of cutpaste.pt in the GAN's run folder, frozen. Raises InputError, see `runs.load_trained`."""
    return runs.load_trained(gan, "cutpaste.pt", COMMAND, "cutpaste", build(gan), SAME)


# ---- scores ---------------------------------------------------------------------------------------------------------


def own_loss(cutpaste: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """-log p(as it was), the network's loss on x: (N, C, H, H) in [-1, 1] to float64 (N,)."""
    # in float64, or a confident network would make ties at 0
    return -cutpaste(x).cpu().double().log_softmax(1)[:, 0]


def features(cutpaste: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network makes of images (N, C, H, H) in [-1, 1]: of each as a whole (N, F), and of each place in it
    (N, K, h, h).

    As a whole: the last rung, averaged, which is what the head sees. Of a place: the last two rungs, at the finer grid.
    """
    before, last = cutpaste.rungs(x)[-2:]
    side = before.shape[-1]
    places = torch.cat([before, interpolate(last, (side, side), mode="bilinear")], 1)
    return last.mean((2, 3)), places


def gaussians(cutpaste: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The `Gaussian` of training images as a whole and that of their places by name, given batches of (N, C, H, H)."""
    wholes, places = [], []
    for x in batches:
        whole, of_places = features(cutpaste, x)
        wholes.append(whole)
        places.append(of_places.flatten(2).transpose(1, 2).flatten(0, 1))  # (N, K, h, h) -> (N h h, K)
    found = {"whole": fit(torch.cat(wholes), SHRINKAGE), "place": fit(torch.cat(places), SHRINKAGE)}
    return {f"{of}_{name}": value for of, gaussian in found.items() for name, value in vars(gaussian).items()}


@dataclass(frozen=True)
class Loaded:
    """What the scores rest on."""

    network: nn.Module
    whole: Gaussian
    place: Gaussian


def remember(gan: runs.TrainedGAN, training: Pictures | None = None) -> Loaded:
    """The network and its Gaussians, see `runs.remembered`. Raises InputError as that and `load` do."""
    trained = load(gan)
    rests_on = f"{trained.fingerprint} version {VERSION}"
    kept = runs.remembered(gan, "cutpaste", rests_on, partial(gaussians, trained.network), MEMORY, training)
    return Loaded(
        trained.network, *(Gaussian(kept[f"{of}_mean"], kept[f"{of}_precision"]) for of in ("whole", "place"))
    )


def distance(loaded: Loaded, x: torch.Tensor) -> torch.Tensor:
    """How far an image's features are from those of normal ones: (N, C, H, H) in [-1, 1] to (N,)."""
    return loaded.whole.distance(features(loaded.network, x)[0])


def distance_map(loaded: Loaded, x: torch.Tensor) -> torch.Tensor:
    """How far each place of an image is from normal ones, in deviations: (N, C, H, H) in [-1, 1] to (N, 1, H, H)."""
    places = features(loaded.network, x)[1]  # (N, K, h, h)
    distances = loaded.place.distance(places.permute(0, 2, 3, 1)).clamp(min=0).sqrt()  # (N, h, h)
    return interpolate(distances[:, None], x.shape[-2:], mode="bilinear")


CUTPASTE = Source("cutpaste.pt", COMMAND, lambda gan, image_sets: remember(gan), version=VERSION)
DISTANCE = HeatMap(
    "distance",
    CUTPASTE,
    lambda loaded, x, generated: distance_map(loaded, x),
    lambda normalise: (1.0, "deviations of CutPaste's features"),
)
SCORES = (
    Score(
        "pasted",
        "pasted, CutPaste's loss",
        CUTPASTE,
        lambda loaded, batch: own_loss(loaded.network, batch.x),
        colour="teal",
        line="--",
        opacity=0.6,
    ),
    Score(
        "cutpaste",
        "Mahalanobis in CutPaste's features",
        CUTPASTE,
        lambda loaded, batch: distance(loaded, batch.x),
        colour="teal",
    ),
    Score(
        "cutpaste_peak",
        "largest distance of a place, CutPaste",
        CUTPASTE,
        peak,
        colour="teal",
        line=":",
        opacity=0.4,
        map=DISTANCE,
    ),
)


def check_fade(fade: float, gan: runs.TrainedGAN) -> None:
    """Raise InputError if a piece would fade over more than the whole image: little of it would be left to see."""
    if fade > gan.image_size:
        raise util.InputError(f"--fade must be at most the side of what the network sees, {gan.image_size}, not {fade}")


def main(config: Config) -> Path:
    """Check what was asked for, read the GAN's images, and train CutPaste; returns the run folder."""
    util.check_at_least(config, 0, "fade")
    check = partial(check_fade, config.fade)
    with detector_training(config, COMMAND, "cutpaste.pt", load, SAME, check) as (gan, training):
        training = training.of_about(STEPS) if config.epochs is None else training
        cutpaste = build(gan).apply(initialise_weights)
        optimizer = prepare(cutpaste, training.config, gan.device)
        with Loop(training, {"cutpaste": cutpaste, "optimizer": optimizer}, CURVES) as loop:
            train(loop, loop.share(cutpaste), optimizer, config.fade)
        if processes.rank() == 0:
            remember(gan, training.pictures)
        print(f"next: python evaluate.py --run-dir {util.quoted(gan.run_dir)}")
        return gan.run_dir


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
