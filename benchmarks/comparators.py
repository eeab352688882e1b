"""AnoGAN beside what it is compared with: ROC-AUC and seconds from finished run folders, in two tables and one figure.

    python -m benchmarks.comparators outputs/digits-1 outputs/cifar10-jpeg-automobile-g1

Each run folder must hold all that evaluate.py can score, see README.md. Prints both tables in Markdown, and writes
benchmarks/results/comparators.json and docs/comparators.png.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import tyro
from sklearn.metrics import roc_curve

import plots
import runs
import util
from benchmarks import measure

SCRIPTS = (
    "train_gan",
    "train_encoder",
    "train_acae",
    "fit_latent",
    "fit_latent_reference",
    "fit_baselines",
    "evaluate",
)
DIRECT = ("p_d", "f_anogan", "acae")
SCORES = ("anomaly_score", "p_d", "gan_r", "acae", "f_anogan", *runs.BASELINES)  # in the order of the tables


@dataclass
class Config:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # finished run folders


def read_run(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """run.json and metrics.json. Raises InputError if a script has not run, or ran before another that it needs."""
    record = runs.read_record(run_dir)
    try:
        metrics = json.loads((run_dir / "metrics.json").read_text())
    except ValueError as error:
        raise util.InputError(f"{run_dir}/metrics.json is damaged ({error}): run evaluate.py again") from error
    if missing := [script for script in SCRIPTS if script not in record]:
        raise util.InputError(f"{run_dir} lacks what {', '.join(missing)} leave: run them first, then evaluate.py")
    if missing := {*SCORES} - {*metrics["test"]} | {*DIRECT} - {*record["evaluate"]["seconds_to_score_1000"]}:
        raise util.InputError(f"{run_dir}/metrics.json lacks {', '.join(missing)}: run evaluate.py again")
    for script, search in (("fit_latent", "search"), ("fit_latent_reference", "search_gan_r")):
        flags, fitted = record[script]["hyperparameters"], record[script]["fitted"]
        if any(flags.get(name, value) != value for name, value in metrics[search].items() if name != "precision"):
            raise util.InputError(
                f"{run_dir}/run.json tells of another search than metrics.json: run evaluate.py again"
            )
        if not any(name.startswith("latents-test") and each["searched"] for name, each in fitted.items()):
            raise util.InputError(f"{run_dir}/run.json lacks the seconds of {script}: search the test split again")
    return record, metrics


def seconds_of(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds to train on 1,000 images and to score 1,000, by score, from a run.json.

    Searches have the decoding of images in it, the other scores leave it out.
    """
    thousands = int(record["train_gan"]["training_images"].split()[0]) / 1000
    train = {name: record[name]["seconds"] / thousands for name in ("train_gan", "train_encoder", "train_acae")}

    def search(script: str) -> float:
        of_test = next(each for name, each in record[script]["fitted"].items() if name.startswith("latents-test"))
        return 1000 * of_test["seconds"] / of_test["searched"]

    direct = record["evaluate"]["seconds_to_score_1000"]
    baselines = record["fit_baselines"]["seconds_by_baseline"]
    return {
        "anomaly_score": {"train": train["train_gan"], "score": search("fit_latent")},
        "p_d": {"train": train["train_gan"], "score": direct["p_d"]},
        "f_anogan": {"train": train["train_gan"] + train["train_encoder"], "score": direct["f_anogan"]},
        "acae": {"train": train["train_acae"], "score": direct["acae"]},
        "gan_r": {"train": train["train_gan"], "score": search("fit_latent_reference")},
        **{
            name: {"train": baselines[name]["fit"] / thousands, "score": baselines[name]["score_1000"]}
            for name in runs.BASELINES
        },
    }


def main(config: Config) -> None:
    """Read the run folders, print the tables, draw the figure."""
    if not config.run_dirs:
        raise util.InputError("name one or more finished run folders")
    read = {run_dir.name: (run_dir, *read_run(run_dir)) for run_dir in config.run_dirs}
    lines = -(-len(read) // 2)
    figure, grid = plt.subplots(lines, 2, figsize=(10, 5 * lines + 1.5), layout="constrained", squeeze=False)
    results = {}
    for axes in grid.flat[len(read) :]:
        axes.axis("off")
    for axes, (title, (run_dir, record, metrics)) in zip(grid.flat, read.items(), strict=False):
        rows, is_anomaly = measure.test_rows(run_dir)
        for name in SCORES:
            fpr, tpr, _ = roc_curve(is_anomaly, [float(row[name]) for row in rows])
            axes.plot(fpr, tpr, color=plots.COLOURS[name], label=plots.LABELS[name])
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="chance")
        counts = f"{(~is_anomaly).sum()} normal, {is_anomaly.sum()} anomalous"
        axes.set(xlabel="false positive rate", ylabel="true positive rate", title=f"{title}\n{counts}")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.grid(alpha=0.3)
        seconds, hyperparameters = seconds_of(record), record["train_gan"]["hyperparameters"]
        results[title] = {
            "commits": {script: record[script]["git_commit"] for script in SCRIPTS},
            # where the folders stood says nothing about the figures
            "training": {k: v for k, v in hyperparameters.items() if k != "run_dir"}
            | {"dataset": Path(hyperparameters["dataset"]).name},
            "scores": {
                name: {key: metrics["test"][name][key] for key in ("roc_auc", "roc_auc_95_interval")}
                | {f"seconds_to_{key}_1000": round(value, 4) for key, value in seconds[name].items()}
                for name in SCORES
            },
        }
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    folder = Path(__file__).parent
    with runs.replacing(folder.parent / "docs/comparators.png") as partial:
        figure.savefig(partial, dpi=100)
    runs.write_json(folder / "results/comparators.json", results)

    def table(cell: Callable[[dict[str, Any]], str]) -> None:
        print("\n| score | " + " | ".join(results) + " |\n|---|" + "---|" * len(results))
        for name in SCORES:
            print(f"| `{name}` | " + " | ".join(cell(of["scores"][name]) for of in results.values()) + " |")

    table(lambda of: "{:.3f} [{:.3f}, {:.3f}]".format(of["roc_auc"], *of["roc_auc_95_interval"]))
    table(lambda of: f"{of['seconds_to_train_1000']:.3g}, {of['seconds_to_score_1000']:.3g}")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
