"""The images that the teacher saw, replayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import dask
import numpy as np
import pytest
import torch
from helpers.caches import Made
from helpers.corruption import flipped
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from helpers.verify import TOP_3, another_library, column, rewrite
from torch import Tensor

from kdcache import dump_teacher
from kdcache.cache.format.zarr_store import read_inputs
from kdcache.cache.inspect.audit import audit
from kdcache.config.cache import CacheSpec
from kdcache.data.replay import Replay, replay
from kdcache.data.seeding import seed_of
from kdcache.errors import MismatchError


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_findings_do_not_depend_on_threads(
    threads: int, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(copy, "logsumexp", (0,), lambda rows: np.where(np.arange(12) % 5 == 0, math.inf, rows))
    rewrite(copy, "statistics", (1, 6), column(TOP_3, "entropy", -1.0))
    for name in ("data.zarr/tail/c/1/1/0", "data.zarr/sketches/c/1/1/0", "commits/0/1.json"):
        (copy / name).write_bytes(flipped((copy / name).read_bytes(), 9))
    (copy / "commits/x").touch()
    usual = audit(copy)
    assert len(usual.problems) == 3 + 1 + 2 * 2 + 1
    monkeypatch.setattr("kdcache.cache.format.verified_files.ThreadPoolExecutor", partial(ThreadPoolExecutor, threads))
    with dask.config.set(num_workers=threads):
        assert [audit(copy) for _ in range(3)] == 3 * [usual]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_views_are_replayed_to_the_bit_by_any_number_of_workers(workers: int, seen: Made) -> None:
    assert replay(seen.cache, seen.samples, num_workers=workers) == Replay(68, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: pixels.index_put((torch.tensor(0), torch.tensor(3), torch.tensor(3)), pixels[0, 3, 3] + 1),
        lambda pixels: pixels.roll(1, dims=2),
        lambda pixels: pixels * math.nan,
        lambda pixels: pixels + 1e-3,
    ],
    ids=["one pixel", "shifted", "NaN", "brighter"],
)
def test_other_pixels_are_refused_by_the_first_of_them(
    change: Callable[[Tensor], Tensor], seen: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    another_library(monkeypatch, lambda p, sample, view: change(p) if (view, sample) >= (1, 19) else p)
    with pytest.raises(MismatchError, match="view 1 of sample 21 is not what the teacher") as caught:
        replay(seen.cache, seen.samples)
    assert caught.value.exit_code == 4
    stored = read_inputs(seen.cache.path, seen.cache.manifest.plan, 1).fingerprints[7]
    assert f"in the cache {stored:08x}" in caught.value.what


def test_images_of_another_seed_are_refused(seen: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.data.views.seed_of", lambda seed, *parts: seed_of(seed + 1, *parts))
    with pytest.raises(MismatchError, match="view 0 of sample"):
        replay(seen.cache, seen.samples)


@pytest.mark.parametrize("scale", [1, 65_535])
def test_pixels_that_are_rounded_otherwise_are_counted(
    scale: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = tiny_samples(20)
    transform = [*FLIP, {"Normalize": {"mean": [0.0], "std": [1 / scale]}}]
    cache = dump_teacher(TinyTeacher(), samples, tmp_path / "c.kdcache", transform=transform, spec=CacheSpec(views=2))
    assert replay(cache, samples) == Replay(40, 0)
    another_library(monkeypatch, lambda p, sample, view: p * (1 + 2**-23) if sample % 4 == 1 else p)
    assert replay(cache, samples) == Replay(40, 10)


def test_a_quick_look_is_spread_over_views_and_samples(seen: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[tuple[int, int]] = []

    def note(pixels: Tensor, sample: int, view: int) -> Tensor:
        looked.append((view, sample))
        return pixels

    another_library(monkeypatch, note)
    assert replay(seen.cache, seen.samples, limit=8) == Replay(8, 0)
    assert len(set(looked)) == 8
    for view in range(2):
        samples = [sample for number, sample in looked if number == view]
        assert len(samples) == 4
        assert min(samples) < 50 <= max(samples)
    assert replay(seen.cache, seen.samples, limit=1000) == Replay(68, 0)
