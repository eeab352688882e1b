"""Ten one-class problems: every class of CIFAR-10 in turn is normal, the nine others are anomalies.

    python -m benchmarks.cifar10_table                                              # CIFAR-10, hours on a CPU
    python -m benchmarks.cifar10_table --dataset data/cifar10-jpeg --seeds 0 1 2

Runs the scripts as a user does, a run folder for each class and seed, and adds a row a score to
benchmarks/results/cifar10_table.csv, from which it makes cifar10_table.md. What is in the file already is not run
again, and what stopped goes on: delete its rows to measure anew. One seeded half of the test split, `development`,
is for choosing among scores, as was done for `combined`; `roc_auc` is of the other half, the `report`.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import fit_latent
import util
from anogan import files, images, runs
from benchmarks import measure
from benchmarks.measure import CIFAR10, RESULTS, ROOT

COLUMNS = (
    *("normal_class", "method", "seed", "roc_auc", "roc_auc_development", "n_test"),
    *("dataset", "image_size", "ngf", "epochs", "hardware", "git_commit"),
)
# On the original files: mean of ten classes, those classes for which we found a source, paper and preprocessing.
# The ten figures of OCGAN and of GeoTrans are as Cheng et al. 2020 quote them; how these two and DROCC scale images is
# from their authors' code
RUFF = "Ruff et al. 2018; contrast-normalised images"
PUBLISHED: dict[str, tuple[float, dict[str, float], str]] = {
    "AnoGAN": (61.8, {"automobile": 54.7}, RUFF),
    "OC-SVM": (64.8, {"automobile": 63.8}, RUFF),
    "KDE": (64.9, {"automobile": 64.0}, RUFF),
    "Deep SVDD": (64.8, {"automobile": 65.9}, RUFF),
    "OCGAN": (
        65.6,
        dict(zip(CIFAR10, (75.7, 53.0, 64.0, 62.0, 72.3, 62.0, 72.3, 57.5, 82.0, 55.4), strict=True)),
        "Perera et al. 2019; pixels in [-1, 1]",
    ),
    "DROCC": (74.2, {}, "Goyal et al. 2020; channels standardised"),
    "GeoTrans": (
        86.0,
        dict(zip(CIFAR10, (74.7, 95.7, 78.1, 72.4, 87.8, 87.8, 83.4, 95.5, 93.3, 91.3), strict=True)),
        "Golan and El-Yaniv 2018; pixels in [-1, 1]",
    ),
}


@dataclass
class Config:
    dataset: str = "cifar10"  # cifar10, or a folder with the same ten classes
    seeds: tuple[int, ...] = (0,)  # each a training of its own for every class
    image_size: int = 32  # side in pixels
    ngf: int = 32  # width of the networks, for ndf too
    epochs: int = 45  # of the GAN; at 15 and 45 the cosine of the step size has just come down
    folder: Path = Path("outputs/table")  # of the run folders
    device: str = fit_latent.Config().device  # auto, cuda, cuda:1, mps, cpu, ...


def run(command: str, run_dir: Path, *flags: object) -> None:
    """Run `train_gan.py` or `-m detectors.rotnet` as a user does, from any working directory.

    Raises InputError if it fails; it has said why.
    """
    script = command.split() if command.startswith("-m ") else [str(ROOT / command)]
    arguments = [*script, "--run-dir", str(run_dir), *map(str, flags)]
    print("$", " ".join(arguments), flush=True)
    # imports come from the repository, never from the working directory
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    with subprocess.Popen([sys.executable, *arguments], env=environment) as process:
        try:
            process.wait()
        except KeyboardInterrupt:
            process.wait()  # it got the Ctrl-C too, and is writing its checkpoint
            raise
    if process.returncode != 0:
        raise util.InputError(
            f"{command} ended with {process.returncode}, see above: the same command goes on from there"
        )


def fit(config: Config, normal_class: str, seed: int) -> Path:
    """All scripts in order for one class and seed; returns the run folder."""
    run_dir = config.folder / f"{normal_class}-{seed}-{config.image_size}-{config.ngf}-{config.epochs}"
    data = ("--dataset", config.dataset, "--normal-class", normal_class)
    sizes = ("--image-size", config.image_size, "--ngf", config.ngf, "--ndf", config.ngf, "--epochs", config.epochs)
    common = ("--seed", seed, "--device", config.device)
    run("train_gan.py", run_dir, *data, *sizes, "--generator-steps", 1, *common)
    run("-m detectors.rotnet", run_dir, *common)
    run("-m detectors.baselines", run_dir, "--seed", seed)
    run("fit_latent.py", run_dir, *common)
    run("evaluate.py", run_dir, "--device", config.device)
    return run_dir


def halves(run_dir: Path) -> tuple[dict[str, tuple[float, float]], int]:
    """ROC-AUC of each score of a run, [on the report half of its test split, on the other]; images in the first."""
    rows, is_anomaly = measure.test_rows(run_dir)
    report = measure.seeded_half(np.array([int(row["label"]) for row in rows]))
    return measure.aucs_of_halves(rows, is_anomaly, report), int(report.sum())


def to_markdown(rows: list[dict[str, str]]) -> str:
    """Mean ROC-AUC in percent of each method and class over its seeds, and of all classes with the seeds' deviation.

    All rows are of one data set, size and number of epochs.
    """
    classes = list(dict.fromkeys(row["normal_class"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    seeds = sorted({row["seed"] for row in rows}, key=int)
    auc = {(row["method"], row["normal_class"], row["seed"]): 100 * float(row["roc_auc"]) for row in rows}
    first, hardware = rows[0], sorted({row["hardware"] for row in rows})
    lines = [
        f"ROC-AUC in percent on the report half of the test split ({first['n_test']} images). {first['dataset']}, "
        f"{first['image_size']}x{first['image_size']}, ngf {first['ngf']}. GAN: {first['epochs']} epochs, one G step; "
        "RotNet: 45 epochs, both on 80% of a class's training images. "
        f"Seeds {', '.join(seeds)}; {'; '.join(hardware)}.",
        "",
        "| method | " + " | ".join(classes) + " | mean | seeds |",
        "|---|" + "---|" * (len(classes) + 2),
    ]
    for method in methods:
        of_class = [[auc[method, name, seed] for seed in seeds if (method, name, seed) in auc] for name in classes]
        whole = [seed for seed in seeds if all((method, name, seed) in auc for name in classes)]
        means = [np.mean([auc[method, name, seed] for name in classes]) for seed in whole]
        deviation = f" ± {np.std(means, ddof=1):.1f}" if len(means) > 1 else ""
        mean = f"**{np.mean(means):.1f}{deviation}**" if means else ""
        cells = [f"{np.mean(values):.1f}" if values else "" for values in of_class]
        lines.append(f"| `{method}` | " + " | ".join(cells) + f" | {mean} | {len(whole)} |")
    lines += [
        "",
        "| published, on the original files | " + " | ".join(CIFAR10) + " | mean | source |",
        "|---|" + "---|" * (len(CIFAR10) + 2),
    ]
    for name, (mean, of_class, source) in PUBLISHED.items():
        cells = [str(of_class.get(each, "")) for each in CIFAR10]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | **{mean}** | {source} |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Run what is missing, class by class, and make the tables."""
    path = RESULTS / "cifar10_table.csv"
    rows = measure.read_rows(path)
    if not config.seeds:
        raise util.InputError("--seeds names no seed")
    ours = {
        "dataset": Path(config.dataset).name,
        "image_size": str(config.image_size),
        "ngf": str(config.ngf),
        "epochs": str(config.epochs),
    }
    for seed in config.seeds:
        for name in images.open_dataset(config.dataset, "test").classes:
            profile = ours | {"normal_class": name, "seed": str(seed)}
            if any(all(row[key] == value for key, value in profile.items()) for row in rows):
                print(f"{name}, seed {seed}: measured before")
                continue
            run_dir = fit(config, name, seed)
            aucs, n_test = halves(run_dir)
            hardware = measure.about(util.pick_device(config.device))["hardware"]
            commits = sorted({str(of["git_commit"]) for of in runs.read_record(run_dir).values()})
            where = {"n_test": n_test, "hardware": hardware, "git_commit": " ".join(commits)}
            for method, (report, development) in aucs.items():
                figures = {"roc_auc": f"{report:.4f}", "roc_auc_development": f"{development:.4f}"}
                rows.append({**profile, "method": method, **figures, **where})
            measure.write_rows(path, COLUMNS, rows)
    markdown = to_markdown([row for row in rows if all(row[key] == ours[key] for key in ours)])
    with files.replacing(path.with_suffix(".md")) as partial:
        partial.write_text(markdown, encoding="utf-8")
    print(markdown)


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
