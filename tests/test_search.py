"""The batched search against a plain loop over single images, and what it must leave alone."""

import copy

import numpy as np
import pytest
import torch

import fit_latent
import util
from fit_latent import search_latents, starting_latents, stratified_subset
from network import Discriminator, Generator

STEPS, LR, WEIGHT = 12, 0.1, 0.1
Networks = tuple[Generator, Discriminator]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32), dtype=np.uint8))


def search(networks: Networks, images: torch.Tensor, batch_size: int, **changes: float) -> list[torch.Tensor]:
    settings = {"steps": STEPS, "lr": LR, "discrimination_weight": WEIGHT} | changes
    parts = [
        search_latents(
            *networks, util.to_model(batch).double(), starting_latents(batch, 8, seed=0).double(), **settings
        )
        for batch in images.split(batch_size)
    ]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def plain_search(networks: Networks, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """AnoGAN's search for one image, as the paper tells it: no batch, no optimiser class, f(x) anew at every step."""
    generator, discriminator = networks
    x = (image.double() / 127.5 - 1)[None]
    z = starting_latents(image[None], 8, seed=0).double()
    first_moment, second_moment = torch.zeros_like(z), torch.zeros_like(z)

    def losses(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = torch.sum(torch.abs(x - generator(z)))
        return residual, torch.sum(torch.abs(discriminator.features(x) - discriminator.features(generator(z))))

    for step in range(STEPS):
        z.requires_grad_()
        residual, discrimination = losses(z)
        (gradient,) = torch.autograd.grad((1 - WEIGHT) * residual + WEIGHT * discrimination, z)
        first_moment = 0.9 * first_moment + 0.1 * gradient
        second_moment = 0.999 * second_moment + 0.001 * gradient**2
        unbiased = first_moment / (1 - 0.9 ** (step + 1)), second_moment / (1 - 0.999 ** (step + 1))
        z = (z - LR * unbiased[0] / (unbiased[1].sqrt() + 1e-8)).detach()
    residual, discrimination = losses(z)
    return z[0], residual, discrimination


def test_batched_search_is_the_plain_search(tiny_networks: Networks, images: torch.Tensor) -> None:
    batched = search(tiny_networks, images, batch_size=len(images))
    one_by_one = [torch.stack(part) for part in zip(*(plain_search(tiny_networks, i) for i in images), strict=True)]
    for found, expected in zip(batched, one_by_one, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_and_order_change_nothing(tiny_networks: Networks, images: torch.Tensor, batch_size: int) -> None:
    together = search(tiny_networks, images, batch_size=len(images))
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    apart = search(tiny_networks, images[order], batch_size)
    for found, expected in zip(apart, together, strict=True):
        torch.testing.assert_close(found, expected[order], rtol=1e-7, atol=1e-7)


def test_search_lowers_the_loss(tiny_networks: Networks, images: torch.Tensor) -> None:
    _, *before = search(tiny_networks, images, 7, steps=1, lr=0.0)
    _, *after = search(tiny_networks, images, 7, steps=100)
    assert (util.anomaly_score(*after, WEIGHT) < util.anomaly_score(*before, WEIGHT)).all()


def test_losses_belong_to_the_latents_returned(tiny_networks: Networks, images: torch.Tensor) -> None:
    z, residual, discrimination = search(tiny_networks, images, 7)
    generator, discriminator = tiny_networks
    x, generated = util.to_model(images).double(), generator(z)
    torch.testing.assert_close(residual, (x - generated).abs().sum((1, 2, 3)))
    features = discriminator.features(x) - discriminator.features(generated)
    torch.testing.assert_close(discrimination, features.abs().sum((1, 2, 3)))


def test_search_from_the_answer_stays_there(tiny_networks: Networks) -> None:
    generator, discriminator = tiny_networks
    answer = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = generator(answer)
    _, residual, discrimination = search_latents(generator, discriminator, x, answer, 20, 1e-4, WEIGHT)
    _, far_residual, _ = search_latents(generator, discriminator, x, answer.flip(0), 20, 1e-4, WEIGHT)
    keep = torch.tensor([0, 1, 3, 4])  # flip leaves the third where it is
    assert (residual < 0.01 * far_residual[keep].min()).all()
    assert (discrimination < 1).all()
    near = answer + 0.3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    start = util.residual_loss(x, generator(near))
    z, found, _ = search_latents(generator, discriminator, x, near, 300, 0.01, WEIGHT)
    assert (found < 0.2 * start).all() and (z - answer).norm() < (near - answer).norm()


def test_search_changes_nothing_in_the_networks(tiny_networks: Networks, images: torch.Tensor) -> None:
    before = [copy.deepcopy(network.state_dict()) for network in tiny_networks]
    search(tiny_networks, images, 3)
    for network, state in zip(tiny_networks, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())


def test_start_depends_on_seed_and_image_alone(images: torch.Tensor) -> None:
    start = starting_latents(images, 8, seed=0)
    assert torch.equal(start[[4, 1]], starting_latents(images[[4, 1]], 8, seed=0))
    assert not torch.equal(start, starting_latents(images, 8, seed=1))
    assert len(np.unique(start.numpy())) == start.numel()  # no two images share a start
    many = starting_latents(torch.arange(4000 * 4, dtype=torch.int32).view(torch.uint8).view(4000, 1, 4, 4), 8, 0)
    assert abs(many.mean()) < 0.03 and many.std() == pytest.approx(1, abs=0.03)  # N(0, I)


def test_stratified_subset() -> None:
    label = np.repeat([3, 1, 2], [600, 300, 100])
    for count in (10, 100, 500):
        rows = stratified_subset(label, count, seed=0)
        assert len(rows) == len(set(rows)) == count and (np.diff(rows) > 0).all()
        np.testing.assert_allclose(np.bincount(label[rows])[1:], [0.3 * count, 0.1 * count, 0.6 * count], atol=1)
    assert set(stratified_subset(label, 50, 0)) < set(stratified_subset(label, 60, 0))
    assert set(stratified_subset(label, 50, 0)) != set(stratified_subset(label, 50, 1))
    np.testing.assert_array_equal(stratified_subset(label, 5000, 0), np.arange(1000))


def test_a_step_moves_a_coordinate_by_about_lr(tiny_networks: Networks, images: torch.Tensor) -> None:
    """Why 2e-4, the usual step size, goes nowhere in 400 steps."""
    start = starting_latents(images, 8, seed=0).double()
    z, *_ = search(tiny_networks, images, 7, steps=40, lr=2e-4)
    assert (z - start).abs().max() < 1.1 * 40 * 2e-4
    assert fit_latent.Config().lr * fit_latent.Config().steps > 3  # ours can cross the prior
