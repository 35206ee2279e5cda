"""Files, transforms and options that are refused."""

from __future__ import annotations

import math
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.foreign import (
    CLASSES,
    COUNT,
    DRAWN,
    FRACTIONS,
    ONE,
    PIXELS,
    REST,
    SPEC,
    VIEWS,
    Calls,
    Images,
    Seeing,
    fkd_of,
    from_fkd,
    kdcache,
    ml_dr_of,
    one,
    saved,
    tinyvit_of,
)

from kdcache import dump_teacher
from kdcache.config.transform import Transform
from kdcache.curate.decoded_files import logits_of_cache
from kdcache.curate.dense_logits import cache_of_logits
from kdcache.curate.foreign import cache_of_files
from kdcache.data.transforms import transform_for_evaluation
from kdcache.data.views import View
from kdcache.dump.check_teacher import compare_with_teacher
from kdcache.errors import CorruptError, KdcacheError, MismatchError, UsageError

COORDS, FLIPS = np.full((VIEWS, 4), 0.25, np.float32), np.zeros(VIEWS, bool)


PAIRS = np.stack([np.tile(np.arange(5.0), (VIEWS, 1)), np.full((VIEWS, 5), 0.1)], axis=1).astype(np.float32)


def off(values: Any, place: Any, value: float) -> Any:
    made = values.copy()
    made[place] = value
    return made


WRONG_FKD: dict[str, tuple[Any, str]] = {
    "a box that is NaN": ([off(COORDS, (1, 2), math.nan), FLIPS, PAIRS], "which is not a box in fractions"),
    "an infinite box": ([off(COORDS, (1, 2), math.inf), FLIPS, PAIRS], "which is not a box in fractions"),
    "a negative box": ([off(COORDS, (0, 0), -0.5), FLIPS, PAIRS], "which is not a box in fractions"),
    "an empty box": ([off(COORDS, (0, 3), 0), FLIPS, PAIRS], "which is not a box in fractions"),
    "a box outside": ([off(COORDS, (0, 1), 0.9), FLIPS, PAIRS], "which is not a box in fractions"),
    "a flip that is none": ([COORDS, np.full(VIEWS, 2), PAIRS], "which is not a box in fractions"),
    "fewer flips": ([COORDS, FLIPS[1:], PAIRS], "flips"),
    "other crops": ([COORDS[1:], FLIPS[1:], PAIRS[1:]], "2 crops"),
    "another k": ([COORDS, FLIPS, PAIRS[:, :, :4]], "with 4 classes"),
    "two parts": ([COORDS, PAIRS], "does not hold coords"),
    "a class too many": ([COORDS, FLIPS, off(PAIRS, (1, 0, 4), CLASSES)], "holds classes from 0 to 12"),
    "a class twice": ([COORDS, FLIPS, off(PAIRS, (1, 0, 4), 0)], "twice"),
    "half a class": ([COORDS, FLIPS, off(PAIRS, (1, 0, 4), 4.5)], "are not integers"),
    "a class that is NaN": ([COORDS, FLIPS, off(PAIRS, (1, 0, 4), math.nan)], "holds classes from -1"),
    "a negative probability": ([COORDS, FLIPS, off(PAIRS, (1, 1, 4), -0.1)], "are not probabilities"),
    "a probability that is NaN": ([COORDS, FLIPS, off(PAIRS, (1, 1, 4), math.nan)], "are not probabilities"),
    "more than all": ([COORDS, FLIPS, off(PAIRS, (1, 1, 4), 0.9)], "are not probabilities"),
    "other classes": ([COORDS, FLIPS, np.full((VIEWS, 11), 1 / 11, np.float32)], "neither"),
    "hard labels": ([COORDS, FLIPS, np.zeros(VIEWS, np.int64)], "hard labels"),
    "words": (["a", "b", "c"], "holds coords"),
    "objects": ([COORDS, FLIPS, np.array([{}])], "cannot be read"),
    "one crop many times": (
        [
            torch.tensor(COORDS[:1]).expand(10**6, 4),
            torch.zeros(1).expand(10**6),
            torch.tensor(PAIRS[:1]).expand(10**6, 2, 5),
        ],
        "is too small for coords",
    ),
    "code": ([COORDS, FLIPS, Calls()], "cannot be read"),
}


