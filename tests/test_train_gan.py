"""The GAN losses by hand, a training step against a plain one, and the learning rate over the epochs."""

import copy
import csv
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partialmethod
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, Batches, Replay
from PIL import Image
from test_util import folder
from torch import nn
from torch.nn.functional import logsigmoid
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import fit_latent
import train_gan
import util
from anogan import loop, reconstruction, runs
from anogan.candidates import draw_candidates, nearest
from anogan.decoding import View
from anogan.images import ImageSet, to_model
from anogan.pictures import Pictures
from network import Discriminator, Generator, initialise_weights


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([0.0, math.log(3)]), torch.tensor([0.0, -math.log(4)])  # D: 1/2, 3/4; 1/2, 1/5
    expected = -(math.log(1 / 2) + math.log(3 / 4)) / 2 - (math.log(1 / 2) + math.log(4 / 5)) / 2
    assert util.discriminator_loss(real, fake).item() == pytest.approx(expected)
    assert util.generator_loss(fake).item() == pytest.approx(-(math.log(1 / 2) + math.log(1 / 5)) / 2)


def test_losses_do_not_overflow() -> None:
    logits = torch.tensor([1000.0])
    assert util.discriminator_loss(-logits, logits).item() == pytest.approx(2000)
    assert util.generator_loss(-logits).item() == pytest.approx(1000)


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def plain_steps(
    generator: Generator, discriminator: Discriminator, batches: list[torch.Tensor], config: train_gan.Config
) -> list[list[float]]:
    """DCGAN's training with nothing left out: NCHW, and gradients for D's weights in G's steps too."""
    adam = {"lr": config.lr, "betas": (0.5, 0.999), "weight_decay": config.weight_decay}
    optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
    losses = []
    for real in batches:
        fake = generator(torch.randn(len(real), config.latent_dim))
        loss_d = -logsigmoid(discriminator(real)).mean() - logsigmoid(-discriminator(fake.detach())).mean()
        optimizer_d.zero_grad()
        loss_d.backward()
        optimizer_d.step()
        for step in range(config.generator_steps):
            if step > 0:
                fake = generator(torch.randn(len(real), config.latent_dim))
            loss_g = -logsigmoid(discriminator(fake)).mean()
            optimizer_g.zero_grad()
            loss_g.backward()
            optimizer_g.step()
        losses.append([loss_d.item(), loss_g.item()])
    return losses


