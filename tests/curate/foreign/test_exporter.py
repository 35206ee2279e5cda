"""Caches become files of other projects."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torchvision.transforms as v1
from helpers.foreign import (
    CLASSES,
    COUNT,
    DRAWN,
    FRACTIONS,
    MEAN,
    PIXELS,
    REST,
    SIZE,
    SPEC,
    STD,
    VIEWS,
    Floats,
    Images,
    Seeing,
    as_json,
    check_same_pixels,
    fkd_of,
    fkd_shows,
    kdcache,
    logits_of,
    ml_dr_of,
    ml_dr_says,
    unpacked,
)
from helpers.tiny import TinyTeacher, tiny_samples
from torch import Tensor
from torchvision.transforms import functional as v1_functional

from kdcache import Cache, Samples, dump_teacher
from kdcache.cli.convert import _SOURCES, _TARGETS
from kdcache.config.cache import CacheSpec
from kdcache.config.transform import Transform
from kdcache.curate.foreign import SOURCES, TARGETS, cache_of_files, files_of_cache
from kdcache.data.replay import teacher_view
from kdcache.errors import UsageError


def ml_dr_shows(images: Images, folder: Path, number: int, view: int) -> Tensor:
    """What ml-dr's students are shown."""
    found, samples = unpacked(folder / f"{number}.pth.tar")
    assert found == number
    box, flip = samples[view]["params"]
    size = unpacked(folder / "config.pth.tar")["reinforce"]["image_augmentation"]["random_resized_crop"]["size"]
    sides = [size, size] if isinstance(size, int) else size
    cut = v1_functional.resized_crop(images.image(number), *box, sides, v1.InterpolationMode.BILINEAR)
    cut = v1_functional.hflip(cut) if flip else cut
    return torch.as_tensor(v1_functional.normalize(v1_functional.to_tensor(cut), MEAN, STD))


SHOWS: dict[str, Callable[[Images, Path, int, int], Tensor]] = {"fkd": fkd_shows, "ml-dr": ml_dr_shows}


