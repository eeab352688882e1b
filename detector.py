"""A trained detector that a program or a notebook holds: it judges pictures without a new start, and writes no
results.

    from detector import Detector

    detector = Detector.load("outputs/washers-good")     # after evaluate.py; takes seconds, once
    for found in detector.judge(["part.png", image, array]):
        print(found.score, found.p_value, found.flagged)

The verdicts are those of evaluate.py --images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import evaluate
import fit_latent
import util
from anogan import decoding, heatmaps, latents, patches, runs, scores, scoring, verdicts
from anogan.candidates import candidates_of, nearest
from detectors import f_anogan

Picture = str | Path | Image.Image | np.ndarray  # an array is (H, W), grey, or (H, W, 3), in RGB


class Judgement(NamedTuple):
    """What is found of one picture."""

    score: float  # high means anomalous
    p_value: float  # how often a normal picture would score as high
    flagged: bool  # whether the p-value is at most alpha
    heat: np.ndarray | None  # (height, width), at the picture's own size; NaN where the networks have not looked
    doubts: list[str]  # why the p-value may not hold, such as another size than the validation pictures have


@dataclass(frozen=True)
class Detector:
    """A run that is ready to judge: its networks, and the scores of the normal pictures that it compares with."""

    gan: runs.TrainedGAN
    score: str  # what the verdict rests on
    alpha: float  # share of normal pictures that may be flagged
    normals: scoring.Normals
    needed: list[scores.Score]  # the score, its parts, and what they are made of
    map: scores.HeatMap | None  # of the method that the verdict rests on; None if it has none
    loaded: dict[scores.Source, Any]  # what the needed scores rest on, without the latents
    search: "Search | None"  # None where no score looks at G(z)

    @classmethod
    def load(
        cls, run_dir: str | Path, score: str | None = None, alpha: float = evaluate.Config.alpha, device: str = "auto"
    ) -> "Detector":
        """Read a run folder; by default it judges by the score that evaluate.py last judged by there.

        What a detector remembers of its training images is made again if it was removed; else nothing is written.
        Raises InputError if evaluate.py has not run there since it was trained, or if there is no such score, or a file
        is missing or damaged.
        """
        if not 0 < alpha < 1:
            raise util.InputError(f"alpha must lie between 0 and 1, not {alpha}")
        gan = runs.load_gan(runs.find_run(Path(run_dir)), util.pick_device(device))
        name, parts = evaluate.score_of_verdict(gan, score)
        declared = scores.declared_for(gan, evaluate.SCORES)
        wanted = next((each for each in declared if each.name == name), None)
        if wanted is None or not (wanted.parts or wanted.source.scores_unlabelled):
            raise util.InputError(f"there is no score {name} of pictures without labels here: name another one")
        normals = scoring.kept_normals(gan, evaluate.SCORES)
        if normals is None or name not in normals.scores:
            raise util.InputError(
                f"{run_dir} does not keep what {name} is of its validation images: run python evaluate.py --run-dir "
                f"{util.quoted(run_dir)} --score {name}"
            )
        evaluate.check_parts(gan.run_dir, parts, normals.scores)
        names = {name, *normals.scores.keys() & set(wanted.parts), wanted.pooled_of}
        needed = [each for each in declared if each.name in names]
        sources = {each.source for each in needed if not each.parts}
        maps = (each.map for each in declared if each.map is not None and each.name in normals.scores)
        return cls(
            gan=gan,
            score=name,
            alpha=alpha,
            normals=normals,
            needed=needed,
            map=next((each for each in maps if each.source in sources), None),
            loaded={source: source.load(gan, {}) for source in sources - {scores.LATENTS}},
            search=Search.load(gan) if scores.LATENTS in sources else None,
        )

    @property
    def level(self) -> float:
        """Up to here goes the heat of normal pictures: evaluate.py marks in red what passes it. Infinite if alpha is
        too small for so few normals, or there is no heat."""
        if self.map is None:
            return float("inf")
        peaks = self.normals.scores[scoring.peak_of(self.map, evaluate.SCORES)]
        return verdicts.threshold(peaks, self.alpha)

    def judge(self, pictures: Sequence[Picture]) -> list[Judgement]:
        """A verdict on each picture. Where the networks see whole pictures, 64 are searched at once.

        Raises InputError for one that cannot be read.
        """
        if isinstance(pictures, Picture):
            raise util.InputError(f"judge takes a list of pictures, not {_name(pictures)} alone: put it into one")
        together = 1 if self.gan.view.has_patches else 64
        parts = (pictures[i : i + together] for i in range(0, len(pictures), together))
        return [found for part in parts for found in self._judge(part)]

    def _judge(self, pictures: Sequence[Picture]) -> Iterator[Judgement]:
        opened = [_open(picture) for picture in pictures]
        seen = [self._seen(image, picture) for image, picture in zip(opened, pictures, strict=True)]
        drawn, found = [], []
        for some in self._patches(seen):
            x, generated = self.gan.to_model(some.pixels), None
            if self.search is not None:
                z, residual, discrimination = self.search.find(self.gan, x)
                with util.full_precision():
                    generated = self.gan.generator(z)
                found.append((some.row, residual.cpu().numpy(), discrimination.cpu().numpy()))
            drawn.append((some, x, generated))
        loaded, heats = self.loaded, [None] * len(opened)
        if self.search is not None:
            names = ("picture", "residual", "discrimination")
            arrays = dict(zip(names, map(np.concatenate, zip(*found, strict=True)), strict=True))
            loaded = loaded | {scores.LATENTS: {"images": arrays | {"search": self.search.settings}}}
        with util.full_precision():
            by_name, _ = scoring.score_batches("images", loaded, self.needed, self.normals.usual, drawn)
            for each in self.needed:
                if each.parts:
                    by_name[each.name] = each.function(by_name, self.normals.scores)
            if self.map is not None:
                usual = self.normals.usual.get(self.map.name)
                for i, of_picture in scoring.stitched(self.map, loaded.get(self.map.source), drawn):
                    heat = scoring.heat_map(of_picture, self.gan.image_size, usual)
                    heats[i] = heatmaps.at_own_size(heat, decoding.upright(opened[i]).size, self.gan.view)
        score = by_name[self.score]
        p_value = verdicts.p_values(score, self.normals.scores[self.score])
        flagged = verdicts.flags(p_value, self.alpha)
        doubts = map(self._doubts, seen)
        for row in zip(score.tolist(), p_value.tolist(), flagged.tolist(), heats, doubts, strict=True):
            yield Judgement(*row)

    def _seen(self, image: Image.Image, picture: Picture) -> decoding.Seen:
        try:
            return decoding.as_seen(image, self.gan.view)
        except Exception as error:  # a damaged file can make a decoder raise anything
            raise util.InputError(f"cannot read {_name(picture)} ({error})") from error

    def _grid(self, size: tuple[int, int]) -> patches.Corners:
        return patches.grid(size, self.gan.image_size, self.normals.stride)

    def _patches(self, seen: list[decoding.Seen]) -> Iterator[patches.Patches]:
        """The patches of these pictures, in batches."""
        pictures = enumerate(each.pixels for each in seen)
        return patches.batches(pictures, lambda _, size: self._grid(size), self.gan.image_size, 256)

    def _doubts(self, seen: decoding.Seen) -> list[str]:
        """What sets a picture apart from the validation pictures, or is not seen of it."""
        size, (fewest, most) = seen.pixels.shape[1:], self.normals.patch_range
        count, by_place = len(self._grid(size)), self.normals.usual.get(self.map.name) if self.map else None
        found = []
        if not fewest <= count <= most:
            found.append(f"it has {count} patches, not {fewest} to {most} as the validation pictures")
        if by_place is not None and size != by_place.total.shape:
            found.append("it has another size than the validation pictures, and its heat goes by place")
        if seen.lost_colour:
            found.append("it is in colour, and is judged in grey")
        if seen.enlarged:
            found.append("it is enlarged, so that its details are blurred")
        if seen.outside > 0:
            found.append(f"{seen.outside:.2%} of its pixels lie outside the black and white of the training pictures")
        return found


@dataclass(frozen=True)
class Search:
    """How z is searched: as it was for the validation images."""

    settings: dict[str, Any]  # see `fit_latent.SEARCH_SETTINGS`
    start: Callable[[torch.Tensor], torch.Tensor]  # x (N, C, H, W) to where the search begins, z (N, latent_dim)

    @classmethod
    def load(cls, gan: runs.TrainedGAN) -> "Search":
        """The settings of latents-validation.npz. Raises InputError if it is missing, or E is not that of then."""
        settings = latents.read_fits(gan, ["validation"])["validation"]["search"]
        if "encoder" in settings:
            encoder = f_anogan.load(gan)
            if encoder.fingerprint != settings["encoder"]:
                raise util.InputError(f"{gan.run_dir}/encoder.pt is not that of the search: run fit_latent.py again")
            return cls(settings, encoder.network)
        found = candidates_of(gan, settings["candidates"], settings["seed"], keep=False)
        return cls(settings, partial(nearest, candidates=found))

    def find(self, gan: runs.TrainedGAN, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """z, residual and discrimination of x (N, C, H, W), see `fit_latent.search`."""
        names = (*fit_latent.SEARCH_SETTINGS, "precision")
        config = fit_latent.Config(**{name: self.settings[name] for name in names})
        found = fit_latent.search((gan.generator, gan.discriminator), x, self.start(x), config)
        if not all(values.isfinite().all() for values in found):
            raise util.InputError("the search diverged: numbers that are not finite")
        return found


def _open(picture: Picture) -> Image.Image:
    """A picture as Pillow opens it. Raises InputError if it is none, or holds several."""
    if isinstance(picture, Image.Image):
        return picture
    try:
        if isinstance(picture, np.ndarray):
            return Image.fromarray(picture)
        pages = decoding.page_numbers(Path(picture))
        if len(pages) == 1:
            return decoding.open_file(Path(picture), pages[0])
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise util.InputError(f"cannot read {_name(picture)} ({error})") from error
    raise util.InputError(f"{picture} holds {len(pages)} pictures: open it with Pillow, and judge its pages")


def _name(picture: Picture) -> str:
    return f"an array {picture.shape} of {picture.dtype}" if isinstance(picture, np.ndarray) else str(picture)
