"""The two networks of a DCGAN (Radford et al. 2016), as AnoGAN (Schlegl et al. 2017) uses them, and an encoder, which
more than one detector needs.

`image_size` sets the length of both ladders: every rung doubles or halves the side, between 4 and `image_size`.
At 64 the generator's widths are 8, 4, 2, 1 x ngf at 4x4, 8x8, 16x16, 32x32, then the image; the discriminator is its
mirror. At 32 the ladder is one rung shorter (4, 2, 1), at 128 one longer (16, 8, 4, 2, 1).
"""

import contextlib
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def channel_multipliers(image_size: int) -> list[int]:
    """Widths of the hidden layers from the image inwards, in units of ngf or ndf: 64 -> [1, 2, 4, 8].

    Raises ValueError unless `image_size` is a power of two from 32 up.
    """
    if image_size < 32 or image_size & (image_size - 1):
        raise ValueError(f"image_size must be a power of two from 32 up (32, 64, 128, ...), not {image_size}")
    return [2**rung for rung in range(image_size.bit_length() - 3)]


class Generator(nn.Module):
    """G: a latent z ~ N(0, I) to an image in [-1, 1].

    Raises ValueError unless `image_size` is a power of two from 32 up.
    """

    def __init__(self, image_size: int = 64, image_channels: int = 3, latent_dim: int = 128, ngf: int = 64) -> None:
        super().__init__()
        widths = [ngf * multiplier for multiplier in reversed(channel_multipliers(image_size))]
        # (N, latent_dim, 1, 1) -> (N, 8 ngf, 4, 4) at image_size 64
        layers = [
            nn.ConvTranspose2d(latent_dim, widths[0], 4, 1, 0, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        ]
        for wide, narrow in pairwise(widths):  # each rung doubles the side
            layers += [
                nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False),
                nn.BatchNorm2d(narrow),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.ConvTranspose2d(widths[-1], image_channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """z (N, latent_dim) to images (N, image_channels, image_size, image_size) in [-1, 1]."""
        return self.layers(z.to(self.layers[0].weight.dtype)[:, :, None, None])


def downward_ladder(
    image_size: int, image_channels: int, ndf: int, deep: bool = False, first_bias: bool = False
) -> nn.Sequential:
    """The hidden layers of D, and of the detectors' networks: (N, image_channels, image_size, image_size) to
    (N, 8 ndf, 4, 4) at image_size 64, and (N, 4 ndf, 4, 4) at 32.

    With `deep` each rung has a second convolution, which keeps the side. With `first_bias` the first convolution has a
    bias: it alone has no BatchNorm, which brings a bias of its own.

    Raises ValueError unless `image_size` is a power of two from 32 up.
    """
    widths = [ndf * multiplier for multiplier in channel_multipliers(image_size)]
    layers = []
    for narrow, wide in pairwise([image_channels, *widths]):  # each rung halves the side
        layers.append(nn.Conv2d(narrow, wide, 4, 2, 1, bias=first_bias and not layers))
        if len(layers) > 1:  # like G's last layer, whose mirror it is, the first keeps the image's own contrast
            layers.append(nn.BatchNorm2d(wide))
        layers.append(nn.LeakyReLU(0.2, inplace=True))
        if deep:
            layers += [
                nn.Conv2d(wide, wide, 3, 1, 1, bias=False),
                nn.BatchNorm2d(wide),
                nn.LeakyReLU(0.2, inplace=True),
            ]
    return nn.Sequential(*layers)


def rung_outputs(body: nn.Sequential, x: torch.Tensor) -> list[torch.Tensor]:
    """What each rung of a `downward_ladder` puts out, from the widest image to the smallest: (N, ndf, 32, 32), ...,
    (N, 8 ndf, 4, 4) at image_size 64."""
    found = []
    for layer in body:
        if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):  # a rung ends where the next begins
            found.append(x)
        x = layer(x)
    return [*found[1:], x]


class Discriminator(nn.Module):
    """D: an image in [-1, 1] to one logit; sigmoid(logit) is D's probability that the image is real.

    Raises ValueError unless `image_size` is a power of two from 32 up.
    """

    def __init__(self, image_size: int = 64, image_channels: int = 3, ndf: int = 64) -> None:
        super().__init__()
        # Without the bias D hardly sees contrast: doubling the pixels would double every feature up to the first
        # BatchNorm, which divides it out, since real and generated images come in separate batches. On pictures that
        # do not reach black and white, G's colours then drift
        self.body = downward_ladder(image_size, image_channels, ndf, first_bias=True)
        self.head = nn.Conv2d(ndf * channel_multipliers(image_size)[-1], 1, 4, 1, 0, bias=False)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """f(x), the output of the last hidden layer: (N, 8 ndf, 4, 4) at image_size 64, (N, 4 ndf, 4, 4) at 32."""
        return self.body(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, image_channels, image_size, image_size) in [-1, 1] to logits (N,)."""
        return self.head(self.features(x)).flatten()  # (N, 1, 1, 1) -> (N,)


class Encoder(nn.Module):
    """E: an image in [-1, 1] to a latent z, by D's hidden layers with a head of its own: for f-AnoGAN and the aCAE.

    Raises ValueError unless `image_size` is a power of two from 32 up.
    """

    def __init__(self, image_size: int = 64, image_channels: int = 3, latent_dim: int = 128, ndf: int = 64) -> None:
        super().__init__()
        self.body = downward_ladder(image_size, image_channels, ndf)
        # no tanh after it: z ~ N(0, I) has no bounds
        self.head = nn.Conv2d(ndf * channel_multipliers(image_size)[-1], latent_dim, 4, 1, 0, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, image_channels, image_size, image_size) in [-1, 1] to z (N, latent_dim)."""
        return self.head(self.body(x)).flatten(1)  # (N, latent_dim, 1, 1) -> (N, latent_dim)


def initialise_weights(module: nn.Module) -> None:
    """DCGAN's start, for `network.apply(initialise_weights)`: convolutions N(0, 0.02), BatchNorm N(1, 0.02), bias 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


@contextlib.contextmanager
def keeping_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in training normalises by its batch as ever, and leaves its stored statistics as they are."""
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def fold_batchnorm(layers: nn.Sequential) -> nn.Sequential:
    """The same function in eval mode with fewer layers: each BatchNorm, a fixed scale and shift there, goes into the
    weights and the bias of the convolution before it."""
    folded = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            convolution = folded.pop()
            folded.append(fuse_conv_bn_eval(convolution, layer, isinstance(convolution, nn.ConvTranspose2d)))
        else:
            folded.append(layer)
    return nn.Sequential(*folded)
