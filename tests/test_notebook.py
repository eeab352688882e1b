"""examples/digits.ipynb, cell by cell in a kernel of its own as Jupyter runs it, with a training of two epochs."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install nbformat: the notebook cannot be read without it")
nbclient = pytest.importorskip("nbclient", reason="pip install nbclient: it runs the notebook's cells")
pytest.importorskip("ipykernel", reason="pip install ipykernel: the notebook's cells run in it")

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples/digits.ipynb"
PICTURES = {"train-pictures": 2, "search-look": 1, "pictures": 3, "own": 1}  # by cell: the scripts', and one of its own
SCORES = 5  # rows of the table


def outputs_of(cell: dict, kind: str) -> list[str]:
    """What a cell shows of one kind, such as image/png."""
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def test_the_notebook_runs_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, in another run folder. The kernel starts in examples/ and finds the scripts without help."""
    run_dir = tmp_path / "run"
    text = NOTEBOOK.read_text(encoding="utf-8")
    for shown, here in {
        "outputs/digits-1-notebook": run_dir.as_posix(),
        "epochs=105": "epochs=2",
        "ngf=16": "ngf=4",
        "ndf=16": "ndf=4",
        "steps=100": "steps=2, candidates=100, max_images=60",
        "alpha=0.1": "alpha=0.1, bootstrap=20",
    }.items():
        assert text.count(shown) == 1, f"{shown} must stand once in the notebook, or this test runs all of it"
        text = text.replace(shown, here)
    notebook = nbformat.reads(text, as_version=4)

    for name in ("PYTHONPATH", "MPLBACKEND"):  # what would hide that the notebook does not find its way by itself
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):  # this user's start-up files stay out, and nothing is left
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", resources=where).execute()

    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    assert {name: found for name, cell in cells.items() if (found := len(outputs_of(cell, "image/png")))} == PICTURES
    (table,) = outputs_of(cells["scores"], "text/markdown")
    numbers = [float(number) for number in re.findall(r"\d\.\d{3}", table)]  # ROC-AUC and both ends of its interval
    assert len(numbers) == 3 * SCORES
    assert all(0 <= number <= 1 for number in numbers)
    assert (run_dir / "report.html").is_file()
    assert str(run_dir) in "".join(output.get("text", "") for output in cells["train"].outputs)


def test_the_notebook_is_committed_without_outputs() -> None:
    """What a run leaves in it would be in every diff."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), f"clear the outputs of cell {cell.id}"
    assert notebook.metadata.kernelspec.name == "python3"
