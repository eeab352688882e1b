"""AnoGAN beside what it is compared with: ROC-AUC and seconds from finished run folders, in two tables and one figure.

    python -m benchmarks.comparators outputs/digits-1 outputs/cifar10-jpeg-automobile-g1

Each run folder must hold all that evaluate.py can score, see README.md. Prints both tables in Markdown, and writes
benchmarks/results/comparators.json and docs/comparators.png.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import tyro
from sklearn.metrics import roc_curve

import plots
import runs
import util

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Config:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # finished run folders


def seconds_of(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds to train on 1,000 images and to score 1,000, by score, from a run.json.

    Scores of the networks leave out the decoding of images, searches have it in. R and D come with A(x).
    """
    thousands = int(record["train_gan"]["training_images"].split()[0]) / 1000
    train = {name: record[name]["seconds"] / thousands for name in ("train_gan", "train_encoder", "train_acae")}
    direct = record["evaluate"]["seconds_to_score_1000"]
    baselines = record["fit_baselines"]["seconds_by_baseline"]
    return {
        "anomaly_score": {"train": train["train_gan"], "score": record["fit_latent"]["seconds_to_score_1000"]},
        "p_d": {"train": train["train_gan"], "score": direct["p_d"]},
        "f_anogan": {"train": train["train_gan"] + train["train_encoder"], "score": direct["f_anogan"]},
        "acae": {"train": train["train_acae"], "score": direct["acae"]},
        "gan_r": {"train": train["train_gan"], "score": record["fit_latent_reference"]["seconds_to_score_1000"]},
        **{
            name: {"train": baselines[name]["fit"] / thousands, "score": baselines[name]["score_1000"]}
            for name in runs.BASELINES
        },
    }


def main(config: Config) -> None:
    """Read the run folders, print the tables, draw the figure."""
    figure, grid = plt.subplots(2, -(-len(config.run_dirs) // 2), figsize=(10, 11.5), layout="constrained")
    results = {}
    for run_dir, axes in zip(config.run_dirs, grid.flat, strict=False):
        record, metrics = runs.read_record(run_dir), json.loads((run_dir / "metrics.json").read_text())
        names = [name for name in metrics["test"] if name not in plots.PARTS]
        with (run_dir / "scores.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
        is_anomaly = np.array([row["is_anomaly"] == "1" for row in rows])
        for name in names:
            fpr, tpr, _ = roc_curve(is_anomaly, [float(row[name]) for row in rows])
            axes.plot(fpr, tpr, color=plots.COLOURS[name], label=plots.LABELS[name])
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="chance")
        title = f"{run_dir.name}: {(~is_anomaly).sum()} normal, {is_anomaly.sum()} anomalous"
        axes.set(xlabel="false positive rate", ylabel="true positive rate", title=title, xlim=(0, 1), ylim=(0, 1))
        axes.grid(alpha=0.3)
        seconds = seconds_of(record)
        results[run_dir.name] = {
            "commits": {script: each["git_commit"] for script, each in record.items()},
            "training": record["train_gan"]["hyperparameters"],
            "scores": {
                name: {key: metrics["test"][name][key] for key in ("roc_auc", "roc_auc_95_interval")}
                | {f"seconds_to_{key}_1000": round(value, 4) for key, value in seconds[name].items()}
                for name in names
            },
        }
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    folder = Path(__file__).parent
    with runs.replacing(folder.parent / "docs/comparators.png") as partial:
        figure.savefig(partial, dpi=100)
    runs.write_json(folder / "results/comparators.json", results)

    def table(cell: Any) -> None:
        print("\n| score | " + " | ".join(results) + " |\n|---|" + "---|" * len(results))
        for name in next(iter(results.values()))["scores"]:
            print(f"| `{name}` | " + " | ".join(cell(of["scores"][name]) for of in results.values()) + " |")

    table(lambda of: "{:.3f} [{:.3f}, {:.3f}]".format(of["roc_auc"], *of["roc_auc_95_interval"]))
    table(lambda of: f"{of['seconds_to_train_1000']:.3g}, {of['seconds_to_score_1000']:.3g}")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=__doc__))
