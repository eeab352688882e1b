"""RotNet: learn to tell by how much a normal image was turned. Scores that work where the GAN's fail rest on it.

    python train_rotnet.py                                     # on the images of the run trained last
    python train_rotnet.py --run-dir outputs/cifar10-automobile --epochs 15
    torchrun --standalone --nproc-per-node=8 train_rotnet.py   # on eight GPUs

To tell, it must know what the object is, not only its texture, nor its colours, which are changed at random. It suits
pictures that have an upright, and whose mirror images are normal too. From gan.pt it takes the data set, the normal
class and the sizes, no weights. Writes rotnet.pt, rotnet-losses.csv and .png to the run folder, and adds to its
run.json. However it was stopped, the same command goes on from the last rotnet.pt. evaluate.py then has more scores.
Next: python evaluate.py
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torch.optim import Adam

import runs
import training
import util
from network import RotNet, initialise_weights

CURVES = {"Cross-entropy with the turn": {"loss": "loss"}, "Share of turns told right": {"accuracy": "accuracy"}}


@dataclass
class Config:
    run_dir: Path | None = None  # the run to use; by default the one trained last
    epochs: int = 45  # passes over the images that the GAN was trained on
    batch_size: int | None = None  # images a step, each in four turns, in each process; by default as the GAN's
    lr: float = 1e-3  # Adam's step size
    weight_decay: float = 1e-5  # Adam's pull of the weights towards 0
    checkpoint_every: str = "10m"  # minutes (10m) or steps (500) between two writes of rotnet.pt and losses
    fresh: bool = False  # start over, and replace rotnet.pt, instead of going on from there
    tensorboard: bool = False  # also log the losses to tensorboard/ in the run folder, if tensorboard is installed
    seed: int = 0  # of the first weights, the order of the images and how they are moved
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda, cuda:1, cpu, ...
    precision: util.Precision = "auto"  # of the convolutions; auto: bf16 where the hardware multiplies it faster
    skip_unreadable: bool = False  # go on without the images that cannot be read


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


def train_step(rotnet: nn.Module, optimizer: Adam, x: torch.Tensor, autocast: torch.autocast) -> torch.Tensor:
    """One step on images (N, C, H, H), moved and recoloured at random and each in all four turns.

    Returns the cross-entropy with the turn and the share of turns told right, (2,), on the device.
    """
    x = recoloured(augmented(x))
    images = torch.cat([x.rot90(turn, (2, 3)) for turn in range(4)])  # (4 N, C, H, H)
    images = images.contiguous(memory_format=torch.channels_last)
    turn = torch.arange(4, device=x.device).repeat_interleave(len(x))
    with autocast:
        logits = rotnet(images)
    loss = cross_entropy(logits.to(x.dtype), turn)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return torch.stack([loss, (logits.argmax(1) == turn).float().mean()]).detach()


def main(config: Config) -> None:
    """Check what was asked for, read the GAN's images, and train RotNet in the run folder."""
    with training.beside_gan(config, "rotnet", runs.load_rotnet) as start:
        gan, config = start.gan, start.config
        rotnet = RotNet(gan.image_size, gan.image_channels, gan.ndf).apply(initialise_weights)
        optimizer, scheduler = training.prepare(rotnet, config, start.images.device)
        training.train(
            "train_rotnet",
            config,
            start.path,
            start.images,
            start.settings | {name: getattr(gan, name) for name in runs.ROTNET_SIZES},
            parts={"rotnet": rotnet, "optimizer": optimizer, "scheduler": scheduler},
            train_step=lambda networks, x: train_step(*networks, optimizer, x, start.autocast),
            curves=CURVES,
        )
        print(f"next: python evaluate.py --run-dir {util.quoted(start.path.parent)}")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