def said_by(target: str, images: Images, folder: Path, number: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """(probabilities, classes) [V, k] of a sample."""
    if target == "fkd":
        path = images.paths[number]
        _, _, output = unpacked(folder / "train" / path.parent.name / f"{path.stem}.tar")
        return output[:, 1], output[:, 0].astype(np.int64)
    pairs = [one["prob"] for one in unpacked(folder / f"{number}.pth.tar")[1]]
    for values, classes in pairs:
        ml_dr_says(values, classes)
    return np.array([values for values, _ in pairs]), np.array([classes for _, classes in pairs])


@pytest.mark.parametrize("target", ["fkd", "ml-dr"])
@pytest.mark.parametrize("flips", [True, False])
def test_their_readers_cut_what_our_teacher_saw(
    images: Images, dumped: Cache, tmp_path: Path, target: str, flips: bool
) -> None:
    cache = dumped
    if not flips:
        spec = CacheSpec(shard_rows=8, views=VIEWS, seed=5)
        cache = dump_teacher(
            Seeing(CLASSES), images.samples, tmp_path / "c.kdcache", transform=[DRAWN[0], *REST], spec=spec
        )
    out = tmp_path / "out"
    files_of_cache(cache, target, out, images.samples, top_k=5)
    for view in range(VIEWS):
        seen = teacher_view(cache, images.samples, view)
        probabilities = logits_of(cache, view).softmax(dim=1).numpy()
        for number in range(COUNT):
            shown = SHOWS[target](images, out, number, view)
            check_same_pixels(shown, seen[number].images[0])
            values, classes = (found[view] for found in said_by(target, images, out, number))
            np.testing.assert_allclose(values, probabilities[number][classes], rtol=1e-5)
            np.testing.assert_allclose(values, np.sort(probabilities[number])[:-6:-1], rtol=1e-5)
            assert len(set(classes.tolist())) == 5


@pytest.mark.parametrize("source", ["fkd", "ml-dr"])
@pytest.mark.parametrize("target", ["fkd", "ml-dr"])
def test_there_and_back_again(images: Images, tmp_path: Path, source: str, target: str) -> None:
    folder = (fkd_of if source == "fkd" else ml_dr_of)(images, tmp_path / "theirs")
    shown = {"fkd": FRACTIONS, "ml-dr": PIXELS}
    cache = cache_of_files(folder, source, images.samples, tmp_path / "a.kdcache", transform=shown[source], spec=SPEC)
    files_of_cache(cache, target, tmp_path / "out", images.samples)
    for number, view in itertools.product(range(0, COUNT, 5), range(VIEWS)):
        shown_there = SHOWS[target](images, tmp_path / "out", number, view)
        check_same_pixels(shown_there, images.cut(number, view))
    again = cache_of_files(
        tmp_path / "out", target, images.samples, tmp_path / "b.kdcache", transform=shown[target], spec=SPEC
    )
    for view in range(VIEWS):
        torch.testing.assert_close(
            logits_of(again, view).softmax(dim=1), logits_of(cache, view).softmax(dim=1), rtol=5e-3, atol=1e-4
        )
        mine, theirs = (teacher_view(made, images.samples, view) for made in (cache, again))
        check_same_pixels(mine[3].images, theirs[3].images)


def test_files_are_written_on_the_command_line_and_read_again(images: Images, dumped: Cache, tmp_path: Path) -> None:
    pipeline, pixels = images.write(None), images.write("pixels")
    said = as_json(
        "convert", dumped.path, "--to", "ml-dr", "--pipeline", pipeline, "-o", tmp_path / "out", "--top-k", 4
    )
    assert (said["samples"], said["views"], said["top_k"]) == (COUNT, VIEWS, 4)
    assert torch.load(tmp_path / "out" / "9.pth.tar", weights_only=True)[0] == 9  # as torch reads files by now
    done = kdcache("convert", tmp_path / "out", "--from", "ml-dr", "--pipeline", pixels, "-o", tmp_path / "c.kdcache")
    assert done.exit_code == 0, done.output
    assert "4 classes per row" in kdcache(
        "convert", dumped.path, "--to", "fkd", "--pipeline", pipeline, "-o", tmp_path / "labels", "--top-k", 4
    ).stdout  # fmt: skip
    assert list(SOURCES) == list(TARGETS)
    assert list(_TARGETS.choices) == [*TARGETS, "jsonl", "parquet"]
    assert {*_SOURCES.choices} == {*SOURCES, "margin-mse", "llama-cpp", "vllm", "distillkit", "columns"}


def still(samples: Samples, out: Path, transform: Transform, views: int = 1) -> Cache:
    spec = CacheSpec(shard_rows=8, views=views)
    return dump_teacher(Seeing(CLASSES), samples, out, transform=transform, spec=spec)


def test_what_their_readers_would_show_otherwise_is_refused(images: Images, dumped: Cache, tmp_path: Path) -> None:
    out, samples = tmp_path / "out", images.samples
    whole = still(samples, tmp_path / "a.kdcache", [{"Resize": {"size": [SIZE, SIZE]}}, *REST])
    jitter: Transform = [DRAWN[0], {"ColorJitter": {"brightness": 0.5}}, *REST]
    jittered = still(samples, tmp_path / "b.kdcache", jitter, 2)
    for cache in (whole, jittered):
        with pytest.raises(UsageError, match="are not plain crops"):
            files_of_cache(cache, "fkd", out, samples)
    with pytest.raises(UsageError, match="by its own code"):
        files_of_cache(dumped, "tinyvit", out)
    with pytest.raises(UsageError, match="the cache stores 6"):
        files_of_cache(dumped, "fkd", out, samples, top_k=7)
    with pytest.raises(UsageError, match="need the images"):
        files_of_cache(dumped, "fkd", out)
    bicubic = still(
        samples, tmp_path / "d.kdcache", [{"RandomResizedCrop": {"size": SIZE, "interpolation": "bicubic"}}, *REST]
    )
    with pytest.raises(UsageError, match="only crops bilinearly"):
        files_of_cache(bicubic, "ml-dr", out, samples)
    files_of_cache(bicubic, "fkd", tmp_path / "fkd", samples)
    with pytest.raises(UsageError, match="exists already"):
        files_of_cache(bicubic, "fkd", tmp_path / "fkd", samples)
    assert not out.exists()
    assert not list(tmp_path.glob("*.partial"))


def test_images_without_names_are_refused_for_fkd_and_numbered_for_ml_dr(tmp_path: Path) -> None:
    samples = tiny_samples(20, CLASSES)
    cropped: Transform = [{"RandomResizedCrop": {"size": 4}}]
    cache = dump_teacher(TinyTeacher(CLASSES), samples, tmp_path / "c.kdcache", transform=cropped)
    with pytest.raises(UsageError, match="are not in files"):
        files_of_cache(cache, "fkd", tmp_path / "out", samples)
    (tmp_path / "labels").mkdir()
    with pytest.raises(UsageError, match="are not in files"):
        cache_of_files(tmp_path / "labels", "fkd", samples, tmp_path / "a.kdcache", transform=FRACTIONS)
