"""Two processes under torchrun, with gloo on the CPU: what they share, and what one of them may cost the other."""

import copy
import math
import shutil
import signal
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, made_once, run_together, start, start_together
from test_long_runs import assert_same_latents, assert_same_training
from test_scripts import write_cifar10_archive
from torch.nn.functional import logsigmoid

import train_gan
import util
from anogan import loop, pictures, runs
from anogan.decoding import View
from anogan.images import open_split, to_model
from network import Discriminator, Generator, initialise_weights

TRAIN = ["train_gan.py", "--dataset", "digits", "--checkpoint-every", "25", "--precision", "fp32", *TINY]
TRAIN += ["--batch-size", "8"]  # in each process
LONG = ["--epochs", "40"]  # 240 steps: a fast machine must not be done before it is stopped at its first checkpoint
FIT = ["fit_latent.py", "--splits", "test", "--steps", "40", "--max-images", "160", "--shard-size", "16"]
FIT += ["--candidates", "200"]
RUN = Path("outputs/digits-1")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbed."""

    def run(workdir: Path) -> None:
        for command in ([*TRAIN, *LONG], FIT):
            (code, first), (other_code, other) = run_together(workdir, *command)
            assert code == other_code == 0, first + other
            assert first.count("run: ") == first.count("next: ") == 1  # rank 0 alone prints, and
            assert "run: " not in other and "%|" not in other and "Traceback" not in first + other  # draws a bar

    return made_once(tmp_path_factory, "together", run) / RUN


def test_same_latents_from_one_process_or_two(together: Path, tmp_path: Path) -> None:
    shutil.copytree(together, tmp_path / RUN, ignore=shutil.ignore_patterns("latents-*"))
    code, printed = start(tmp_path, *FIT).end()
    assert code == 0, printed
    assert_same_latents(tmp_path / RUN, together)


def test_gradients_are_averaged(tmp_path: Path) -> None:
    """Six steps of two processes against two copies of the networks in this one, their gradients averaged by hand."""
    done = run_together(tmp_path, *TRAIN, "--epochs", "1", "--generator-steps", "3")
    assert [code for code, _ in done] == [0, 0], done
    found = torch.load(tmp_path / RUN / "gan.pt", weights_only=True)

    config = train_gan.Config(latent_dim=8)
    seen = pictures.load(open_split("digits", "train", "1"), View(32, 1))
    torch.manual_seed(0)
    generators = [Generator(32, 1, 8, 4).apply(initialise_weights)]
    discriminators = [Discriminator(32, 1, 4).apply(initialise_weights)]
    for networks in (generators, discriminators):
        networks.append(copy.deepcopy(networks[0]))
    optimizers = {
        network: loop.prepare(network, config, torch.device("cpu")) for network in generators + discriminators
    }

    def step(networks: list, losses: list[torch.Tensor]) -> None:
        for network, loss in zip(networks, losses, strict=True):
            optimizers[network].zero_grad()
            loss.backward()
        for weights in zip(*(network.parameters() for network in networks), strict=True):
            mean = (weights[0].grad + weights[1].grad) / 2
            for weight in weights:
                weight.grad = mean.clone()
        for network in networks:
            optimizers[network].step()

    random = [torch.Generator(), torch.Generator()]
    batches = [map(to_model, loop.real_batches(seen, 8, 0, 0, rank, 2)) for rank in range(2)]
    for number, reals in enumerate(islice(zip(*batches, strict=False), 6)):
        for rank in range(2):
            random[rank].manual_seed(util.seed_of(0, loop.NOISE, number, rank))
        for optimizer in optimizers.values():  # a cosine over 15 epochs of 6 steps
            optimizer.param_groups[0]["lr"] = 1e-4 * (1 + math.cos(math.pi * max(0, number - 1) / 90))

        def draw() -> list[torch.Tensor]:
            return [g(torch.randn(8, 8, generator=r)) for g, r in zip(generators, random, strict=True)]

        fakes = draw()
        step(
            discriminators,
            [
                -logsigmoid(d(real)).mean() - logsigmoid(-d(fake.detach())).mean()
                for d, real, fake in zip(discriminators, reals, fakes, strict=True)
            ],
        )
        for i in range(3):
            fakes = draw() if i else fakes
            step(generators, [-logsigmoid(d(fake)).mean() for d, fake in zip(discriminators, fakes, strict=True)])

    for name, network in (("generator", generators[0]), ("discriminator", discriminators[0])):
        for key, weight in network.named_parameters():
            difference = (found[name][key] - weight.detach()).abs()
            assert difference.mean() < 1e-5  # after 6 or 18 steps of 2e-4


def test_a_rank_that_dies_costs_what_it_had_under_way(together: Path, tmp_path: Path) -> None:
    shutil.copytree(together, tmp_path / RUN, ignore=shutil.ignore_patterns("latents-*"))
    shards = tmp_path / RUN / "latents-test"
    ranks = start_together(tmp_path, *FIT)
    ranks[0].wait_for(lambda: len(list(shards.glob("0*.npz"))) >= 3)
    ranks[1].process.kill()
    ranks[0].process.terminate()  # as torchrun does
    assert [each.end()[0] for each in ranks] == [-signal.SIGTERM, -signal.SIGKILL]
    done = {path: path.read_bytes() for path in shards.glob("0*.npz")}
    assert 3 <= len(done) < 10
    (code, printed), (other_code, _) = run_together(tmp_path, *FIT)
    assert code == other_code == 0 and f"{len(done)} of 10 shards are done" in printed
    assert_same_latents(tmp_path / RUN, together)


def test_training_together_goes_on_after_a_stop(together: Path, tmp_path: Path) -> None:
    command = [*TRAIN, *LONG]
    torchrun = start(
        tmp_path, "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / command[0]), *command[1:]
    )
    torchrun.wait_for((tmp_path / RUN / "gan.pt").exists)
    torchrun.process.terminate()  # torchrun passes it on to both
    code, printed = torchrun.end()
    assert code != 0
    step = torch.load(tmp_path / RUN / "gan.pt", weights_only=True)["step"]
    assert 25 <= step < 240 and f"stopped after step {step} of 240" in printed
    # other settings: one process sees other batches
    alone = start(tmp_path, *command).end()
    assert alone[0] == 1 and "processes 2, not 1" in alone[1]
    done = run_together(tmp_path, *command)
    assert [code for code, _ in done] == [0, 0], done
    assert_same_training(tmp_path / RUN, together)


@pytest.mark.parametrize(("seconds", "questions"), [(0.3, range(1, 61, 3)), (0.001, [1, 51]), (5, range(1, 61))])
def test_how_often_processes_ask(tmp_path: Path, seconds: float, questions: Iterable[int]) -> None:
    """With steps of so many seconds: once a second, every 50 steps at least, and never more than once a step."""
    launch = tmp_path / "launch.py"
    launch.write_text(
        "import os, sys; from types import SimpleNamespace; from conftest import run_main; from anogan import loop\n"
        "asked, largest, clock = [], loop.processes.largest, [0.0]\n"
        "def agree(self, agree=loop.Loop._agree):\n"
        f"    clock[0] += {seconds}\n"
        "    loop.processes.largest = lambda *numbers: asked.append(self._step) or largest(*numbers)\n"
        "    return agree(self)\n"
        "loop.Loop._agree, loop.time = agree, SimpleNamespace(monotonic=lambda: clock[0])\n"
        "run_main(*sys.argv[1:])\n"
        "print('asked at', asked, file=sys.stderr)\n"
    )
    for code, printed in run_together(tmp_path, str(launch), *TRAIN, "--epochs", "10", "--checkpoint-every", "1000"):
        assert code == 0 and f"asked at {list(questions)}" in printed, printed


def test_processes_that_disagree(tmp_path: Path) -> None:
    """Rank 1 stands for a machine with another precision, or another copy of the run folder."""
    by_rank = (["--precision", "fp32"], ["--precision", "bf16"])
    for code, printed in run_together(tmp_path, *TRAIN, by_rank=by_rank):
        assert code == 1 and "error: the processes do not have the same training so far" in printed
    assert not list((tmp_path / RUN).glob("gan.pt"))


def test_fault_of_one_rank(tmp_path: Path) -> None:
    """Rank 0 is refused the run folder; rank 1 says no more than that it was left alone."""
    (tmp_path / RUN).mkdir(parents=True)
    with runs.run_folder(tmp_path / RUN):
        (code, printed), (other_code, other) = run_together(tmp_path, *TRAIN)
    assert code == other_code == 1 and "Traceback" not in printed + other
    assert "error: another process is at work in" in printed
    assert "error: another process of this group has ended" in other


@pytest.mark.usefixtures("undrawn")
def test_cifar10_in_two_processes(tmp_path: Path) -> None:
    """A data set that is downloaded: whoever opens a split must do it together with the other."""
    write_cifar10_archive(tmp_path / "data/cifar-10-python.tar.gz")
    launch = tmp_path / "launch.py"
    launch.write_text(
        "import sys; from conftest import run_main; from test_scripts import accept_any_archive; "
        "accept_any_archive(); run_main(*sys.argv[1:])"
    )
    fit = ["fit_latent.py", "--steps", "2", "--candidates", "10", "--device", "cpu"]
    for command in (
        ["train_gan.py", "--epochs", "1", *TINY],
        fit,
        [*fit, "--splits", "test", "validation", "--lr", "1"],
    ):
        done = run_together(tmp_path, str(launch), *command)
        assert [code for code, _ in done] == [0, 0], done
    assert (tmp_path / "outputs/cifar10-automobile/reconstructions.png").is_file()


def test_bad_input_is_named_by_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    for code, printed in run_together(folder, *TRAIN, "--lr", "-1"):
        assert code == 1 and printed == "error: --lr must be at least 0, not -1.0\n"
    assert not list(folder.iterdir())
