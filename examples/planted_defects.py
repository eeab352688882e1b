"""A data set to try everything on: pictures of brass washers, and of washers with a scratch, a blot or a missing part.

    python -m examples.planted_defects                     # data/washers/, in colour
    python -m examples.planted_defects --grey              # data/washers-grey/

Draws train/good, test/good, test/scratch, test/blot, test/missing and, in MVTec AD's layout, masks of the defects
in ground_truth/. new/ holds pictures of both kinds without labels. The same seed draws the same pictures. Next:
docs/own-pictures.md
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

import util
from anogan import files

WIDTH, HEIGHT = 160, 120
DEFECTS = ("scratch", "blot", "missing")


@dataclass
class Config:
    folder: Path | None = None  # where to draw; by default data/washers or data/washers-grey
    grey: bool = False  # grey pictures instead of coloured ones
    train: int = 400  # good pictures to train on, a fifth of which train_gan.py keeps for validation
    test: int = 30  # pictures of each defect, and twice as many good ones
    seed: int = 0  # of everything that is drawn


def draw(rng: np.random.Generator, defect: str | None, grey: bool) -> tuple[np.ndarray, np.ndarray]:
    """A picture of a washer, uint8 (HEIGHT, WIDTH, 3), and where its defect is, bool (HEIGHT, WIDTH)."""
    down, across = np.mgrid[:HEIGHT, :WIDTH]
    x, y = across - WIDTH / 2 - rng.normal(0, 2), down - HEIGHT / 2 - rng.normal(0, 2)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    outer, inner = 44 + rng.normal(0, 1.2), 20 + rng.normal(0, 0.8)
    ring = np.clip(outer - radius + 0.5, 0, 1) * np.clip(radius - inner + 0.5, 0, 1)  # 1 on it, soft at its edges
    mask = np.zeros((HEIGHT, WIDTH), bool)

    # Turned on a lathe: grooves go round, and the light comes from the upper left
    grooves = np.interp(radius, np.arange(100), gaussian_filter(rng.normal(0, 1, 100), 1.5))
    metal = 0.62 + 0.05 * grooves + 0.14 * np.cos(angle + 3 * np.pi / 4 + rng.normal(0, 0.15))
    table = 0.2 + 0.25 * gaussian_filter(rng.normal(0, 1, (HEIGHT, WIDTH)), 3)

    at_angle, at_radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.65)
    middle = inner + at_radius * (outer - inner)
    spot = np.hypot(x - middle * np.cos(at_angle), y - middle * np.sin(at_angle))  # distance from a place on the ring
    if defect == "missing":
        bite = np.hypot(x - outer * np.cos(at_angle), y - outer * np.sin(at_angle)) < rng.uniform(9, 14)
        mask = bite & (ring > 0.5)
        ring = np.where(bite, 0, ring)
    elif defect == "blot":
        size = rng.uniform(4, 8) * (1 + 4 * gaussian_filter(rng.normal(0, 1, (HEIGHT, WIDTH)), 4))
        mask = (spot < size) & (ring > 0.5)
        metal = np.where(mask, metal * rng.uniform(0.3, 0.5), metal)
    elif defect == "scratch":
        canvas = Image.new("L", (WIDTH, HEIGHT))
        slope, half = rng.uniform(0, np.pi), rng.uniform(10, 18)
        row, column = np.unravel_index(spot.argmin(), spot.shape)
        step = half * np.array([np.cos(slope), np.sin(slope)])
        ends = [tuple(np.array([column, row]) - step), tuple(np.array([column, row]) + step)]
        ImageDraw.Draw(canvas).line(ends, fill=255, width=int(rng.integers(2, 4)))
        mask = (np.asarray(canvas) > 0) & (ring > 0.5)
        metal = np.where(mask, metal + rng.choice([-0.3, 0.3]), metal)

    brass, cloth = np.array([1.1, 0.98, 0.7]), np.array([0.8, 0.95, 1.25])
    picture = ring[..., None] * metal[..., None] * brass + (1 - ring[..., None]) * table[..., None] * cloth
    picture = picture + rng.normal(0, 0.01, picture.shape)
    if grey:
        picture = np.repeat(picture.mean(2, keepdims=True), 3, 2)
    return (255 * picture.clip(0, 1)).round().astype(np.uint8), mask


def main(config: Config) -> None:
    """Draw the whole set next to the place where it will stand, then put it there."""
    util.check_at_least(config, 1, "train", "test")
    util.check_seed(config.seed)
    folder = config.folder or Path("data/washers-grey" if config.grey else "data/washers")
    rng = np.random.default_rng(config.seed)

    def save(name: str, defect: str | None) -> None:
        picture, mask = draw(rng, defect, config.grey)
        pixels_of = {name: picture}
        if defect and name.startswith("test/"):
            pixels_of[f"{name.replace('test', 'ground_truth', 1).removesuffix('.png')}_mask.png"] = mask
        for path, pixels in pixels_of.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(partial / path)

    with files.new_folder(folder) as partial:
        for i in range(config.train):
            save(f"train/good/{i:03d}.png", None)
        for i in range(2 * config.test):
            save(f"test/good/{i:03d}.png", None)
        for defect in DEFECTS:
            for i in range(config.test):
                save(f"test/{defect}/{i:03d}.png", defect)
        for i in range(20):  # every other one is good
            save(f"new/part-{i:02d}.png", DEFECTS[i // 2 % 3] if i % 2 else None)
    print(f"wrote {folder}/: train/good test/good {' '.join(f'test/{defect}' for defect in DEFECTS)} ground_truth new")
    sizes = "--ngf 32 --ndf 32 --batch-size 16 --epochs 105"
    print(f"next: python train_gan.py --dataset {shlex.quote(str(folder))} --normal-class good {sizes}")


if __name__ == "__main__":
    with util.clear_errors():
        main(tyro.cli(Config, description=util.help_text(__doc__)))
