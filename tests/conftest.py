"""What the tests share: running a script as a person does, in a process or in this one, and a tiny trained run."""

import contextlib
import csv
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import util
from anogan import files, plots
from network import Discriminator, Generator

ROOT = Path(__file__).parent.parent
TINY = ["--image-size", "32", "--ngf", "4", "--ndf", "4", "--latent-dim", "8", "--batch-size", "16", "--device", "cpu"]

# The same on every machine: no GPU, and one thread, since pytest-xdist runs a worker on each core
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # where the server below imports from
torch.set_num_threads(1)
plots.DPI = 40  # figures are drawn as ever, but smaller: at 120 they take most of the time of a short training

# Scripts start as children of a server that has imported what they import: a process of its own each, which can be
# killed and limited like any other, without the seconds that importing torch takes
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["conftest", "evaluate", "sklearn.datasets", "sklearn.model_selection"])


def run_main(script: str, *arguments: str) -> None:
    """Run a script or a module from its first line to its last inside this process.

    A script is a file of the repository; a module, such as detectors.rotnet, is what python -m runs.
    """
    sys.argv = [script, *arguments]
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported here before
        runpy.run_module(script, run_name="__main__")


@dataclass(frozen=True)
class Started:
    """A script at work in a process of its own."""

    process: multiprocessing.Process
    output: Path  # where its stdout and stderr go

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Wait until this holds; the process must not end before."""
        while not happened():
            assert self.process.is_alive(), self.output.read_text()
            time.sleep(0.01)

    def end(self) -> tuple[int, str]:
        """Wait for the end: exit code (-9 if it was killed, ...) and what was printed."""
        self.process.join()  # however slow the machine is
        return self.process.exitcode, self.output.read_text()


def start(
    cwd: Path,
    script: str,
    *arguments: str,
    largest_file: int | None = None,
    environment: dict[str, str] | None = None,
) -> Started:
    """Start a script in `cwd`. It cannot write files larger than `largest_file` bytes, as if the disk were full.

    It leaves figures blank where this process does, see `undrawn`.
    """
    handle, output = tempfile.mkstemp(dir=cwd.parent, prefix="output-")
    os.close(handle)
    command = [script, *arguments]
    is_blank = plots.save is leave_blank
    process = SERVER.Process(target=_be_script, args=(cwd, output, command, largest_file, environment or {}, is_blank))
    process.start()
    return Started(process, Path(output))


def start_together(cwd: Path, *command: str, by_rank: tuple[list[str], list[str]] = ([], [])) -> list[Started]:
    """Start a script in two processes with what torchrun tells its own, by rank.

    `by_rank` are further arguments of each. Unlike torchrun this takes no time to import torch, and when one process
    ends the other is left to notice.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        start(cwd, *command, *more, environment=group | {"TORCHELASTIC_RUN_ID": "1", "RANK": r, "LOCAL_RANK": r})
        for r, more in zip("01", by_rank, strict=True)
    ]


def run_together(cwd: Path, *command: str, by_rank: tuple[list[str], list[str]] = ([], [])) -> list[tuple[int, str]]:
    """Run a script in two processes, see `start_together`: exit code and what was printed, by rank."""
    return [each.end() for each in start_together(cwd, *command, by_rank=by_rank)]


def _be_script(
    cwd: Path, output: str, command: list[str], largest_file: int | None, environment: dict[str, str], is_blank: bool
) -> None:
    os.chdir(cwd)
    os.environ |= environment
    if is_blank:
        plots.save = leave_blank
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream.fileno())
        stream.reconfigure(line_buffering=True)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would be started deaf to it
    multiprocessing.set_start_method(None, force=True)  # the platform's own again, not that of the server
    run_main(*command)


def leave_blank(figure: Figure, path: Path) -> None:
    """Write one pixel where `plots.save` draws a figure."""
    with files.replacing(path) as partial:
        Image.new("L", (1, 1)).save(partial, "PNG")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, and stay blank: to draw those that no one looks at takes half the time of a short training."""
    monkeypatch.setattr(plots, "save", leave_blank)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder of this name, which the first process of pytest-xdist that asks for it makes for all.

    No test may write to it, nor run a script on it, which would lock it.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all processes
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a fault left
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


class Replay(TorchDispatchMode):
    """A CUDA graph on a CPU: the operations of one call of a step, on the very tensors that they were called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.replays = 0

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        found = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:  # on a CPU what is noted is done as well
            return
        for function, args, kwargs, before in self.calls:
            found = function(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(found), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Replay]]:
    """Once called, `util.captured` does on a CPU what it does on a GPU, with a `Replay` for each CUDA graph, in the
    list that it returns."""

    def start() -> list[Replay]:
        graphs: list[Replay] = []

        def graph() -> Replay:
            graphs.append(Replay())
            return graphs[-1]

        stream, original = SimpleNamespace(wait_stream=lambda other: None), util.captured
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
        monkeypatch.setattr(util, "captured", lambda step, device: original(step, torch.device("cuda")))
        return graphs

    return start


class Batches:
    """What the body of a training sees of a Loop: its batches, autocast switched off, and what it logs, in `rows`."""

    def __init__(self, batches: Iterable[torch.Tensor]) -> None:
        self.batches, self.rows = batches, []
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=False)

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from self.batches

    def captured(self, body: Callable[..., Any]) -> Callable[..., Any]:
        return util.captured(body, torch.device("cpu"))

    def log(self, **values: torch.Tensor) -> None:
        self.rows.append({name: value.item() for name, value in values.items()})


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Run a script from its first line to its last inside this process, in `tmp_path`: no second import of torch."""

    def run(script: str, *arguments: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", sys.argv)  # to be restored
        run_main(script, *arguments)

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
    """A working directory in which the three scripts ran on `digits`, each as its own process. See `made_once`."""
    return made_once(tmp_path_factory, "digits", run_on_digits)


def run_on_digits(workdir: Path) -> None:
    """The three scripts and every detector."""
    for command in (
        "train_gan.py --dataset digits --normal-class 0 --epochs 3 --generator-steps 3 --checkpoint-every 10 "
        + " ".join(TINY),
        "fit_latent.py --splits validation test train_anomalies --max-images 60 --steps 20 --shard-size 40",
        "fit_latent.py --splits validation test train_anomalies --max-images 60 --steps 20 --discrimination reference",
        "detectors.f_anogan --kappa 0.5",
        "detectors.acae",
        "detectors.rotnet --epochs 6",
        "detectors.pca",
        "detectors.baselines --splits validation test train_anomalies",
        "evaluate.py --bootstrap 50 --score anomaly_score",
    ):
        code, printed = start(workdir, *command.split()).end()
        assert code == 0, printed


@pytest.fixture
def trained(digits_workdir: Path, tmp_path: Path) -> Path:
    """A copy of that run, in `tmp_path`."""
    return shutil.copytree(digits_workdir / "outputs/digits-0", tmp_path / "outputs/digits-0")


def read_scores(run_dir: Path) -> list[dict[str, str]]:
    """The rows of scores.csv."""
    with (run_dir / "scores.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def tiny_networks() -> tuple[Generator, Discriminator]:
    """Untrained networks in float64, frozen, with BatchNorm statistics that are not those of the start."""
    torch.manual_seed(0)
    generator, discriminator = Generator(32, 3, 8, 4).double(), Discriminator(32, 3, 4).double()
    with torch.no_grad():
        for _ in range(5):
            discriminator(generator(torch.randn(16, 8, dtype=torch.float64)))
    return generator.eval().requires_grad_(False), discriminator.eval().requires_grad_(False)
