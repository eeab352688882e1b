"""Shapes, parameter counts, features and first weights of G and D."""

import pytest
import torch
from torch import nn

from detectors.rotnet import RotNet
from network import Discriminator, Encoder, Generator, fold_batchnorm, initialise_weights


@pytest.mark.parametrize("image_size", [32, 64, 128])
@pytest.mark.parametrize("image_channels", [1, 3])
def test_shapes(image_size: int, image_channels: int) -> None:
    images = Generator(image_size, image_channels, latent_dim=7, ngf=2)(torch.randn(5, 7))
    assert images.shape == (5, image_channels, image_size, image_size)
    assert images.abs().max() <= 1
    discriminator = Discriminator(image_size, image_channels, ndf=2)
    assert discriminator(images).shape == (5,)
    assert discriminator.features(images).shape == (5, 2 * image_size // 8, 4, 4)
    assert Encoder(image_size, image_channels, latent_dim=7, ndf=2)(images).shape == (5, 7)
    rotnet = RotNet(image_size, image_channels, ndf=2)
    assert rotnet(images).shape == (5, 4)
    sides = [image_size // 2**rung for rung in range(1, image_size.bit_length() - 2)]
    assert [rung.shape for rung in rotnet.features(images)] == [(5, image_size // side, side, side) for side in sides]
    assert torch.equal(rotnet.eval().features(images)[-1], rotnet.body(images))


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_parameter_counts(channels: int) -> None:
    # 4x4 kernels without bias, and two numbers a channel for each BatchNorm; a bias in D's first layer, which has none
    at_64 = 16 * (128 * 512 + 512 * 256 + 256 * 128 + 128 * 64 + 64 * channels) + 2 * (512 + 256 + 128 + 64)
    assert count(Generator(64, channels, latent_dim=128, ngf=64)) == at_64
    at_32 = 16 * (128 * 256 + 256 * 128 + 128 * 64 + 64 * channels) + 2 * (256 + 128 + 64)
    assert count(Generator(32, channels, latent_dim=128, ngf=64)) == at_32
    at_64 = 16 * (channels * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 2 * (128 + 256 + 512)
    assert count(Discriminator(64, channels, ndf=64)) == at_64 + 64
    at_32 = 16 * (channels * 64 + 64 * 128 + 128 * 256 + 256) + 2 * (128 + 256)
    assert count(Discriminator(32, channels, ndf=64)) == at_32 + 64
    # the encoder's head has an output for each of z's coordinates
    assert count(Encoder(32, channels, latent_dim=128, ndf=64)) == at_32 + 16 * 256 * 127
    # RotNet's head has four, and each rung a second convolution with BatchNorm
    assert count(RotNet(32, channels, ndf=64)) == at_32 + 16 * 256 * 3 + sum(9 * n * n + 2 * n for n in (64, 128, 256))


def test_features_are_what_the_logit_is_made_from() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(64, 3, ndf=64).eval()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    features = discriminator.features(x)
    assert features.shape == (2, 512, 4, 4)  # 8 ndf x 4 x 4, after the activation of the last hidden layer
    by_hand = (features * discriminator.head.weight).sum((1, 2, 3))
    torch.testing.assert_close(discriminator(x), by_hand)
    slope = features[features < 0].abs().mean() / features[features > 0].mean()
    assert 0.1 < slope < 0.4  # LeakyReLU(0.2) of roughly symmetric inputs


def test_first_weights() -> None:
    torch.manual_seed(0)
    for network in (Generator(64), Discriminator(64)):
        network.apply(initialise_weights)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                weight = module.weight
                assert weight.std().item() == pytest.approx(0.02, rel=0.05)
                assert abs(weight.mean().item()) < 4 * 0.02 / weight.numel() ** 0.5
                assert module.bias is None or (module.bias == 0).all()
            if isinstance(module, nn.BatchNorm2d):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.4)
                assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
                assert (module.bias == 0).all()


def test_folded_networks_compute_the_same(tiny_networks: tuple[Generator, Discriminator]) -> None:
    generator, discriminator = tiny_networks
    z = torch.randn(3, 8, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = generator.layers(z)
    for layers, inputs in ((generator.layers, z), (discriminator.body, images)):
        expected, depth = layers(inputs), len(layers)
        folded = fold_batchnorm(layers)
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded) and len(layers) == depth
        torch.testing.assert_close(folded(inputs), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layers(inputs), expected, rtol=0, atol=0)  # the original is left as it was


@pytest.mark.parametrize("image_size", [0, 16, 31, 48, 65, -64])
def test_wrong_image_size(image_size: int) -> None:
    for network in (Generator, Discriminator, Encoder, RotNet):
        with pytest.raises(ValueError, match="power of two from 32 up"):
            network(image_size)
