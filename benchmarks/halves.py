"""ROC-AUC of each score on both halves of the test pictures, the mean and deviation over runs that differ in a seed.

    python -m benchmarks.halves outputs/tiles-0 outputs/tiles-1 outputs/tiles-2 --scores cutpaste cutpaste_peak

Settings and weights were chosen on the development half, so that figures are of the other, the report half. Prints a
table in Markdown, from the scores.csv of the runs; writes nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

import util
from anogan import runs
from benchmarks import measure


@dataclass
class Config:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # evaluated runs of the same pictures
    scores: tuple[str, ...] = ()  # by name; by default those that all runs have


def main(config: Config) -> None:
    """Read, average, print."""
    if not config.run_dirs:
        raise util.InputError("name one or more evaluated run folders")
    tables = [measure.test_rows(run_dir) for run_dir in config.run_dirs]
    pictures = [[row["source"] for row in rows] for rows, _ in tables]
    if any(each != pictures[0] for each in pictures):
        raise util.InputError("the runs were evaluated on different test pictures: name runs of the same ones")
    group_by = runs.load_gan(config.run_dirs[0], torch.device("cpu")).group_by
    in_report = measure.report_half(tables[0][0], group_by)  # the same pictures, so the same half of each run
    found = [measure.aucs_of_halves(*table, in_report) for table in tables]
    common = [name for name in found[0] if all(name in of for of in found)]
    if unknown := set(config.scores) - set(common):
        raise util.InputError(f"not every run has the score {min(unknown)}: choose --scores from {', '.join(common)}")
    print("| score | report half | development half |\n|---|---|---|")
    for name in config.scores or common:
        cells = []
        for half in np.array([of[name] for of in found]).T:  # (2, runs)
            deviation = f" ± {half.std(ddof=1):.3f}" if len(half) > 1 else ""
            cells.append(f"{half.mean():.3f}{deviation}")
        print(f"| `{name}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
