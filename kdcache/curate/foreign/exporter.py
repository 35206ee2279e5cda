"""Export a cache as files that the students of FKD, ml-dr or TinyViT read.

Recorded boxes are written as they are; those of RandomResizedCrop follow from (seed, sample, view) and are computed
again. So the reader's crop and flip are those that the teacher saw.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.format import stored_bases, zarr_store
from kdcache.cache.format.codec import decode
from kdcache.cache.format.recorded_views import BOX, CROP, recorded
from kdcache.cache.preconditions import check_outside, refuse_sequences
from kdcache.cache.reader import Cache
from kdcache.config.transform import Transform
from kdcache.curate.foreign import fkd, ml_dr, tinyvit
from kdcache.curate.foreign.sparse_labels import SparseSoftLabels, most_probable
from kdcache.data.images import Picture
from kdcache.data.loader import cut_range
from kdcache.data.recorded_crop import PixelBox, pixels_of, sides_of, split_recorded
from kdcache.data.replay import SPOT_CHECK_IMAGES, check_matches_cache, replay
from kdcache.data.samples import Samples
from kdcache.data.seeding import seeded
from kdcache.data.transforms import build_transform, is_random
from kdcache.errors import UsageError
from kdcache.runtime.atomic_write import move_into_place
from kdcache.runtime.progress import Progress, Silent

TARGETS = ("fkd", "ml-dr", "tinyvit")
_VALUES_AT_ONCE = 2**22
"""Number of logits, and of probabilities of all views, in memory at once."""

_RANDOM_CROP, _FLIP = "RandomResizedCrop", "RandomHorizontalFlip"


def files_of_cache(
    cache: Cache,
    target: str,
    out: str | Path,
    samples: Samples | None = None,
    *,
    top_k: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write a cache in the layout of another project.

    Args:
        cache: a cache whose views are crops or, for TinyViT, that was imported from TinyViT.
        target: one of `TARGETS`.
        out: a new folder; it appears when all files are written.
        samples: the images, whose names and sizes are needed.
        top_k: number of classes per row; None for the head of the cache.
        progress: progress reporter; silent if None.

    Returns:
        The number of classes per row.

    Raises:
        UsageError: if the project's students would see other images than the teacher did.
        MismatchError: if `samples` are not the cache's.
    """
    out, plan, reporter = Path(out), cache.manifest.plan, progress or Silent()
    refuse_sequences(plan, f"the export to {target}", "read the rows with cache.sequences()")
    check_outside(out)
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already", "give another name with -o")
    k = plan.encoding.top_k if top_k is None else top_k
    if not 0 < k <= (stored := plan.encoding.top_k):
        raise UsageError(f"top_k is {k}, but the cache stores {stored} classes per row", f"use 1 to {stored}")
    cache.check_views()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        unfinished = Path(scratch) / out.name
        if target == "tinyvit":
            _write_epochs(cache, unfinished, samples, k, reporter)
        else:
            _write_samples(cache, target, unfinished, _images(cache, target, samples, reporter), k, reporter)
        move_into_place(unfinished, out)
    return k


def _images(cache: Cache, target: str, samples: Samples | None, progress: Progress) -> Samples:
    if samples is None:
        raise UsageError(f"the files of {target} need the images", "pass the data set with --pipeline PIPELINE")
    _check_crops(cache.manifest.plan.views.transform)
    check_matches_cache(cache, samples, None, progress)
    replay(cache, samples, SPOT_CHECK_IMAGES)
    return samples


def _check_crops(transform: Transform) -> None:
    """Check that the transform is a crop, optionally a flip, and then steps that are not random."""
    first = next(iter(transform[0]), "nothing") if transform else "nothing"
    rest = transform[1:]
    if first == _RANDOM_CROP and rest and _FLIP in rest[0]:
        rest = rest[1:]
    if first not in (CROP, _RANDOM_CROP) or is_random(rest):
        raise UsageError(
            f"the views of the teacher are not plain crops: {transform}",
            f"only a transform of {CROP}, or {_RANDOM_CROP} and optionally {_FLIP}, followed by steps that are not "
            "random, can be exported",
        )


