"""Figures: names that matplotlib cannot take as they are, letters from other fonts, and hundreds of classes."""

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from conftest import TINY
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image
from test_report import NAMES

import evaluate
from anogan import plots

DATA = Path(matplotlib.get_data_path())
MORE = ["a $x$ and $y_{1$", "\\$ \\alpha $", "\x1b[31m", "_", "y" * 100]
SCRIPT_A = "\U0001d4d0"  # a letter of STIXGeneral, which DejaVu Sans lacks
HAN = "\u5199"  # a letter that no font of matplotlib has


@pytest.fixture
def only_own_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if no other fonts were installed than those that come with matplotlib."""
    own = [font for font in fontManager.ttflist if Path(font.fname).is_relative_to(DATA)]
    monkeypatch.setattr(fontManager, "ttflist", own)
    plots._other_families.cache_clear()
    yield
    plots._other_families.cache_clear()


@pytest.fixture
def no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails if matplotlib or NumPy warns of anything, or logs it."""
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "matplotlib"):
        for kind in (UserWarning, RuntimeWarning):
            warnings.simplefilter("error", kind)
        yield
    assert caplog.messages == []


def drawn(path: Path, text: str, **properties: object) -> np.ndarray:
    """A figure of nothing but a text, as pixels."""
    figure = Figure(figsize=(4, 1))
    figure.text(0.1, 0.4, text, **properties)
    plots.save(figure, path)
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_every_name_can_be_drawn(only_own_fonts: None, no_complaints: None, tmp_path: Path, name: str) -> None:
    """As a title, a caption and a label at an axis; not as math, in one line."""
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    axes.set_xticks([0], [plots.shown(name)])
    axes.set_title(plots.shown(name))
    figure.suptitle(plots.shown(name), fontsize=8)
    plots.save(figure, tmp_path / "figure.png")
    assert [label.get_text() for label in (*axes.get_xticklabels(), axes.title)] == [plots.shown(name)] * 2
    assert "\n" not in plots.shown(name) and len(plots.shown(name)) <= 31


def test_shown_by_hand(only_own_fonts: None) -> None:
    assert plots.shown("Ñandú $5 {x}") == "Ñandú $5 {x}"
    assert plots.shown(f"two\nlines \x1b \udcff {HAN}", 50) == "two\\nlines \\x1b \\udcff \\u5199"
    assert plots.shown("\u202egnp.exe") == "\\u202egnp.exe"  # a glyph that turns the text round
    assert plots.shown("abcdefgh", 8) == "abcdefgh"
    assert plots.shown("abcdefghi", 8) == "abcd…fghi" and plots.shown("abcdefghij", 5) == "abc…ij"
    assert plots.shown(HAN * 9, 14) == "\\u5199…\\u5199"  # an escape is kept whole or left out


def test_a_letter_comes_from_a_font_that_has_it(only_own_fonts: None, no_complaints: None, tmp_path: Path) -> None:
    assert plots.family_with("A") == "sans-serif" and plots.family_with(HAN) is None
    name = plots.shown(SCRIPT_A)
    assert name == SCRIPT_A
    family = plots.family_with(SCRIPT_A)
    assert family != "sans-serif"
    found = drawn(tmp_path / "found.png", name)
    assert np.array_equal(found, drawn(tmp_path / "of_family.png", name, family=family))
    assert not np.array_equal(found, drawn(tmp_path / "escaped.png", "\\U0001d4d0"))
    # the letters around it stay what they are
    assert np.array_equal(drawn(tmp_path / "a.png", "A"), drawn(tmp_path / "b.png", "A", family="sans-serif"))


def test_east_asian_letters_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "family_with", lambda letter: "some font")
    assert plots.shown(HAN * 5, 10) == HAN * 5 and plots.shown(HAN * 6, 10) == HAN * 3 + "…" + HAN * 2


