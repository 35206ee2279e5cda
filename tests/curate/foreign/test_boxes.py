"""The array of crops in a cache."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
from helpers.foreign import (
    COUNT,
    FRACTIONS,
    SPEC,
    VIEWS,
    Floats,
    Images,
    fkd_of,
    kdcache,
    logits_of,
    ml_dr_of,
    stored,
    tinyvit_of,
)
from helpers.format_text import Kept, check_arrays

from kdcache import Cache, open_cache
from kdcache.cache.format import zarr_store
from kdcache.cache.inspect.audit import audit
from kdcache.config.loader import load_pipeline
from kdcache.curate.foreign import cache_of_files
from kdcache.curate.merge import merge
from kdcache.curate.select import select
from kdcache.data.replay import replay, teacher_view
from kdcache.errors import CorruptError, IncompleteError, MismatchError
from kdcache.train.train import train_student


def boxes_of(images: Images) -> Floats:
    """[V, N, 5], in pixels."""
    boxes = np.array(images.boxes, np.float32).swapaxes(0, 1)
    return np.concatenate([boxes, images.flips.T[..., None]], axis=2)


def test_any_zarr_reads_the_boxes_and_other_caches_have_none(images: Images, cropped: Cache, dumped: Cache) -> None:
    np.testing.assert_array_equal(stored(cropped)["crops"], boxes_of(images))
    assert stored(dumped) == {}
    assert "level" not in dumped.manifest.model_dump()["plan"]["teacher"]


def test_the_arrays_are_those_of_the_format(images: Images, cropped: Cache, tmp_path: Path) -> None:
    logits = tinyvit_of(images, tmp_path / "logits")
    drawn = cache_of_files(logits, "tinyvit", images.samples, tmp_path / "seeds.kdcache", spec=SPEC)
    for cache in (cropped, drawn):
        live = np.stack([logits_of(cache, view).numpy() for view in range(VIEWS)])
        check_arrays(Kept(cache, live))
    assert not any(values.any() for values in zarr_store.read_inputs(drawn.path, drawn.manifest.plan, 1))


def test_selected_and_merged_samples_keep_their_boxes(images: Images, cropped: Cache, tmp_path: Path) -> None:
    chosen = np.array([9, 2, 17, 4, 25])
    others = np.setdiff1d(np.arange(COUNT), chosen)
    parts = [
        select(cropped, tmp_path / f"{name}.kdcache", samples=ids, data=images.samples)
        for name, ids in (("some", chosen), ("rest", others))
    ]
    whole = merge(parts, tmp_path / "whole.kdcache", data=images.samples)
    order = np.concatenate([chosen, others])
    np.testing.assert_array_equal(stored(whole)["crops"], boxes_of(images)[:, order])
    for view in range(VIEWS):
        torch.testing.assert_close(logits_of(whole, view), logits_of(cropped, view)[order], rtol=0, atol=0)
    for cache in (*parts, whole):
        assert audit(cache.path).failure is None
    # Their images, in their order, are seen as the teacher saw them.
    samples = images.samples
    from kdcache.data.alignment import align, apply_alignment

    found = align(samples.keys(), samples.labels, whole.sample_keys, whole.labels)
    assert replay(whole, apply_alignment(samples, found)).rounded == 0
    fewer = select(cropped, tmp_path / "fewer.kdcache", views=[0, 1], top_k=2)
    np.testing.assert_array_equal(stored(fewer)["crops"], boxes_of(images)[:2])


def test_parts_with_other_views_are_no_parts_of_one(images: Images, cropped: Cache, tmp_path: Path) -> None:
    first = select(cropped, tmp_path / "first.kdcache", samples=np.arange(8))
    rest = select(cropped, tmp_path / "rest.kdcache", samples=np.arange(8, 16), views=[0])
    with pytest.raises(MismatchError, match="views: 3, 1"):
        merge([first, rest], tmp_path / "whole.kdcache")


def test_a_mirror_brings_the_boxes_of_the_views_that_are_asked_for(
    images: Images, cropped: Cache, tmp_path: Path
) -> None:
    url = f"file://{tmp_path / 'shared'}"
    assert kdcache("push", cropped.path, url).exit_code == 0
    pulled = kdcache("pull", url, tmp_path / "here", "--views", "0-1")
    assert pulled.exit_code == 0, pulled.output
    cache = open_cache(tmp_path / "here")
    assert cache.views == (0, 1)
    files = {path.name for path in (tmp_path / "here" / "data.zarr" / "crops" / "c").iterdir()}
    assert files == {"0", "1"}
    assert replay(cache, images.samples).rounded == 0
    assert cache.crops is not None
    np.testing.assert_array_equal(cache.crops(1), boxes_of(images)[1])
    backwards = np.arange(COUNT)[::-1]
    turned = select(cache, tmp_path / "turned.kdcache", views=[0, 1], samples=backwards, data=images.samples)
    torch.testing.assert_close(logits_of(turned, 1), logits_of(cropped, 1).flip(0), rtol=0, atol=0)
    with pytest.raises(IncompleteError, match="holds views 0, 1 of 3, not view 2"):
        select(cache, tmp_path / "all.kdcache", samples=backwards, data=images.samples)


def test_caches_of_other_crops_are_not_joined(images: Images, cropped: Cache, tmp_path: Path) -> None:
    moved = Images.__new__(Images)
    vars(moved).update(vars(images))
    moved.flips = ~images.flips
    folder = ml_dr_of(moved, tmp_path / "flipped")
    other = cache_of_files(folder, "ml-dr", images.samples, tmp_path / "d.kdcache", spec=SPEC)
    pipeline = load_pipeline(images.write("pixels"))
    train_student(pipeline, [cropped, cropped], tmp_path / "both")
    with pytest.raises(MismatchError, match="saw another crop of sample 0 in view 0"):
        train_student(pipeline, [cropped, other], tmp_path / "run")


def hostile(cache: Cache, tmp_path: Path, view: int, sample: int, box: list[float]) -> Path:
    """The cache with another box, sealed again by whoever made it so."""
    from kdcache.cache.format import array_specs
    from kdcache.cache.format.read_records import read_commit, read_manifest
    from kdcache.cache.format.schema import MANIFEST, canonical, commit_file, seal
    from kdcache.cache.format.verified_files import record_of

    path = tmp_path / "hostile.kdcache"
    shutil.copytree(cache.path, path)
    folder = path / "data.zarr" / "crops"
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    store = tensorstore.open(spec).result()
    store[view, sample].write(np.array(box, np.float32)).result()
    manifest = read_manifest(path / MANIFEST)
    files = dict(manifest.files)
    for shard in range(manifest.plan.shards):
        marker = path / commit_file(view, shard)
        commit = read_commit(marker)
        again = {name: record_of(path / name) for name in commit.files}
        marker.write_bytes(canonical(commit.model_copy(update={"files": again})))
        files |= again | {commit_file(view, shard): record_of(marker)}
    (path / MANIFEST).write_bytes(canonical(seal(manifest.plan, manifest.summary, files)))
    assert array_specs.recorded_arrays(manifest.plan).keys() == {"crops"}
    return path


BOXES: dict[str, list[float]] = {
    "NaN": [math.nan, 0, 1, 1, 0],
    "infinite": [0, 0, math.inf, 1, 0],
    "negative": [-1, 0, 1, 1, 0],
    "empty": [0, 0, 0, 1, 0],
    "halves": [0.5, 0, 1, 1, 0],
    "a flip of 2": [0, 0, 1, 1, 2],
    "too large for a float": [0, 0, 2**25, 1, 0],
}


@pytest.mark.parametrize("what", BOXES)
def test_hostile_boxes_are_found_and_refused(images: Images, cropped: Cache, tmp_path: Path, what: str) -> None:
    path = hostile(cropped, tmp_path, 1, 11, BOXES[what])
    failure = audit(path).failure
    assert failure is not None
    assert "view 1, sample 11" in failure.what
    cache = open_cache(path)
    assert cache.crops is not None
    with pytest.raises(CorruptError, match=r"holds the invalid box .*: view 1, sample 11"):
        teacher_view(cache, images.samples, 1)[0]


def test_a_changed_byte_of_the_boxes_is_found(cropped: Cache) -> None:
    file = cropped.path / "data.zarr" / "crops" / "c" / "2" / "1" / "0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CorruptError, match="crops/c/2/1/0"):
        open_cache(cropped.path)


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_a_conversion_that_stopped_goes_on_to_the_same_digest(images: Images, tmp_path: Path, scheduler: str) -> None:
    folder = fkd_of(images, tmp_path / "labels")
    made = cache_of_files(
        folder, "fkd", images.samples, tmp_path / "whole.kdcache", transform=FRACTIONS, spec=SPEC, name="t",
        scheduler=scheduler,
    )  # fmt: skip
    from kdcache.cache.format.schema import MANIFEST, PLAN, canonical, commit_file

    stopped = tmp_path / "stopped.kdcache"
    shutil.copytree(made.path, stopped)
    (stopped / MANIFEST).unlink()
    (stopped / PLAN).write_bytes(canonical(made.manifest.plan))
    for view, shard in ((0, 1), (2, 1), (1, 0)):
        (stopped / commit_file(view, shard)).unlink()
    again = cache_of_files(folder, "fkd", images.samples, stopped, transform=FRACTIONS, spec=SPEC, name="t")
    assert again.manifest.digest == made.manifest.digest
