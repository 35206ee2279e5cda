"""A cache as files that the students of FKD, ml-dr or TinyViT read.

Boxes that are recorded are written as they are; those of RandomResizedCrop follow from (seed, sample, view), and are
drawn again. So the reader's crop is the one that the teacher saw, with its flip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import decode
from kdcache.cache.format.recorded_views import BOX, CROP, recorded
from kdcache.cache.preconditions import check_outside
from kdcache.cache.reader import Cache
from kdcache.config.schema import Transform
from kdcache.curate.foreign import fkd, ml_dr, tinyvit
from kdcache.curate.foreign.sparse_labels import SparseSoftLabels, most_probable
from kdcache.data.images import Picture
from kdcache.data.loader import cut_range
from kdcache.data.recorded_crop import PixelBox, pixels_of, sides_of, split_recorded
from kdcache.data.replay import A_FEW, check_data, replay
from kdcache.data.samples import Samples
from kdcache.data.transforms import build_transform, is_random
from kdcache.data.views import seeded
from kdcache.errors import UsageError
from kdcache.runtime.atomic_write import move_into_place
from kdcache.runtime.progress import Progress, Silent

TARGETS = ("fkd", "ml-dr", "tinyvit")
_AT_ONCE = 2**22
"""Numbers of logits, and of probabilities of all views, that are in memory at once."""

_DRAWN, _FLIP = "RandomResizedCrop", "RandomHorizontalFlip"


def files_of_cache(
    cache: Cache,
    target: str,
    out: str | Path,
    samples: Samples | None = None,
    *,
    top_k: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write what a cache holds in another project's layout, and say how many classes of a row were kept.

    Args:
        cache: whose views are crops, or, for TinyViT, were drawn by TinyViT.
        target: one of `TARGETS`.
        out: a new folder; there is nothing there before all is.
        samples: the images, whose names and sizes are needed.
        top_k: how many classes of a row are kept; None for as many as the cache keeps one by one.
        progress: who is told how it goes.

    Raises:
        UsageError: if the project's students would be shown something else than the teacher was.
        MismatchError: if these are other samples than the cache's.
    """
    out, plan, listener = Path(out), cache.manifest.plan, progress or Silent()
    check_outside(out)
    if out.exists():
        raise UsageError(f"{out} exists already", "give another name with -o")
    kept = plan.encoding.top_k if top_k is None else top_k
    if not 0 < kept <= (most := plan.encoding.top_k):
        raise UsageError(f"{kept} classes of a row are asked for, the cache keeps {most}", f"ask for 1 to {most}")
    if len(cache.views) < plan.views.count:
        raise UsageError(f"{cache.path} holds only {len(cache.views)} of {plan.views.count} views", "pull the others")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        unfinished = Path(scratch) / out.name
        if target == "tinyvit":
            _write_epochs(cache, unfinished, samples, kept, listener)
        else:
            _write_samples(cache, target, unfinished, _images(cache, target, samples, listener), kept, listener)
        move_into_place(unfinished, out)
    return kept


def _images(cache: Cache, target: str, samples: Samples | None, progress: Progress) -> Samples:
    if samples is None:
        raise UsageError(f"the files of {target} are of images, and none are given", "give the data set: --pipeline P")
    _check_crops(cache.manifest.plan.views.transform)
    check_data(cache, samples, None, progress)
    replay(cache, samples, A_FEW)
    return samples


def _check_crops(transform: Transform) -> None:
    """That what a teacher saw of an image is a box of it, perhaps flipped, through steps that draw nothing."""
    first = next(iter(transform[0]), "nothing") if transform else "nothing"
    rest = transform[1:]
    if first == _DRAWN and rest and _FLIP in rest[0]:
        rest = rest[1:]
    if first not in (CROP, _DRAWN) or is_random(rest):
        raise UsageError(
            f"what the teacher saw is no crop of an image alone: {transform}",
            f"only caches whose transform is {CROP}, or {_DRAWN} and perhaps {_FLIP}, and then draws nothing more, can "
            "be written for readers that cut a box out",
        )


