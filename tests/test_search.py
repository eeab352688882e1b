"""The batched search against a plain loop over single images, and what it must leave alone."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import Replay

import fit_latent
import util
from anogan import runs
from anogan.candidates import draw_candidates, nearest
from anogan.images import stratified_subset, to_model
from anogan.latents import batch_and_shard
from benchmarks.once import Autocast
from fit_latent import Config
from network import Discriminator, Generator, fold_batchnorm

STEPS, LR, WEIGHT = 12, 0.1, 0.1
Networks = tuple[Generator, Discriminator]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32), dtype=np.uint8))


@pytest.fixture
def start() -> torch.Tensor:
    return torch.randn(7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def search(
    networks: Networks, images: torch.Tensor, start: torch.Tensor, batch_size: int = 7, **changes: float | str
) -> list[torch.Tensor]:
    settings = {"steps": STEPS, "lr": LR, "ball": False, "discrimination_weight": WEIGHT, "precision": "fp32"}
    config = Config(**settings | changes)
    parts = [
        fit_latent.search(networks, to_model(batch).double(), z, config)
        for batch, z in zip(images.split(batch_size), start.split(batch_size), strict=True)
    ]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def plain_search(
    networks: Networks, image: torch.Tensor, z: torch.Tensor, discrimination_loss: str = "features"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """AnoGAN's search for one image, as the paper tells it: no batch, no optimiser class, f(x) anew at every step."""
    generator, discriminator = networks
    x, z = (image.double() / 127.5 - 1)[None], z[None]
    first_moment, second_moment = torch.zeros_like(z), torch.zeros_like(z)

    def losses(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = torch.sum(torch.abs(x - generator(z)))
        if discrimination_loss == "reference":
            return residual, -torch.log(torch.sigmoid(discriminator(generator(z)))).sum()
        return residual, torch.sum(torch.abs(discriminator.features(x) - discriminator.features(generator(z))))

    for step in range(STEPS):
        z.requires_grad_()
        residual, discrimination = losses(z)
        (gradient,) = torch.autograd.grad((1 - WEIGHT) * residual + WEIGHT * discrimination, z)
        first_moment = 0.9 * first_moment + 0.1 * gradient
        second_moment = 0.999 * second_moment + 0.001 * gradient**2
        unbiased = first_moment / (1 - 0.9 ** (step + 1)), second_moment / (1 - 0.999 ** (step + 1))
        lr = LR * np.interp(step, [-1, 0.2 * STEPS - 1, 0.8 * STEPS, STEPS], [0, 1, 1, 0])
        z = (z - lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8)).detach()
    residual, discrimination = losses(z)
    return z[0], residual, discrimination


@pytest.mark.parametrize("discrimination_loss", ["features", "reference"])
def test_batched_search_is_the_plain_search(
    tiny_networks: Networks, images: torch.Tensor, start: torch.Tensor, discrimination_loss: str
) -> None:
    """Our search on folded networks against the plain one on networks with BatchNorm in place."""
    plain = copy.deepcopy(tiny_networks)
    generator, discriminator = tiny_networks
    generator.layers, discriminator.body = fold_batchnorm(generator.layers), fold_batchnorm(discriminator.body)
    assert not any(
        isinstance(layer, torch.nn.BatchNorm2d) for layer in [*generator.modules(), *discriminator.modules()]
    )
    batched = search(tiny_networks, images, start, discrimination=discrimination_loss)
    one_by_one = [plain_search(plain, image, z, discrimination_loss) for image, z in zip(images, start, strict=True)]
    for found, expected in zip(batched, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-7, atol=1e-7)


def test_steps_in_bf16_end_where_fp32_ends(tiny_networks: Networks, images: torch.Tensor, start: torch.Tensor) -> None:
    generator, discriminator = (network.float() for network in tiny_networks)
    x, z = to_model(images), start.float()
    fp32, bf16 = (
        fit_latent.search((generator, discriminator), x, z, Config(steps=60, lr=LR, precision=precision))
        for precision in ("fp32", "bf16")
    )
    assert not torch.equal(fp32[0], bf16[0])  # it did run in bf16
    assert all(part.dtype == torch.float32 for part in bf16)
    scores = [util.anomaly_score(*found, WEIGHT) for _, *found in (fp32, bf16)]
    torch.testing.assert_close(scores[1], scores[0], rtol=0.01, atol=0)
    # what is returned is measured in fp32, not as the steps saw it
    torch.testing.assert_close(bf16[1], util.residual_loss(x, generator(bf16[0])))


