"""The benchmark of what is done once: it runs from its first line to its last, and leaves the run as it was."""

from collections.abc import Callable
from pathlib import Path

import pytest

from anogan import files
from benchmarks import measure, once


@pytest.mark.usefixtures("undrawn")
def test_before_and_after(
    trained: Path, tmp_path: Path, run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(script: str, run_dir: Path, *flags: str) -> None:
        run_here(script, "--run-dir", str(run_dir), *flags)

    monkeypatch.setattr(once, "_command", command)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    once.main(once.Config(run_dir=trained, images=4, steps=2, searched=30, repeats=1))
    assert before == {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    found = files.read_json(tmp_path / "once.json")["digits-0"]
    for name in ("decoded once, evaluate.py", "cast once, steps in bf16"):
        of = found[name]
        assert of["ratio"]["median"] == pytest.approx(of["before"]["median"] / of["after"]["median"])
    assert [of["steps"] for of in found["warm"].values()] == [100, 25]
    for of in found["warm"].values():
        assert 0 < of["ms_a_picture"]["median"] < 1000 * of["seconds_of_two_commands"]