def test_training_step_is_the_plain_step(float64: None) -> None:
    config = train_gan.Config(latent_dim=8, batch_size=8, lr=1e-3, generator_steps=3)
    torch.manual_seed(0)
    ours = Generator(32, 3, 8, 4).apply(initialise_weights), Discriminator(32, 3, 4).apply(initialise_weights)
    plain = copy.deepcopy(ours)
    batches = [torch.rand(8, 3, 32, 32) * 2 - 1 for _ in range(4)]

    torch.manual_seed(1)
    expected = plain_steps(*plain, batches, config)
    torch.manual_seed(1)
    optimizers = [loop.prepare(network, config, torch.device("cpu")) for network in ours]
    steps = Batches(batches)
    train_gan.train(steps, *ours, optimizers, config.latent_dim, config.generator_steps)
    found = [[row["loss_d"], row["loss_g"]] for row in steps.rows]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-9, atol=0)
    for network, other in zip(ours, plain, strict=True):
        for weight, expected_weight in zip(network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(weight, expected_weight, rtol=0, atol=1e-7)  # steps of up to 1e-3
        assert all(weight.requires_grad for weight in network.parameters())


class Scheduled(Batches):
    """Batches whose step size changes from one to the next, as a Loop does it."""

    def __init__(self, batches: list[torch.Tensor], optimizers: list[torch.optim.Adam], precision: str) -> None:
        super().__init__(batches)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        self.schedulers = [CosineAnnealingWarmRestarts(each, T_0=15, T_mult=2) for each in optimizers]
        self.optimizers = optimizers

    def __iter__(self) -> Iterator[torch.Tensor]:
        for step, batch in enumerate(self.batches):
            yield batch
            for scheduler in self.schedulers:
                loop.change_step_size(scheduler, step)

    def captured(self, body: Callable) -> Callable:
        for optimizer in self.optimizers:
            loop.make_capturable(optimizer, torch.device("cpu"))
        return super().captured(body)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replayed_step_is_the_step(replayed: Callable[[], list[Replay]], precision: str) -> None:
    """A CUDA graph knows tensors alone: a training whose steps from the fourth on are replays must end the same."""
    config = train_gan.Config(latent_dim=8, batch_size=8, lr=1e-3)
    batches = [torch.rand(8, 3, 32, 32) * 2 - 1 for _ in range(8)]
    ended = []
    for turn in range(2):
        graphs = replayed() if turn == 1 else []
        torch.manual_seed(0)
        networks = Generator(32, 3, 8, 4).apply(initialise_weights), Discriminator(32, 3, 4).apply(initialise_weights)
        optimizers = [loop.prepare(network, config, torch.device("cpu")) for network in networks]
        steps = Scheduled(batches, optimizers, precision)
        train_gan.train(steps, *networks, optimizers, config.latent_dim, generator_steps=3)
        ended.append((steps.rows, [value for network in networks for value in network.state_dict().values()]))
    (graph,) = graphs
    assert len(graph.calls) > 100 and graph.replays == 5
    assert ended[0][0] == ended[1][0]
    assert all(torch.equal(one, other) for one, other in zip(ended[0][1], ended[1][1], strict=True))


def test_a_step_size_stays_in_its_tensor() -> None:
    """PyTorch 2.6 puts a float in its place, which a CUDA graph would not see."""
    optimizer = loop.prepare(nn.Linear(2, 2), train_gan.Config(lr=0.25), torch.device("cpu"))
    scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=15, T_mult=2)
    loop.make_capturable(optimizer, torch.device("cpu"))
    (group,) = optimizer.param_groups
    place = group["lr"]
    loop.change_step_size(scheduler, 7.5)
    assert group["lr"] is place and place.item() == pytest.approx(0.125) and group["capturable"]


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(tmp_path: Path) -> None:
    """There a CUDA graph has the step size in a tensor, and the optimizer is capturable."""
    run_dir = tmp_path / "run"
    sizes = {"ngf": 4, "ndf": 4, "latent_dim": 8, "batch_size": 16, "device": "cpu"}
    config = train_gan.Config("digits", **sizes, epochs=2, run_dir=run_dir)
    train_gan.main(config)
    state = torch.load(run_dir / "gan.pt", weights_only=True)
    for name in ("optimizer_g", "optimizer_d"):
        for group in state[name]["param_groups"]:
            group.update(lr=torch.tensor(group["lr"]), capturable=True)
    torch.save(state, run_dir / "gan.pt")
    train_gan.main(replace(config, epochs=3))
    state = torch.load(run_dir / "gan.pt", weights_only=True)
    groups = [group for name in ("optimizer_g", "optimizer_d") for group in state[name]["param_groups"]]
    assert state["epoch"] == 3 and all(type(group["lr"]) is float and not group["capturable"] for group in groups)


def test_a_loss_that_is_written_over_is_kept() -> None:
    """A captured step writes each loss to the place of the one before."""
    of_a_loop, loss = SimpleNamespace(_labels={"loss": "loss"}, _recent=[]), torch.tensor(1.0)
    loop.Loop.log(of_a_loop, loss=loss)
    loss.fill_(2.0)
    loop.Loop.log(of_a_loop, loss=loss)
    assert [row.item() for row in of_a_loop._recent] == [1.0, 2.0]


