"""Real defects on a surface: magnetic tiles (Huang, Qiu, Yuan 2020), as `make magnetic-tile REAL=DIR` takes them.

    python -m examples.magnetic_tile --archive DIR/magnetic_tile.tar.xz    # data/magnetic_tile/

Each tile was photographed under up to six exposures. The numbers in the file names tell the tiles: the pictures of one
lie close together. Each name gets its tile in front, tile007_exp1_num_1234.jpg, so that --group-by 'tile(\\d+)' keeps
the pictures of a tile on one side, training or validation. Next: docs/real-defects.md
"""

import lzma
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import tyro

import util
from anogan import files

GAP = 300  # the numbers of two tiles are farther apart than that


@dataclass
class Config:
    archive: Path  # magnetic_tile.tar.xz
    folder: Path = Path("data/magnetic_tile")  # where to unpack


def number(path: Path) -> int:
    """The number of a picture, which stands after `num_`. Raises InputError if there is none."""
    found = re.search(r"num_(\d+)", path.name)
    if found is None:
        raise util.InputError(f"{path.name} has no num_ and number in its name: is this magnetic_tile.tar.xz?")
    return int(found[1])


def tiles(paths: list[Path]) -> dict[Path, int]:
    """The tile of each picture: from 0, in the order of the numbers."""
    found, tile, before = {}, -1, -GAP - 1
    for path in sorted(paths, key=number):
        tile += number(path) - before > GAP
        found[path], before = tile, number(path)
    return found


def main(config: Config) -> None:
    """Unpack and rename next to the place where the set will stand, then put it there."""
    if not config.archive.is_file():
        raise util.InputError(f"there is no {config.archive}: name the archive with --archive")
    with files.new_folder(config.folder) as partial:
        try:
            with tarfile.open(config.archive) as archive:
                archive.extractall(partial, filter="data")
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise util.InputError(f"{config.archive} is damaged or no archive ({reason}): get it again") from error
        tile_of = tiles([path for path in partial.rglob("*") if path.suffix in (".jpg", ".png")])
        if not tile_of:
            raise util.InputError(f"{config.archive} holds no pictures: is it magnetic_tile.tar.xz?")
        for path, tile in tile_of.items():
            path.rename(path.with_name(f"tile{tile:03d}_{path.name}"))
    print(f"wrote {config.folder}/: pictures and masks of {len(set(tile_of.values()))} tiles")
    settings = "--normal-class good --group-by 'tile(\\d+)' --picture-size 128 --image-size 64 --ngf 8 --epochs 1"
    print(f"next: python train_gan.py --dataset {util.quoted(config.folder)} {settings}")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
