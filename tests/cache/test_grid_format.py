"""Maps as section 13 of docs/FORMAT.md has them: read and computed without the package; and what a reader refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from helpers.corruption import forge, refresh
from helpers.format_text import Array, metadata, read_array, table, without_levels
from helpers.paths import GOLDEN

from kdcache import Cache, open_cache
from kdcache.cache.format.grid_encoding import GridEncoding, GridFidelity, GridRequest
from kdcache.cache.inspect.audit import audit
from kdcache.errors import CorruptError, KdcacheError

PATH = GOLDEN / "grid-v1.kdcache"
DIGEST = "sha256:9f8b219d42924cac7771d91dfc4d17a31baa6e3c528fc59af918a51d957f2e52"
NAMES = ("classes", "depth", "feature", "half", "level", "unit")
STEPPED = ("classes", "feature", "level", "unit")


@pytest.fixture(scope="module")
def frozen() -> dict[str, Array]:
    with np.load(GOLDEN / "grid-v1.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def cache() -> Cache:
    return open_cache(PATH)


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    return json.loads((PATH / "manifest.json").read_bytes())["plan"]  # type: ignore[no-any-return]


def arrays_of(name: str) -> dict[str, Array]:
    folder = PATH / "data.zarr" / "outputs" / name
    return {path.parent.name: read_array(path.parent) for path in folder.glob("*/zarr.json")}


def test_the_golden_cache_gives_what_it_gave(cache: Cache, frozen: dict[str, Array]) -> None:
    assert cache.manifest.digest == DIGEST
    assert tuple(cache.manifest.plan.output_names) == NAMES
    for name in NAMES:
        found = cache.teacher(name)(torch.arange(12)).numpy()
        np.testing.assert_allclose(found, frozen[f"decoded_{name}"], rtol=0, atol=1e-5)
    assert audit(PATH).failure is None


def test_what_the_golden_teacher_said_follows_from_images_and_weights(frozen: dict[str, Array]) -> None:
    numbers = np.einsum("dc,bchw->bdhw", frozen["weight"], frozen["images"])
    np.testing.assert_allclose(frozen["live_classes"], numbers[:, :5], atol=1e-5)
    np.testing.assert_allclose(frozen["live_depth"], numbers[:, 17:], atol=1e-5)


def whole_numbers(values: Array, bits: int) -> Array:
    """The integers of the planes, [..., h, w], one place after the other and in Python's integers."""
    found = np.zeros(values.shape, dtype=object)
    for index in np.ndindex(values.shape):
        stored = int(values[index]) % 2**bits
        if bits == 16:
            stored = stored // 2 if stored % 2 == 0 else -(stored + 1) // 2
        *plane, y, x = index
        left = found[(*plane, y, x - 1)] if x else 0
        above = found[(*plane, y - 1, x)] if y else 0
        corner = found[(*plane, y - 1, x - 1)] if x and y else 0
        number = (stored + left + above - corner) % 2**bits
        found[index] = number - 2**bits if number >= 2 ** (bits - 1) else number
    return found.astype(np.int64)


def maps_of(name: str, encoding: dict[str, Any]) -> Array:
    of = arrays_of(name)
    if encoding["step"] is None:
        maps: Array = of["values"][0].astype(float)
    else:
        numbers = encoding["step"] * whole_numbers(of["values"][0], int(encoding["dtype"][3:])).astype(float)
        maps = numbers
        if encoding["codec"] == "klt":
            maps = np.einsum("brhw,rc->bchw", numbers, of["axes"].astype(float)) + of["mean"][:, None, None]
    return maps / np.linalg.norm(maps, axis=1, keepdims=True) if encoding["normalized"] else maps


