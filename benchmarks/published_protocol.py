"""AnoGAN under the protocol of its published figures: contrast-normalised CIFAR-10, as Ruff et al. 2018 make it.

    python -m benchmarks.published_protocol                                              # CIFAR-10, hours on a CPU
    python -m benchmarks.published_protocol --dataset data/cifar10-jpeg --seeds 0 1 2

Each class in turn is normal. Writes its pictures anew, each minus its mean, over its mean absolute value, and scaled to
the range that the training pictures have then; runs the three scripts on them; and adds a row to
benchmarks/results/published_protocol.csv, from which it makes published_protocol.md. What is in the file already is not
run again, and what stopped goes on.

Two things differ from the paper's: pictures have 8 bits again after they are scaled, and test pictures beyond the range
of the training pictures are cut off there.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torchvision.transforms.functional import to_pil_image

import fit_latent
import util
from anogan import files, images, loading, runs
from anogan.decoding import View
from benchmarks import cifar10_table, measure

SCORES = ("anomaly_score", "residual", "discrimination", "peak", "p_d")
KEY = ("normal_class", "seed", "dataset", "epochs", "n_test")
COLUMNS = (*KEY, *SCORES, "hardware", "git_commit")
RUFF_MEAN, RUFF_OF_CLASS, _ = cifar10_table.PUBLISHED["AnoGAN"]


@dataclass
class Config:
    dataset: str = "cifar10"  # cifar10, or a folder with the same ten classes
    seeds: tuple[int, ...] = (0,)  # each a training of its own for every class
    epochs: int = 45  # of the GAN, as in `make table`
    test: int = 2000  # test pictures, every class in its proportion
    validation: int = 200  # validation pictures, which no figure here rests on
    folder: Path = Path("outputs/published-protocol")  # of the pictures and the run folders
    device: str = fit_latent.Config().device  # auto, cuda, cuda:1, mps, cpu, ...


def contrast_normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures minus their mean, over their mean absolute value: uint8 (N, C, H, W) to float64, the same shape.

    A picture of a single level becomes 0.
    """
    x = pixels.double()
    x = x - x.mean((1, 2, 3), keepdim=True)
    return x / x.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-8)


def scaled(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """What lies between `low` and `high` to 0 to 255; what lies beyond is cut off: float64 to uint8, the same shape."""
    return ((x - low) * (255 / (high - low))).round().clamp(0, 255).byte()


def write_data(folder: Path, config: Config, normal_class: str) -> None:
    """The data set of one normal class: all training pictures, and as many of the others as are asked for."""
    view = View(32, 3)
    parts = {part: images.open_split(config.dataset, part, normal_class) for part in ("train", "validation", "test")}
    for part, count in (("validation", config.validation), ("test", config.test)):
        parts[part] = parts[part].take(images.stratified_subset(parts[part].label, count, seed=0))
    normalised = {part: contrast_normalised(loading.load_images(of, view)[0]) for part, of in parts.items()}
    low, high = float(normalised["train"].min()), float(normalised["train"].max())
    with files.new_folder(folder) as new:
        for part, of in parts.items():
            for path, x in zip(_paths(new / part, of), scaled(normalised[part], low, high), strict=True):
                files.make_folder(path.parent)
                to_pil_image(x).save(path)


def _paths(folder: Path, of: images.ImageSet) -> Iterator[Path]:
    """Where each picture of a set is written: a folder for its class, and its own name."""
    for class_name, source in zip(of.class_name, of.source, strict=True):
        yield folder / str(class_name) / f"{Path(source).stem}.png"


def measured(config: Config, key: dict[str, str]) -> dict[str, str]:
    """The row of one class and seed."""
    name, seed = key["normal_class"], key["seed"]
    about = f"{key['dataset']}-{config.test}-{config.validation}"
    data, run_dir = config.folder / f"data-{name}-{about}", config.folder / f"{name}-{seed}-{config.epochs}-{about}"
    if not data.exists():
        write_data(data, config, name)
    common = ("--seed", seed, "--device", config.device)
    sizes = ("--image-size", 32, "--ngf", 32, "--ndf", 32, "--epochs", config.epochs, "--generator-steps", 1)
    cifar10_table.run("train_gan.py", run_dir, "--dataset", data, "--normal-class", name, *sizes, *common)
    cifar10_table.run("fit_latent.py", run_dir, *common)
    cifar10_table.run("evaluate.py", run_dir, "--device", config.device, "--score", "anomaly_score")
    found = measure.read_metrics(run_dir)["test"]
    record = runs.read_record(run_dir)
    shutil.rmtree(data)  # made anew for the next seed: ten of them are 60,000 files
    return {
        **key,
        **{score: f"{found[score]['roc_auc']:.4f}" for score in SCORES},
        "hardware": str(measure.about(util.pick_device(config.device))["hardware"]),
        "git_commit": " ".join(sorted({str(of["git_commit"]) for of in record.values()})),
    }


def to_markdown(rows: list[dict[str, str]]) -> str:
    """ROC-AUC in percent of each score and class, the mean of its seeds; of ten classes also the seeds' deviation."""
    classes = list(dict.fromkeys(row["normal_class"] for row in rows))
    seeds = sorted({row["seed"] for row in rows}, key=int)
    lines = [
        f"ROC-AUC in percent of {rows[0]['n_test']} test pictures. {rows[0]['dataset']}, contrast-normalised, 32x32, "
        f"ngf 32, {rows[0]['epochs']} epochs. Seeds {', '.join(seeds)}; "
        f"{'; '.join(sorted({row['hardware'] for row in rows}))}.",
        "",
        f"| score | {' | '.join(classes)} | mean |",
        "|---|" + "---|" * (len(classes) + 1),
    ]
    for score in SCORES:
        auc = {(row["normal_class"], row["seed"]): 100 * float(row[score]) for row in rows}
        cells = [f"{np.mean([v for (of, _), v in auc.items() if of == name]):.1f}" for name in classes]
        means = [np.mean([auc[name, s] for name in classes]) for s in seeds if all((n, s) in auc for n in classes)]
        deviation = f" ± {np.std(means, ddof=1):.1f}" if len(means) > 1 else ""
        is_whole = means and set(classes) == set(measure.CIFAR10)
        lines.append(f"| `{score}` | {' | '.join(cells)} | {f'{np.mean(means):.1f}{deviation}' if is_whole else ''} |")
    published = [str(RUFF_OF_CLASS.get(name, "")) for name in classes]
    lines.append(f"| AnoGAN in Ruff et al. 2018 | {' | '.join(published)} | {RUFF_MEAN} |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Run what is missing, class by class, and make the table."""
    path = measure.RESULTS / "published_protocol.csv"
    rows = measure.read_rows(path)
    util.check_at_least(config, 1, "epochs", "test", "validation")
    if not config.seeds:
        raise util.InputError("--seeds names no seed")
    for seed in config.seeds:
        for name in images.open_dataset(config.dataset, "test").classes:
            about = (name, str(seed), Path(config.dataset).name, str(config.epochs), str(config.test))
            key = dict(zip(KEY, about, strict=True))
            if any(all(row[column] == value for column, value in key.items()) for row in rows):
                print(f"{name}, seed {seed}: measured before")
                continue
            rows.append(measured(config, key))
            measure.write_rows(path, COLUMNS, rows)
    same = [row for row in rows if all(row[name] == key[name] for name in KEY[2:])]
    with files.replacing(path.with_suffix(".md")) as partial:
        partial.write_text(markdown := to_markdown(same), encoding="utf-8")
    print(markdown)


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