def with_zeros(path: Path) -> None:
    """With a million zeros beside what it holds."""
    with zipfile.ZipFile(path) as packed:
        members = {name: packed.read(name) for name in packed.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, held in members.items():
            packed.writestr(name, held + (b"." * 10**6 if name.endswith(".pkl") else b""))


@pytest.mark.parametrize("what", [*WRONG_FKD, "no file", "no bytes", "half of it", "other bytes", "zeros, compressed"])
def test_files_of_fkd_that_cannot_be_are_named(images: Images, tmp_path: Path, what: str) -> None:
    folder = fkd_of(images, tmp_path / "labels")
    path = folder / "train" / images.paths[11].parent.name / f"{images.paths[11].stem}.tar"
    whole, (held, why) = (
        path.read_bytes(),
        WRONG_FKD.get(what, (None, "missing" if what == "no file" else "cannot be read")),
    )
    if held is not None:
        saved(path, held)
    elif what == "no file":
        path.unlink()
    elif what == "zeros, compressed":
        with_zeros(path)
    else:
        path.write_bytes(
            {"no bytes": b"", "half of it": whole[: len(whole) // 2], "other bytes": b"PK" + whole[9:]}[what]
        )
    with pytest.raises(KdcacheError, match=why) as raised:
        cache_of_files(folder, "fkd", images.samples, tmp_path / "c.kdcache", transform=FRACTIONS, spec=SPEC)
    assert str(path) in str(raised.value)
    assert not (tmp_path / "c.kdcache").exists()


def deep(levels: int) -> Any:
    """Four of what is four of what is four ...: a few bytes, as each is one list four times."""
    values: Any = 0.4
    for _ in range(levels):
        values = [values] * 4
    return values


WRONG_ML_DR: dict[str, tuple[Any, str]] = {
    "another number": ((8, [ONE] * VIEWS), "is of sample 8"),
    "fewer": ((9, [ONE] * 2), "2 reinforcements"),
    "none": ((9, []), "no reinforcement"),
    "no pair": ([9], "does not hold a number"),
    "a number too long to be told": ((10**5_000, [ONE] * VIEWS), "does not hold a number"),
    "probabilities of probabilities": ((9, [ONE | {"prob": (deep(60), [3, 2, 1, 0])}] * VIEWS), "does not hold 4 prob"),
    "a box of three": (one(params=[(1, 2, 3), False]), "parameters for reinforcement 1 that do not fit"),
    "a box of halves": (one(params=[(1, 2, 3.5, 4), False]), "parameters for reinforcement 1 that do not fit"),
    "a box of words": (one(params=[("1", 2, 3, 4), False]), "parameters for reinforcement 1 that do not fit"),
    "a box too large for a float": (
        one(params=[(10**400, 2, 3, 4), False]),
        "parameters for reinforcement 1 that do not fit",
    ),
    "a negative box": (one(params=[(-1, 2, 3, 4), False]), "which is not a box in pixels"),
    "more parameters": (one(params=[(1, 2, 3, 4), False, 3]), "parameters for reinforcement 1 that do not fit"),
    "are not probabilities": (one(prob=None), "does not hold 4 probabilities"),
    "fewer probabilities": (one(prob=([0.5], [1])), "does not hold 4 probabilities"),
    "a class too many": (one(prob=([0.4, 0.2, 0.1, 0.1], [3, 2, 1, 12])), "holds classes"),
    "code": ((9, [ONE, Calls(), ONE]), "cannot be read"),
    "arrays": ((9, [ONE, np.zeros(3), ONE]), "cannot be read"),
}


def hostile_pickle(body: bytes) -> bytes:
    return pickle.PROTO + b"\x05" + pickle.NONE + body + pickle.STOP


HOSTILE_ML_DR = {
    "a memo of a billion": (pickle.LONG_BINPUT + struct.pack("<I", 2**31), "does not hold a number"),
    "bytes that are not there": (pickle.BYTEARRAY8 + struct.pack("<Q", 10**9), r"cannot be read \(KeyError\)"),
}


@pytest.mark.parametrize("what", [*WRONG_ML_DR, *HOSTILE_ML_DR, "no file", "half of it", "zeros, compressed"])
def test_files_of_ml_dr_that_cannot_be_are_named(images: Images, tmp_path: Path, what: str) -> None:
    folder = ml_dr_of(images, tmp_path / "reinforced")
    samples = images.samples
    path, (held, why) = folder / "9.pth.tar", WRONG_ML_DR.get(what, (None, "is missing|cannot be read"))
    if what == "no file":
        path.unlink()
    elif what == "half of it":
        path.write_bytes(path.read_bytes()[:300])
    elif what in HOSTILE_ML_DR:
        body, why = HOSTILE_ML_DR[what]
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("archive/data.pkl", hostile_pickle(body))
    elif what == "zeros, compressed":
        with_zeros(path)
    else:
        path.unlink()
        torch.save(held, path, pickle_protocol=4)
    place = tmp_path / "c.kdcache"
    with pytest.raises(KdcacheError, match=why) as raised:
        cache_of_files(folder, "ml-dr", samples, place, spec=SPEC)
    assert str(path) in str(raised.value)
    assert not place.exists()


def test_a_box_outside_of_its_image_is_found_where_it_is_cut(images: Images, tmp_path: Path) -> None:
    folder = ml_dr_of(images, tmp_path / "reinforced")
    saved_as = {"params": [(1, 2, 300, 4), False], "prob": ONE["prob"]}
    torch.save((9, [ONE, saved_as, ONE]), folder / "9.pth.tar", pickle_protocol=4)
    with pytest.raises(CorruptError, match=r"sample 9 of image-folder/train, view 1: .* is not inside"):
        cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache", spec=SPEC)


def _without_keys(made: Path) -> None:
    (made / "rank1-keys.txt").unlink()


def _short(made: Path) -> None:
    values = made / "rank1-values.bin"
    values.write_bytes(values.read_bytes()[:-1])


def _other_class(made: Path) -> None:
    values = made / "rank0-values.bin"
    values.write_bytes(values.read_bytes()[:4] + struct.pack("<h", -5) + values.read_bytes()[6:])


def _not_there(made: Path) -> None:
    keys = made / "rank0-keys.txt"
    first, _, *others = keys.read_text().split()
    keys.write_text("\n".join([first, "nobody", *others]) + "\n")


def _empty(made: Path) -> None:
    shutil.rmtree(made)
    made.mkdir()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_without_keys, "rank1-keys.txt cannot be read"),
        (_short, "rank1-values.bin has 391 bytes"),
        (_other_class, "rank0-values.bin holds classes from -5"),
        (_not_there, "has no record with the key"),
        (_empty, "has no rank0-values.bin"),
    ],
)
def test_files_of_tinyvit_that_cannot_be_are_named(
    images: Images, tmp_path: Path, damage: Callable[[Path], None], why: str
) -> None:
    folder = tinyvit_of(images, tmp_path / "logits")
    damage(folder / "logits_top6_epoch1")
    with pytest.raises(CorruptError, match=why):
        cache_of_files(folder, "tinyvit", images.samples, tmp_path / "c.kdcache", spec=SPEC)
    assert not (tmp_path / "c.kdcache").exists()