def _write_samples(cache: Cache, target: str, out: Path, samples: Samples, top_k: int, progress: Progress) -> None:
    """Write one file per sample, with all its views."""
    plan = cache.manifest.plan
    views = range(plan.views.count)
    transform = plan.views.transform
    reader, boxes = _TopClasses(cache, top_k), _Boxes(cache, samples, "fraction" if target == "fkd" else "pixels")
    names = fkd.names_of(samples) if target == "fkd" else [ml_dr.name_of(id_) for id_ in range(len(samples))]
    out.mkdir(parents=True)
    if target == "fkd":
        _check_names(samples, names)
    else:
        size, normalization = _size_and_normalization(transform)
        ml_dr.write_config(out, samples, len(views), top_k, size, normalization)
    with progress.task(f"files of {target}", len(samples), "files") as task:
        for ids in cut_range(range(len(samples)), max(_VALUES_AT_ONCE // (len(views) * max(top_k, BOX)), 1)):
            of_views = [reader.read(view, ids) for view in views]
            probabilities, classes = (np.stack(parts) for parts in zip(*of_views, strict=True))
            of_ids = boxes.read(ids)
            for index, id_ in enumerate(ids):
                soft_labels = SparseSoftLabels(probabilities[:, index], classes[:, index], of_ids[:, index])
                if target == "fkd":
                    fkd.write(out / names[id_], soft_labels)
                else:
                    ml_dr.write(out / names[id_], id_, soft_labels)
                task.advance(1)


def _check_names(samples: Samples, names: Sequence[str]) -> None:
    """Check that FKD's reader, which truncates paths at their first dot, finds the files."""
    dotted = next((name for name in names if "." in name.removesuffix(".tar")), None)
    if dotted is not None:
        raise UsageError(
            f"FKD's reader does not find {dotted}: it truncates paths at their first dot", "rename the folder"
        )


class _TopClasses:
    """A reader of the most probable classes of a cache's rows."""

    def __init__(self, cache: Cache, top_k: int) -> None:
        plan = cache.manifest.plan
        self._labels, self._encoding, self._top_k = cache.labels, plan.encoding, top_k
        self._reader, self._basis = zarr_store.row_reader(cache.path, plan), stored_bases.read_basis(cache.path, plan)

    def read(self, view: int, ids: range) -> tuple[Any, Any]:
        """Return (probabilities, classes), both [B, k], of some samples in a view."""
        parts = []
        for some in cut_range(ids, max(_VALUES_AT_ONCE // self._encoding.num_classes, 1)):
            labels = torch.from_numpy(self._labels[some.start : some.stop].astype(np.int64))
            logits = decode(self._reader.read(view, some), labels, self._encoding, self._basis)
            parts.append(most_probable(logits, self._top_k))
        probabilities, classes = (np.concatenate(values) for values in zip(*parts, strict=True))
        return probabilities, classes


class _Boxes:
    """A reader of the boxes of a cache's views, in pixels or as fractions of the image."""

    def __init__(self, cache: Cache, samples: Samples, unit: str) -> None:
        self._cache, self._samples, self._unit = cache, samples, unit
        transform = cache.manifest.plan.views.transform
        self._crop = split_recorded(transform)[0] if recorded(transform) else None
        self._steps = [build_transform([step]).transforms[0] for step in transform[:2]] if self._crop is None else []  # type: ignore[attr-defined]  # of Compose
        self._flips = len(transform) > 1 and _FLIP in transform[1]

    def read(self, ids: range) -> npt.NDArray[np.float32]:
        """Return the boxes of some samples, [V, B, 5]: top, left, height, width, flip."""
        plan = self._cache.manifest.plan
        views = range(plan.views.count)
        if self._crop is not None:
            stored = np.stack([zarr_store.read_recorded(self._cache.path, plan, view, ids) for view in views])
            if self._crop.unit == self._unit:
                return stored
        boxes = np.zeros((len(views), len(ids), BOX), np.float32)
        for index, id_ in enumerate(ids):
            picture = self._samples.images.picture(id_)
            height, width = sides_of(picture)
            for view in views:
                if self._crop is not None:
                    box = pixels_of(stored[view, index], self._crop.unit, height, width)
                    flip = bool(stored[view, index, 4])
                else:
                    box, flip = self._compute(picture, id_, view)
                sides = (height, width, height, width) if self._unit == "fraction" else (1, 1, 1, 1)
                boxes[view, index] = [*(value / side for value, side in zip(box, sides, strict=True)), flip]
        return boxes

    def _compute(self, picture: Picture, id_: int, view: int) -> tuple[PixelBox, bool]:
        """Compute the random crop and flip of a view of a sample, in the order of the transform."""
        crop, seed = self._steps[0].step, self._cache.manifest.plan.views.seed
        get_params = getattr(crop, "make_params", None) or crop._get_params  # as torchvision 0.19 calls it
        with seeded(seed, id_, view):
            params = get_params([picture])
            box = PixelBox(*(int(params[side]) for side in PixelBox._fields))
            flipped = self._steps[1](torch.tensor([[[0, 1]]])) if self._flips else torch.tensor([[[0, 1]]])
        return box, bool(flipped[0, 0, 0])


def _size_and_normalization(transform: Transform) -> tuple[list[int], dict[str, Any]]:
    """Return (size, normalization) of a transform that ml-dr's config can express.

    Raises:
        UsageError: if it cannot.
    """
    crop = transform[0].get(CROP) or transform[0].get(_RANDOM_CROP) or {}
    rest = transform[2:] if len(transform) > 1 and _FLIP in transform[1] else transform[1:]
    conversion = [{"ToImage": {}}, {"ToDtype": {"dtype": "float32", "scale": True}}]
    normalization = rest[2].get("Normalize") if len(rest) == len(conversion) + 1 else {}
    if (
        crop.get("interpolation", "bilinear") != "bilinear"
        or rest[:2] != conversion
        or normalization is None
        or len(rest) > 3
    ):
        raise UsageError(
            f"ml-dr's reader only crops bilinearly, scales and normalizes, but the transform is {transform}",
            f"only {conversion} and optionally Normalize can follow the crop",
        )
    size = crop["size"]
    return [size, size] if isinstance(size, int) else [*size] * (2 // len(size)), normalization


def _write_epochs(cache: Cache, out: Path, samples: Samples | None, top_k: int, progress: Progress) -> None:
    """Write one folder per epoch, of a cache that was imported from TinyViT."""
    plan = cache.manifest.plan
    transform = plan.views.transform
    if recorded(transform) != "seeds":
        raise UsageError(
            "TinyViT's reader augments images from a seed by its own code: no seed gives the images that this teacher "
            "saw",
            "export only caches that were imported from TinyViT, or use --to fkd or --to ml-dr",
        )
    if plan.encoding.num_classes > tinyvit.MAX_CLASSES:
        raise UsageError(f"TinyViT's int16 cannot hold {plan.encoding.num_classes} classes", "select fewer classes")
    if samples is not None:
        check_matches_cache(cache, samples, None, progress)
    (arguments,) = transform[0].values()
    names = tinyvit.names_of(samples, str(arguments.get("keys")), len(cache))

    reader = _TopClasses(cache, top_k)

    def parts(view: int) -> Iterator[SparseSoftLabels]:
        for ids in cut_range(range(len(cache)), plan.shape.chunk_rows):
            probabilities, classes = reader.read(view, ids)
            seeds = zarr_store.read_recorded(cache.path, plan, view, ids)
            yield SparseSoftLabels(probabilities[None], classes[None], seeds[None])

    with progress.task("epochs", plan.views.count, "epochs") as task:
        for view in range(plan.views.count):
            tinyvit.write(out, view, names, parts(view), top_k)
            task.advance(1)