@pytest.mark.parametrize("name", NAMES)
def test_maps_follow_from_the_text(name: str, plan: dict[str, Any], frozen: dict[str, Array]) -> None:
    maps = maps_of(name, plan["outputs"][name]["encoding"])
    np.testing.assert_allclose(maps, frozen[f"decoded_{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STEPPED)
def test_a_writer_stores_what_the_text_says(name: str, plan: dict[str, Any], frozen: dict[str, Array]) -> None:
    encoding, live, of = plan["outputs"][name]["encoding"], frozen[f"live_{name}"].astype(float), arrays_of(name)
    if not encoding["level"]:
        live = live - live.mean(axis=1, keepdims=True)
    if encoding["codec"] == "klt":
        live = np.einsum("rc,bchw->brhw", of["axes"], live - of["mean"][:, None, None])
    numbers = whole_numbers(of["values"][0], int(encoding["dtype"][3:]))
    np.testing.assert_allclose(numbers, live / encoding["step"], atol=0.5 + 1e-3)


def test_arrays_are_those_of_the_table(plan: dict[str, Any]) -> None:
    shape = plan["shape"]
    for name in NAMES:
        encoding = plan["outputs"][name]["encoding"]
        rank, channels = encoding["components"], encoding["channels"]
        size = {"1": 1, "V": 1, "N": 12, "c": shape["chunk_rows"], "s": shape["shard_rows"], "R": rank, "C": channels}
        size |= {"W": rank or channels, "h": 6, "w": 6}
        expected = {
            array: metadata(
                {"dtype": encoding["dtype"]}.get(dtype, dtype),
                [[size[symbol] for symbol in extent.split(", ")] for extent in extents],
                compression,
                dimensions.split(", "),
            )
            for array, where, dtype, *extents, compression, dimensions in table("array of maps")
            if where == "always" or rank
        }
        files = (PATH / "data.zarr" / "outputs" / name).glob("*/zarr.json")
        found = {path.parent.name: without_levels(json.loads(path.read_bytes())) for path in files}
        assert found == {array: {**of, "attributes": {}} for array, of in expected.items()}


@pytest.mark.parametrize(
    ("about", "model"),
    [("grid_request", GridRequest), ("grid_encoding", GridEncoding), ("grid_fidelity", GridFidelity)],
)
def test_records_have_the_keys_of_the_tables(about: str, model: Any, plan: dict[str, Any]) -> None:
    keys = [key for key, _, _ in table(about)]
    assert keys == list(model.model_fields)
    assert keys == list(plan["outputs"]["unit"][about.removeprefix("grid_")])


# What a reader refuses


def encoding_of(name: str, **changes: Any) -> Callable[[Any], None]:
    return lambda manifest: manifest["plan"]["outputs"][name]["encoding"].update(changes)


def output_of(name: str, **changes: Any) -> Callable[[Any], None]:
    return lambda manifest: manifest["plan"]["outputs"][name].update(changes)


FORGED: dict[str, Callable[[Any], Any]] = {
    "places immense": encoding_of("depth", height=2**16, width=2**16),
    "places many": encoding_of("depth", height=2**14, width=2**14),
    "places none": encoding_of("depth", height=0),
    "places fraction": encoding_of("depth", height=6.0),
    "places other": encoding_of("depth", height=12, width=3),
    "channels many": encoding_of("unit", channels=2**24, components=2**24),
    "channels more": encoding_of("feature", channels=7),
    "scores many": encoding_of("depth", channels=65),
    "components more than channels": encoding_of("unit", components=7),
    "components of steps": encoding_of("feature", components=1),
    "step missing": encoding_of("feature", step=None),
    "step of float16": encoding_of("half", step=0.5),
    "step negative": encoding_of("feature", step=-0.5),
    "type other": encoding_of("feature", dtype="int16"),
    "type of codec": encoding_of("half", dtype="int8"),
    "level unknown, and stored": output_of("level", level="unknown"),
    "level unknown of vectors": encoding_of("feature", level=False),
    "normalized classes": encoding_of("level", normalized=True),
    "one place": output_of("feature", places="one"),
    "labels": output_of("classes", labels="sample"),
    "pool": output_of("feature", pool="mean"),
    "names": output_of("classes", class_names=["a"] * 5),
    "kind": output_of("classes", kind="score"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_plan_is_refused(what: str, tmp_path: Path) -> None:
    copy = tmp_path / "c.kdcache"
    shutil.copytree(PATH, copy)
    forge(copy, FORGED[what])
    with pytest.raises(CorruptError):
        open_cache(copy).teacher("depth")(torch.arange(12))
        audit_failure = audit(copy).failure
        if audit_failure is not None:
            raise audit_failure


def test_chunks_of_2_gib_are_refused(tmp_path: Path) -> None:
    copy = tmp_path / "c.kdcache"
    shutil.copytree(PATH, copy)
    forge(copy, encoding_of("depth", height=2**13, width=2**14))
    with pytest.raises(CorruptError, match="a chunk of 4 maps has 2,147,483,648 bytes"):
        open_cache(copy)


def test_a_flipped_byte_is_found_before_it_is_used(tmp_path: Path) -> None:
    copy = tmp_path / "c.kdcache"
    shutil.copytree(PATH, copy)
    file = copy / "data.zarr/outputs/level/values/c/0/1/0/0/0"
    content = bytearray(file.read_bytes())
    content[30] ^= 1
    file.write_bytes(content)
    with pytest.raises(KdcacheError, match="outputs/level/values/c/0/1/0/0/0 has the sha256"):
        open_cache(copy).teacher("level")(torch.arange(12))


@pytest.mark.parametrize("position", range(0, 400, 57))
def test_a_flipped_byte_that_the_manifest_vouches_for_gives_one_error_or_numbers(
    position: int, tmp_path: Path, frozen: dict[str, Array]
) -> None:
    """As a foreign writer would publish it: the checksum of the chunk finds it."""
    copy = tmp_path / "c.kdcache"
    shutil.copytree(PATH, copy)
    file = copy / "data.zarr/outputs/level/values/c/0/0/0/0/0"
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)
    forge_commit(copy)
    with pytest.raises(CorruptError):
        open_cache(copy).teacher("level", placement="host")(torch.arange(12))


def forge_commit(copy: Path) -> None:
    """Let markers and manifest vouch for the files as they are now."""
    refresh(copy)
    records = json.loads((copy / "manifest.json").read_bytes())["files"]
    for marker in copy.glob("commits/*/*.json"):
        written = json.loads(marker.read_bytes())
        written["files"] = {name: records[name] for name in written["files"]}
        marker.write_text(json.dumps(written, indent=1) + "\n")
    refresh(copy)


def rewritten(tmp_path: Path, name: str, where: tuple[Any, ...], value: float) -> Path:
    copy = tmp_path / "c.kdcache"
    shutil.copytree(PATH, copy)
    group = zarr.open_group(copy / "data.zarr", mode="r+", zarr_format=3)
    array: Any = group[f"outputs/{name}/values"]
    array[where] = value
    forge_commit(copy)
    return copy


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("half", np.nan, "a number is NaN or infinite"),
        ("depth", np.inf, "a number is NaN or infinite"),
        ("feature", -128, "a rounded number is -128, which none is rounded to"),
        ("level", -1, "a rounded number is -32768, which none is rounded to"),
    ],
)
def test_impossible_numbers_are_found_by_their_sample(name: str, value: float, words: str, tmp_path: Path) -> None:
    """The first difference is the number itself; folded, -32768 is 65535, whose bits are those of -1."""
    problems = audit(rewritten(tmp_path, name, (0, 9, 0, 0, 0), value)).problems
    assert {problem.where for problem in problems} == {f"output {name}, view 0, shard 1, sample 9"}
    assert words in problems[0].what


@pytest.mark.parametrize("placement", ["host", "mmap", "stream"])
def test_every_placement_gives_the_same(placement: Any, cache: Cache, frozen: dict[str, Array]) -> None:
    teacher, ids = cache.teacher("classes", placement=placement), torch.tensor([11, 0, 7, 0])
    np.testing.assert_allclose(teacher(ids).numpy(), frozen["decoded_classes"][ids], atol=1e-5)
    assert "shape=[5, 6, 6]" in repr(teacher)