WRONG_TRANSFORMS: dict[str, tuple[Transform | None, str]] = {
    "none": (None, "but not the rest of the transform"),
    "drawn here": (DRAWN, "but the transform starts with"),
    "pixels": (PIXELS, "boxes in the unit 'fraction'"),
    "behind something": ([*REST, FRACTIONS[0]], "but the transform starts with"),
    "twice": ([*FRACTIONS, FRACTIONS[0]], "has random steps after its recorded crop"),
    "and erased": ([*FRACTIONS, {"RandomErasing": {"p": 0.5}}], "has random steps after its recorded crop"),
    "no size": ([{"RecordedCrop": {}}, *REST], "missing"),
    "three sizes": ([{"RecordedCrop": {"size": [1, 2, 3]}}, *REST], "size must be a number of pixels or"),
    "another unit": ([{"RecordedCrop": {"size": 8, "unit": "inches"}}, *REST], "boxes in the unit 'fraction'"),
    "another interpolation": ([{"RecordedCrop": {"size": 8, "interpolation": "wild"}}, *REST], "must be one of"),
}


@pytest.mark.parametrize("what", WRONG_TRANSFORMS)
def test_other_transforms_than_of_such_crops_are_refused(images: Images, tmp_path: Path, what: str) -> None:
    transform, why = WRONG_TRANSFORMS[what]
    folder = fkd_of(images, tmp_path / "labels")
    with pytest.raises(UsageError, match=why):
        cache_of_files(folder, "fkd", images.samples, tmp_path / "c.kdcache", transform=transform, spec=SPEC)
    assert not (tmp_path / "c.kdcache").exists()


def test_a_recorded_crop_has_one_place(images: Images) -> None:
    boxes = np.array([[[0, 0, 1, 1, 0]] * COUNT], np.float32)
    astray: list[Transform] = [[*REST, FRACTIONS[0]], [FRACTIONS[0], *FRACTIONS], [*REST, {"DrawnElsewhere": {}}]]
    for steps in astray:
        with pytest.raises(UsageError, match="can only be the first step"):
            View(images.samples, steps, crops=lambda view: boxes[view])
    with pytest.raises(UsageError, match="whose boxes are recorded for training images only"):
        transform_for_evaluation(FRACTIONS, FRACTIONS)
    with pytest.raises(UsageError, match="need one that is not"):
        transform_for_evaluation(None, FRACTIONS)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--from", "fkd", "--to", "fkd"], "import first, and then export the cache"),
        (["--from", "fkd", "--top-k", "3"], "is only for --to"),
        (["--from", "fkd"], "also pass --pipeline"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, arguments: list[str], why: str) -> None:
    (tmp_path / "labels").mkdir()
    done = kdcache("convert", tmp_path / "labels", "-o", tmp_path / "out", *arguments)
    assert (done.exit_code, why in done.stderr) == (2, True)


def test_boxes_are_of_a_cache_and_of_no_dump(images: Images, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="whose boxes are stored in a cache"):
        dump_teacher(Seeing(CLASSES), images.samples, tmp_path / "c.kdcache", transform=FRACTIONS)
    cache = from_fkd(images, tmp_path)
    logits_of_cache(cache, tmp_path / "l.npz")
    with pytest.raises(UsageError, match="whose boxes are stored in a cache"):
        cache_of_logits(tmp_path / "l.npz", images.samples, tmp_path / "d.kdcache", transform=FRACTIONS)
    with pytest.raises(MismatchError, match="has the weights"):
        compare_with_teacher(cache, Seeing(CLASSES), images.samples)
