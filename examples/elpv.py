"""Real defects in equal parts: monocrystalline solar cells (Buerhop-Lutz et al. 2018), as `make elpv` takes them.

    pip install elpv-dataset
    python -m examples.elpv    # data/elpv-mono/

Electroluminescence pictures of 300x300 pixels. Cells that are certainly good are normal, cells that are certainly
defective are the defects, the others are left out. Four fifths of the good ones are for training. Which module a cell
is of is not known, so cells of one module lie on both sides. The pictures are CC BY-NC-SA 4.0. Next:
docs/real-defects.md
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

import util
from anogan import files

TRAINING_SHARE = 0.8  # of the good cells


@dataclass
class Config:
    folder: Path = Path("data/elpv-mono")  # where to write
    seed: int = 0  # of which good cells are for training


def read_cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cells uint8 (2624, 300, 300), the probability (2624,) that each is defective, and its kind (2624,), mono or
    poly. Raises InputError if the package is missing."""
    try:
        from elpv_dataset.utils import load_dataset
    except ModuleNotFoundError as error:
        if error.name != "elpv_dataset":
            raise
        raise util.InputError("the package elpv-dataset is missing: pip install elpv-dataset") from error
    return load_dataset()


def main(config: Config) -> None:
    """Write the set next to the place where it will stand, then put it there."""
    util.check_seed(config.seed)
    with files.new_folder(config.folder) as partial:
        cells, defect_probability, kind = read_cells()
        good, defective = (np.flatnonzero((kind == "mono") & (defect_probability == p)) for p in (0, 1))
        good = np.random.default_rng(config.seed).permutation(good)
        in_training = round(TRAINING_SHARE * len(good))
        classes = {"train/good": good[:in_training], "test/good": good[in_training:], "test/defect": defective}
        for name, rows in classes.items():
            (partial / name).mkdir(parents=True)
            for row in rows:
                Image.fromarray(cells[row]).save(partial / name / f"cell{row + 1:04d}.png")
    print(f"wrote {config.folder}/: {', '.join(f'{len(rows)} {name}' for name, rows in classes.items())}")
    where = util.quoted(config.folder)
    print(f"next: python train_gan.py --dataset {where} --normal-class good --image-size 64 --ngf 8 --epochs 1")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
