"""Sequences of tokens, as section 12 of docs/FORMAT.md has them: read and computed without the package."""

from __future__ import annotations

import json
import re
import runpy
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.format_text import Array, metadata, read_array, table, without_levels
from helpers.paths import GOLDEN, ROOT
from pydantic import BaseModel

from kdcache import Cache, open_cache
from kdcache.cache.format.sequence_records import SequencesRecord, VocabularyRecord
from kdcache.cache.format.token_encoding import TokenEncoding, TokenRequest
from kdcache.cache.inspect.audit import audit

PATH = GOLDEN / "tokens-v1.kdcache"
STORE = PATH / "data.zarr"
DIGEST = "sha256:a196469a74bd080bb704e9bcfad16da44b8dfedf3b196857916b89995e293891"
MODELS: dict[str, type[BaseModel]] = {
    "sequences": SequencesRecord,
    "vocabulary": VocabularyRecord,
    "token_request": TokenRequest,
    "token_encoding": TokenEncoding,
}


@pytest.fixture(scope="module")
def frozen() -> dict[str, Array]:
    with np.load(GOLDEN / "tokens-v1.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def cache() -> Cache:
    return open_cache(PATH)


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((PATH / "manifest.json").read_bytes())
    return manifest["plan"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def sizes(plan: dict[str, Any]) -> dict[str, Any]:
    """The symbols of section 12."""
    of, encoding = plan["sequences"], plan["outputs"]["next_token"]["encoding"]
    a, b, shards = of["token_chunk"], of["row_chunk"], len(of["rows"])
    tokens, rows = -(-max(of["tokens"]) // a) * a, -(-max(of["rows"]) // b) * b
    return {
        "1": 1, "N": plan["dataset"]["samples"], "c": plan["shape"]["chunk_rows"], "s": plan["shape"]["shard_rows"],
        "P": of["vocabulary"]["size"], "U": of["vocabulary"]["bytes"], "a": a, "b": b, "A": tokens, "B": rows,
        "SA": shards * tokens, "SB": shards * rows, "k": encoding["top_k"], "R": encoding["rank"],
        "Q": len([*columns(encoding)]), "m": encoding["draws"],
    }  # fmt: skip


def columns(encoding: dict[str, Any]) -> list[str]:
    there = {"always": True, "more than one temperature": len(encoding["temperatures"]) > 1}
    return [name for name, where, _ in table("column of a token row") if there[where]]


def test_the_golden_cache_gives_what_it_gave(cache: Cache, frozen: dict[str, Array]) -> None:
    assert cache.manifest.digest == DIGEST
    teacher = cache.sequences()
    batch = teacher(range(6))
    assert batch.tokens.tolist() == frozen["tokens"].tolist()
    assert batch.token_start.diff().tolist() == frozen["lengths"].tolist()
    assert batch.positions.tolist() == np.flatnonzero(frozen["taught"]).tolist()
    targets = teacher.targets(batch.rows)
    for name in ("indices", "log_probs", "tail_log_mass", "logsumexp", "coordinates", "basis", "mean"):
        np.testing.assert_allclose(getattr(targets, name).numpy(), frozen[name], rtol=0, atol=1e-6)
    assert b"\n".join(cache.vocabulary or []) == frozen["vocabulary"].tobytes()
    assert audit(PATH).failure is None


def test_what_the_golden_teacher_said_is_in_its_rows(frozen: dict[str, Array]) -> None:
    live = frozen["live"][frozen["taught"]].astype(float)
    level = np.logaddexp.reduce(live, axis=1, keepdims=True)
    order = np.argsort(-live, axis=1, kind="stable")
    assert frozen["indices"].tolist() == order[:, :3].tolist()
    np.testing.assert_allclose(frozen["logsumexp"], level[:, 0], rtol=1e-6)
    log_probs = np.take_along_axis(live - level, order, axis=1)
    np.testing.assert_allclose(frozen["log_probs"], log_probs[:, :3], rtol=2**-10)
    for column, t in enumerate((1, 4 / 3, 2, 4)):
        scaled = live / t - np.logaddexp.reduce(live / t, axis=1, keepdims=True)
        mass = np.logaddexp.reduce(np.take_along_axis(scaled, order, axis=1)[:, 3:], axis=1)
        np.testing.assert_allclose(frozen["tail_log_mass"][:, column], mass, rtol=2**-10, atol=1e-6)


def test_arrays_are_those_of_the_tables(plan: dict[str, Any], sizes: dict[str, Any]) -> None:
    encoding = plan["outputs"]["next_token"]["encoding"]
    index = f"uint{8 if sizes['P'] <= 256 else 16 if sizes['P'] <= 65536 else 32}"
    types = {"index": index, "dtype": encoding["dtype"]}
    there = {"always": True, "level": encoding["level"], "U > 0": sizes["U"] > 0, "R > 0": sizes["R"] > 0}
    there |= {"m = 0": sizes["m"] == 0, "m > 0": sizes["m"] > 0}
    expected = {}
    for name, where, dtype, *extents, compression, dimensions in table("array of sequences"):
        if there[where]:
            shapes = [[sizes[symbol] for symbol in extent.split(", ")] for extent in extents]
            of = metadata(types.get(dtype, dtype), shapes, compression, dimensions.split(", "))
            of["attributes"] = {"columns": columns(encoding)} if name.endswith("statistics") else {}
            expected[name.replace("NAME", "next_token")] = of
    found = {
        path.parent.relative_to(STORE).as_posix(): without_levels(json.loads(path.read_bytes()))
        for path in STORE.rglob("*/zarr.json")
        if json.loads(path.read_bytes())["node_type"] == "array"
    }
    assert set(found) == {*expected, "labels", "sample_keys"}
    assert {name: found[name] for name in expected} == expected


def test_only_chunks_without_a_row_are_missing(plan: dict[str, Any], sizes: dict[str, Any]) -> None:
    missing, of = 2**64 - 1, plan["sequences"]
    for name, numbers, chunk, room in (
        ("tokens", "tokens", "a", "A"),
        ("outputs/next_token/logsumexp", "rows", "b", "B"),
    ):
        chunks = sizes[room] // sizes[chunk]
        assert chunks > 1
        for shard, number in enumerate(of[numbers]):
            entries = struct.iter_unpack("<QQ", (STORE / name / f"c/0/{shard}").read_bytes()[-16 * chunks - 4 : -4])
            used = -(-number // sizes[chunk])
            assert [entry == (missing, missing) for entry in entries] == [index >= used for index in range(chunks)]
    assert -(-of["rows"][1] // sizes["b"]) < sizes["B"] // sizes["b"]


def test_the_manifest_lists_the_files_of_its_plan(plan: dict[str, Any]) -> None:
    manifest = json.loads((PATH / "manifest.json").read_bytes())
    shards = range(len(plan["sequences"]["rows"]))
    expected = {f"commits/0/{shard}.json" for shard in shards}
    expected |= {f"data.zarr/{group}zarr.json" for group in ("", "outputs/", "outputs/next_token/")}
    names = [name for name, *_ in table("array of sequences") if not name.endswith(("draws", "counts"))]
    for name in (*names, "labels", "sample_keys"):
        array = f"data.zarr/{name}".replace("NAME", "next_token")
        expected.add(f"{array}/zarr.json")
        of = json.loads((PATH / array / "zarr.json").read_bytes())
        if of["dimension_names"][0] == "view":
            expected |= {f"{array}/c/0/{shard}" + "/0" * (len(of["shape"]) - 2) for shard in shards}
        elif of["dimension_names"] == ["sample"]:
            expected |= {f"{array}/c/{shard}" for shard in shards}
        else:
            expected.add(f"{array}/c" + "/0" * len(of["shape"]))
    assert set(manifest["files"]) == expected


def test_the_rule_for_any_temperature_gives_the_masses(frozen: dict[str, Array]) -> None:
    """Section 12.4, with NumPy's polynomials, against the dense distribution."""
    live = frozen["live"][frozen["taught"]].astype(float)
    order = np.argsort(-live, axis=1, kind="stable")
    nodes = np.array([0, 1, 3 / 4, 1 / 2, 1 / 4])
    for t in (1.0, 1.2, 1.6, 3.0, 8.0):
        for row in range(len(live)):
            head = frozen["log_probs"][row].astype(float)
            masses = frozen["tail_log_mass"][row].astype(float)
            sums = [np.logaddexp.reduce(head * beta) for beta in nodes[1:]]
            g = np.array([np.log(40 - 3), *(h + m - np.log(-np.expm1(m)) for h, m in zip(sums, masses, strict=True))])
            at = np.polyval(np.polyfit(nodes, g, 4), 1 / t)
            mass = np.exp(at) / (np.exp(at) + np.exp(np.logaddexp.reduce(head / t)))
            scaled = np.exp(live[row] / t)
            exact = scaled[order[row, 3:]].sum() / scaled.sum()
            assert abs(mass - exact) < 5e-3


@pytest.mark.parametrize("about", MODELS)
def test_records_have_the_keys_of_the_tables(about: str, plan: dict[str, Any]) -> None:
    keys, output = [key for key, _, _ in table(about)], plan["outputs"]["next_token"]
    written = {
        "sequences": plan["sequences"],
        "vocabulary": plan["sequences"]["vocabulary"],
        "token_request": output["request"],
        "token_encoding": output["encoding"],
    }[about]
    assert keys == list(MODELS[about].model_fields) == list(written)
    MODELS[about].model_validate(written)


def test_arrays_hold_the_samples_one_after_the_other(plan: dict[str, Any], sizes: dict[str, Any], frozen: Any) -> None:
    arrays = {name: read_array(STORE / name) for name in ("tokens", "taught", "token_count", "row_count")}
    assert arrays["token_count"].tolist() == frozen["lengths"].tolist()
    begin = 0
    for index, length in enumerate(frozen["lengths"].tolist()):
        shard, first = index // sizes["s"], index // sizes["s"] * sizes["s"]
        at = shard * sizes["A"] + int(arrays["token_count"][first:index].sum())
        assert arrays["tokens"][0, at : at + length].tolist() == frozen["tokens"][begin : begin + length].tolist()
        assert arrays["taught"][0, at : at + length].sum() == arrays["row_count"][index]
        begin += length
    for numbers, counts in (("tokens", "token_count"), ("rows", "row_count")):
        assert np.add.reduceat(arrays[counts], [0, sizes["s"]]).tolist() == plan["sequences"][numbers]


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 4.0])
def test_the_example_reads_what_the_teacher_said(temperature: float, frozen: dict[str, Array]) -> None:
    """With four of six directions of the teacher, and the exact mass of the tail."""
    path = ROOT / "examples" / "read_tokens_with_tensorstore.py"
    read = runpy.run_path(str(path))["read"]
    ends = np.cumsum(frozen["lengths"])
    for sequence, (end, length) in enumerate(zip(ends.tolist(), frozen["lengths"].tolist(), strict=True)):
        tokens, positions, log_probs = read(PATH, sequence, temperature)
        assert tokens.tolist() == frozen["tokens"][end - length : end].tolist()
        assert positions.tolist() == np.flatnonzero(frozen["taught"][end - length : end]).tolist()
        live = frozen["live"][end - length : end][positions].astype(float) / temperature
        exact = np.exp(live - np.logaddexp.reduce(live, axis=1, keepdims=True))
        found = np.exp(log_probs)
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-9)
        order = np.argsort(-live, axis=1, kind="stable")
        head = np.take_along_axis(found, order, axis=1)[:, :3]
        np.testing.assert_allclose(head, np.take_along_axis(exact, order, axis=1)[:, :3], rtol=2e-2)
        even = np.full_like(exact, np.nan)
        np.put_along_axis(even, order[:, :3], 0, axis=1)
        in_tail = np.isnan(even)
        spread = np.where(in_tail, (1 - head.sum(axis=1, keepdims=True)) / 37, exact)
        assert np.abs(found - exact)[in_tail].sum() < np.abs(spread - exact)[in_tail].sum()


def test_golden_names_are_of_no_machine() -> None:
    for path in Path(PATH).rglob("*.json"):
        assert not re.search(r'"(/|[A-Z]:)[^"]', path.read_text(encoding="utf-8"))
