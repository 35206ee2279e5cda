"""Files of TinyViT become caches of rows."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.foreign import (
    CLASSES,
    COUNT,
    SPEC,
    VIEWS,
    Images,
    as_json,
    kdcache,
    logits_of,
    stored,
    tinyvit_of,
)
from helpers.tiny import tiny_samples

from kdcache import CachedDataset, open_cache
from kdcache.cache.inspect.audit import audit
from kdcache.curate.foreign import cache_of_files
from kdcache.curate.select import select
from kdcache.errors import MismatchError, UsageError


def tinyvit_records(folder: Path, k: int = 6) -> dict[tuple[int, str], bytes]:
    """The record of each epoch and key; of several the first."""
    found: dict[tuple[int, str], bytes] = {}
    size = 4 + 4 * k
    for epoch in range(VIEWS):
        for rank in sorted((folder / f"logits_top{k}_epoch{epoch}").glob("rank*-keys.txt")):
            values = rank.with_name(rank.name.replace("keys.txt", "values.bin")).read_bytes()
            for row, key in enumerate(rank.read_text().split()):
                found.setdefault((epoch, key), values[row * size : (row + 1) * size])
    return found


@pytest.mark.parametrize("names", [False, True])
def test_tinyvits_rows_can_be_read_and_written_again(images: Images, tmp_path: Path, names: bool) -> None:
    folder, out = tinyvit_of(images, tmp_path / "logits", names), tmp_path / "c.kdcache"
    pipeline = images.write(None)
    made = as_json("convert", folder, "--from", "tinyvit", "--pipeline", pipeline, "-o", out)
    assert made["plan"]["views"]["transform"][0].keys() == {"DrawnElsewhere"}
    cache = open_cache(out)
    assert audit(out).failure is None
    records = tinyvit_records(folder)
    for view in range(VIEWS):
        found = logits_of(cache, view).softmax(dim=1)
        for number, path in enumerate(images.paths):
            _, *kept = struct.unpack("<i6h6e", records[view, path.stem if names else str(number)])
            even = max(1 - sum(kept[6:]), 0) / (CLASSES - 6)
            expected = torch.full((CLASSES,), even)
            expected[kept[:6]] = torch.tensor(kept[6:])
            torch.testing.assert_close(found[number], expected, rtol=2e-3, atol=2e-3)
    with_images = ["--pipeline", pipeline] if names else []
    as_json("convert", out, "--to", "tinyvit", "-o", tmp_path / "again", *with_images)
    again = tinyvit_records(tmp_path / "again")
    assert again.keys() == records.keys()
    for key, record in records.items():
        seed, *kept = struct.unpack("<i6h6e", record)
        found_seed, *found_kept = struct.unpack("<i6h6e", again[key])
        assert (found_seed, found_kept[:6]) == (seed, kept[:6])
        assert found_kept[6:] == pytest.approx(kept[6:], rel=2e-3, abs=1e-4)


def test_whatever_needs_no_images_works_with_tinyvits_rows(images: Images, tmp_path: Path) -> None:
    out, pipeline = tmp_path / "c.kdcache", images.write(None)
    cache = cache_of_files(tinyvit_of(images, tmp_path / "logits"), "tinyvit", images.samples, out, spec=SPEC)
    for command in (["info", out], ["verify", out], ["summarize", out], ["diff", out, out], ["card", out]):
        done = kdcache(*command)
        assert done.exit_code == 0, done.output
    chosen = np.array([20, 3, 11, 7])
    some = select(cache, tmp_path / "some.kdcache", samples=chosen)
    assert audit(some.path).failure is None
    torch.testing.assert_close(logits_of(some, 1), logits_of(cache, 1)[chosen], rtol=0, atol=0)
    kept, all_of_them = stored(some), stored(cache)
    np.testing.assert_array_equal(kept["seeds"], all_of_them["seeds"][:, chosen])
    assert all_of_them["seeds"].dtype == np.int32
    assert (all_of_them["seeds"] == 2**31 - 1 - np.arange(COUNT)).all()
    why = "drawn by code outside of kdcache"
    for command in (
        ["train-student", pipeline, "--cache", out, "-o", tmp_path / "run"],
        ["verify", out, pipeline, "--replay"],
    ):
        done = kdcache(*command)
        assert (done.exit_code, why in done.stderr, "teacher()" in done.stderr) == (2, True, True)
    with pytest.raises(UsageError, match=why):
        CachedDataset(images.samples, cache)


def test_epochs_that_are_no_views_and_other_images_are_refused(images: Images, tmp_path: Path) -> None:
    folder = tinyvit_of(images, tmp_path / "logits")
    (folder / "logits_top6_epoch1").rename(folder / "logits_top6_epoch9")
    with pytest.raises(UsageError, match=r"epochs \[0, 2, 9\]"):
        cache_of_files(folder, "tinyvit", images.samples, tmp_path / "c.kdcache")
    (folder / "logits_top6_epoch9").rename(folder / "logits_top6_epoch1")
    with pytest.raises(MismatchError, match="not in tiny/train, such as 20"):
        cache_of_files(folder, "tinyvit", tiny_samples(20, CLASSES), tmp_path / "c.kdcache")
