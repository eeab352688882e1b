"""Other methods on the pictures of finished runs: PyOD's, anomalib's, PCA, and how smooth a picture is. ROC-AUC and
seconds.

    make peers RUNS="outputs/magnetic-tile-good outputs/elpv-mono-good"
    .venv-peers/bin/python -m benchmarks.peers outputs/elpv-mono-good --methods pyod_knn patch_pca --seeds 0 1 2

Trains each method on the pictures that a run's GAN was trained on, and scores the test pictures in the run's
scores.csv. Adds a row to benchmarks/results/peers.csv, of which peers.md is made; what is in the file already is not
run again. Test labels are for the ROC-AUC, and for the proportions of --max-test. The score of the run's own verdict
stands beside.

All start from random weights, with the default settings of their library. Those of GANomaly and DRAEM name no end:
--minutes is for them, and --device; the others run on the CPU. PyOD's see whole pictures, squeezed into a square of 64
pixels; anomalib's one of 128, a quarter of the pixels of its default. Patches are cut from pictures with a shorter side
of 128. No side is larger than that of a GAN that sees whole pictures.
"""

import random
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from sklearn.metrics import roc_auc_score

import evaluate
import util
from anogan import files, images, loading, runs, scores
from anogan.decoding import View
from benchmarks import measure
from benchmarks.peer_methods import CPU, METHODS, Budget, Pictures

# A row is measured once for each of KEY. `side` is that of pictures. `minutes` and `device` are empty where a method
# ends by itself
RUN = ("data", "normal_class", "training_images", "test_images", "seed")
KEY = (*RUN[:4], "method", "side", "seed", "minutes", "device")
FIGURES = ("roc_auc", "roc_auc_report", "training_seconds", "ms_a_picture", "size")
COLUMNS = (*KEY, *FIGURES, "versions", "hardware", "git_commit")

Row = dict[str, str]


@dataclass
class Config:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders after evaluate.py
    methods: tuple[str, ...] = ()  # by name; by default all
    seeds: tuple[int, ...] = (0,)  # each a training of its own
    minutes: float = 10.0  # of training, for methods whose defaults name no end
    device: str = "cpu"  # of the same methods: cpu, cuda, cuda:1, ...
    max_test: int = 1000  # at most so many test pictures, every class in its proportion


class Judged(NamedTuple):
    """A run and its test pictures."""

    gan: runs.TrainedGAN
    images: images.ImageSet
    rows: list[Row]  # in scores.csv
    is_anomaly: np.ndarray  # (N,) bool
    in_report: np.ndarray  # (N,) bool, see `measure.report_half`

    def key(self, method: str, seed: int | str, side: str = "", budget: Budget | None = None) -> Row:
        """What a row is measured once for."""
        data = Path(self.gan.dataset).name  # where a folder stood says nothing about the figures
        about = data, self.gan.normal_class, self.gan.training_images, self.images.checksum()
        spent = ("", "") if budget is None else (f"{budget.minutes:g}", budget.device.type)
        return dict(zip(KEY, (*about, method, side, str(seed), *spent), strict=True))

    def aucs(self, score: np.ndarray) -> Row:
        """ROC-AUC of a score (N,), of all pictures and of the report half."""
        parts = {"roc_auc": slice(None), "roc_auc_report": self.in_report}
        return {name: f"{roc_auc_score(self.is_anomaly[part], score[part]):.4f}" for name, part in parts.items()}


