"""Faults, injected for real: kills and signals at random moments, a full disk, spoilt files, a second process.

After each the same command goes on, and ends as if nothing had happened: the same weights and latents, bit by bit.
"""

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, made_once, start
from test_util import folder

import util
from anogan import decoding, files, latents, runs

TRAIN = ["train_gan.py", "--dataset", "digits", "--epochs", "20", "--checkpoint-every", "25", *TINY]  # 120 steps
FIT = ["fit_latent.py", "--splits", "test", "--steps", "40", "--max-images", "160", "--shard-size", "16"]  # 10 shards
FIT += ["--candidates", "200"]
SHORT = ["48" if word == "160" else word for word in FIT]  # 3 shards
RUN = Path("outputs/digits-1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""

    def run(workdir: Path) -> None:
        for command in (TRAIN, FIT):
            finish(workdir, command)

    return made_once(tmp_path_factory, "whole", run) / RUN


@pytest.fixture(scope="module")
def short(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, of which fewer images were searched."""

    def search(workdir: Path) -> None:
        shutil.copytree(whole, workdir / RUN, ignore=shutil.ignore_patterns("latents-*"))
        finish(workdir, SHORT)

    return made_once(tmp_path_factory, "short", search) / RUN


@pytest.fixture
def trained(whole: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed run as it was before the search."""
    shutil.copytree(whole, tmp_path / RUN, ignore=shutil.ignore_patterns("latents-*", "pictures-*"))
    return tmp_path / RUN


def assert_same(first: object, second: object) -> None:
    """Equal bit by bit, tensors and what holds them."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def assert_same_training(run_dir: Path, whole: Path) -> None:
    """All of gan.pt but the seconds that the training took, and the losses."""
    states = [torch.load(path / "gan.pt", weights_only=True) for path in (run_dir, whole)]
    assert [state.pop("seconds") > 0 for state in states] == [True, True]
    assert_same(*states)
    assert (run_dir / "losses.csv").read_bytes() == (whole / "losses.csv").read_bytes()
    assert not list(run_dir.glob(f"{files.PARTIAL}*"))


def assert_same_latents(run_dir: Path, whole: Path, split: str = "test") -> None:
    first, second = (dict(np.load(path / f"latents-{split}.npz")) for path in (run_dir, whole))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert not (run_dir / f"latents-{split}").exists() and not list(run_dir.glob(f"{files.PARTIAL}*"))


def shards(workdir: Path) -> list[Path]:
    """What a search has done so far."""
    return sorted((workdir / RUN / "latents-test").glob("0*.npz"))


def start_and_stop(
    cwd: Path, command: list[str], how: int, after: float | Callable[[], bool], then: float = 0
) -> tuple[int, str]:
    """Let a script come to its work, send it a signal some seconds later or after something has happened and `then`
    seconds more, and wait for its end: exit code and what it printed."""
    script = start(cwd, *command)
    script.wait_for(lambda: "run: " in script.output.read_text())
    if callable(after):
        script.wait_for(lambda: after() or not script.process.is_alive())  # a fast machine may be done before
    else:
        time.sleep(after)
    time.sleep(then)
    with contextlib.suppress(ProcessLookupError):  # it was faster than that
        os.kill(script.process.pid, how)
    return script.end()


def finish(cwd: Path, command: list[str]) -> str:
    """Run a script to its good end; what it printed."""
    code, printed = start(cwd, *command).end()
    assert code == 0, printed
    return printed


def another(happened: Callable[[], object]) -> Callable[[], bool]:
    """Whether what this returns has changed since now."""
    before = happened()
    return lambda: happened() != before


def last_checkpoint(workdir: Path) -> int | None:
    """When gan.pt was written."""
    path = workdir / RUN / "gan.pt"
    return path.stat().st_mtime_ns if path.exists() else None


def test_training_killed_at_random_moments(whole: Path, tmp_path: Path) -> None:
    moments, kills = random.Random(0), 0
    for _ in range(4):  # before the first checkpoint, and after every other one
        after = another(lambda: last_checkpoint(tmp_path)) if kills else 0.1
        code, _ = start_and_stop(tmp_path, TRAIN, signal.SIGKILL, after, moments.uniform(0, 0.4))
        kills += code == -signal.SIGKILL
    assert kills > 1
    finish(tmp_path, TRAIN)
    assert_same_training(tmp_path / RUN, whole)


def test_search_killed_at_random_moments(whole: Path, trained: Path, tmp_path: Path) -> None:
    moments, kills = random.Random(0), 0
    for _ in range(5):
        if (trained / "latents-test.npz").exists():
            break
        after = another(lambda: shards(tmp_path)) if kills else 0.1
        code, _ = start_and_stop(tmp_path, FIT, signal.SIGKILL, after, moments.uniform(0, 0.1))
        kills += code == -signal.SIGKILL
    assert kills > 1
    finish(tmp_path, FIT)
    assert_same_latents(trained, whole)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_training_stopped_by_a_signal(whole: Path, tmp_path: Path, how: int, code: int) -> None:
    stopped, printed = start_and_stop(tmp_path, TRAIN, how, another(lambda: last_checkpoint(tmp_path)), 0.1)
    assert stopped == code and "Traceback" not in printed
    step = torch.load(tmp_path / RUN / "gan.pt", weights_only=True)["step"]
    assert 25 < step < 120 and f"stopped after step {step} of 120" in printed
    finish(tmp_path, TRAIN)
    assert_same_training(tmp_path / RUN, whole)


def test_killed_worker_is_named(trained: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        assert os.getpid() != here
        os.kill(os.getpid(), signal.SIGKILL)

    here = os.getpid()
    monkeypatch.setattr(decoding, "as_seen", killed)
    assert "a process that decodes images ended" in fails(*FIT)
    assert not list(trained.glob("*pictures-*"))


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_search_stopped_by_a_signal(whole: Path, trained: Path, tmp_path: Path, how: int, code: int) -> None:
    stopped, printed = start_and_stop(tmp_path, FIT, how, after=lambda: len(shards(tmp_path)) > 1)
    assert stopped == code and "Traceback" not in printed
    done = shards(tmp_path)
    assert 1 < len(done) < 10
    for shard in done:  # marked: what is done must not be done again
        content = dict(np.load(shard))
        content["z"][:] = 7
        np.savez(shard, **content)
    assert f"{len(done)} of 10 shards are done" in finish(tmp_path, FIT)
    marked = (np.load(trained / "latents-test.npz")["z"] == 7).all(1)
    assert marked.sum() == 16 * len(done)


@pytest.mark.usefixtures("undrawn")
def test_full_disk(whole: Path, short: Path, trained: Path, tmp_path: Path, digits_workdir: Path) -> None:
    def no_room(command: list[str], largest_file: int) -> None:
        code, printed = start(tmp_path, *command, largest_file=largest_file).end()
        assert code == 1 and "error: cannot write" in printed and "Traceback" not in printed

    (trained / "gan.pt").unlink()
    no_room(TRAIN, 20_000)
    assert not list(trained.glob("*gan.pt")) and not list(trained.glob(f"{files.PARTIAL}*"))
    finish(tmp_path, ["15" if word == "20" else word for word in TRAIN])
    before = (trained / "gan.pt").read_bytes()
    no_room(TRAIN, len(before) // 2)
    assert (trained / "gan.pt").read_bytes() == before
    finish(tmp_path, TRAIN)
    assert_same_training(trained, whole)

    shutil.copy(whole / "gan.pt", trained / "gan.pt")
    no_room(SHORT, 1000)
    assert not list(trained.glob("*pictures-*"))
    for name in ("pictures-test.bin", "pictures-test.npz", "candidates.npz"):
        shutil.copy(short / name, trained)
    no_room(SHORT, 8000)  # room for the shards, not for all of them in one file
    assert len(shards(tmp_path)) == 3
    finish(tmp_path, SHORT)
    assert_same_latents(trained, short)

    run_dir = tmp_path / "outputs/digits-0"
    shutil.copytree(digits_workdir / "outputs/digits-0", run_dir)
    before = {path.name: path.read_bytes() for path in run_dir.glob("*")}
    no_room(["evaluate.py", "--run-dir", "outputs/digits-0", "--alpha", "0.1", "--device", "cpu"], 1000)
    assert before == {path.name: path.read_bytes() for path in run_dir.glob("*")}


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that not even root may write to")
def test_folder_that_cannot_be_written(fails: Callable[..., str]) -> None:
    message = fails("train_gan.py", "--dataset", "digits", "--epochs", "1", "--run-dir", "/sys/kernel", *TINY)
    assert "/sys/kernel" in message


def test_second_process_is_refused(trained: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    first = start(tmp_path, *FIT, "--steps", "1000")  # long enough for all three
    first.wait_for(lambda: "run: " in first.output.read_text())
    try:
        for command in (FIT, ["evaluate.py"], [*TRAIN, "--fresh"]):
            assert f"another process is at work in {RUN}" in fails(*command)
    finally:
        first.process.kill()
        first.end()
    with runs.run_folder(trained):  # the lock of the dead binds nobody, though its workers may live on a while
        pass


@pytest.mark.usefixtures("undrawn")
def test_image_that_vanishes_during_the_search(tmp_path: Path, run_here: Callable[..., None]) -> None:
    root = folder(tmp_path / "set", {"train/good": 10, "test/good": 40})
    run_here("train_gan.py", "--dataset", "set", "--normal-class", "good", "--epochs", "1", *TINY)
    fit = ["fit_latent.py", "--splits", "test", "--steps", "30", "--shard-size", "2", "--batch-size", "2"]
    fit += ["--candidates", "200"]
    run_here(*fit, "--device", "cpu")
    run_dir, path = Path("outputs/set-good"), root / "test/good/39.png"
    shutil.copytree(run_dir, "whole")
    (run_dir / "latents-test.npz").unlink()

    search = start(tmp_path, *fit, "--device", "cpu")
    search.wait_for((run_dir / "latents-test/000000.npz").exists)  # every image was decoded by now
    path.rename(tmp_path / "39.png")
    code, printed = search.end()
    assert code == 0, printed
    assert_same_latents(run_dir, Path("whole"))


@pytest.mark.parametrize("kept", [0, 30, 0.5, -1])
def test_files_cut_short(
    short: Path,
    trained: Path,
    tmp_path: Path,
    fails: Callable[..., str],
    run_here: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    kept: float,
) -> None:
    """Every kind of file that a script reads, cut at several lengths."""

    def cut(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else kept])

    # a shard is searched again, and nothing else
    start_and_stop(tmp_path, SHORT, signal.SIGKILL, after=lambda: len(shards(tmp_path)) > 0)
    done = shards(tmp_path)
    cut(done[0])
    run_here(*SHORT)
    printed = capsys.readouterr().out
    assert f"{done[0].name} is damaged" in printed and printed.count("searching it again") == 1
    assert_same_latents(trained, short)
    # so is a split
    cut(trained / "latents-test.npz")
    assert "latents-validation.npz is missing" in fails("evaluate.py")
    run_here(*SHORT)
    assert "latents-test.npz is damaged" in capsys.readouterr().out
    assert_same_latents(trained, short)
    # a run.json is named before any work is done
    record = (trained / "run.json").read_bytes()
    cut(trained / "run.json")
    if kept != -1:  # its last byte is a line break
        for command in (TRAIN, SHORT, ["evaluate.py"]):
            assert "run.json is damaged" in fails(*command)
    (trained / "run.json").write_bytes(record)
    # a gan.pt is refused, and starts over with --fresh only
    cut(trained / "gan.pt")
    spoilt = (trained / "gan.pt").read_bytes()
    assert "gan.pt is damaged" in fails(*TRAIN) and "gan.pt is damaged" in fails(*SHORT)
    assert (trained / "gan.pt").read_bytes() == spoilt


def test_flipped_bytes(whole: Path, trained: Path) -> None:
    """Wherever a bit flips, a file is refused or says what it said before."""
    device, places, refused = torch.device("cpu"), random.Random(0), 0
    gan = runs.load_gan(whole, device)
    good = {name: getattr(gan, name).state_dict() for name in ("generator", "discriminator")}
    expected = latents.read_latents(whole / "latents-test.npz", "test", gan)
    for name in ("gan.pt", "latents-test.npz"):
        content = (whole / name).read_bytes()
        for _ in range(150):
            spoilt = bytearray(content)
            spoilt[places.randrange(len(content))] ^= 1 << places.randrange(8)
            (trained / name).write_bytes(spoilt)
            try:
                if name == "gan.pt":
                    found = runs.load_gan(trained, device)
                    assert_same({part: getattr(found, part).state_dict() for part in good}, good)
                    assert_same(*(torch.load(at / name, weights_only=True) for at in (trained, whole)))
                else:
                    found = latents.read_latents(trained / name, "test", gan)
                    for key in (*latents.PER_PICTURE, *latents.PER_PATCH):
                        np.testing.assert_array_equal(found[key], expected[key])
            except util.InputError:
                refused += 1
    assert refused > 200


def test_swapped_files(whole: Path, trained: Path, fails: Callable[..., str]) -> None:
    shutil.copy(whole / "latents-test.npz", trained / "latents-validation.npz")
    assert "holds the split 'test', not 'validation'" in fails("evaluate.py")
    shutil.copy(whole / "latents-test.npz", trained / "gan.pt")
    for command in (TRAIN, FIT, ["evaluate.py"]):
        assert "gan.pt is damaged or was not written by this train_gan.py" in fails(*command)


def test_shards_of_other_settings_are_searched_again(
    trained: Path, tmp_path: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    start_and_stop(tmp_path, FIT, signal.SIGKILL, after=lambda: len(shards(tmp_path)) > 1)
    done = len(shards(tmp_path))
    run_here(*["20" if word == "40" else word for word in FIT])
    assert capsys.readouterr().out.count("was fitted with other settings: searching it again") == done > 0
    gan = runs.load_gan(trained, torch.device("cpu"))
    assert latents.read_latents(trained / "latents-test.npz", "test", gan)["search"]["steps"] == 20


def test_more_images_are_searched_anew(
    whole: Path, trained: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Images that were not asked for are not taken for such as could not be read."""
    run_here(*FIT, "--max-images", "50", "--skip-unreadable")
    run_here(*FIT, "--skip-unreadable")
    assert "latents-test.npz holds other images: searching again" in capsys.readouterr().out
    assert_same_latents(trained, whole)


def test_a_finished_search_is_not_done_again(
    whole: Path, trained: Path, run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(whole / "latents-test.npz", trained)
    shutil.copytree(trained, trained / "latents-test")  # killed after the merge, before the shards were removed
    monkeypatch.setattr(torch.Tensor, "backward", None)
    run_here(*FIT)
    assert_same_latents(trained, whole)


@pytest.mark.usefixtures("undrawn")
def test_training_goes_on_to_more_epochs(whole: Path, tmp_path: Path, run_here: Callable[..., None]) -> None:
    run_here(*["11" if word == "20" else word for word in TRAIN])
    run_here(*TRAIN)
    first, second = (torch.load(path / "gan.pt", weights_only=True) for path in (RUN, whole))
    for name in ("generator", "discriminator", "optimizer_g", "optimizer_d", "history", "step"):
        assert_same(first[name], second[name])


def test_a_finished_training_is_not_done_again(
    trained: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: (trained / name).read_bytes() for name in ("gan.pt", "run.json", "samples.png", "samples.gif")}
    (trained / "samples.png").unlink()  # killed after gan.pt, before the pictures
    run_here(*TRAIN)
    assert "nothing left to train; --fresh starts over" in capsys.readouterr().out
    assert before == {name: (trained / name).read_bytes() for name in before}


def test_other_settings_are_refused_by_name(trained: Path, fails: Callable[..., str]) -> None:
    before = (trained / "gan.pt").read_bytes()
    message = fails(*TRAIN, "--lr", "1e-3", "--ngf", "5")
    assert "lr 0.0002, not 0.001; ngf 4, not 5" in message and "--fresh" in message and "epochs" not in message
    assert (trained / "gan.pt").read_bytes() == before


@pytest.mark.usefixtures("undrawn")
def test_other_images_are_refused(tmp_path: Path, run_here: Callable[..., None], fails: Callable[..., str]) -> None:
    root = folder(tmp_path / "set", {"train/good": 10, "test/good": 1})
    command = ["train_gan.py", "--dataset", "set", "--normal-class", "good", "--epochs", "2", *TINY]
    run_here(*command)
    shutil.copy(root / "train/good/01.png", root / "train/good/00.png")
    message = fails(*command)
    assert message.count(";") == 0 and "training_images 9 with checksum" in message


@pytest.mark.usefixtures("undrawn")
def test_fresh_starts_over(
    whole: Path, trained: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    content = (trained / "gan.pt").read_bytes()
    (trained / "gan.pt").write_bytes(content[:1000])  # what cannot be gone on with
    run_here(*TRAIN, "--fresh")
    assert f"starting over: the first checkpoint replaces {RUN / 'gan.pt'}" in capsys.readouterr().out
    assert_same_training(trained, whole)


@pytest.mark.usefixtures("undrawn")
def test_divergence_keeps_the_last_good_checkpoint(
    tmp_path: Path, run_here: Callable[..., None], fails: Callable[..., str]
) -> None:
    """A step size and a moment of 1e38 in the checkpoint stand for any training that blows up late."""
    run_here(*["3" if word == "20" else word for word in TRAIN])
    state = torch.load(RUN / "gan.pt", weights_only=True)
    state["optimizer_g"]["param_groups"][0]["lr"] = 1e38
    state["optimizer_g"]["state"][0]["exp_avg"][:] = 1e38
    torch.save(state, RUN / "gan.pt")
    before = (RUN / "gan.pt").read_bytes()
    message = fails(*TRAIN)
    assert "diverged at step" in message and f"{RUN / 'gan.pt'} keeps step 18" in message
    step = int(message.split("diverged at step ")[1].split()[0])
    assert 19 <= step <= 25
    assert (RUN / "gan.pt").read_bytes() == before


# Run a script with a malloc that gives back what is freed: glibc keeps more of it than the bound below
THRIFTY = """
import ctypes, sys
from conftest import run_main

libc, largest_block = ctypes.CDLL(None), -3  # M_MMAP_THRESHOLD
if hasattr(libc, "mallopt"):
    libc.mallopt(largest_block, 65536)
run_main(*sys.argv[1:])
"""


@pytest.mark.usefixtures("undrawn")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, run_here: Callable[..., None]) -> None:
    root = folder(tmp_path / "set", {"train/good": 10, "test/good": 1})
    for i in range(400):  # 20 MB once decoded
        (root / f"test/good/{i:05d}.png").hardlink_to(root / "test/good/00.png")
    train = ["train_gan.py", "--dataset", "set", "--normal-class", "good", "--epochs", "1", *TINY]
    run_here(*train, "--image-size", "128")
    (tmp_path / "launch.py").write_text(THRIFTY)
    peaks = []
    for count in (50, 400):
        flags = ["--splits", "test", "--max-images", str(count), "--steps", "1", "--candidates", "10"]
        finish(tmp_path, [str(tmp_path / "launch.py"), "fit_latent.py", *flags, "--batch-size", "16"])
        peaks.append(runs.read_record(tmp_path / "outputs/set-good")["fit_latent"]["peak_memory_mib"])
    assert peaks[1] < peaks[0] + 10  # MiB


NASTY = ["-1", "0", "nan", "inf", "-inf", "1e400", "", " ", "abc", "0.5", "7", "9" * 30, "é", "\n", "--", "None"]


@pytest.mark.usefixtures("undrawn")
def test_bad_flags_never_end_in_a_traceback(
    whole: Path, trained: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A seeded loop over flags and values: each run ends well, or with a line that names the trouble, or in usage."""
    shutil.copy(whole / "latents-test.npz", trained)
    draw, refused = random.Random(0), 0
    flags = {
        "train_gan.py": "image-size latent-dim batch-size generator-steps lr weight-decay checkpoint-every seed "
        "precision normal-class dataset device group-by max-megapixels",
        "fit_latent.py": "splits max-images steps lr discrimination-weight candidates batch-size shard-size seed "
        "precision device run-dir init images dataset max-megapixels",
        "detectors.f_anogan": "epochs batch-size kappa lr weight-decay checkpoint-every seed precision device run-dir",
        "detectors.acae": "epochs batch-size l1-weight lr weight-decay checkpoint-every seed precision device run-dir",
        "evaluate.py": "alpha fdr images score bootstrap batch-size seed device run-dir dataset max-megapixels",
    }
    base = {
        "train_gan.py": ["--dataset", "digits", "--epochs", "1", *TINY, "--run-dir", "outputs/other", "--fresh"],
        "fit_latent.py": ["--splits", "test", "--steps", "1", "--max-images", "5", "--run-dir", str(RUN)],
        "detectors.f_anogan": ["--run-dir", str(RUN), "--epochs", "1", "--fresh"],
        "detectors.acae": ["--run-dir", str(RUN), "--epochs", "1", "--fresh"],
        "evaluate.py": ["--run-dir", str(RUN)],
    }
    for _ in range(90):
        script = draw.choice(list(flags))
        flag, value = f"--{draw.choice(flags[script].split())}", draw.choice(NASTY)
        try:
            run_here(script, *base[script], flag, value)
        except SystemExit as stopped:
            refused += 1
            if isinstance(stopped.code, str):
                assert stopped.code.startswith("error: ") and "\n" not in stopped.code, (script, flag, value)
            else:
                assert stopped.code == 2, (script, flag, value)  # tyro's usage message
    assert 30 < refused < 90
    assert not [path for path in Path("outputs").rglob("*") if path.name.startswith(files.PARTIAL)]
