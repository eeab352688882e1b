"""Scoring: the scores of every picture of a run, of the splits that were searched or of pictures without labels.

What it scores by is declared in scores.py and by each detector. The scores of the validation images are kept in the
run folder, since a verdict compares with them.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from anogan import files, heatmaps, images, latents, patches, runs
from anogan.scores import (
    GAN_R,
    LATENTS,
    REFERENCE,
    Batch,
    HeatMap,
    ImageSets,
    Score,
    Source,
    declared_for,
    peak,
    pooled,
    sources_of,
)
from util import InputError, printable, quoted

NORMALS = "validation-scores.npz"
USUAL = ("count", "total", "squares")  # what is kept there of `heatmaps.Usual`
Drawn = tuple[patches.Patches, torch.Tensor, torch.Tensor | None]  # see `latents.drawn`
UsualByMap = dict[str, heatmaps.Usual]  # what heat maps are relative to, by their names; a map that is not has none


# ---- the scores of a run --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A picture as the networks see it, at the size at which they do."""

    row: int  # its position in the split
    real: np.ndarray  # uint8 (height, width, 3)
    generated: np.ndarray | None  # the same of G(z), stitched; None where nothing was searched
    heat: np.ndarray | None  # (height, width); None without a heat map


@dataclass(frozen=True)
class ScoredSplit:
    """The images of one split and their scores, every array in the same order."""

    gan: runs.TrainedGAN
    images: images.ImageSet
    latents: dict[str, Any] | None  # of these images, see `latents.read_latents`; None where nothing was searched
    class_name: np.ndarray  # (N,) str, "" for pictures without labels
    is_anomaly: np.ndarray  # (N,) bool, False for pictures without labels
    scores: dict[str, np.ndarray]  # by name, each (N,)
    declared: dict[str, Score]  # the same names
    batch_size: int  # images that go through the networks at once
    seen_size: np.ndarray | None = None  # (N, 2) the height and the width at which the networks see a picture
    patch_counts: np.ndarray | None = None  # (N,) of how many patches a picture's scores are
    stride: int | None = None  # of these patches; None for whole pictures
    usual: UsualByMap = field(default_factory=dict)
    map: HeatMap | None = None  # that is shown: of the method that the verdict rests on, else the first that there is
    loaded: Any = None  # what the source of this map has loaded

    @property
    def unit(self) -> tuple[float, str]:
        """What the heat that is shown is told to a person in, see `heatmaps.unit`."""
        if self.map.name in self.usual:
            return heatmaps.RELATIVE
        return self.map.unit(self.gan.normalise)

    @property
    def peak(self) -> str:
        """The name of the score that is the largest value of the heat map that is shown."""
        return peak_of(self.map, self.declared.values())

    @property
    def search(self) -> dict[str, Any] | None:
        """The settings of the search that found the latents."""
        return None if self.latents is None else self.latents["search"]

    def in_figures(self, judged: str) -> list[str]:
        """The names of the scores that figures show: the main ones, and the one that is judged by."""
        return [name for name, score in self.declared.items() if score.pooled_of is None or name == judged]

    def ranked(self, score: str) -> np.ndarray:
        """Positions (N,), the most anomalous by this score first."""
        return np.argsort(-self.scores[score], kind="stable")

    def drawn(self, rows: np.ndarray | None = None) -> Iterator[Drawn]:
        """Patches, x and G(z) of all pictures or of these rows, see `latents.drawn`; `row` counts these rows."""
        rows = np.arange(len(self.images)) if rows is None else rows
        found = self.stride if self.latents is None else latents.taken(self.latents, rows)
        return latents.drawn(self.gan, self.images.take(rows), found, self.batch_size)

    def heats(self, rows: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """The position and the heat map (height, width) of all pictures or of these rows."""
        for i, of_picture in stitched(self.map, self.loaded, self.drawn(rows)):
            yield i if rows is None else int(rows[i]), self._heat(of_picture)

    def _heat(self, of_picture: torch.Tensor) -> np.ndarray:
        return heat_map(of_picture, self.gan.image_size, self.usual.get(self.map.name))

    def shown(self, rows: np.ndarray) -> Iterator[Shown]:
        """The pictures at these rows as the networks see them."""
        stitching, channels = patches.Stitching(), self.gan.image_channels
        for some, x, generated in self.drawn(rows):
            layers = [some.pixels.to(x.device) / 127.5 - 1]
            if generated is not None:
                layers.append(images.to_levels(generated, some.pixels, self.gan.view.normalise))
            if self.map is not None:
                layers.append(self.map.function(self.loaded, x, generated))
            for i, found in stitching.add(some, torch.cat(layers, 1)):
                yield Shown(
                    row=int(rows[i]),
                    real=heatmaps.to_rgb(found[:channels]),
                    generated=None if generated is None else heatmaps.to_rgb(found[channels : 2 * channels]),
                    heat=None if self.map is None else self._heat(found[-1]),
                )


def peak_of(map: HeatMap, declared: Iterable[Score]) -> str:
    """The name of the score that is the largest value of this heat map."""
    return next(score.name for score in declared if score.map is map and score.function is peak)


def stitched(map: HeatMap, loaded: Any, drawn: Iterable[Drawn]) -> Iterator[tuple[int, torch.Tensor]]:
    """The position of each picture and its map (height, width), from what `latents.drawn` yields of a set."""
    stitching = patches.Stitching()
    for some, x, generated in drawn:
        for row, (of_picture,) in stitching.add(some, map.function(loaded, x, generated)):
            yield row, of_picture


def heat_map(of_picture: torch.Tensor, side: int, usual: heatmaps.Usual | None, is_among: bool = False) -> np.ndarray:
    """The heat map (height, width) of a picture from its stitched map: smoothed, and relative to what is usual."""
    heat = heatmaps.smoothed(of_picture, side)
    return heat if usual is None else usual.relative(heat, is_among)


def search_of_gan_r(split: ScoredSplit) -> dict[str, Any] | None:
    """The settings of the search that GAN_R's scores are from, None without such scores."""
    if GAN_R.name not in split.scores:
        return None
    return latents.read_fits(split.gan, ["validation"], "reference")["validation"]["search"]


def fingerprints(scored: dict[str, ScoredSplit]) -> dict[str, str]:
    """SHA-256 of each file of the run folder, by name, that the scores of these splits rest on."""
    names = {
        score.source.file.format(split=name)
        for name, split in scored.items()
        for score in split.declared.values()
        if not score.parts
    }
    run_dir = next(iter(scored.values())).gan.run_dir
    return {name: files.fingerprint(run_dir / name) for name in sorted(names)}


@dataclass(frozen=True)
class Request:
    """What evaluate.py was asked for."""

    score: str  # what the verdict rests on
    is_the_only_one: bool  # whether other scores may be left out where what they need is missing or out of date
    batch_size: int  # images that go through the networks at once
    skip_unreadable: bool


def score_run(
    gan: runs.TrainedGAN,
    image_sets: ImageSets,
    declared: Sequence[Score],
    request: Request,
    normals: "Normals | None" = None,
) -> dict[str, ScoredSplit]:
    """Every declared score that the run folder allows, of these sets' images.

    Where the sets were searched, only the images that were. The scores of validation, which other scores are made with,
    are `normals`, by default those of the set `validation`. Raises InputError if the score that was asked for is not
    there, or a file is missing, damaged or of something else.
    """
    declared = declared_for(gan, declared)
    loaded, image_sets = _load_sources(gan, image_sets, declared, request)
    # each picture is decoded once, if fit_latent.py has not done it: what follows looks at it several times
    image_sets = {
        split: runs.keep_decoded(gan, each, split, request.skip_unreadable) for split, each in image_sets.items()
    }
    present = [score for score in declared if score.source in loaded]
    present += _made_of(declared, present, None if normals is None else normals.scores)
    scored: dict[str, ScoredSplit] = {}
    stride = _stride(gan, loaded, normals)
    maps = list(dict.fromkeys(score.map for score in present if score.map is not None))
    usual = _usual(gan, image_sets["validation"], loaded, maps, stride, request) if normals is None else normals.usual
    if normals is not None:  # a map is read against that of the normals: without theirs there is none
        maps = [each for each in maps if peak_of(each, present) in normals.scores]
    if not maps:
        print("without heat maps, since these images were not searched: run fit_latent.py, or python -m detectors.pca")
    rests_on = sources_of(request.score, declared)
    # the map of a method that the verdict rests on, else the first that there is
    shown = next((each for each in maps if each.source in rests_on), next(iter(maps), None))
    for split, image_set in image_sets.items():
        found = loaded[LATENTS][split] if LATENTS in loaded else None
        searched = stride if found is None else found
        drawn = latents.drawn(gan, image_set, searched, request.batch_size, request.skip_unreadable, quiet=False)
        by_name, seen = score_batches(split, loaded, present, usual, drawn)
        readable, first, patch_counts = np.unique(seen[:, 0], return_index=True, return_counts=True)
        image_set = image_set.take(readable)
        class_name = image_set.class_name
        scored[split] = ScoredSplit(
            gan=gan,
            images=image_set,
            latents=None if found is None else latents.taken(found, readable),
            class_name=class_name,
            is_anomaly=(class_name != "") & (class_name != gan.normal_class),
            scores=by_name,
            declared={score.name: score for score in present},
            batch_size=request.batch_size,
            seen_size=seen[first, 1:],
            patch_counts=patch_counts,
            stride=stride,
            usual=usual,
            map=shown,
            loaded=None if shown is None else loaded[shown.source],
        )
    counts = patch_range(scored["validation"]) if normals is None else normals.patch_range
    for split, each in scored.items():
        _name_others(split, each, counts)
    for score in present:  # those made of others come last: validation has all the others by then
        if score.parts:
            of_normals = scored["validation"].scores if normals is None else normals.scores
            for each in scored.values():
                each.scores[score.name] = score.function(each.scores, of_normals)
    return scored


def _made_of(declared: Sequence[Score], present: Sequence[Score], normals: Iterable[str] | None = None) -> list[Score]:
    """The declared scores that are made of others of which two or more are present: all that the normals have."""
    names = {score.name for score in present}
    of_normals = names if normals is None else set(normals)
    parts = {score.name: of_normals.intersection(score.parts) for score in declared}
    return [score for score in declared if len(parts[score.name]) > 1 and parts[score.name] <= names]


def patch_range(scored: ScoredSplit) -> tuple[int, int]:
    """The fewest and the most patches that a picture has."""
    return int(scored.patch_counts.min()), int(scored.patch_counts.max())


def _name_others(split: str, scored: ScoredSplit, of_normals: tuple[int, int]) -> None:
    """Say which pictures cannot be compared with validation: those with fewer or more patches than any picture there
    has, given their `patch_range`; and those of another size, where heat maps go by place."""
    fewest, most = of_normals
    others = np.flatnonzero((scored.patch_counts < fewest) | (scored.patch_counts > most))
    if len(others) > 0:
        # the worst of many patches is worse than that of few, and the mean of few varies more than that of many
        print(
            f"{split}: {len(others)} of {len(scored.images)} pictures are smaller or larger than every validation "
            f"picture, such as {printable(scored.images.source[others[0]])} ({scored.patch_counts[others[0]]} patches, "
            f"not {fewest} to {most}): their p-values do not hold, since scores depend on the number of patches"
        )
    if not scored.usual:
        return
    height, width = next(iter(scored.usual.values())).total.shape  # of all maps: that of the pictures
    others = np.flatnonzero((scored.seen_size != (height, width)).any(1))
    if len(others) > 0:
        one = "x".join(map(str, scored.seen_size[others[0]][::-1]))
        print(
            f"{split}: {len(others)} of {len(scored.images)} pictures have another size than the validation pictures, "
            f"such as {printable(scored.images.source[others[0]])} ({one}, not {width}x{height}): what is usual at a "
            f"place does not hold for them, so do not judge them by {' or '.join(_by_place(scored))}"
        )


def _by_place(scored: ScoredSplit) -> list[str]:
    """The names of the scores that rest on what is usual at a place."""
    peaks = [name for name, score in scored.declared.items() if score.map and score.map.name in scored.usual]
    return peaks + [name for name, score in scored.declared.items() if set(peaks).intersection(score.parts)]


def _usual(
    gan: runs.TrainedGAN,
    validation: images.ImageSet,
    loaded: dict[Source, Any],
    maps: Sequence[HeatMap],
    stride: int | None,
    request: Request,
) -> UsualByMap:
    """What the maps of the validation images have at each place, where there is something usual: `heatmaps.usual`."""
    searched = loaded[LATENTS]["validation"] if LATENTS in loaded else stride
    found = {}
    for each in maps:
        drawn = latents.drawn(gan, validation, searched, request.batch_size, request.skip_unreadable)
        maps_of = stitched(each, loaded[each.source], drawn)
        heats = (heatmaps.smoothed(of_picture, gan.image_size) for _, of_picture in maps_of)
        found[each.name] = heatmaps.usual(heats, gan.image_size)
    return {name: usual for name, usual in found.items() if usual is not None}


def _stride(gan: runs.TrainedGAN, loaded: dict[Source, Any], normals: "Normals | None") -> int | None:
    """From which patches the scores of pictures are made: those that were searched, else those of the normals that they
    are compared with, since scores depend on the number of patches."""
    for source in (LATENTS, REFERENCE):
        if source in loaded:
            return next(iter(loaded[source].values()))["search"]["stride"]
    return latents.stride_of(gan) if normals is None else normals.stride


def _load_sources(
    gan: runs.TrainedGAN, image_sets: ImageSets, declared: Sequence[Score], request: Request
) -> tuple[dict[Source, Any], ImageSets]:
    """What the declared scores rest on, as far as it is there, and those of the images that were searched.

    Raises InputError, see `score_run`.
    """
    wanted = next((score for score in declared if score.name == request.score), None)
    if wanted is None:
        raise InputError(f"there is no score {request.score} here: it is of a GAN of patches, and this one sees none")
    of_wanted = sources_of(request.score, declared)
    is_there = {each.source: each.source.is_there(gan.run_dir, list(image_sets)) for each in declared if not each.parts}
    if wanted.source is LATENTS:
        is_there[LATENTS] = True  # so that its loading names what is missing
    loaded: dict[Source, Any] = {}
    for source in sorted(is_there, key=lambda source: source is not LATENTS):  # first what says which were searched
        if not is_there[source]:
            continue
        try:
            found = source.load(gan, image_sets)
            if source is REFERENCE and LATENTS in loaded:
                _check_same_patches(loaded[LATENTS], found)
            if source is LATENTS:
                image_sets = {name: _searched(each, name, found[name]) for name, each in image_sets.items()}
        except InputError as error:
            if source in of_wanted or not request.is_the_only_one:
                raise
            print(f"without the scores of {source.command}: {error}")
        else:
            loaded[source] = found
    if wanted.parts:
        if sum(score.source in loaded for score in declared if score.name in wanted.parts) < 2:
            raise InputError(
                f"there is no score {wanted.name} here: it takes two or more of {', '.join(wanted.parts)}, of "
                f"{' and '.join(sorted(source.command for source in of_wanted))}"
            )
    elif wanted.source not in loaded:
        does_not = "images" in image_sets and not wanted.source.scores_unlabelled
        reason = (
            f"{wanted.name} scores no pictures without labels"
            if does_not
            else f"run {_command(wanted.source, gan)} first"
        )
        names = ", ".join(score.name for score in declared if score.source in loaded)
        raise InputError(f"there is no score {wanted.name} here, but {names}: {reason}")
    return loaded, image_sets


def _check_same_patches(fits: dict[str, dict[str, Any]], references: dict[str, dict[str, Any]]) -> None:
    """Raise InputError unless the search by features and that of GAN_R were of the same patches of a picture."""
    for split, reference in references.items():
        strides = [of["search"]["stride"] for of in (fits[split], reference)]
        if strides[0] != strides[1]:
            raise InputError(
                f"the two searches of {split} are of other patches (stride {strides[0]} and {strides[1]}): run "
                f"fit_latent.py --discrimination reference --stride {strides[0]}"
            )


def _searched(image_set: images.ImageSet, split: str, fits: dict[str, Any]) -> images.ImageSet:
    """`latents.fitted_images`, and how many are left out."""
    fitted = latents.fitted_images(image_set, split, fits)
    if split != "images" and len(fitted) < len(image_set):
        print(
            f"{split}: {len(fitted)} of {len(image_set)} images were searched; the others are left out, such as "
            f"{printable(min(set(image_set.source) - set(fitted.source)))}: fit_latent.py searches them"
        )
    return fitted


def _command(source: Source, gan: runs.TrainedGAN) -> str:
    """The command that makes what a score needs, as it can be pasted."""
    return f"{source.command} --run-dir {quoted(gan.run_dir)}"


def score_batches(
    split: str,
    loaded: dict[Source, Any],
    present: list[Score],
    usual: UsualByMap,
    drawn: Iterable[Drawn],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The scores that are worked out from a split's images, which come as `latents.drawn` yields them: each (N,).

    Also returns the position, height and width of the picture of each patch (P, 3), of those that could be read. Raises
    InputError if there are none.
    """
    direct = [score for score in present if not score.parts and score.map is None]
    of_maps = [score for score in present if score.map is not None]
    values: dict[str, list[np.ndarray]] = {score.name: [] for score in direct if score.pooled_of is None}
    by_name: dict[str, Any] = {score.name: [] for score in of_maps}
    seen = [np.empty((0, 3), np.int64)]
    stitchings = {score.map: patches.Stitching() for score in of_maps}
    for some, x, generated in drawn:
        seen.append(np.column_stack([some.row, some.size]))
        batch = Batch(split, some, x, generated)
        for score in direct:
            if score.pooled_of is None:
                of_batch = score.function(loaded[score.source], batch)
                values[score.name].append(of_batch.cpu().numpy() if isinstance(of_batch, torch.Tensor) else of_batch)
        for each, stitching in stitchings.items():
            for _, (of_picture,) in stitching.add(some, each.function(loaded[each.source], x, generated)):
                heat = heat_map(of_picture, x.shape[-1], usual.get(each.name), is_among=split == "validation")
                for score in of_maps:
                    if score.map is each:
                        by_name[score.name].append(score.function(heat))
    seen = np.concatenate(seen)
    if len(seen) == 0:
        raise InputError(f"none of the images of the split {split} can be read")
    for score in direct:
        of_patches = np.concatenate(values[score.pooled_of or score.name])
        by_name[score.name] = pooled(of_patches, seen[:, 0], score.pool)
    return {score.name: np.array(by_name[score.name]) for score in present if not score.parts}, seen


# ---- the scores of validation normals, which a verdict compares with ------------------------------------------------


@dataclass(frozen=True)
class Normals:
    """What a verdict compares with."""

    scores: dict[str, np.ndarray]  # of the validation images, (V,) each by name
    stride: int | None  # of the patches that they are of, see `ScoredSplit`
    usual: UsualByMap
    patch_range: tuple[int, int]  # the fewest and the most patches that one of them has


def keep_normals(validation: ScoredSplit) -> None:
    """Write the scores of the validation images to the run folder, which then judges pictures without the data set."""
    gan, rests_on = validation.gan, json.dumps(fingerprints({"validation": validation}))
    about = {"index": validation.images.index, "split": "validation", "gan": gan.fingerprint, "rests_on": rests_on}
    about |= {"stride": json.dumps(validation.stride), "patch_range": np.array(patch_range(validation))}
    about["maps"] = json.dumps(list(validation.usual))
    sources = {score.source for score in validation.declared.values() if not score.parts}
    about["versions"] = json.dumps({source.file: source.version for source in sources})
    for name, usual in validation.usual.items():
        about |= {f"{name}_usual_{each}": np.array(getattr(usual, each)) for each in USUAL}
    files.write_arrays(gan.run_dir / NORMALS, **validation.scores, **about)


def scores_of_normals(gan: runs.TrainedGAN, declared: Sequence[Score], request: Request) -> Normals:
    """Every score of the validation images: as they were kept, or scored and kept now.

    Raises InputError if they must be scored, and as `score_run` does or because the data set is not there.
    """
    if (kept := kept_normals(gan, declared)) is not None:
        return kept
    if not runs.data_is_there(gan):
        raise InputError(
            f"{gan.run_dir} does not keep the scores of its validation images, and its data set is not in "
            f"{gan.dataset}: run evaluate.py where the data set is, or say where with --dataset DIR"
        )
    scored = score_run(gan, {"validation": runs.open_split(gan, "validation")}, declared, request)["validation"]
    keep_normals(scored)
    return Normals(scored.scores, scored.stride, scored.usual, patch_range(scored))


def kept_normals(gan: runs.TrainedGAN, declared: Sequence[Score]) -> Normals | None:
    """Every score of the validation images, as `keep_normals` wrote it; None if one is missing or out of date."""
    declared = declared_for(gan, declared)
    there = [s for s in declared if s.source is not None and s.source.scores_unlabelled]
    there = [s for s in there if s.source.is_there(gan.run_dir, ["validation"])]
    if not (gan.run_dir / NORMALS).is_file():
        return None
    try:
        kept = latents.read_arrays(gan.run_dir / NORMALS, "evaluate.py", "validation", gan, {})
    except InputError as error:
        print(f"{error}: scoring the validation images again")
        return None
    rests_on = json.loads(str(kept["rests_on"]))
    names = {score.source.file.format(split="validation") for score in there}
    versions = json.loads(str(kept.get("versions", "{}")))
    is_current = all(rests_on.get(name) == files.fingerprint(gan.run_dir / name) for name in names)
    is_current &= all(versions.get(score.source.file, 1) == score.source.version for score in there)
    is_whole = all(name in kept for name in ("stride", "patch_range", "maps", *(score.name for score in there)))
    if not (is_current and is_whole and _has_images(gan, kept["index"])):
        return None
    usual = {}
    for name in json.loads(str(kept["maps"])):
        count, total, squares = (kept[f"{name}_usual_{each}"] for each in USUAL)
        usual[name] = heatmaps.Usual(gan.image_size, int(count), total, squares)
    by_name, stride = {s.name: kept[s.name] for s in there}, json.loads(str(kept["stride"]))
    by_name |= {s.name: s.function(by_name, by_name) for s in _made_of(declared, there)}
    return Normals(by_name, stride, usual, tuple(kept["patch_range"].tolist()))


def _has_images(gan: runs.TrainedGAN, index: np.ndarray) -> bool:
    """Whether validation still has the images with these numbers; True where the data set is not there to tell, and for
    those that never change. Raises InputError, see `runs.open_split`."""
    if gan.dataset in images.EMBEDDED or not runs.data_is_there(gan):
        return True
    return bool(np.isin(index, runs.open_split(gan, "validation").index).all())