def open_run(run_dir: Path, count: int) -> Judged:
    """A run and at most `count` of the test pictures in its scores.csv.

    Raises InputError if they are not those of the data set, or the report half has normal or anomalous ones alone.
    """
    gan = runs.load_gan(run_dir, CPU)
    measure.read_verdict(run_dir)  # raises if there is none
    rows, is_anomaly = measure.test_rows(run_dir)
    in_report = measure.report_half(rows, gan.group_by)
    # not the seed of CIFAR-10's seeded half: the subset would lie inside it, or hold all of it
    kept = images.stratified_subset(np.array([int(row["label"]) for row in rows]), count, seed=1)
    rows, is_anomaly, in_report = [rows[i] for i in kept], is_anomaly[kept], in_report[kept]
    if len(set(is_anomaly[in_report])) < 2:
        raise util.InputError(f"{run_dir}: the report half lacks normal or anomalous pictures: raise --max-test")
    test = runs.open_split(gan, "test")
    place = {(str(index), source): i for i, (index, source) in enumerate(zip(test.index, test.source, strict=True))}
    found = [place.get((row["index"], row["source"])) for row in rows]
    if None in found:
        raise util.InputError(f"{run_dir}/scores.csv is of other test pictures than are there: run evaluate.py again")
    return Judged(gan, test.take(np.array(found)), rows, is_anomaly, in_report)


def our_row(run: Judged) -> Row:
    """The score of the run's verdict, and the seconds for which what it needs was trained, from run.json.

    The seed is that of the detectors which the score rests on, and the GAN's if none of them has one.
    """
    run_dir = run.gan.run_dir
    record, name = runs.read_record(run_dir), measure.read_verdict(run_dir)["score"]
    sources = scores.sources_of(name, scores.with_pools(evaluate.SCORES))
    scripts = {source.command.rpartition("detectors.")[2] for source in sources}
    detectors = [of for script, of in record.items() if script in scripts]
    seeds = {of["hyperparameters"]["seed"] for of in detectors if "seed" in of["hyperparameters"]}
    trained = [record["train_gan"], *detectors]
    about = trained[-1]
    return {
        **dict.fromkeys(COLUMNS, ""),
        **run.key(f"ours: {name}", " ".join(map(str, sorted(seeds or {trained[0]["hyperparameters"]["seed"]})))),
        **run.aucs(np.array([float(row[name]) for row in run.rows])),
        "training_seconds": f"{sum(each['seconds'] for each in trained):.1f}",
        "versions": f"torch {about['versions']['torch']}",
        "hardware": f"{about['device']}, {about.get('precision', 'fp32')}, {about['cpu_threads']} threads",
        "git_commit": " ".join(sorted({str(each["git_commit"]) for each in trained})),
    }


def read(image_set: images.ImageSet, view: View, skip_unreadable: bool = False) -> Pictures:
    """The pictures of a set, decoded."""
    batches = loading.decode_batches(len(image_set), view)
    return [each for some, _ in loading.image_batches(image_set, batches, view, skip_unreadable) for each in some]


def peer_row(run: Judged, key: Row, budget: Budget) -> Row:
    """Train a method and score the test pictures; all are decoded before."""
    method, seed = METHODS[key["method"]], int(key["seed"])
    view = method.view(run.gan)
    training, test = read(runs.open_split(run.gan, "train"), view, skip_unreadable=True), read(run.images, view)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    device = budget.device if method.has_budget else CPU
    fitted = method.fit(training, budget)
    seconds, score = measure.timed(lambda: fitted.score(test), device)
    about = measure.about(device)
    return {
        **key,
        **run.aucs(score),
        "training_seconds": f"{fitted.seconds:.1f}",
        "ms_a_picture": f"{1000 * seconds / len(test):.1f}",
        "size": fitted.size,
        "versions": f"{method.package} {metadata.version(method.package)}, torch {about['torch']}",
        "hardware": about["hardware"] + (f", {torch.get_num_threads()} threads" if device == CPU else ""),
        "git_commit": str(about["git_commit"]),
    }


