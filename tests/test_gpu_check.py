"""benchmarks/gpu_check.py on a CPU, as small as it can be: that it runs, and that a comparison can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import util
from benchmarks import gpu_check


def test_it_runs_and_writes_both_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    names = " ".join(row["name"] for row in found["checks"])
    assert "digits: training" in names and "pictures: anomaly_score of the same z" in names
    assert "D(G(z)) of a checkpoint" in names and "killed after" in names and "tensors that differ" in names
    for precision in {"fp32", found["auto_precision"]}:
        assert f"pictures: A(x) after a search of 10 steps in {precision} against fp32 on a CPU, median" in names
    # the CPU against itself, but for bf16 that is compared with fp32, where it has native bf16
    of_itself = [row for row in found["checks"] if "bf16 against fp32" not in row["name"]]
    assert all(row["holds"] for row in found["checks"]) and all(row["found"] == 0 for row in of_itself)
    assert all(check in done.stdout for check in map(gpu_check.check_line, found["checks"]))
    precisions = {"fp32", found["auto_precision"]}
    for part, key, whole in (
        ("search", "seconds_for_10000_images", 10_000),
        ("training", "seconds_for_100_epochs_of_4000", 400_000),
    ):
        for table in found[part].values():
            assert len(table) == 1 + len(precisions) and next(iter(table.values()))["ratio"]["median"] == 1
            assert all(row[key] == pytest.approx(whole / row["images_per_second"]) for row in table.values())
    assert found["scripts"]["fit_latent.py"]["images"] == 10
    assert list(found["search"]) == ["batches of 2"] and list(found["training"]) == ["batches of 4"]
    lines = (tmp_path / "gpu_check.md").read_text().splitlines()
    shown = [2 + len(table) for table in (found["checks"], *found["search"].values(), *found["training"].values())]
    assert sum(line.startswith("|") for line in lines) == sum(shown) + 4


def test_what_does_not_hold_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A fault in one part does not keep the others from their figures, and a number that is none does not hold."""
    calls = []

    def broken(*_: object) -> None:
        raise RuntimeError("this GPU\ncannot do it")

    monkeypatch.setattr(gpu_check, "time_search", broken)
    monkeypatch.setattr(gpu_check, "time_training", lambda findings, *_: calls.append(findings))
    config = gpu_check.Config(("search", "training"), quick=True, out=tmp_path, device="cpu")
    with pytest.raises(util.InputError, match="1 of 1 comparisons do not hold: search runs"):
        gpu_check.main(config)
    assert len(calls) == 1 and "cannot do it" in capfd.readouterr().err  # the traceback
    (row,) = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert not row["holds"] and row["found"] is None and row["reason"] == "RuntimeError: this GPU"
    calls[0].check("too far", 2.0, 1.0, "it is")
    assert [row["holds"] for row in calls[0].checks] == [False, False]
    assert "| too far | **no** | 2 | 1 | it is |" in (tmp_path / "gpu_check.md").read_text()