@pytest.mark.parametrize("discrimination", ["features", "reference"])
def test_weights_cast_once_have_the_gradients_of_autocast(
    tiny_networks: Networks,
    images: torch.Tensor,
    start: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    discrimination: str,
) -> None:
    networks, x, z = tuple(network.float() for network in tiny_networks), to_model(images), start.float()
    for network in networks:
        runs.freeze(network, torch.device("cpu"))
    config = Config(steps=20, precision="bf16", discrimination=discrimination)
    found = fit_latent.search(networks, x, z, config)
    monkeypatch.setattr(runs, "cast", lambda networks, to: [Autocast(network) for network in networks])
    expected = fit_latent.search(networks, x, z, config)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}  # theirs are copies


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_and_order_change_nothing(
    tiny_networks: Networks, images: torch.Tensor, start: torch.Tensor, batch_size: int
) -> None:
    together = search(tiny_networks, images, start)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    apart = search(tiny_networks, images[order], start[order], batch_size)
    for found, expected in zip(apart, together, strict=True):
        torch.testing.assert_close(found, expected[order], rtol=1e-7, atol=1e-7)


def test_search_lowers_the_loss(tiny_networks: Networks, images: torch.Tensor, start: torch.Tensor) -> None:
    _, *before = search(tiny_networks, images, start, steps=1, lr=0.0)
    _, *after = search(tiny_networks, images, start, steps=100)
    assert (util.anomaly_score(*after, WEIGHT) < util.anomaly_score(*before, WEIGHT)).all()


def test_losses_belong_to_the_latents_returned(
    tiny_networks: Networks, images: torch.Tensor, start: torch.Tensor
) -> None:
    z, residual, discrimination = search(tiny_networks, images, start)
    generator, discriminator = tiny_networks
    x, generated = to_model(images).double(), generator(z)
    torch.testing.assert_close(residual, (x - generated).abs().sum((1, 2, 3)))
    features = discriminator.features(x) - discriminator.features(generated)
    torch.testing.assert_close(discrimination, features.abs().sum((1, 2, 3)))


def test_search_from_the_answer_stays_there(tiny_networks: Networks) -> None:
    generator, _ = tiny_networks
    answer = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fit_latent.shorten(answer, 8**0.5)  # where a search may end
    x = generator(answer)
    config = Config(steps=20, lr=1e-4, precision="fp32")
    _, residual, discrimination = fit_latent.search(tiny_networks, x, answer, config)
    _, far_residual, _ = fit_latent.search(tiny_networks, x, answer.flip(0), config)
    keep = torch.tensor([0, 1, 3, 4])  # flip leaves the third where it is
    assert (residual < 0.01 * far_residual[keep].min()).all()
    assert (discrimination < 1).all()
    near = answer + 0.3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    start = util.residual_loss(x, generator(near))
    z, found, _ = fit_latent.search(tiny_networks, x, near, Config(steps=300, lr=0.01, precision="fp32"))
    assert (found < 0.2 * start).all() and (z - answer).norm() < (near - answer).norm()


def test_search_changes_nothing_in_the_networks(
    tiny_networks: Networks, images: torch.Tensor, start: torch.Tensor
) -> None:
    before = [copy.deepcopy(network.state_dict()) for network in tiny_networks]
    search(tiny_networks, images, start)
    for network, state in zip(tiny_networks, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())


def test_search_starts_at_the_nearest_candidate(tiny_networks: Networks, images: torch.Tensor) -> None:
    generator = tiny_networks[0].float()
    candidates = draw_candidates(generator, 8, 50, seed=0)
    x = to_model(images)
    start = nearest(x, candidates)
    for image, z in zip(x, start, strict=True):  # against a loop over all candidates
        blocks = [drawn.reshape(3, 16, 2, 16, 2).mean((2, 4)) for drawn in (image, *generator(candidates.z))]
        distances = torch.stack([(blocks[0] - block).abs().sum() for block in blocks[1:]])
        assert torch.equal(z, candidates.z[distances.argmin()])
    drawn = generator(candidates.z[[17, 4]])  # an image that G drew starts at its own z
    assert torch.equal(nearest(drawn, candidates), candidates.z[[17, 4]])