def test_no_graph_with_torchrun(replayed: Callable[[], list[Replay]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes would wait for each other in it; it was never tried."""
    replayed()
    assert util.captured(print, torch.device("cpu")) is not print
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert util.captured(print, torch.device("cpu")) is print


def test_stored_statistics_are_of_real_images_alone() -> None:
    """Those of generated ones, `generator_steps` + 1 batches to one real one, would be what P_D and f are seen with."""
    torch.manual_seed(0)
    generator, discriminator = Generator(32, 3, 8, 4), Discriminator(32, 3, 4)
    real = torch.rand(8, 3, 32, 32) * 2 - 1
    norms = [layer for layer in discriminator.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0  # what is stored is of the last batch
    config = train_gan.Config(lr=0.0, weight_decay=0.0)
    optimizers = [loop.prepare(network, config, torch.device("cpu")) for network in (generator, discriminator)]
    train_gan.train(Batches([real]), generator, discriminator, optimizers, 8, generator_steps=3)
    found = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in norms]
    discriminator(real)  # with lr 0 the weights are the same
    for layer, (mean, variance) in zip(norms, found, strict=True):
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, variance)


def read_losses(run_dir: Path) -> torch.Tensor:
    """losses.csv: (steps, 4)."""
    with (run_dir / "losses.csv").open(newline="") as file:
        return torch.tensor([[float(value) for value in row[2:]] for row in list(csv.reader(file))[1:]])


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("flag", "tolerance"),
    [
        (("--precision", "bf16"), 0.05),
        (("--compile",), 1e-3),
    ],
)
def test_bf16_and_compile_train_the_same(
    run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, flag: tuple, tolerance: float
) -> None:
    # captured as for any backend, but run by PyTorch's own kernels: generating C++ takes a minute
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    arguments = ["train_gan.py", "--dataset", "digits", "--epochs", "3", *TINY]
    run_here(*arguments, "--run-dir", "plain", "--precision", "fp32")
    run_here(*arguments, "--run-dir", "other", *(() if "--precision" in flag else ("--precision", "fp32")), *flag)
    plain, other = read_losses(Path("plain")), read_losses(Path("other"))
    assert len(plain) == 18
    torch.testing.assert_close(other, plain, rtol=tolerance, atol=0)


def seen_by_training(first_step: int, count: int, **where: int) -> list[list[int]]:
    """Which of ten numbered images the batches of training hold, from `first_step` on."""
    numbered = Pictures(np.arange(10, dtype=np.uint8).repeat(4), np.full((10, 2), 2), View(2, 1))
    batches = islice(loop.real_batches(numbered, seed=0, first_step=first_step, **where), count)
    return [batch[:, 0, 0, 0].tolist() for batch in batches]


def test_an_epoch_is_a_shuffle_and_a_batch_is_left_out_rather_than_cut() -> None:
    batches = seen_by_training(0, 6, batch_size=4)
    epochs = [batches[0] + batches[1], batches[2] + batches[3], batches[4] + batches[5]]
    assert all(len(set(epoch)) == 8 and set(epoch) <= set(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_depend_on_the_step_and_not_on_where_training_started() -> None:
    batches = seen_by_training(0, 9, batch_size=3)
    for first in range(9):
        assert seen_by_training(first, 9 - first, batch_size=3) == batches[first:]


def test_processes_share_an_epoch_out() -> None:
    alone = seen_by_training(0, 4, batch_size=4)
    shares = [seen_by_training(0, 4, batch_size=2, rank=rank, processes=2) for rank in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == alone


@pytest.mark.parametrize(
    ("text", "seconds", "steps"), [("10m", 600, math.inf), ("0.5m", 30, math.inf), ("500", math.inf, 500)]
)
def test_checkpoint_interval(text: str, seconds: float, steps: float) -> None:
    assert loop.checkpoint_interval(text) == (seconds, steps)


@pytest.mark.usefixtures("undrawn")
def test_learning_rate_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cosine from lr to 0 over 15 epochs, then over 30, stepped by fractions of an epoch."""
    seen = {}

    class Recorder(loop.CosineAnnealingWarmRestarts):
        def step(self, epoch: float | None = None) -> None:
            super().step(epoch)
            seen[epoch] = self.get_last_lr()[0]

    monkeypatch.setattr(loop, "CosineAnnealingWarmRestarts", Recorder)
    dataset = folder(tmp_path / "set", {"train/good": 5, "test/good": 1})  # 4 to train with, so 2 steps an epoch
    train_gan.main(
        train_gan.Config(
            dataset=str(dataset),
            normal_class="good",
            run_dir=tmp_path / "run",
            image_size=32,
            latent_dim=2,
            ngf=1,
            ndf=1,
            batch_size=2,
            epochs=31,
            generator_steps=1,
            lr=1.0,
            device="cpu",
        )
    )
    for epoch, lr in ((0.0, 1), (0.5, (1 + math.cos(math.pi / 30)) / 2), (7.5, 0.5), (10.0, 0.25)):
        assert seen[epoch] == pytest.approx(lr)
    for epoch, lr in ((15.0, 1), (25.0, 0.75), (30.0, 0.5), (30.5, (1 + math.cos(math.pi * 15.5 / 30)) / 2)):
        assert seen[epoch] == pytest.approx(lr)


@pytest.mark.usefixtures("undrawn")
def test_same_seed_same_weights(digits_workdir: Path, run_here: Callable[..., None]) -> None:
    run_here(
        "train_gan.py", "--dataset", "digits", "--normal-class", "0", "--epochs", "3", "--generator-steps", "3", *TINY
    )
    again = runs.load_gan(Path("outputs/digits-0"), torch.device("cpu"))
    first = runs.load_gan(digits_workdir / "outputs/digits-0", torch.device("cpu"))
    for name in ("generator", "discriminator"):
        weights = getattr(first, name).state_dict()
        for key, tensor in getattr(again, name).state_dict().items():
            assert torch.equal(tensor, weights[key])


def test_reconstruction_check(digits_workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """G explains most of images that it drew itself, and next to nothing of noise."""
    run_dir = shutil.copytree(digits_workdir / "outputs/digits-0", tmp_path / "run")
    gan = runs.load_gan(run_dir, torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    known = ((gan.generator(torch.randn(6, gan.latent_dim, generator=random)) + 1) * 127.5).round().to(torch.uint8)
    noise = torch.randint(0, 256, known.shape, generator=random, dtype=torch.uint8)
    explained = []
    for pixels in (known, noise):
        names = np.array([f"{i}.png" for i in range(6)])
        made = ImageSet(
            "made", [], np.arange(6), np.zeros(6), names, lambda i, _, p=pixels: Image.fromarray(p[i, 0].numpy())
        )
        x, config = to_model(pixels[:3]), fit_latent.Config(precision="fp32")
        start = nearest(x, draw_candidates(gan.generator, gan.latent_dim, 1000, seed=0))
        z, residual, _ = fit_latent.search((gan.generator, gan.discriminator), x, start, config)
        found = {"source": names[:3], "index": np.arange(3), "class_name": names[:3], "picture": np.arange(3)}
        found |= {"z": z.numpy(), **dict.fromkeys(("residual", "discrimination"), residual.numpy())}
        reconstruction.check(gan, made, made.take(slice(3)), found | dict.fromkeys(("top", "left"), np.zeros(3, int)))
        explained.append(int(capsys.readouterr().out.split("G explains ")[1].split("%")[0]))
        assert (run_dir / "reconstructions.png").is_file()
    assert explained[0] > 60 and explained[1] < 20


@pytest.mark.usefixtures("undrawn")
def test_tensorboard_has_the_losses(
    tmp_path: Path, run_here: Callable[..., None], fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    flags = ["train_gan.py", "--dataset", "digits", *TINY, "--tensorboard"]
    run_here(*flags, "--epochs", "1")
    run_here(*flags, "--epochs", "2")  # goes on
    with (tmp_path / "outputs/digits-1/losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    events = accumulator(str(tmp_path / "outputs/digits-1/tensorboard/gan"))
    events.Reload()
    logged = events.Scalars("loss_d")
    assert [event.step for event in logged] == [int(row["step"]) for row in rows]
    np.testing.assert_allclose([event.value for event in logged], [float(row["loss_d"]) for row in rows], rtol=1e-4)
    assert "--tensorboard cannot write to" in fails(*flags, "--run-dir", "not UTF-8 \udcff")
    monkeypatch.setattr("anogan.loop.find_spec", lambda name: None)
    assert "--tensorboard needs a package that is not installed: pip install tensorboard" in fails(*flags)
