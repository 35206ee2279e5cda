"""Select, merge, push and pull of caches with several outputs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kdcache import Cache, dump_teacher, open_cache, wrap
from kdcache.cache.format import sharding
from kdcache.cache.format.array_specs import output_encoding, row_parts
from kdcache.cache.inspect.audit import audit
from kdcache.cache.push_pull import pull, push
from kdcache.curate.merge import merge
from kdcache.curate.select import select
from kdcache.errors import MismatchError, UsageError

OUTPUTS = {
    "features": {"encoding": "klt", "fidelity": 0.01},
    "hidden": {"encoding": "int8"},
    "age": {"kind": "score"},
    "color": {"kind": "classes"},
    "auxiliary": {"kind": "classes", "labels": True},
}


class Teacher(nn.Module):
    """Gives logits, vectors, scores, and the classes of two other heads."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(48, 64, generator=generator) / 7)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = images.flatten(1) @ self.weight
        return {
            "logits": hidden[:, :6],
            "features": hidden[:, :32],
            "hidden": hidden.relu(),
            "age": hidden[:, 6:8],
            "color": hidden[:, 8:11],
            "auxiliary": hidden[:, 11:17],
        }


def images(start: int = 0, stop: int = 300) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    pixels, labels = torch.randn(400, 3, 4, 4, generator=generator), torch.arange(400) % 6
    return TensorDataset(pixels[start:stop], labels[start:stop])


