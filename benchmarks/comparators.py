"""AnoGAN and what it is compared with: ROC-AUC and seconds from finished run folders, in two tables and one figure.

    python -m benchmarks.comparators outputs/digits-1 outputs/cifar10-jpeg-automobile-g1

Each run folder must hold what all these scores need, see docs/results.md. Prints both tables in Markdown, and writes
benchmarks/results/comparators.json and docs/comparators.png. The seconds to train the networks are those of run.json.
All else is timed here: the baselines are fitted again, and every score, the searches included, is worked out for test
images that were decoded before.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.metrics import roc_curve
from sklearn.pipeline import Pipeline, make_pipeline
from tqdm import tqdm

import evaluate
import fit_latent
import util
from anogan import files, images, latents, loading, plots, runs
from anogan.candidates import draw_candidates, nearest
from anogan.scores import Batch
from benchmarks import measure
from detectors import baselines, f_anogan

SCRIPTS = ("train_gan", "f_anogan", "acae", "baselines", "fit_latent", "fit_latent_reference", "evaluate")
SEARCHES = {"anomaly_score": "features", "gan_r": "reference"}  # by score: the discrimination loss of its search
DIRECT = ("p_d", "f_anogan", "acae")
SCORES = ("anomaly_score", "p_d", "gan_r", "acae", "f_anogan", *baselines.LABELS)  # in the order of the tables
DECLARED = {score.name: score for score in evaluate.SCORES}
REPEATS = 5  # of the timing of what needs no search


@dataclass
class Config:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # finished run folders
    images: int = 1000  # of the test split, every class in its proportion: what the scores are timed on
    device: str = fit_latent.Config().device  # auto, cuda, cuda:1, mps, cpu, ...


def read_run(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """run.json and metrics.json. Raises InputError if a script has not run, or ran before another that it needs."""
    record, metrics = runs.read_record(run_dir), measure.read_metrics(run_dir)
    if missing := [script for script in SCRIPTS if script not in record]:
        raise util.InputError(f"{run_dir} lacks what {', '.join(missing)} leave: run them first, then evaluate.py")
    if missing := [name for name in SCORES if name not in metrics.get("test", {})]:
        raise util.InputError(f"{run_dir}/metrics.json lacks {', '.join(missing)}: run evaluate.py again")
    return record, metrics


def training_seconds(record: dict[str, Any]) -> dict[str, float]:
    """Seconds to train on 1,000 images, by score, from a run.json; without the baselines, see `fit_baselines`."""
    thousands = int(record["train_gan"]["training_images"].split()[0]) / 1000
    gan, encoder, autoencoder = (record[name]["seconds"] / thousands for name in ("train_gan", "f_anogan", "acae"))
    return {"anomaly_score": gan, "p_d": gan, "gan_r": gan, "f_anogan": gan + encoder, "acae": autoencoder}


def fit_baselines(gan: runs.TrainedGAN, config: baselines.Config) -> tuple[dict[str, float], dict[str, Pipeline]]:
    """Seconds to fit each baseline to 1,000 training images, and what is fitted, which takes vectors of pixels.

    Each needs the principal components: their seconds count for all three.
    """
    device = torch.device("cpu")
    vectors = baselines.training_vectors(gan, config.skip_unreadable)
    pca = PCA(config.variance, svd_solver="full")
    pca_seconds, components = measure.timed(lambda: pca.fit(vectors).transform(vectors), device)
    seconds, fitted = {}, {}
    for name in baselines.LABELS:
        own_seconds, model = measure.timed(partial(baselines.fit_baseline, name, components, config), device)
        seconds[name] = 1000 * (pca_seconds + own_seconds) / len(vectors)
        fitted[name] = make_pipeline(pca, model)
    return seconds, fitted


def read_searches(gan: runs.TrainedGAN, metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings with which a run's test images were searched, by score.

    Raises InputError if there are no latents, or metrics.json is of another search.
    """
    paths = {name: latents.latents_path(gan.run_dir, "test", loss) for name, loss in SEARCHES.items()}
    searches = {name: latents.read_latents(path, "test", gan)["search"] for name, path in paths.items()}
    if searches["anomaly_score"] != metrics["search"]:
        raise util.InputError(f"{gan.run_dir}/metrics.json is of another search: run evaluate.py again")
    return searches


def search_like(gan: runs.TrainedGAN, search: dict[str, Any], x: torch.Tensor) -> Callable[[], None]:
    """Work that can be timed: the search, with these settings, for images x (N, C, H, W) in [-1, 1]."""
    config = fit_latent.Config(**{name: value for name, value in search.items() if name != "encoder"})
    if "encoder" in search:
        start = f_anogan.load(gan).network
    else:
        candidates = draw_candidates(gan.generator, gan.latent_dim, config.candidates, config.seed)
        start = partial(nearest, candidates=candidates)

    def work() -> None:
        for batch in tqdm(x.split(measure.BATCH_SIZE), f"search, {config.discrimination}", leave=False):
            measure.search_loss(gan, batch, start(batch), config)

    return work