def test_start_depends_on_seed_model_and_image_alone(tiny_networks: Networks, images: torch.Tensor) -> None:
    generator, x = tiny_networks[0].float(), to_model(images)
    candidates = draw_candidates(generator, 8, 500, seed=0)
    start = nearest(x, candidates)
    assert torch.equal(start[[4, 1]], nearest(x[[4, 1]], candidates))
    again = draw_candidates(generator, 8, 500, seed=0)
    assert torch.equal(candidates.z, again.z) and torch.equal(start, nearest(x, again))
    assert not torch.equal(candidates.z, draw_candidates(generator, 8, 500, seed=1).z)
    assert abs(candidates.z.mean()) < 0.05 and candidates.z.std() == pytest.approx(1, abs=0.05)  # N(0, I)


def test_stratified_subset() -> None:
    label = np.repeat([3, 1, 2], [600, 300, 100])
    for count in (10, 100, 500):
        rows = stratified_subset(label, count, seed=0)
        assert len(rows) == len(set(rows)) == count and (np.diff(rows) > 0).all()
        np.testing.assert_allclose(np.bincount(label[rows])[1:], [0.3 * count, 0.1 * count, 0.6 * count], atol=1)
    assert set(stratified_subset(label, 50, 0)) < set(stratified_subset(label, 60, 0))
    assert set(stratified_subset(label, 50, 0)) != set(stratified_subset(label, 50, 1))
    np.testing.assert_array_equal(stratified_subset(label, 5000, 0), np.arange(1000))


def test_a_step_moves_a_coordinate_by_about_lr(
    tiny_networks: Networks, images: torch.Tensor, start: torch.Tensor
) -> None:
    """Why 2e-4, the usual step size, goes nowhere in 400 steps."""
    z, *_ = search(tiny_networks, images, start, steps=40, lr=2e-4)
    assert (z - start).abs().max() < 1.1 * 40 * 2e-4
    assert fit_latent.Config().lr * fit_latent.Config().steps > 3  # ours can cross the prior


def test_what_is_measured_is_in_full_precision(
    tiny_networks: Networks, images: torch.Tensor, start: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU fp32 is TF32 where it is allowed: in the steps, but not where f(x), R and D are worked out."""
    generator, discriminator = tiny_networks
    allowed: dict[str, list[bool]] = {"G": [], "f": []}

    def noting(name: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(values: torch.Tensor) -> torch.Tensor:
            allowed[name].append(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
            return function(values)

        return call

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(generator, "forward", noting("G", generator.forward))
    monkeypatch.setattr(discriminator, "features", noting("f", discriminator.features))
    search(tiny_networks, images, start)
    assert allowed == {"G": [True] * STEPS + [False], "f": [False] + [True] * STEPS + [False]}
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("discrimination", ["features", "reference"])
def test_a_replayed_step_is_the_step(
    tiny_networks: Networks,
    images: torch.Tensor,
    start: torch.Tensor,
    replayed: Callable[[], list[Replay]],
    precision: str,
    discrimination: str,
) -> None:
    """A CUDA graph knows tensors alone: a search whose steps from the fourth on are replays must find the same."""
    networks, x, z = tuple(network.float() for network in tiny_networks), to_model(images), start.float()
    config = Config(steps=30, precision=precision, discrimination=discrimination)
    expected = fit_latent.search(networks, x, z, config)
    graphs = replayed()
    found = fit_latent.search(networks, x, z, config)
    (graph,) = graphs
    assert len(graph.calls) > 50 and graph.replays == config.steps - 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(found[0], z)


def test_a_step_is_itself_on_a_cpu() -> None:
    def step() -> None:
        raise NotImplementedError

    assert util.captured(step, torch.device("cpu")) is step


def test_a_shard_is_whole_batches() -> None:
    """A shard of 1,024 images cut batches of 4,096 to 1,024, and of 600 to 600 and 424."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for asked, device, expected in (
        ((None, 1024), cpu, (64, 1024)),
        ((None, 1024), gpu, (512, 1024)),
        ((4096, 1024), gpu, (4096, 4096)),
        ((600, 1024), gpu, (600, 1200)),
        ((7, 25), cpu, (7, 28)),
        ((None, 20), cpu, (20, 20)),  # a small shard is one batch
        ((None, 100), cpu, (64, 128)),
    ):
        assert batch_and_shard(*asked, device) == expected
