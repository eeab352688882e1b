"""RotNet: learn to tell by how much a normal image was turned. Its scores work on natural pictures, where A(x) fails.

    python -m detectors.rotnet                                     # on the images of the run trained last
    python -m detectors.rotnet --run-dir outputs/cifar10-automobile --epochs 15
    torchrun --standalone --nproc-per-node=8 -m detectors.rotnet   # on eight GPUs

To tell the turn, the network must know what the object is: texture is not enough, and colours are changed at random.
It suits pictures with a canonical orientation whose mirror images are normal too. From gan.pt it takes the data set,
the normal class and the sizes, no weights. Writes rotnet.pt, rotnet-losses.csv and .png to the run folder, and adds to
its run.json. Stop it at any time: the same command continues from the last rotnet.pt. evaluate.py then has the scores
`rotation`, `neighbours` and `mahalanobis`, and they are part of `combined`. Next: python evaluate.py
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, normalize, pad
from torch.optim import Adam

import util
from anogan import processes, runs
from anogan.gaussians import Gaussian, fit
from anogan.loop import Loop, detector_training, prepare
from anogan.pictures import Pictures
from anogan.scores import Score, Source
from network import channel_multipliers, downward_ladder, initialise_weights, rung_outputs

COMMAND = "python -m detectors.rotnet"
CURVES = {"Cross-entropy with the turn": {"loss": "loss"}, "Share of turns told right": {"accuracy": "accuracy"}}
SAME = (*runs.SAME_IMAGES, "ndf")  # what a checkpoint must share with the GAN
MEMORY = 5000  # training images at most that the scores compare with; at 64x64 with ndf 64 they take 250 MB


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    dataset: str | None = None  # where the pictures of the run lie now, if they were moved
    epochs: int = 45  # passes over the images that the GAN was trained on
    batch_size: int | None = None  # images a step, each in four turns, in each process; by default as the GAN's
    lr: float = 1e-3  # Adam's step size
    weight_decay: float = 1e-5  # Adam's pull of the weights towards 0
    checkpoint_every: str = "10m"  # how often to save rotnet.pt and losses: minutes (10m) or steps (500)
    fresh: bool = False  # start over and replace rotnet.pt, instead of continuing it
    tensorboard: bool = False  # also log the losses to tensorboard/ in the run folder, if tensorboard is installed
    seed: int = 0  # of the first weights, the order of the images and how they are moved
    device: str = "auto"  # cuda, cuda:1, mps, cpu, ...; auto: the first there is of cuda, mps and cpu
    precision: util.Precision = "auto"  # of the convolutions; auto: bf16 where the hardware has it natively
    skip_unreadable: bool = False  # go on without the images that cannot be read


# ---- network and training -------------------------------------------------------------------------------------------


class RotNet(nn.Module):
    """An image in [-1, 1] to four logits: was it turned by 0, 90, 180 or 270 degrees (Gidaris et al. 2018)?

    D's hidden layers, each rung with a second convolution. Raises ValueError unless `image_size` is a power of two
    from 32 up.
    """

    def __init__(self, image_size: int = 64, image_channels: int = 3, ndf: int = 64) -> None:
        super().__init__()
        self.body = downward_ladder(image_size, image_channels, ndf, deep=True)
        self.head = nn.Conv2d(ndf * channel_multipliers(image_size)[-1], 4, 4, 1, 0, bias=False)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What each rung puts out, see `rung_outputs`."""
        return rung_outputs(self.body, x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, image_channels, image_size, image_size) in [-1, 1] to logits (N, 4)."""
        return self.head(self.body(x)).flatten(1)  # (N, 4, 1, 1) -> (N, 4)


def augmented(x: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W), each mirrored or not and moved by up to a tenth of its side, at random.

    What a moved image uncovers shows what its edge mirrors.
    """
    count, channels, height, width = x.shape
    is_mirrored = torch.rand(count, 1, 1, 1, device=x.device) < 0.5
    reach = width // 10
    padded = pad(torch.where(is_mirrored, x.flip(3), x), (reach,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * reach + 1, (2, count, 1), device=x.device)
    rows = (top + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=x.device))[:, None, None, :]
    image = torch.arange(count, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[:, None, None]
    return padded[image, channel, rows, columns]  # (N, C, H, W)


def recoloured(x: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W), each in another brightness, contrast and saturation at random, a fifth of them in grey."""

    def around(middle: float, reach: float) -> torch.Tensor:
        return middle + reach * (2 * torch.rand(len(x), 1, 1, 1, device=x.device) - 1)

    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + around(1, 0.4) * (x - mean) + around(0, 0.2)
    is_grey = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.2
    grey = x.mean(1, keepdim=True)
    return grey + torch.where(is_grey, 0, around(1, 0.6)) * (x - grey)


def turned(x: torch.Tensor) -> list[torch.Tensor]:
    """Images (N, C, H, H) turned by 0, 90, 180 and 270 degrees, each (N, C, H, H)."""
    return [x.rot90(turn, (2, 3)).contiguous(memory_format=torch.channels_last) for turn in range(4)]


def train(loop: Loop, rotnet: nn.Module, optimizer: Adam) -> None:
    """Steps on batches (B, C, H, H) in [-1, 1], moved and recoloured at random and each image in all four turns."""
    for x in loop:
        x = recoloured(augmented(x))
        turns = torch.cat([x.rot90(turn, (2, 3)) for turn in range(4)])  # (4 B, C, H, H)
        turns = turns.contiguous(memory_format=torch.channels_last)
        turn = torch.arange(4, device=x.device).repeat_interleave(len(x))  # (4 B,)
        with loop.autocast:
            logits = rotnet(turns)  # (4 B, 4)
        loss = cross_entropy(logits.to(x.dtype), turn)
        util.take_step(optimizer, loss)
        loop.log(loss=loss, accuracy=(logits.argmax(1) == turn).float().mean())


def check_direction(gan: runs.TrainedGAN) -> None:
    """Raise InputError for a GAN whose pictures have no direction: then no network can tell how they were turned."""
    if gan.augment is not None:
        raise util.InputError(
            f"RotNet learns to tell by how much a picture was turned, and {gan.run_dir} was trained with --augment "
            f"{gan.augment}, for pictures without a direction: use the other scores, or train without --augment"
        )


def build(gan: runs.TrainedGAN) -> RotNet:
    """RotNet of the GAN's sizes."""
    return RotNet(gan.image_size, gan.image_channels, gan.ndf)


def load(gan: runs.TrainedGAN) -> runs.Trained:
    """RotNet of rotnet.pt in the GAN's run folder, frozen. Raises InputError, see `runs.load_trained`."""
    return runs.load_trained(gan, "rotnet.pt", COMMAND, "rotnet", build(gan), SAME)


# ---- scores ---------------------------------------------------------------------------------------------------------


def rotation(rotnet: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Σ -log p(k | x turned by k) over the four turns k, RotNet's own loss on x: (N, C, H, H) to float64 (N,).

    The score of Golan and El-Yaniv 2018 and Hendrycks et al. 2019 with turns as the only transformations.
    """
    # in float64, or a confident network would make ties at 0
    return sum(-rotnet(images).cpu().double().log_softmax(1)[:, turn] for turn, images in enumerate(turned(x)))


def directions(rotnet: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RotNet's features of images (N, C, H, W) as vectors of length 1: (N, F).

    Those of its last two rungs, averaged to 4x4 and of equal weight: what an object is, and what its parts look like.
    """
    rungs = [normalize(adaptive_avg_pool2d(rung, 4).flatten(1)) for rung in rotnet.features(x)[-2:]]
    return normalize(torch.cat(rungs, 1))


def channel_means(rotnet: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RotNet's channels, those of every rung, averaged over the image: (N, C, H, W) to (N, K)."""
    return torch.cat([rung.mean((2, 3)) for rung in rotnet.features(x)], 1)


@dataclass(frozen=True)
class NormalFeatures:
    """What RotNet makes of the training images, for `neighbours` and `mahalanobis`."""

    directions: torch.Tensor  # (M, F)
    means: torch.Tensor  # (4, K), of the `channel_means` of the images in each turn
    precisions: torch.Tensor  # (4, K, K), the inverse of their covariance


def normal_features(rotnet: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The `NormalFeatures` of the training images by name, given batches of (N, C, H, H) in [-1, 1]."""
    lengths_of_1, channels = [], []
    for x in batches:
        lengths_of_1.append(directions(rotnet, x))
        channels.append(torch.stack([channel_means(rotnet, images) for images in turned(x)]))  # (4, N, K)
    fits = [fit(of_turn) for of_turn in torch.cat(channels, 1)]
    means, precisions = (torch.stack([getattr(each, name) for each in fits]) for name in ("mean", "precision"))
    return {"directions": torch.cat(lengths_of_1), "means": means, "precisions": precisions}


def neighbours(rotnet: nn.Module, x: torch.Tensor, normal: NormalFeatures, count: int = 5) -> torch.Tensor:
    """Mean cosine distance of x's features to those of the nearest training images: (N, C, H, W) to (N,) in [0, 2].

    `count` of the training images, or all if there are fewer, are averaged. An image that is among them finds itself,
    at distance 0: on the split `train` this score means little.
    """
    similarity = directions(rotnet, x) @ normal.directions.T  # (N, M)
    return 1 - similarity.topk(min(count, len(normal.directions)), 1).values.mean(1)


def mahalanobis(rotnet: nn.Module, x: torch.Tensor, normal: NormalFeatures) -> torch.Tensor:
    """Σ (c - μ)ᵀ Σ⁻¹ (c - μ) over the four turns of x, where c are its `channel_means`: (N, C, H, H) to (N,).

    The squared distance from the training images' mean, in their own covariance (Lee et al. 2018, with one class).
    """
    fits = map(Gaussian, normal.means, normal.precisions)
    return sum(each.distance(channel_means(rotnet, turn)) for turn, each in zip(turned(x), fits, strict=True))


def remember(gan: runs.TrainedGAN, training: Pictures | None = None) -> tuple[RotNet, NormalFeatures]:
    """RotNet, and what it makes of the training images, see `runs.remembered`. Raises InputError as that and `load`."""
    trained = load(gan)
    make = partial(normal_features, trained.network)
    normal = runs.remembered(gan, "rotnet", trained.fingerprint, make, MEMORY, training)
    return trained.network, NormalFeatures(**normal)


ROTNET = Source("rotnet.pt", COMMAND, lambda gan, image_sets: remember(gan))
SCORES = (
    Score(
        "rotation",
        "rotation, RotNet's loss",
        ROTNET,
        lambda loaded, batch: rotation(loaded[0], batch.x),
        colour="tab:olive",
        line="--",
        opacity=0.6,
    ),
    Score(
        "neighbours",
        "neighbours in RotNet's features",
        ROTNET,
        lambda loaded, batch: neighbours(loaded[0], batch.x, loaded[1]),
        colour="tab:olive",
        line=":",
        opacity=0.4,
    ),
    Score(
        "mahalanobis",
        "Mahalanobis in RotNet's features",
        ROTNET,
        lambda loaded, batch: mahalanobis(loaded[0], batch.x, loaded[1]),
        colour="tab:olive",
        line="-.",
        opacity=0.2,
    ),
)


def main(config: Config) -> Path:
    """Check what was asked for, read the GAN's images, and train RotNet; returns the run folder."""
    with detector_training(config, COMMAND, "rotnet.pt", load, SAME, check_direction) as (gan, training):
        rotnet = build(gan).apply(initialise_weights)
        optimizer = prepare(rotnet, training.config, gan.device)
        with Loop(training, {"rotnet": rotnet, "optimizer": optimizer}, CURVES) as loop:
            train(loop, loop.share(rotnet), optimizer)
        if processes.rank() == 0:
            remember(gan, training.pictures)
        print(f"next: python evaluate.py --run-dir {util.quoted(gan.run_dir)}")
        return gan.run_dir


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