def _write_samples(cache: Cache, target: str, out: Path, samples: Samples, top_k: int, progress: Progress) -> None:
    """One file a sample, with all its views."""
    plan = cache.manifest.plan
    views = range(plan.views.count)
    transform = plan.views.transform
    rows, boxes = _MostProbable(cache, top_k), _Boxes(cache, samples, "fraction" if target == "fkd" else "pixels")
    names = fkd.names_of(samples) if target == "fkd" else [ml_dr.name_of(number) for number in range(len(samples))]
    out.mkdir(parents=True)
    if target == "fkd":
        _check_names(samples, names)
    else:
        size, normal = _stated(transform)
        ml_dr.write_config(out, samples, len(views), top_k, size, normal)
    with progress.task(f"files of {target}", len(samples), "files") as task:
        for ids in cut_range(range(len(samples)), max(_AT_ONCE // (len(views) * max(top_k, BOX)), 1)):
            of_views = [rows.of(view, ids) for view in views]
            probabilities, classes = (np.stack(parts) for parts in zip(*of_views, strict=True))
            kept = boxes.of(ids)
            for place, number in enumerate(ids):
                said = SparseSoftLabels(probabilities[:, place], classes[:, place], kept[:, place])
                if target == "fkd":
                    fkd.write(out / names[number], said)
                else:
                    ml_dr.write(out / names[number], number, said)
                task.advance(1)


def _check_names(samples: Samples, names: Sequence[str]) -> None:
    """That FKD's reader, which cuts paths at their first point, finds the files under the names of its writer."""
    astray = next((name for name in names if "." in name.removesuffix(".tar")), None)
    if astray is not None:
        raise UsageError(
            f"FKD's reader does not find {astray}: it ends names at their first point", "rename the folder"
        )


class _MostProbable:
    """The most probable classes of a cache's rows."""

    def __init__(self, cache: Cache, top_k: int) -> None:
        plan = cache.manifest.plan
        self._labels, self._encoding, self._top_k = cache.labels, plan.encoding, top_k
        self._reader, self._basis = zarr_store.RowReader(cache.path, plan), zarr_store.read_basis(cache.path, plan)

    def of(self, view: int, ids: range) -> tuple[Any, Any]:
        """(probabilities, classes) [B, k] of a view of some samples."""
        parts = []
        for some in cut_range(ids, max(_AT_ONCE // self._encoding.num_classes, 1)):
            labels = torch.from_numpy(self._labels[some.start : some.stop].astype(np.int64))
            logits = decode(self._reader.read(view, some), labels, self._encoding, self._basis)
            parts.append(most_probable(logits, self._top_k))
        probabilities, classes = (np.concatenate(values) for values in zip(*parts, strict=True))
        return probabilities, classes


class _Boxes:
    """The boxes of a cache's views, in the unit that is asked for."""

    def __init__(self, cache: Cache, samples: Samples, unit: str) -> None:
        self._cache, self._samples, self._unit = cache, samples, unit
        transform = cache.manifest.plan.views.transform
        self._crop = split_recorded(transform)[0] if recorded(transform) else None
        self._steps = [build_transform([step]).transforms[0] for step in transform[:2]] if self._crop is None else []  # type: ignore[attr-defined]  # of Compose
        self._flips = len(transform) > 1 and _FLIP in transform[1]

    def of(self, ids: range) -> npt.NDArray[np.float32]:
        """Of some samples, [V, B, 5]."""
        plan = self._cache.manifest.plan
        views = range(plan.views.count)
        if self._crop is not None:
            kept = np.stack([zarr_store.read_recorded(self._cache.path, plan, view, ids) for view in views])
            if self._crop.unit == self._unit:
                return kept
        boxes = np.zeros((len(views), len(ids), BOX), np.float32)
        for place, number in enumerate(ids):
            picture = self._samples.images.picture(number)
            height, width = sides_of(picture)
            for view in views:
                if self._crop is not None:
                    box = pixels_of(kept[view, place], self._crop.unit, height, width)
                    flip = bool(kept[view, place, 4])
                else:
                    box, flip = self._drawn(picture, number, view)
                sides = (height, width, height, width) if self._unit == "fraction" else (1, 1, 1, 1)
                boxes[view, place] = [*(value / side for value, side in zip(box, sides, strict=True)), flip]
        return boxes

    def _drawn(self, picture: Picture, number: int, view: int) -> tuple[PixelBox, bool]:
        """What the first two steps draw for a view of a sample, in their order."""
        crop, seed = self._steps[0].step, self._cache.manifest.plan.views.seed
        draw = getattr(crop, "make_params", None) or crop._get_params  # as torchvision 0.19 calls it
        with seeded(seed, number, view):
            drawn = draw([picture])
            box = PixelBox(*(int(drawn[side]) for side in PixelBox._fields))
            flipped = self._steps[1](torch.tensor([[[0, 1]]])) if self._flips else torch.tensor([[[0, 1]]])
        return box, bool(flipped[0, 0, 0])


def _stated(transform: Transform) -> tuple[list[int], dict[str, Any]]:
    """(size, normalization) that ml-dr's config can state, and nothing else that the transform does.

    Raises:
        UsageError: if it does something else.
    """
    crop = transform[0].get(CROP) or transform[0].get(_DRAWN) or {}
    rest = transform[2:] if len(transform) > 1 and _FLIP in transform[1] else transform[1:]
    plain = [{"ToImage": {}}, {"ToDtype": {"dtype": "float32", "scale": True}}]
    normal = rest[2].get("Normalize") if len(rest) == len(plain) + 1 else {}
    if crop.get("interpolation", "bilinear") != "bilinear" or rest[:2] != plain or normal is None or len(rest) > 3:
        raise UsageError(
            f"ml-dr's reader cuts bilinearly and then scales and normalizes alone, and this teacher saw {transform}",
            f"only {plain} and perhaps Normalize can follow the crop",
        )
    size = crop["size"]
    return [size, size] if isinstance(size, int) else [*size] * (2 // len(size)), normal


def _write_epochs(cache: Cache, out: Path, samples: Samples | None, top_k: int, progress: Progress) -> None:
    """A folder an epoch, of a cache whose images TinyViT drew."""
    plan = cache.manifest.plan
    transform = plan.views.transform
    if recorded(transform) != "seeds":
        raise UsageError(
            "TinyViT's reader draws its images from a seed, by its own code: with any seed that could be written it "
            "would show a student other images than this teacher saw",
            "write only caches that came from TinyViT's files; or take --to fkd or --to ml-dr",
        )
    if plan.encoding.num_classes > tinyvit.MOST_CLASSES:
        raise UsageError(f"TinyViT's int16 has no room for {plan.encoding.num_classes} classes", "take fewer")
    if samples is not None:
        check_data(cache, samples, None, progress)
    (arguments,) = transform[0].values()
    names = tinyvit.names_of(samples, str(arguments.get("keys")), len(cache))

    rows = _MostProbable(cache, top_k)

    def said(view: int) -> Iterator[SparseSoftLabels]:
        for ids in cut_range(range(len(cache)), plan.shape.chunk_rows):
            probabilities, classes = rows.of(view, ids)
            seeds = zarr_store.read_recorded(cache.path, plan, view, ids)
            yield SparseSoftLabels(probabilities[None], classes[None], seeds[None])

    with progress.task("epochs", plan.views.count, "epochs") as task:
        for view in range(plan.views.count):
            tinyvit.write(out, view, names, said(view), top_k)
            task.advance(1)