def to_markdown(rows: list[Row]) -> str:
    """A table of all rows; of those that differ in their seed alone the mean, and the deviation of the ROC-AUC."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in KEY if name != "seed"), []).append(row)

    def cell(of: list[Row], name: str) -> str:
        values = [float(row[name]) for row in of if row[name]]
        if "auc" not in name and len({row["hardware"] for row in of}) > 1:
            return ""  # seconds of different machines have no mean
        digits = ".3f" if "auc" in name else ".1f"
        deviation = f" ± {np.std(values, ddof=1):.3f}" if "auc" in name and len(values) > 1 else ""
        return f"{np.mean(values):{digits}}{deviation}" if values else ""

    names = (
        "data | normal | method | side | seeds | ROC-AUC | report half | training, s | a picture, ms | size | hardware"
    )
    lines = [f"| {names} |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for of in sorted(groups.values(), key=lambda of: [of[0][name] for name in KEY[:4]]):
        seeds = ", ".join(row["seed"] for row in of)
        size, hardware = ("; ".join(dict.fromkeys(row[name] for row in of)) for name in ("size", "hardware"))
        cells = (of[0]["data"], of[0]["normal_class"], f"`{of[0]['method']}`", of[0]["side"], seeds)
        lines.append(f"| {' | '.join([*cells, *(cell(of, name) for name in FIGURES[:4]), size, hardware])} |")
    for name in ("training_images", "test_images", "versions", "git_commit"):
        lines += ["", f"{name}: {'; '.join(sorted({row[name] for row in rows}))}"]
    return "\n".join(lines) + "\n"


def write(rows: list[Row]) -> str:
    """Both tables; returns the Markdown."""
    measure.write_rows(measure.RESULTS / "peers.csv", COLUMNS, rows)
    with files.replacing(measure.RESULTS / "peers.md") as partial:
        partial.write_text(markdown := to_markdown(rows), encoding="utf-8")
    return markdown


def check(config: Config) -> None:
    """Raise InputError, naming the flag or the package, if something cannot be used."""
    if not config.run_dirs or not config.seeds:
        raise util.InputError("name one or more evaluated run folders, and one or more --seeds")
    if unknown := set(config.methods) - set(METHODS):
        raise util.InputError(f"unknown method {min(unknown)!r}: choose --methods from {', '.join(METHODS)}")
    for seed in config.seeds:
        util.check_seed(seed, "--seeds")
    util.check_at_least(config, 0.01, "minutes")
    util.check_at_least(config, 4, "max_test")
    if util.pick_device(config.device).type not in ("cpu", "cuda"):
        raise util.InputError(f"--device must be cpu or cuda, not {config.device}")
    installed = {each.name.lower() for each in metadata.distributions()}
    if missing := {METHODS[name].package for name in config.methods or METHODS} - installed:
        raise util.InputError(f"{min(missing)} is not installed here: use make peers, or .venv-peers/bin/python")


def main(config: Config) -> None:
    """Measure what is missing, run by run."""
    check(config)
    budget = Budget(config.minutes, util.pick_device(config.device))
    rows = measure.read_rows(measure.RESULTS / "peers.csv")
    opened = [open_run(run_dir, config.max_test) for run_dir in config.run_dirs]
    of_ours = [our_row(run) for run in opened]  # what is missing must be said before the first training
    ours_before = [tuple(ours[name] for name in RUN) for ours in of_ours]
    if len(set(ours_before)) < len(ours_before):
        raise util.InputError("two of these runs are of the same pictures and seed: name one of them")
    rows = [r for r in rows if not (r["method"].startswith("ours") and tuple(r[name] for name in RUN) in ours_before)]
    rows += of_ours
    for run in opened:
        for seed in config.seeds:
            for name in config.methods or METHODS:
                view = METHODS[name].view(run.gan)
                side = str(view.picture_size or view.size)
                key = run.key(name, seed, side, budget if METHODS[name].has_budget else None)
                where = f"{run.gan.run_dir}, {name}, seed {seed}"
                if any(all(row[each] == value for each, value in key.items()) for row in rows):
                    print(f"{where}: measured before")
                    continue
                print(where, flush=True)
                rows.append(peer_row(run, key, budget))
                write(rows)
    print(write(rows))


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