def test_no_text_is_math(tmp_path: Path) -> None:
    assert not np.array_equal(drawn(tmp_path / "a.png", "$x$"), drawn(tmp_path / "b.png", "x"))


def test_hundreds_of_classes_in_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst 30 by the judged score, which the title says; a picture that one can look at, with every score."""
    rng = np.random.default_rng(0)
    declared = {score.name: score for score in evaluate.SCORES}
    of_class = [{"roc_auc": value, "roc_auc_95_interval": [0.2, 0.8]} for value in rng.random(900)]
    names = [f"class {i:03d}" for i in range(900)]
    metrics = {
        name: {"per_class": dict(zip(names, of_class[i:] + of_class[:i], strict=True))}
        for i, name in enumerate(declared)
    }

    def labels_of(figure: Figure) -> list[str]:
        return [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()]

    figures: list[Figure] = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    plots.per_class_auc(tmp_path / "many.png", SimpleNamespace(declared=declared), metrics, "peak", "run")
    width, height = Image.open(tmp_path / "many.png").size
    assert width < 30 * plots.DPI and height < 12 * plots.DPI
    worst = sorted(names, key=lambda name: metrics["peak"]["per_class"][name]["roc_auc"])[:30]
    assert labels_of(figures[0]) == worst
    assert "of the 30 of 900 anomalous classes" in figures[0].get_suptitle()

    few = {name: {"per_class": dict(list(of["per_class"].items())[:9])} for name, of in metrics.items()}
    plots.per_class_auc(tmp_path / "few.png", SimpleNamespace(declared=declared), few, "peak", "run")
    assert labels_of(figures[1]) == names[:9]
    assert "AUC by anomalous class" in figures[1].get_suptitle()


def test_scores_that_are_all_the_same(tmp_path: Path, no_complaints: None) -> None:
    is_second = np.arange(6) >= 3
    plots.score_histograms(tmp_path / "same.png", {"same": np.full(6, 0.25)}, is_second, ("same", 0.25), "run")
    pixels = np.asarray(Image.open(tmp_path / "same.png").convert("RGB")).astype(int)
    assert (np.ptp(pixels, -1) > 50).sum() > 20  # bars in colour, not a blank panel


@pytest.mark.skipif(os.name != "posix", reason="file names that are not UTF-8 are POSIX's")
def test_the_scripts_on_hostile_names(
    run_here: Callable[..., None], tmp_path: Path, no_complaints: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """From training to the report, in folders of such names; the table has a line a class."""
    root = tmp_path / "da$ta$ \udcff"
    names = ["two\nlines", "surrogate \udcff", *MORE[:3]]
    rng = np.random.default_rng(0)
    for folder in ("train/good", "test/good", *(f"test/{name}" for name in names)):
        (root / folder).mkdir(parents=True)
        for i in range(8 if folder == "train/good" else 2):
            Image.fromarray(rng.integers(0, 255, (32, 32), np.uint8)).save(root / folder / f"{i} \udcff.png")
    run_here("train_gan.py", "--dataset", str(root), "--epochs", "1", *TINY)
    run_dir = next(Path("outputs").iterdir())
    assert run_dir.name == "da$ta$ \udcff-good"
    run_here("fit_latent.py", "--steps", "1", "--candidates", "10")
    capsys.readouterr()
    run_here("evaluate.py", "--bootstrap", "10")
    printed = capsys.readouterr().out.encode(errors="backslashreplace").decode()
    for name in names:
        line = name.encode("unicode_escape").decode() if not name.isprintable() else name
        assert f"\n  {line}" in printed, line
    for name in ("per_class_auc", "ranking", "difference_maps", "roc"):
        assert (run_dir / f"{name}.png").is_file()
    rows = (run_dir / "scores.csv").read_text(encoding="utf-8")
    assert "1 \\udcff.png" in rows and "surrogate \\udcff" in rows
    run_here("evaluate.py", "--score", "p_d", "--images", str(root / "test"))
    shutil.rmtree(run_dir)
