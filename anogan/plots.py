"""The pictures of a run: losses and samples of its training; ROC curves, histograms, difference maps of its scores."""

import io
import math
from functools import cache
from itertools import zip_longest
from pathlib import Path
from unicodedata import east_asian_width

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot, which would choose a backend for whoever imports this
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image
from sklearn.metrics import roc_curve
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from anogan import files, heatmaps
from anogan.metrics import worst_classes
from anogan.scoring import ScoredSplit
from anogan.verdicts import Verdict
from util import printable

DPI = 120  # dots per inch of every figure
LONGEST = 256  # pixels of the longer side of a picture in ranking.png, and of a panel in difference_maps.png


# ---- names from outside ---------------------------------------------------------------------------------------------


def shown(name: str, most: int = 30) -> str:
    """A name of a folder or a class as a figure can show it, in one line of at most so many characters.

    What is not printable, and what no installed font has, becomes an escape such as \\x1b or \\u5199. A longer name
    loses its middle. East Asian characters count twice, as they are twice as wide.
    """
    pieces = [letter if family_with(letter) else letter.encode("unicode_escape").decode() for letter in printable(name)]
    kept = list(pieces)
    while sum(2 if east_asian_width(piece[0]) in "FW" else len(piece) for piece in kept) > most:
        del kept[len(kept) // 2]
    if len(kept) < len(pieces):
        kept.insert((len(kept) + 1) // 2, "…")
    return "".join(kept)


def family_with(letter: str) -> str | None:
    """The first font family with a glyph for a letter, that of matplotlib's settings before others; None without."""
    ordinary = FontProperties().get_family()
    return next((name for name in (*ordinary, *_other_families()) if ord(letter) in _letters(name)), None)


@cache
def _other_families() -> list[str]:
    """Every installed family with an upright font of normal weight, but those that stand in for missing letters."""
    usual = (font for font in fontManager.ttflist if font.style == "normal" and font.weight in (400, "normal"))
    return sorted({font.name for font in usual if "LastResort" not in font.name.replace(" ", "")})


@cache
def _letters(family: str) -> frozenset[int]:
    """The code points that a font family has a glyph for."""
    return frozenset(FT2Font(findfont(FontProperties(family=[family]))).get_charmap())


# ---- figures --------------------------------------------------------------------------------------------------------


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all. No text in it is read as math, whatever `$` a name has, and a letter that
    the font lacks comes from another font."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        families = {family_with(letter) for letter in text.get_text() if letter.isprintable()}
        ordinary = text.get_fontfamily()
        text.set_fontfamily([*ordinary, *sorted(families - {None, *ordinary})])
    with files.replacing(path) as partial:
        figure.savefig(partial, dpi=DPI)


def losses(path: Path, values: np.ndarray, panels: dict[str, dict[str, str]], steps_per_epoch: int) -> None:
    """The columns of values (steps, M) against the epoch: `panels` says, by title, which columns with which labels."""
    window = max(1, len(values) // 200)  # averaged to about 200 points, or the noise hides the trend
    means = values[: len(values) // window * window].reshape(-1, window, values.shape[1]).mean(1)
    epochs = (np.arange(len(means)) + 0.5) * window / steps_per_epoch
    columns = iter(means.T)
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (title, labels) in zip(grid.flat, panels.items(), strict=True):
        for label in labels.values():
            axes.plot(epochs, next(columns), label=label)
        axes.set(xlabel="epoch", title=title)
        axes.set_ylim(bottom=0)
        axes.legend()
        axes.grid(alpha=0.3)
    save(figure, path)


def grid(x: torch.Tensor) -> Image.Image:
    """Images (N, C, H, W) in [0, 1] as one picture, eight in a row."""
    return to_pil_image(make_grid(x.cpu(), nrow=8, padding=1))


def samples(path: Path, real: Image.Image, generated: Image.Image, title: str) -> None:
    """A grid of real images next to one of generated ones."""
    height = 0.6 + 5.4 * real.height / real.width
    figure = Figure(figsize=(11, height), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, picture, name in zip(panels, (real, generated), ("real", "generated"), strict=True):
        axes.imshow(picture)
        axes.set_title(name)
        axes.axis("off")
    figure.suptitle(title)
    save(figure, path)


def to_png(picture: Image.Image) -> bytes:
    """A picture in 64 colours as the bytes of a PNG file: a frame of a film, as gan.pt can hold it."""
    content = io.BytesIO()
    picture.quantize(64).save(content, "PNG")
    return content.getvalue()


def film(path: Path, frames: list[bytes]) -> None:
    """PNG pictures one after the other, in about six seconds, as a GIF."""
    pictures = [Image.open(io.BytesIO(frame)) for frame in frames]
    duration = max(50, 6000 // len(pictures))  # milliseconds a frame
    with files.replacing(path) as partial:
        pictures[0].save(partial, save_all=True, append_images=pictures[1:], duration=duration, loop=0)


def legend_below(figure: Figure, axes: Axes, title: str | None = None) -> None:
    """A legend of these axes below all, in as many columns as the figure is wide enough for; the figure grows by it."""
    handles, labels = axes.get_legend_handles_labels()
    for columns in range(4, 0, -1):
        where = {"loc": "outside lower center", "ncols": columns, "fontsize": "small"}
        legend = figure.legend(handles, labels, title=title, **where)
        extent = legend.get_window_extent()
        if columns == 1 or extent.width < 0.98 * figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)


def roc_curves(path: Path, split: ScoredSplit, metrics: dict, title: str) -> None:
    """One ROC curve a score in `metrics`, with its area and interval from there."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    for name in metrics:
        fpr, tpr, _ = roc_curve(split.is_anomaly, split.scores[name])
        low, high = metrics[name]["roc_auc_95_interval"]
        declared = split.declared[name]
        label = f"{declared.label}: {metrics[name]['roc_auc']:.3f} [{low:.3f}, {high:.3f}]"
        axes.plot(fpr, tpr, color=declared.colour, linestyle=declared.line, label=label)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="chance: 0.5")
    axes.set(xlabel="false positive rate (normals flagged)", ylabel="true positive rate (anomalies flagged)")
    axes.set(title=title, xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.grid(alpha=0.3)
    legend_below(figure, axes, "ROC-AUC [95% interval]")  # near chance the curves fill the axes
    save(figure, path)


def score_histograms(
    path: Path,
    scores: dict[str, np.ndarray],
    is_second: np.ndarray,
    threshold: tuple[str, float],
    title: str,
    kinds: tuple[str, str] = ("normal", "anomalous"),
) -> None:
    """Two kinds of images against each other, a panel a score, each kind with area 1.

    `scores` are by label, `is_second` (N,) says of which kind an image is, and `threshold` is drawn in the panel of its
    label, unless it is infinite.
    """
    lines = -(-len(scores) // 3)  # three in a row can be read in report.html
    columns = -(-len(scores) // lines)
    figure = Figure(figsize=(max(6, 4 * columns), 3.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(scores) :]:
        axes.axis("off")
    for axes, (label, score) in zip(panels.flat, scores.items(), strict=False):
        # a few extreme scores would squeeze the rest; if all are the same, these bins have a width nonetheless
        bins = np.histogram_bin_edges(score, 49, np.quantile(score, [0.0, 0.998]))
        score = score.clip(bins[0], bins[-1])  # the last bin holds the rest
        for kind, rows, colour in zip(kinds, (~is_second, is_second), ("tab:green", "tab:red"), strict=True):
            label_of_kind = f"{kind} ({rows.sum()})"
            axes.hist(
                score[rows], bins, density=True, histtype="stepfilled", alpha=0.5, color=colour, label=label_of_kind
            )
        if label == threshold[0] and np.isfinite(threshold[1]):
            axes.axvline(threshold[1], ymax=0.7, color="black", linestyle="--", label="threshold, from validation")
        axes.set(xlabel=label, yticks=[], ylim=(0, 1.4 * axes.get_ylim()[1]))  # the legend stands above the bars
        axes.xaxis.set_major_locator(MaxNLocator(5))  # or long labels, such as those of a narrow P_D, touch
        axes.legend(fontsize="small", loc="upper right")
    for axes in panels[:, 0]:
        axes.set_ylabel("density")
    figure.suptitle(title)
    save(figure, path)


def per_class_auc(path: Path, split: ScoredSplit, metrics: dict, judged: str, title: str) -> None:
    """ROC-AUC of each anomalous class against the normals, a bar a score, with 95% intervals.

    Ten classes a line. Of more than `metrics.CLASSES`, those that the score `judged` finds worst.
    """
    names, count = worst_classes(metrics[judged]["per_class"]), len(metrics[judged]["per_class"])
    lines = -(-len(names) // 10)
    each = -(-len(names) // lines)
    size = max(10.0, 0.13 * len(metrics) * each + 2), 3 * lines + 0.5
    figure = Figure(figsize=size, layout="constrained")
    for i, axes in enumerate(figure.subplots(lines, 1, squeeze=False).flat):
        bars_of_classes(axes, split, metrics, names[i * each : (i + 1) * each])
        axes.set(ylabel="ROC-AUC", xlim=(-0.6, each - 0.4), ylim=(0, 1.03))
    which = "by anomalous class"
    if len(names) < count:
        which = f"of the {len(names)} of {count} anomalous classes where {split.declared[judged].label} is worst"
    figure.suptitle(f"{title}\nAUC {which} (dotted: chance)")
    legend_below(figure, axes)
    save(figure, path)


def bars_of_classes(axes: Axes, split: ScoredSplit, metrics: dict, names: list[str]) -> None:
    """The bars of some classes, a group of all scores for each."""
    width = 0.8 / len(metrics)
    for i, (score, overall) in enumerate(metrics.items()):
        auc = np.array([overall["per_class"][name]["roc_auc"] for name in names])
        interval = np.array([overall["per_class"][name]["roc_auc_95_interval"] for name in names]).T  # (2, classes)
        places = np.arange(len(names)) + (i - (len(metrics) - 1) / 2) * width
        # percentile intervals of a skewed bootstrap may leave out the estimate itself
        errors = np.abs(interval - auc).clip(min=0)
        declared = split.declared[score]
        axes.bar(
            places,
            auc,
            width,
            yerr=errors,
            color=(declared.colour, declared.opacity),
            label=declared.label,
            error_kw={"linewidth": 0.8},
        )
    axes.axhline(0.5, color="black", linestyle=":", linewidth=1)
    axes.set_xticks(range(len(names)), [shown(name, 24) for name in names], rotation=30, ha="right")


def panels_of_images(
    path: Path, panels: list[list[np.ndarray]], headers: list[str], captions: list[list[str]], title: str
) -> None:
    """A row of panels for each image, as `heatmaps.panels` makes them, each uint8 (H, W, 3), under these headers.

    The words of an image's caption stand above its panels, one each.
    """
    lines = -(-len(captions) // 2)  # two images to a line, or the picture grows too tall to look at
    shapes = [panel.shape for of_image in panels for panel in of_image]
    side, tallest = max(map(max, shapes)), max(height for height, _, _ in shapes)
    gap = max(1, side // 16)
    places = [number * (side + gap) for number in range(len(headers))]  # where in a strip a panel begins
    strips = np.full((len(captions), tallest, places[-1] + side, 3), 255, np.uint8)
    for strip, of_image in zip(strips, panels, strict=True):
        for place, panel in zip(places, of_image, strict=True):
            height, width, _ = panel.shape  # in the middle of its place
            top, left = (tallest - height) // 2, place + (side - width) // 2
            strip[top : top + height, left : left + width] = panel
    figure = Figure(figsize=(11, (0.25 + 1.3 * tallest / side) * lines + 1.4), layout="constrained")
    grid = figure.subplots(lines, 2, squeeze=False)  # one axes an image: a hundred of them take seconds to lay out
    for axes in grid.flat:
        axes.axis("off")
    for i, (strip, words) in enumerate(zip(strips, captions, strict=True)):
        axes = grid[i % lines, i // lines]
        axes.imshow(strip)
        if i % lines == 0:
            axes.set_title("\n\n", fontsize=8)  # room for the headers
        for place, header, word in zip_longest(places, headers, words, fillvalue=""):
            text = f"{header}\n\n{word}" if i % lines == 0 else word
            axes.text(place + side / 2, -gap, text, ha="center", va="bottom", fontsize=8)
    figure.suptitle(title)
    save(figure, path)


def ranking(path: Path, groups: dict[str, tuple[list[np.ndarray], list[str], np.ndarray]], title: str) -> None:
    """Two groups of images, eight in a row; a frame in green round the normal ones and in red round the anomalies.

    A group is (N images uint8 (H, W, 3), N captions, is_anomaly (N,)).
    """
    lines = -(-max(len(captions) for _, captions, _ in groups.values()) // 8)
    figure = Figure(figsize=(11, 1 + 3.5 * lines), layout="constrained")
    for block, (name, (pictures, captions, is_anomaly)) in zip(figure.subfigures(2, 1), groups.items(), strict=True):
        panels = block.subplots(lines, 8, squeeze=False)
        for axes in panels.flat:
            axes.axis("off")
        for axes, image, caption, anomalous in zip(panels.flat, pictures, captions, is_anomaly, strict=False):
            show_framed(axes, image, "tab:red" if anomalous else "tab:green")
            axes.set_title(caption, fontsize=8)
        block.suptitle(name)
    figure.suptitle(f"{title} (green frame: normal, red frame: anomalous)")
    save(figure, path)


def show_framed(axes: Axes, image: np.ndarray, colour: str) -> None:
    """An image uint8 (H, W, 3) with a coloured frame."""
    axes.imshow(image)
    axes.axis("on")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=3)


# ---- the figures of evaluate.py --------------------------------------------------------------------------------------


def of_scores(test: ScoredSplit, verdict: Verdict, metrics: dict[str, dict]) -> list[Path]:
    """ROC curves, histograms, ROC-AUC by class and the ranking, to the run folder; returns their paths."""
    names = ("roc.png", "score_histograms.png", "per_class_auc.png", "ranking.png")
    paths = [test.gan.run_dir / name for name in names]
    label, title = test.declared[verdict.score].label, f"{shown(test.gan.run_dir.name)}, test split"
    metrics = {name: metrics[name] for name in test.in_figures(verdict.score)}
    roc_curves(paths[0], test, metrics, title)
    by_label = {test.declared[name].label: test.scores[name] for name in metrics}
    score_histograms(paths[1], by_label, test.is_anomaly, (label, verdict.threshold), title)
    per_class_auc(paths[2], test, metrics, verdict.score, title)
    ranked, score = test.ranked(verdict.score), test.scores[verdict.score]
    count = min(16, (len(ranked) + 1) // 2)  # or a small set would show its images twice
    groups = {
        f"most {kind}": (
            [heatmaps.thumbnail(each.real, LONGEST) for each in test.shown(rows)],
            [f"{shown(test.class_name[i], 16)}\n{score[i]:.4g}" for i in rows],
            test.is_anomaly[rows],
        )
        for kind, rows in (("normal", ranked[::-1][:count]), ("anomalous", ranked[:count]))
    }
    ranking(paths[3], groups, f"{title}\n{label}")
    return paths


def difference_maps(test: ScoredSplit, verdict: Verdict) -> Path:
    """Real, generated, heat map and marked, of the first few normals and the first two of each anomalous class.

    Ten classes at most, and the title says so. They are not the best-looking ones. Returns the figure's path.
    """
    path = test.gan.run_dir / "difference_maps.png"
    all_anomalous = np.unique(test.class_name[test.is_anomaly])
    anomalous = all_anomalous[:10]
    rows = [np.flatnonzero(~test.is_anomaly)[:4]]
    rows = np.concatenate(rows + [np.flatnonzero(test.class_name == name)[:2] for name in anomalous])
    by = verdict.level, verdict.brightest, LONGEST
    panels = [heatmaps.panels(each.real, each.generated, each.heat, *by) for each in test.shown(rows)]
    score, p_value = test.scores[verdict.score], verdict.p_value["test"]
    captions = [[shown(test.class_name[i], 16), f"{score[i]:.4g}", f"p = {p_value[i]:.2g}"] for i in rows]
    is_marked = math.isfinite(verdict.level)
    red = f"red: more than {verdict.level_in_words}" if is_marked else "too few normals to mark"
    title = f"{shown(test.gan.run_dir.name)}, test split\nscore and p of {test.declared[verdict.score].label}\n{red}"
    if len(all_anomalous) > len(anomalous):
        title += f"; the first {len(anomalous)} of {len(all_anomalous)} anomalous classes"
    headers = ["real", *(["generated"] if test.latents is not None else []), test.map.label, "marked"]
    panels_of_images(path, panels, headers, captions, title)
    return path