def score_by(gan: runs.TrainedGAN, name: str, test: images.ImageSet) -> Callable[[], None]:
    """Work that can be timed: a score that needs no search, of test images, which are decoded before."""
    score = DECLARED[name]
    loaded = score.source.load(gan, {"test": test})
    drawn = latents.drawn(gan, test, latents.stride_of(gan), evaluate.Config().batch_size)
    batches = [Batch("test", some, x, None) for some, x, _ in drawn]

    def work() -> None:
        for batch in batches:
            score.function(loaded, batch)

    return work


def scoring_seconds(
    gan: runs.TrainedGAN, searches: dict[str, dict[str, Any]], fitted: dict[str, Pipeline], count: int
) -> dict[str, float]:
    """Seconds to score 1,000 images, by score, measured on `count` test images or all. They are decoded before.

    `searches` and `fitted` are as `read_searches` and `fit_baselines` return them. A search starts from candidates that
    are drawn before.
    """
    test = runs.open_split(gan, "test")
    test = test.take(images.stratified_subset(test.label, count, seed=0))
    pixels, test = loading.load_images(test, gan.view, skip_unreadable=True)
    x = gan.to_model(pixels)
    vectors = baselines.to_vectors(x)
    seconds = {name: measure.timed(search_like(gan, search, x), gan.device)[0] for name, search in searches.items()}
    direct = {name: score_by(gan, name, test) for name in DIRECT}
    direct |= {name: partial(model.score_samples, vectors) for name, model in fitted.items()}
    for name, work in direct.items():
        seconds[name] = statistics.median(measure.timed(work, gan.device)[0] for _ in range(REPEATS))
    return {name: 1000 * spent / len(x) for name, spent in seconds.items()}


def figures(gan: runs.TrainedGAN, count: int) -> dict[str, Any]:
    """What comparators.json has of a run; scores are timed on `count` test images or all."""
    record, metrics = read_run(gan.run_dir)
    searches, count = read_searches(gan, metrics), min(count, len(runs.open_split(gan, "test")))
    fit_seconds, fitted = fit_baselines(gan, baselines.Config(**record["baselines"]["hyperparameters"]))
    train = training_seconds(record) | fit_seconds
    score = scoring_seconds(gan, searches, fitted, count)
    hyperparameters = record["train_gan"]["hyperparameters"]
    return {
        "commits": {script: record[script]["git_commit"] for script in SCRIPTS},
        # where the folders stood says nothing about the figures
        "training": {name: value for name, value in hyperparameters.items() if name != "run_dir"}
        | {"dataset": Path(hyperparameters["dataset"]).name},
        "timing": {"images": count, **measure.about(gan.device)},
        "scores": {
            name: {key: metrics["test"][name][key] for key in ("roc_auc", "roc_auc_95_interval")}
            | {"seconds_to_train_1000": round(train[name], 4), "seconds_to_score_1000": round(score[name], 4)}
            for name in SCORES
        },
    }


def draw_roc(axes: Axes, run_dir: Path) -> None:
    """The ROC curves of a run's test images, one a score."""
    rows, is_anomaly = measure.test_rows(run_dir)
    for name in SCORES:
        fpr, tpr, _ = roc_curve(is_anomaly, [float(row[name]) for row in rows])
        axes.plot(fpr, tpr, color=DECLARED[name].colour, label=DECLARED[name].label)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="chance")
    counts = f"{(~is_anomaly).sum()} normal, {is_anomaly.sum()} anomalous"
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=f"{plots.shown(run_dir.name)}\n{counts}")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.grid(alpha=0.3)


def print_table(results: dict[str, dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> None:
    """A table in Markdown, a row a score and a column a run."""
    print("\n| score | " + " | ".join(results) + " |\n|---|" + "---|" * len(results))
    for name in SCORES:
        print(f"| `{name}` | " + " | ".join(cell(of["scores"][name]) for of in results.values()) + " |")


def main(config: Config) -> None:
    """Read and time the run folders, draw the figure, print the tables."""
    if not config.run_dirs:
        raise util.InputError("name one or more finished run folders")
    util.check_at_least(config, 1, "images")
    device = util.pick_device(config.device)
    for run_dir in config.run_dirs:
        read_run(run_dir)  # what is missing must be said before the first search, not after it
    gans = [runs.load_gan(run_dir, device) for run_dir in config.run_dirs]
    results = {gan.run_dir.name: figures(gan, config.images) for gan in gans}
    files.write_json(measure.RESULTS / "comparators.json", results)

    lines = -(-len(config.run_dirs) // 2)
    figure = Figure(figsize=(10, 5 * lines + 1.5), layout="constrained")
    grid = figure.subplots(lines, 2, squeeze=False)
    for axes in grid.flat[len(config.run_dirs) :]:
        axes.axis("off")
    for axes, run_dir in zip(grid.flat, config.run_dirs, strict=False):
        draw_roc(axes, run_dir)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    plots.save(figure, measure.DOCS / "comparators.png")

    print_table(results, lambda of: "{:.3f} [{:.3f}, {:.3f}]".format(of["roc_auc"], *of["roc_auc_95_interval"]))
    print_table(results, lambda of: f"{of['seconds_to_train_1000']:.3g}, {of['seconds_to_score_1000']:.3g}")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
