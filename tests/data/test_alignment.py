"""A data set in another order, a part of it, or with more: matched by content, it teaches what the whole one did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.cli import npz_recipe, ok, refused
from helpers.tiny import tiny_samples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Subset

from kdcache import open_cache
from kdcache.config.loader import load_pipeline
from kdcache.config.transform import Transform
from kdcache.data.alignment import align, apply_alignment, describe_alignment
from kdcache.data.datasets import load_split
from kdcache.data.images import ArrayImages, FileImages
from kdcache.data.replay import check_matches_cache, replay
from kdcache.data.samples import Samples, wrap
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError
from kdcache.train.inputs import CacheOptions, inputs_from_caches

RANDOM: Transform = [{"RandomHorizontalFlip": {"p": 0.5}}, {"ToDtype": {"dtype": "float32", "scale": True}}]


def arrays(keys: list[int], labels: list[int]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
    return np.array(keys, np.uint64), np.array(labels, np.int32)


@given(st.data())
def test_every_sample_is_matched_with_one_of_its_key_and_label(data: st.DataObject) -> None:
    # Against a plain loop, with few keys, so that many are there several times; a key decides nothing of the label.
    pairs = st.tuples(st.integers(0, 6), st.integers(-1, 2))
    cached = data.draw(st.lists(pairs, min_size=1, max_size=20))
    own = data.draw(st.lists(pairs, min_size=1, max_size=20))
    # A copy of an image that no row of the cache needs has another label there; without one, a row is missing.
    spare_keys = {pair[0] for pair in own if own.count(pair) > cached.count(pair)}
    relabeled = [pair for pair in cached if pair not in own and pair[0] in spare_keys]
    given_own, given_cached = (arrays([k for k, _ in some], [y for _, y in some]) for some in (own, cached))
    if relabeled:
        with pytest.raises(MismatchError, match=f"{len(relabeled)} samples have other labels"):
            align(*given_own, *given_cached)
        return
    found = align(*given_own, *given_cached)
    assert found.ids.tolist() == [i for i, pair in enumerate(cached) if pair in own]
    assert found.missing.tolist() == [i for i, pair in enumerate(cached) if pair not in own]
    assert [own[p] for p in found.positions] == [cached[i] for i in found.ids]
    assert found.extra.tolist() == [p for p in range(len(own)) if p not in set(found.positions.tolist())]
    for pair in set(own) & set(cached):
        used = {p for p in found.positions.tolist() if own[p] == pair}
        assert len(used) == min(own.count(pair), cached.count(pair)), "none is used twice while another is not"


@pytest.mark.parametrize(
    ("own", "missing"),
    [
        ([(1, 0), (2, 0)], [1]),
        ([(1, 1), (2, 0)], [0]),
        ([(2, 0)], [0, 1]),
        ([(1, 0), (1, 1)], [2]),
    ],
)
def test_an_image_under_two_labels_of_which_one_is_missing(own: list[tuple[int, int]], missing: list[int]) -> None:
    cached = [(1, 0), (1, 1), (2, 0)]
    found = align(*arrays([k for k, _ in own], [y for _, y in own]), *arrays([1, 1, 2], [0, 1, 0]))
    assert found.missing.tolist() == missing
    assert [own[p] for p in found.positions] == [cached[i] for i in found.ids]


def test_a_different_label_is_reported() -> None:
    with pytest.raises(MismatchError, match=r"sample 1 of the data set has label 3, and is sample 0 .* with label 5"):
        align(*arrays([8, 7], [0, 3]), *arrays([7, 8], [5, 0]))


def test_what_is_missing_and_extra_is_counted_and_named(tmp_path: Path) -> None:
    paths = []
    for number in range(5):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("L", (2, 2), number).save(paths[-1])
    samples = Samples("mine", "train", FileImages(paths), np.zeros(5, np.int32), ("one",), [])
    keys = samples.keys()
    cached = np.concatenate([keys[[3, 1]], np.arange(4, dtype=np.uint64)])
    found = align(keys, samples.labels, cached, np.zeros(6, np.int32))
    assert describe_alignment(samples, found) == (
        "2 samples of the cache are in mine/train, 4 are missing (sample 2 of the cache, sample 3 of the cache, "
        f"sample 4 of the cache, ...), 3 of its own are left out ({paths[0]}, {paths[2]}, {paths[4]})"
    )
    part = apply_alignment(samples, found)
    assert isinstance(part.images, FileImages)
    assert [*part.images.paths] == [paths[3], paths[1]]
    assert part.keys().tolist() == cached[:2].tolist()


class Pairs(torch.utils.data.Dataset[Any]):
    """A data set of somebody else."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 2, 2), float(index)), index % 3


def test_data_sets_of_other_libraries_are_put_in_the_order_of_the_cache() -> None:
    whole, turned = wrap(Pairs(), 3), wrap(Subset(Pairs(), [5, 3, 1, 0, 2, 4]), 3)
    found = align(turned.keys(), turned.labels, whole.keys(), whole.labels)
    again = apply_alignment(turned, found)
    assert again.ids is None
    assert again.keys().tolist() == whole.keys().tolist()
    assert again.labels.tolist() == whole.labels.tolist()


def test_views_of_a_part_are_those_of_the_whole() -> None:
    whole = tiny_samples(20)
    ids = np.array([2, 3, 7, 11, 19])
    assert isinstance(whole.images, ArrayImages)
    order = [19, 7, 2, 3, 11]
    copy = replace(whole, images=ArrayImages(whole.images.pixels[order]), labels=whole.labels[order])
    found = align(copy.keys(), copy.labels, whole.keys(), whole.labels)
    assert found.ids.tolist() == ids.tolist()
    part = apply_alignment(copy, found)
    for number in range(3):
        expected = View(whole, RANDOM, seed=4, view=number).__getitems__(ids.tolist())
        seen = View(part, RANDOM, seed=4, view=number).__getitems__(range(5))
        assert torch.equal(seen.images, expected.images)
        assert torch.equal(seen.labels, expected.labels)
        assert seen.ids.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="mixes each image with any other one of the cache"):
        View(part, [*RANDOM, {"MixUp": {"alpha": 1.0}}])