def dumped(out: Path, start: int = 0, stop: int = 300, **options: Any) -> Cache:
    return dump_teacher(Teacher(), images(start, stop), out, shard_rows=128, outputs=OUTPUTS, **options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return dumped(tmp_path_factory.mktemp("outputs") / "c.kdcache")


def values(cache: Cache, ids: Tensor | None = None) -> dict[str, Tensor]:
    ids = torch.arange(len(cache)) if ids is None else ids
    plan = cache.manifest.plan
    return {name: cache.teacher(name)(ids) for name in plan.output_names}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, of_output in found.items():
        assert torch.equal(of_output, expected[name]), name


def test_selected_samples_have_their_outputs(cache: Cache, tmp_path: Path) -> None:
    ids = np.array([5, 250, 17, 130])
    selected = select(cache, tmp_path / "s.kdcache", samples=ids, data=wrap(images(), 6))
    check_equal(values(selected), values(cache, torch.from_numpy(ids)))
    assert audit(selected.path).failure is None


def test_the_first_samples_are_taken_with_their_files(cache: Cache, tmp_path: Path) -> None:
    selected = select(cache, tmp_path / "s.kdcache", samples=np.arange(256))
    check_equal(values(selected), values(cache, torch.arange(256)))
    file = "data.zarr/outputs/hidden/values/c/0/1/0"
    assert selected.manifest.files[file] == cache.manifest.files[file]


@pytest.mark.parametrize("kept", [["logits"], ["features"], ["age", "logits"], ["hidden", "color"]])
def test_some_outputs_are_kept(kept: list[str], cache: Cache, tmp_path: Path) -> None:
    selected = select(cache, tmp_path / "s.kdcache", outputs=kept)
    check_equal(values(selected), {name: of for name, of in values(cache).items() if name in kept})
    assert audit(selected.path).failure is None
    assert open_cache(selected.path).manifest.plan.outputs == selected.manifest.plan.outputs
    others = {name for name in OUTPUTS if name not in kept}
    assert not any(f"outputs/{name}/" in file for name in others for file in selected.manifest.files)


def test_a_cache_of_the_logits_alone_is_one_that_never_had_others(cache: Cache, tmp_path: Path) -> None:
    selected = select(cache, tmp_path / "s.kdcache", outputs=["logits"])
    alone = dump_teacher(Teacher(), images(), tmp_path / "alone.kdcache", shard_rows=128)
    of_rows = {name: of for name, of in alone.manifest.files.items() if name.startswith("data.zarr")}
    assert {name: of for name, of in selected.manifest.files.items() if name.startswith("data.zarr")} == of_rows


def test_classes_and_a_shorter_head_leave_the_other_outputs_alone(cache: Cache, tmp_path: Path) -> None:
    kept = ["logits", "features", "hidden", "age", "color"]
    selected = select(cache, tmp_path / "s.kdcache", classes=["1", "3", "4"], outputs=kept)
    expected = values(cache)
    expected = {name: expected[name] for name in selected.manifest.plan.output_names}
    torch.testing.assert_close(
        selected.teacher()(torch.arange(300)), expected.pop("logits")[:, [1, 3, 4]], atol=5e-3, rtol=0
    )
    check_equal({name: of for name, of in values(selected).items() if name != "logits"}, expected)
    with pytest.raises(UsageError, match="output auxiliary has the classes of the data set"):
        select(cache, tmp_path / "t.kdcache", classes=["1", "3"])


def test_what_cannot_be_selected_is_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no output 'feature'"):
        select(cache, tmp_path / "s.kdcache", outputs=["feature"])
    with pytest.raises(UsageError, match="classes and top_k select from class logits, which are not kept"):
        select(cache, tmp_path / "s.kdcache", outputs=["features"], top_k=2)
    only = select(cache, tmp_path / "only.kdcache", outputs=["features"])
    with pytest.raises(UsageError, match="no output 'logits'"):
        select(only, tmp_path / "s.kdcache", outputs=["logits"])


def test_parts_are_merged_and_encoded_again_where_their_axes_differ(tmp_path: Path) -> None:
    first, second = dumped(tmp_path / "a.kdcache", 0, 150), dumped(tmp_path / "b.kdcache", 150, 300)
    with pytest.raises(MismatchError, match=r"have another (encoding|basis)"):
        merge([first, second], tmp_path / "m.kdcache")
    merged = merge([first, second], tmp_path / "m.kdcache", reencode=True)
    found, parts = values(merged), [values(first), values(second)]
    for name, of_output in found.items():
        expected = torch.cat([part[name] for part in parts])
        if name == "features":
            error = (of_output - expected).square().sum() / (expected - expected.mean(dim=0)).square().sum()
            assert 0 < error < 0.02
        else:
            assert torch.equal(of_output, expected), name
    assert audit(merged.path).failure is None


def test_caches_of_other_outputs_are_not_merged(tmp_path: Path) -> None:
    first = dumped(tmp_path / "a.kdcache", 0, 150)
    second = dump_teacher(Teacher(), images(150, 300), tmp_path / "b.kdcache", shard_rows=128)
    with pytest.raises(MismatchError, match=r"cannot be merged; they differ in:\n  outputs"):
        merge([first, second], tmp_path / "m.kdcache", reencode=True)


def test_a_pulled_copy_has_all_outputs(cache: Cache, tmp_path: Path) -> None:
    push(cache.path, f"file://{tmp_path}/there.kdcache")
    pull(f"file://{tmp_path}/there.kdcache", tmp_path / "here.kdcache")
    check_equal(values(open_cache(tmp_path / "here.kdcache")), values(cache))


def test_shards_of_a_derived_cache_leave_room_for_all_outputs(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a dump do: of logits alone, the chunks of a wide vector could exceed what blosc takes."""
    monkeypatch.setattr(sharding, "_MAX_BYTES", 10_000)
    selected = select(cache, tmp_path / "s.kdcache", samples=np.array([7, 3, 5]), data=wrap(images(), 6))
    plan = selected.manifest.plan
    of_outputs = sum(math.prod(part.width) * np.dtype(part.dtype).itemsize for name in OUTPUTS
                     for part in row_parts(output_encoding(plan, name)).values())  # fmt: skip
    assert 10_000 // 2 < plan.shape.chunk_rows * (6 * 2 + of_outputs) <= 10_000
