"""The layout of the repository: which files stand at the top, and who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {"train_gan", "fit_latent", "evaluate"}
FOLDERS = ("anogan", "detectors", "benchmarks", "examples", "tests")


def modules() -> dict[str, Path]:
    """Every module of the project by the name that an import gives it."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for folder in FOLDERS:
        found |= {f"{folder}.{path.stem}": path for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"}
    return found


def imports_of(path: Path, known: set[str]) -> set[str]:
    """The modules of the project that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & known


MODULES = modules()
IMPORTS = {name: imports_of(path, set(MODULES)) for name, path in MODULES.items()}


def test_the_top_level() -> None:
    top = {"network", "util", "detector", *SCRIPTS}
    assert {path.stem for path in ROOT.glob("*.py")} == top


@pytest.mark.parametrize("name", MODULES)
def test_who_imports_whom(name: str) -> None:
    folder = name.split(".")[0] if "." in name else ""
    allowed = {
        "anogan": {"network", "util", *(each for each in MODULES if each.startswith("anogan."))},
        "detectors": {"network", "util", *(each for each in MODULES if each.startswith("anogan."))},
        "benchmarks": set(MODULES),
        "examples": set(MODULES),
        "tests": set(MODULES),
        "": {each for each in MODULES if each.split(".")[0] in ("network", "util", "anogan", "detectors")},
    }[folder]
    if name in ("network", "util"):
        allowed = set()
    if name == "detector":  # stands on the scripts: the search is in one, and the list of scores in another
        allowed |= SCRIPTS
    forbidden = {each for each in IMPORTS[name] - allowed if not (folder == "tests" and each.startswith("tests."))}
    assert not forbidden, f"{name} imports {', '.join(sorted(forbidden))}"


def test_network_stands_on_torch_alone() -> None:
    tree = ast.parse((ROOT / "network.py").read_text(encoding="utf-8"))
    roots = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert roots - set(sys.stdlib_module_names) == {"torch"}


def test_no_circle() -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join([*above, name])}"
        if name not in done:
            for each in IMPORTS[name]:
                visit(each, (*above, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_reads_in_five_minutes(script: str) -> None:
    """About 200 lines, no function over 60, none with more than six parameters."""
    assert len(MODULES[script].read_text(encoding="utf-8").splitlines()) <= 260
    for node in ast.walk(ast.parse(MODULES[script].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 6, node.name


def test_a_score_has_one_name() -> None:
    import evaluate

    names = [score.name for score in evaluate.SCORES]
    assert len(set(names)) == len(names) == len({score.label for score in evaluate.SCORES})


def test_no_backend_of_matplotlib_is_chosen() -> None:
    """A notebook's own backend stays, whichever scripts and detectors it imports."""
    imported = ", ".join(sorted(SCRIPTS | {name for name in MODULES if name.startswith(("anogan.", "detectors."))}))
    code = f"import matplotlib; matplotlib.use('svg'); import {imported}; assert matplotlib.get_backend() == 'svg'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_requirements_are_what_the_code_imports() -> None:
    """requirements.txt lists every package that a script, anogan/, a detector or an example imports, and no other."""
    packages = {"PIL": "pillow", "sklearn": "scikit-learn"}
    if_installed = {"pydicom", "elpv_dataset"}  # for DICOM files and `make elpv` alone, which say so
    imported = set()
    for name, path in MODULES.items():
        if name.startswith(("tests.", "benchmarks.")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                imported |= {each.split(".")[0] for each in names}
    ours = {name.split(".")[0] for name in MODULES}
    imported = {packages.get(name, name) for name in imported - ours - if_installed - set(sys.stdlib_module_names)}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert {line.split(">=")[0] for line in lines if line and not line.startswith("#")} == imported
