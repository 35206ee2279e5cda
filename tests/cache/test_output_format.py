"""Outputs beside class logits, as section 11 of docs/FORMAT.md has them: read and computed without the package."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from helpers.format_text import Array, metadata, read_array, table, without_levels
from helpers.paths import GOLDEN

from kdcache import Cache, open_cache
from kdcache.cache.format.output_records import OutputRecord, VectorEncoding, VectorFidelity, VectorRequest
from kdcache.cache.format.schema import Plan, canonical, root_digest
from kdcache.cache.inspect.audit import audit
from kdcache.errors import CorruptError, KdcacheError

PATH = GOLDEN / "outputs-v1.kdcache"
DIGEST = "sha256:8d20457cb069b66d0efe619c07bb756fa193315ae61c88d46854998b8e9c5cdf"
VECTORS = ("age", "embedding", "half", "hidden")


@pytest.fixture(scope="module")
def frozen() -> dict[str, Array]:
    with np.load(GOLDEN / "outputs-v1.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def cache() -> Cache:
    return open_cache(PATH)


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((PATH / "manifest.json").read_bytes())
    return manifest["plan"]  # type: ignore[no-any-return]


def test_the_golden_cache_gives_what_it_gave(cache: Cache, frozen: dict[str, Array]) -> None:
    assert cache.manifest.digest == DIGEST
    assert cache.manifest.plan.output_names == ["logits", "age", "color", *VECTORS[1:]]
    for name in cache.manifest.plan.output_names:
        found = cache.teacher(name)(torch.arange(20)).numpy()
        np.testing.assert_allclose(found, frozen[f"decoded_{name}"], rtol=0, atol=1e-5)
    assert audit(PATH).failure is None


def test_what_the_golden_teacher_said_follows_from_images_and_weights(frozen: dict[str, Array]) -> None:
    hidden = frozen["images"].reshape(20, -1) @ frozen["weight"]
    np.testing.assert_allclose(frozen["live_age"], hidden[:, 12:14], atol=1e-5)
    np.testing.assert_allclose(frozen["live_hidden"], np.maximum(hidden[:, 4:10], 0) * 10, atol=1e-4)
    lengths = np.linalg.norm(hidden[:, 4:12], axis=1, keepdims=True)
    np.testing.assert_allclose(frozen["live_embedding"], hidden[:, 4:12] / lengths, atol=1e-6)


def arrays_of(name: str) -> dict[str, Array]:
    folder = PATH / "data.zarr" / "outputs" / name
    return {path.parent.name: read_array(path.parent) for path in folder.glob("*/zarr.json")}


def formulas() -> dict[str, Callable[[dict[str, Array], dict[str, Any]], Array]]:
    """The vector of a row by codec, as the last table of section 11 says it."""
    return {
        "klt": lambda of, e: e["step"] * of["values"][0].astype(float) @ of["axes"].astype(float) + of["mean"],
        "int8": lambda of, _: of["scale"][0][:, None].astype(float) * of["values"][0],
        "float16": lambda of, _: of["values"][0].astype(float),
        "float32": lambda of, _: of["values"][0].astype(float),
    }


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_follow_from_the_text(name: str, plan: dict[str, Any], frozen: dict[str, Array]) -> None:
    encoding = plan["outputs"][name]["encoding"]
    vectors = formulas()[encoding["codec"]](arrays_of(name), encoding)
    if encoding["normalized"]:
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, frozen[f"decoded_{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VECTORS)
def test_a_writer_stores_what_the_text_says(name: str, plan: dict[str, Any], frozen: dict[str, Array]) -> None:
    encoding, live, of = plan["outputs"][name]["encoding"], frozen[f"live_{name}"].astype(float), arrays_of(name)
    if encoding["codec"] == "klt":
        exact = (live - of["mean"]) @ of["axes"].astype(float).T / encoding["step"]
        np.testing.assert_allclose(of["values"][0], exact, atol=0.5 + 1e-4)
        np.testing.assert_allclose(of["axes"] @ of["axes"].T, np.eye(len(of["axes"])), atol=1e-5)
    elif encoding["codec"] == "int8":
        largest = np.abs(live).max(axis=1)
        np.testing.assert_allclose(of["scale"][0], np.where(largest > 0, largest / 127, 1), rtol=1e-6)
        np.testing.assert_allclose(of["values"][0], live / of["scale"][0][:, None], atol=0.5 + 1e-4)
    else:
        np.testing.assert_array_equal(of["values"][0], frozen[f"live_{name}"].astype(encoding["codec"]))


def test_arrays_are_those_of_the_table(plan: dict[str, Any]) -> None:
    shape = plan["shape"]
    for name in VECTORS:
        encoding = plan["outputs"][name]["encoding"]
        rank = encoding["components"]
        size = {"1": 1, "V": 1, "N": 20, "c": shape["chunk_rows"], "s": shape["shard_rows"], "R": rank}
        size |= {"D": encoding["length"], "W": rank or encoding["length"]}
        there = {"always": True, "codec is int8": encoding["codec"] == "int8", "R > 0": rank > 0}
        expected = {
            array: metadata(
                {"dtype": encoding["dtype"]}.get(dtype, dtype),
                [[size[symbol] for symbol in extent.split(", ")] for extent in extents],
                compression,
                dimensions.split(", "),
            )
            for array, where, dtype, *extents, compression, dimensions in table("array of an output")
            if there[where.replace('"', "")]
        }
        files = (PATH / "data.zarr" / "outputs" / name).glob("*/zarr.json")
        found = {path.parent.name: without_levels(json.loads(path.read_bytes())) for path in files}
        assert found == {array: {**of, "attributes": {}} for array, of in expected.items()}
    for group in ("outputs", "outputs/age"):
        written = json.loads((PATH / "data.zarr" / group / "zarr.json").read_bytes())
        assert written == {"attributes": {}, "zarr_format": 3, "node_type": "group"}


@pytest.mark.parametrize(
    ("about", "model"),
    [
        ("output", OutputRecord),
        ("vector_request", VectorRequest),
        ("vector_encoding", VectorEncoding),
        ("vector_fidelity", VectorFidelity),
    ],
)
def test_records_have_the_keys_of_the_tables(about: str, model: Any, plan: dict[str, Any]) -> None:
    keys = [key for key, _, _ in table(about)]
    assert keys == list(model.model_fields)
    record = plan["outputs"]["embedding"]
    written = {"output": record, **{f"vector_{key}": record[key] for key in ("request", "encoding", "fidelity")}}[about]
    assert [key for key in keys if key not in ("class_names", "level")] == list(written)


# What a reader refuses


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose plan was changed, with a root digest that is right."""
    copy = tmp_path / "c.kdcache"
    shutil.copytree(PATH, copy)
    written = json.loads((copy / "manifest.json").read_bytes())
    change(written["plan"])
    (copy / "manifest.json").write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    return copy


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "the name of the logits": lambda plan: plan["outputs"].update(logits=plan["outputs"].pop("age")),
    "a path": lambda plan: plan["outputs"].update({"../age": plan["outputs"].pop("age")}),
    "another order": lambda plan: plan.update(outputs=dict(reversed(plan["outputs"].items()))),
    "nothing": lambda plan: plan.update(outputs={}),
    "a longer vector": lambda plan: plan["outputs"]["hidden"]["encoding"].update(length=7),
    "other classes": lambda plan: plan["outputs"]["color"].update(labels="sample"),
    "another kind": lambda plan: plan["outputs"]["hidden"].update(kind="classes"),
    "scores in int8": lambda plan: plan["outputs"]["hidden"].update(kind="score"),
    "more components than numbers": lambda plan: plan["outputs"]["embedding"]["encoding"].update(components=9),
    "places": lambda plan: plan["outputs"]["hidden"].update(places="grid"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_plan_is_refused(what: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="damaged"):
        open_cache(changed(tmp_path, CHANGES[what]))


@pytest.mark.parametrize("name", ["values", "scale"])
def test_rows_that_are_not_finite_are_found(name: str, tmp_path: Path, cache: Cache) -> None:
    """With all digests right, as a foreign writer would publish them."""
    output = {"values": "age", "scale": "hidden"}[name]
    copy = tmp_path / "c.kdcache"
    shutil.copytree(PATH, copy)
    group = zarr.open_group(copy / "data.zarr", mode="r+", zarr_format=3)
    array: Any = group[f"outputs/{output}/{name}"]
    array[(0, 5, 0) if name == "values" else (0, 5)] = np.nan
    files = {
        file: record.model_copy(update=of(copy / file)) if f"{output}/{name}/c" in file else record
        for file, record in cache.manifest.files.items()
    }
    commits = {}
    for file in [file for file in files if file.startswith("commits/")]:
        written = json.loads((copy / file).read_bytes())
        for listed in written["files"]:
            written["files"][listed] = files[listed].model_dump()
        (copy / file).write_text(json.dumps(written, indent=1) + "\n")
        commits[file] = files[file].model_copy(update=of(copy / file))
    manifest = cache.manifest.model_copy(update={"files": files | commits})
    manifest = manifest.model_copy(update={"digest": root_digest(manifest)})
    (copy / "manifest.json").write_bytes(canonical(manifest))
    problems = audit(copy).problems
    assert [problem.where for problem in problems] == [f"output {output}, view 0, shard 0, sample 5"] * len(problems)
    assert problems


def of(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_a_flipped_byte_of_an_output_is_found_before_it_is_used(tmp_path: Path) -> None:
    copy = tmp_path / "c.kdcache"
    shutil.copytree(PATH, copy)
    file = copy / "data.zarr/outputs/embedding/values/c/0/1/0"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(KdcacheError, match="outputs/embedding/values/c/0/1/0 has the sha256"):
        open_cache(copy).teacher("embedding")(torch.arange(20))


def test_a_plan_of_logits_alone_has_no_key_for_outputs() -> None:
    plan = open_cache(GOLDEN / "dense-v1.kdcache").manifest.plan
    assert "outputs" not in plan.model_dump()
    assert Plan.model_validate(plan.model_dump()) == plan
