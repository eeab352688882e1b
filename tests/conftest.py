"""What the tests share: running a script as a person does, in a process or in this one, and a tiny trained run."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from network import Discriminator, Generator

ROOT = Path(__file__).parent.parent
TINY = ["--image-size", "32", "--ngf", "4", "--ndf", "4", "--latent-dim", "8", "--batch-size", "16", "--device", "cpu"]

torch.set_num_threads(2)


def run_process(cwd: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script from a shell's point of view: its own process, with `cwd` as the working directory."""
    command = [sys.executable, str(ROOT / script), *arguments]
    # the same on every machine: no GPU, two threads
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Run a script from its first line to its last inside this process, in `tmp_path`: no second import of torch."""

    def run(script: str, *arguments: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return run


@pytest.fixture
def fails(run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script that must fail with one line; returns the line."""

    def run(script: str, *arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            run_here(script, *arguments)
        message = stop.value.code
        assert isinstance(message, str), (
            f"exit code {message}: {capsys.readouterr()}"
        )  # Python prints it and exits with 1
        assert message.startswith("error: ") and "\n" not in message
        return message

    return run


@pytest.fixture(scope="session")
def digits_workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the three scripts ran on `digits`, each as its own process."""
    workdir = tmp_path_factory.mktemp("digits")
    for command in (
        "train_gan.py --dataset digits --normal-class 0 --epochs 3 --checkpoint-every 10 " + " ".join(TINY),
        "fit_latent.py --splits validation test train_anomalies --max-images 60 --steps 20 --shard-size 40",
        "evaluate.py --bootstrap 50",
    ):
        done = run_process(workdir, *command.split())
        assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture
def tiny_networks() -> tuple[Generator, Discriminator]:
    """Untrained networks in float64, frozen, with BatchNorm statistics that are not those of the start."""
    torch.manual_seed(0)
    generator, discriminator = Generator(32, 3, 8, 4).double(), Discriminator(32, 3, 4).double()
    with torch.no_grad():
        for _ in range(5):
            discriminator(generator(torch.randn(16, 8, dtype=torch.float64)))
    return generator.eval().requires_grad_(False), discriminator.eval().requires_grad_(False)
