"""The examples that bring real sets into the layout of a data set."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import elpv, magnetic_tile


def test_tiles_are_told_by_gaps_in_the_numbers() -> None:
    paths = [Path(f"exp{i % 6}_num_{n}.jpg") for i, n in enumerate((900, 10, 310, 611, 1300))]
    found = magnetic_tile.tiles(paths)
    assert [found[path] for path in paths] == [1, 0, 0, 1, 2]  # 310 to 611 is a gap of 301, 611 to 900 none


def test_magnetic_tile_puts_the_tile_into_each_name(
    tmp_path: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["train/good/exp1_num_5.jpg", "train/good/exp2_num_900.jpg", "test/crack/exp1_num_30.jpg"]
    names.append("ground_truth/crack/exp1_num_30_mask.png")
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "set" / name)
    archive, folder = tmp_path / "magnetic_tile.tar.xz", tmp_path / "tiles"
    with tarfile.open(archive, "w:xz") as file:
        for name in names:
            file.add(tmp_path / "set" / name, name)
    run_here("examples.magnetic_tile", "--archive", str(archive), "--folder", str(folder))
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    assert found == [
        "ground_truth/crack/tile000_exp1_num_30_mask.png",
        "test/crack/tile000_exp1_num_30.jpg",
        "train/good/tile000_exp1_num_5.jpg",
        "train/good/tile001_exp2_num_900.jpg",
    ]
    assert "of 2 tiles" in capsys.readouterr().out
    with pytest.raises(magnetic_tile.util.InputError, match="is there already"):
        magnetic_tile.main(magnetic_tile.Config(archive, folder))
    with pytest.raises(magnetic_tile.util.InputError, match="name the archive"):
        magnetic_tile.main(magnetic_tile.Config(tmp_path / "none.tar.xz", tmp_path / "other"))
    whole, bad = archive.read_bytes(), tmp_path / "bad.tar.xz"
    for content in (whole[: len(whole) // 2], whole[:100] + bytes(20) + whole[120:], b"no archive"):
        bad.write_bytes(content)
        with pytest.raises(magnetic_tile.util.InputError, match="is damaged or no archive"):
            magnetic_tile.main(magnetic_tile.Config(bad, tmp_path / "other"))
    tarfile.open(bad, "w:xz").close()
    with pytest.raises(magnetic_tile.util.InputError, match="holds no pictures"):
        magnetic_tile.main(magnetic_tile.Config(bad, tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_elpv_is_split(tmp_path: Path) -> None:
    pytest.importorskip("elpv_dataset", reason="the package elpv-dataset is not installed")
    elpv.main(elpv.Config(tmp_path / "cells"))
    counts = {
        folder.relative_to(tmp_path / "cells").as_posix(): len(list(folder.iterdir()))
        for folder in (tmp_path / "cells").glob("*/*")
    }
    assert counts == {"train/good": 470, "test/good": 118, "test/defect": 313}