# The same through stage two.


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two random views of sixty images, and the teacher that it is of."""
    folder = tmp_path_factory.mktemp("work")
    recipe = npz_recipe(folder)
    with recipe.open("a") as opened:
        opened.write(f"transform: {json.dumps(RANDOM)}\neval_transform: {json.dumps(RANDOM[1:])}\n")
        opened.write("cache: {views: 2, seed: 3, shard_rows: 16}\n")
    ok("train-teacher", recipe, "-o", folder / "t", "--device", "cpu")
    ok("dump-teacher", recipe, "-o", folder / "c.kdcache", "--device", "cpu")
    return folder


def copy_of(work: Path, folder: Path, which: list[int], more: int = 0) -> Path:
    """A recipe over some of the same training images, in this order, and some others."""
    data = load_pipeline(work / "mine.yaml").dataset
    train = load_split(data, "train")
    assert isinstance(train.images, ArrayImages)
    pixels = train.images.pixels[which, 0].numpy()
    others = np.random.default_rng(1).integers(0, 255, (more, 8, 8), np.uint8)
    labels = np.concatenate([train.labels[which], np.zeros(more, np.int32)])
    np.savez(folder / "theirs.npz", images=np.concatenate([pixels, others]), labels=labels)
    text = (work / "mine.yaml").read_text()
    recipe = folder / "theirs.yaml"
    head = f"dataset: {{name: npz, root: {folder / 'theirs.npz'}, validation_fraction: 0, test_fraction: 0}}\n"
    recipe.write_text(head + text.split("\n", 1)[1])
    return recipe


DEVICE = ("--device", "cpu", "--set", "student.train.epochs=2")


def test_another_order_with_more_samples_trains_the_same_student(work: Path, tmp_path: Path) -> None:
    count = len(open_cache(work / "c.kdcache"))
    order = np.random.default_rng(2).permutation(count).tolist()
    same = copy_of(work, tmp_path, list(range(count)))
    ok("train-student", same, "--cache", work / "c.kdcache", "-o", tmp_path / "same", *DEVICE)
    theirs = copy_of(work, tmp_path, order, more=4)
    train = ["train-student", theirs, "--cache", work / "c.kdcache", "-o", tmp_path / "theirs", *DEVICE]
    assert "the cache holds" in refused(4, *train)
    ok(*train, "--align")
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("same", "theirs")]
    assert weights[0] == weights[1]
    record = json.loads((tmp_path / "theirs" / "metrics.json").read_text())
    assert record["alignment"] == {"matched": count, "missing": 0, "extra": 4}


def test_a_part_is_trained_on_if_asked_for(work: Path, tmp_path: Path) -> None:
    cache = open_cache(work / "c.kdcache")
    count = len(cache)
    order = [i for i in np.random.default_rng(2).permutation(count).tolist() if i % 3]
    theirs = copy_of(work, tmp_path, order)
    train = ["train-student", theirs, "--cache", work / "c.kdcache", "-o", tmp_path / "run", *DEVICE]
    said = refused(4, *train, "--align")
    assert f"{count - len(order)} are missing (sample 0 of the cache, sample 3 of the cache" in said
    assert "--allow-missing" in said
    ok(*train, "--allow-missing")
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["alignment"] == {"matched": len(order), "missing": count - len(order), "extra": 0}
    assert record["replay"][0]["checked"] > 0

    pipeline = load_pipeline(theirs)
    lessons = inputs_from_caches(pipeline, [cache], CacheOptions(allow_missing=True))
    teacher, ids = lessons.teacher, lessons.samples.ids
    assert teacher is not None
    assert ids is not None
    assert ids.tolist() == sorted(order)
    live, here = cache.teacher(), torch.arange(len(order))
    for view in (0, 1):
        teacher.prefetch([here[:7], here[7:]], view)
        got = torch.cat([teacher(here[:7], view), teacher(here[7:], view)])
        assert torch.equal(got, live(torch.from_numpy(ids), view))
    drawn = teacher.order(torch.Generator().manual_seed(0))
    assert sorted(drawn.tolist()) == here.tolist()
    assert drawn.tolist() != here.tolist()
    check_matches_cache(cache, lessons.samples, None, None)
    assert replay(cache, lessons.samples).rounded == 0


def test_pixels_of_a_part_are_still_checked(work: Path) -> None:
    cache = open_cache(work / "c.kdcache")
    whole = load_split(load_pipeline(work / "mine.yaml").dataset, "train")
    ids = np.arange(0, len(cache), 2)
    assert isinstance(whole.images, ArrayImages)
    images = ArrayImages(whole.images.pixels[ids + 1])
    shifted = Samples("x", "train", images, whole.labels[ids], whole.class_names, [], ids)
    with pytest.raises(MismatchError, match="is not what the teacher"):
        replay(cache, shifted)


def test_another_data_set_altogether(work: Path, tmp_path: Path) -> None:
    theirs = copy_of(work, tmp_path, [], more=9)
    train = ["train-student", theirs, "--cache", work / "c.kdcache", "-o", tmp_path / "run", *DEVICE]
    assert "no sample of" in refused(4, *train, "--align")
    message = refused(2, "train-student", theirs, "--align", "-o", tmp_path / "run", *DEVICE)
    assert "match samples with a cache, and there is none" in message
