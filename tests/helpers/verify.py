"""Caches for the tests of verify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import torch
from click.testing import Result
from torch import Tensor

from helpers.cli import kdcache
from helpers.corruption import refresh
from helpers.tiny import FLIP
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.read_records import read_manifest
from kdcache.cache.format.schema import MANIFEST, PLAN, canonical, commit_file
from kdcache.cache.inspect.audit import Audit
from kdcache.config.cache import CacheSpec
from kdcache.data.views import Batch, View

SPEC = CacheSpec(top_k=3, tail="lowrank", rank=4, views=2, seed=5, batch_size=5)


LABELS = [0, -1, 2, 3, 4, 5, 6, 7, -1, 9, 0, 1]


Values = npt.NDArray[Any]


def where(found: Audit) -> list[str]:
    return [finding.where for finding in found.problems]


def failed(code: int, *arguments: object) -> Result:
    """What a verification printed that came to nothing good: a report, then one error with its fix."""
    done = kdcache("verify", *arguments)
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit)
    assert "error: " in done.stderr
    assert "fix: " in done.stderr
    assert "Traceback" not in done.output
    return done


def unseal(cache: Path, *missing: tuple[int, int]) -> None:
    """As a killed run leaves a cache: of the `missing` shards there are files, of any content, and no marker."""
    plan = read_manifest(cache / MANIFEST).plan
    (cache / PLAN).write_bytes(canonical(plan))
    (cache / MANIFEST).unlink()
    for view, shard in missing:
        (cache / commit_file(view, shard)).unlink()
        (cache / f"data.zarr/logsumexp/c/{view}/{shard}").write_bytes(b"half")
        (cache / f"data.zarr/fingerprints/c/{view}/{shard}").unlink()


def rewrite(cache: Path, name: str, at: tuple[int, ...], change: Callable[[Values], object]) -> None:
    """Change values of an array with TensorStore, and let the manifest vouch for the files as they are then."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache / "data.zarr" / name)}}
    array = tensorstore.open(spec, open=True, read=True, write=True).result()
    before = np.array(array[at].read().result())
    after = np.asarray(change(before.copy()), before.dtype)
    assert not np.array_equal(before, after)
    array[at].write(after).result()
    refresh(cache)


def column(encoding: Encoding, name: str, value: float) -> Callable[[Values], Values]:
    def change(row: Values) -> Values:
        row[encoding.statistics.index(name)] = value
        return row

    return change


TOP_3 = Encoding(num_classes=10, top_k=3, tail="lowrank", rank=4, dtype="float16")


CROP = [{"RandomCrop": {"size": 4, "padding": 1}}, *FLIP]


def another_library(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, int, int], Tensor]) -> None:
    """Let every image come out of its transform changed, by (pixels, sample, view)."""
    original = View.batch

    def batch(view: View, ids: Sequence[int], number: int) -> Batch:
        made = original(view, ids, number)
        changed = [change(image, index, number) for image, index in zip(made.images, made.ids.tolist(), strict=True)]
        return made._replace(images=torch.stack(changed))

    monkeypatch.setattr(View, "batch", batch)
