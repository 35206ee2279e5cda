"""docs/FORMAT.md is true of what kdcache writes, and enough to read it with.

What is expected is worked out from the text by hand, with NumPy, TensorStore and the standard library; the package is
what it is held against.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.format_text import FORMAT, Array, Kept, check_arrays, read_array, table
from helpers.paths import ROOT
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor

from kdcache import dump_teacher, open_cache, wrap
from kdcache.cache.format.fingerprints import inputs_of
from kdcache.cache.format.read_records import read_commit
from kdcache.config.cache import CacheSpec
from kdcache.data.images import FileImages
from kdcache.data.seeding import seeded
from kdcache.data.views import View
from kdcache.errors import CorruptError

GOLDEN = ROOT / "tests" / "golden"
EXAMPLE = ROOT / "examples" / "read_with_tensorstore.py"
DIGESTS = {
    "lowrank-v1": "sha256:365d375137d933c7d173f7c5898ee3b7368e0d994addd1f129caab359f569756",
    "dense-v1": "sha256:9a5e3c88e2c2e905bfc866c196f6234f79cffbae403d4b30d929d7fd72044fbb",
}
FRESH: dict[str, dict[str, Any]] = {
    "float16": {"top_k": "all"},
    "float32": {"top_k": "all", "dtype": "float32"},
    "uint8, two views": {"top_k": "all", "dtype": "uint8", "views": 2},
    "uniform": {"top_k": 3, "tail": "uniform"},
    "uniform in float32": {"top_k": 1, "tail": "uniform", "dtype": "float32"},
    "lowrank, two views": {"top_k": 4, "rank": 6, "views": 2},
    "lowrank in float32": {"top_k": 2, "rank": 6, "dtype": "float32"},
    "indices uint16": {"top_k": 3, "rank": 4, "classes": 300},
    "rows that the basis does not fit": {"top_k": 3, "rank": 3, "classes": 40, "teacher": "wavering"},
}


def frozen(name: str) -> dict[str, Array]:
    """What lies beside a golden cache."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


class Wavering(TinyTeacher):
    """Sure of itself, but for bright images, of which it knows next to nothing."""

    def forward(self, images: Tensor) -> Tensor:
        sure = 8 * super().forward(images)
        return torch.where(images.mean(dim=(1, 2, 3)).unsqueeze(1) > 0.3, sure / 1000, sure)


def dump(out: Path, classes: int = 12, views: int = 1, teacher: str = "tiny", **spec: Any) -> Kept:
    labels = [-1 if i % 5 == 3 else (3 * i + 1) % classes for i in range(20)]
    samples, asked = tiny_samples(20, classes, labels), {"tiny": TinyTeacher, "wavering": Wavering}[teacher](classes)
    transform = FLIP if views > 1 else []
    settings = CacheSpec.model_validate({"views": views, "seed": 9, "shard_rows": 16, "batch_size": 16} | spec)
    cache = dump_teacher(asked, samples, out, transform=transform, spec=settings)
    seen = [View(samples, transform, 9, view).__getitems__(range(20))[0] for view in range(views)]
    return Kept(cache, np.stack([asked(images).numpy() for images in seen]))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    """The golden caches, and a new one of every kind."""
    folder = tmp_path_factory.mktemp("fresh")
    golden = {name: Kept(open_cache(GOLDEN / f"{name}.kdcache"), frozen(name)["live"]) for name in DIGESTS}
    return golden | {name: dump(folder / f"{name}.kdcache", **spec) for name, spec in FRESH.items()}


@pytest.fixture(params=[*DIGESTS, *FRESH])
def kept(request: pytest.FixtureRequest, caches: dict[str, Kept]) -> Kept:
    return caches[request.param]


# Golden caches


@pytest.mark.parametrize("name", DIGESTS)
def test_a_golden_cache_opens_and_gives_the_logits_that_it_gave(name: str, caches: dict[str, Kept]) -> None:
    golden = caches[name]
    assert golden.cache.manifest.digest == DIGESTS[name]
    np.testing.assert_allclose(golden.decoded, frozen(name)["decoded"], rtol=0, atol=golden.near)


@pytest.mark.parametrize("name", DIGESTS)
def test_what_a_golden_teacher_saw_and_said_follows_from_images_seed_and_weights(
    name: str, caches: dict[str, Kept]
) -> None:
    golden, made = caches[name], frozen(name)
    images, weight, views = made["images"], made["weight"], golden.plan["views"]
    for view in range(views["count"]):
        seen = images.copy()
        for sample in range(len(seen) if views["transform"] == FLIP else 0):
            torch.manual_seed(seed_of(views["seed"], sample, view))
            if torch.rand(1) < 0.5:
                seen[sample] = seen[sample, :, :, ::-1]
        np.testing.assert_array_equal(seen.reshape(len(seen), -1) @ weight, made["live"][view])
        prints = seen[:: golden.plan["shape"]["fingerprint_stride"]].astype("<f4")
        assert golden.arrays["fingerprints"][view].tolist() == [zlib.crc32(image.tobytes()) for image in prints]
        np.testing.assert_array_equal(golden.arrays["sketches"][view], [sketch_of(image) for image in prints])
    content = b"weight\0torch.float32\0[16, %d]\0" % weight.shape[1] + weight.tobytes()
    assert golden.plan["teacher"]["weights_digest"] == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_golden_caches_name_no_place_of_a_machine() -> None:
    for path in GOLDEN.rglob("*.json"):
        assert not re.search(r'"(/|[A-Z]:)[^"]', path.read_text(encoding="utf-8"))


# The tables


def record(name: str, kept: Kept) -> tuple[dict[str, Any], type[BaseModel]]:
    """A record, or a part of one: as it is written, and what reads it."""
    manifest, file = kept.cache.manifest, "data.zarr/zarr.json"
    if name == "commit":
        written = json.loads((kept.path / "commits/0/0.json").read_bytes())
        return written, type(read_commit(kept.path / "commits/0/0.json"))
    if name == "file":
        return kept.manifest["files"][file], type(manifest.files[file])
    of_logits = {"encoding": manifest.plan.encoding, "request": manifest.plan.request}
    parts = {**dict([*manifest.plan, *manifest]), **of_logits}
    part = manifest if name == "manifest" else parts[name]
    written = kept.manifest if name == "manifest" else (kept.plan | kept.manifest)[name]
    return written, type(part)


RECORDS = (
    "manifest", "plan", "teacher", "dataset", "views", "request", "encoding", "fidelity", "shape", "summary", "file",
    "commit",
)  # fmt: skip
INTEGERS = {f"{name}.{key}": kind for name in RECORDS for key, kind, _ in table(name) if re.match("integer|size", kind)}


@pytest.mark.parametrize("name", RECORDS)
def test_records_have_the_keys_of_the_tables_in_their_order(name: str, caches: dict[str, Kept]) -> None:
    written, model = record(name, caches["lowrank-v1"])
    keys = [key for key, _, _ in table(name)]
    assert keys == [field.alias or key for key, field in model.model_fields.items()]
    # Its teacher has run on images, and only its logits are kept.
    not_there = ("lineage", "level", "weights", "outputs", "noise", "sequences")
    assert [key for key in keys if key not in not_there] == list(written)


def faults(model: type[BaseModel], written: dict[str, Any]) -> list[Any]:
    """What the schema finds wrong, by key; () for keys that do not go together."""
    try:
        model.model_validate(written)
    except ValidationError as error:
        return [found["loc"][:1] for found in error.errors()]
    return []


@pytest.mark.parametrize("where", INTEGERS)
def test_integers_have_the_ranges_of_the_tables(where: str, caches: dict[str, Kept]) -> None:
    name, key = where.split(".")
    written, model = record(name, caches["lowrank-v1"])
    kind = INTEGERS[where].replace("size", "integer, 0 to 2^62").replace("≥ 1", "1 to 2^70").replace("C", "40")
    low, high = (eval_power(number) for number in re.findall(r"[\d^]+", kind)[:2])
    assert (key,) not in faults(model, written | {key: low}) + faults(model, written | {key: high})
    for wrong in (low - 1, float(low), True, str(low)):
        assert (key,) in faults(model, written | {key: wrong})
    beyond = () if "C" in INTEGERS[where] else (key,)
    assert high == 2**70 or beyond in faults(model, written | {key: high + 1})


def eval_power(number: str) -> int:
    base, _, exponent = number.partition("^")
    return 1 << int(exponent) if exponent else int(base)


def test_arrays_are_those_of_the_table(kept: Kept) -> None:
    check_arrays(kept)


def test_only_chunks_without_a_row_are_missing(kept: Kept) -> None:
    shape, missing = kept.plan["shape"], 2**64 - 1
    chunks = shape["shard_rows"] // shape["chunk_rows"]
    for path in kept.path.glob("data.zarr/logsumexp/c/*/*"):
        entries = list(struct.iter_unpack("<QQ", path.read_bytes()[-16 * chunks - 4 : -4]))
        starts = (int(path.name) * shape["shard_rows"] + chunk * shape["chunk_rows"] for chunk in range(chunks))
        assert [entry == (missing, missing) for entry in entries] == [start >= len(kept.cache) for start in starts]


# Files and records


def test_the_manifest_lists_the_files_of_its_plan(kept: Kept) -> None:
    shards = range(-(-len(kept.cache) // kept.plan["shape"]["shard_rows"]))
    expected = {"data.zarr/zarr.json", *(f"data.zarr/{name}/zarr.json" for name in kept.arrays)}
    expected |= {f"data.zarr/{name}/c/{t}" for name in ("labels", "sample_keys") for t in shards}
    if kept.encoding["rank"]:
        expected |= {"data.zarr/tail_basis/c/0/0", "data.zarr/tail_mean/c/0", "data.zarr/tail_scale/c/0"}
    listed = kept.manifest["files"]
    for v, t in product(range(len(kept.live)), shards):
        of_shard = sorted(
            f"data.zarr/{name}/c/{v}/{t}" + "/0" * (len(found["shape"]) - 2)
            for name, found in kept.zarr_json.items()
            if found["dimension_names"][0] == "view"
        )
        expected |= {f"commits/{v}/{t}.json", *of_shard}
        marker = json.loads((kept.path / f"commits/{v}/{t}.json").read_bytes())
        assert list(marker["files"].items()) == [(name, listed[name]) for name in of_shard]
    assert list(listed) == sorted(expected)
    on_disk = {path.relative_to(kept.path).as_posix() for path in kept.path.rglob("*") if path.is_file()}
    assert on_disk - {"README.md", "card.png"} == expected | {"manifest.json"}


def test_digests_are_those_of_the_bytes(kept: Kept) -> None:
    data = (kept.path / "manifest.json").read_bytes()
    root = hashlib.sha256(data[:-68] + b"0" * 64 + data[-4:]).hexdigest()
    assert kept.manifest["digest"] == f"sha256:{root}"
    for name, file in kept.manifest["files"].items():
        content = (kept.path / name).read_bytes()
        assert file == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


ESCAPES = {chr(c): rf"\u{c:04x}" for c in range(0x20)}
ESCAPES |= {'"': r"\"", "\\": r"\\", "\b": r"\b", "\f": r"\f", "\n": r"\n", "\r": r"\r", "\t": r"\t"}


def by_the_list(value: Any, level: int = 0) -> str:
    """JSON as the list in 2.5 has it."""
    if isinstance(value, str):
        return '"' + "".join(ESCAPES.get(character, character) for character in value) + '"'
    if isinstance(value, dict):
        items, ends = [f"{by_the_list(key)}: {by_the_list(item, level + 1)}" for key, item in value.items()], "{}"
    elif isinstance(value, list):
        items, ends = [by_the_list(item, level + 1) for item in value], "[]"
    else:
        return repr(value) if isinstance(value, float) else json.dumps(value)
    inside = ",".join(f"\n{' ' * (level + 1)}{item}" for item in items)
    return ends[0] + inside + (f"\n{' ' * level}" if items else "") + ends[1]


def test_the_bytes_of_records_are_canonical(kept: Kept) -> None:
    for path in (kept.path / "manifest.json", *kept.path.glob("commits/*/*.json")):
        data = path.read_bytes()
        content = json.loads(data)
        assert (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode() == data
        assert (by_the_list(content) + "\n").encode() == data


def test_the_list_of_the_text_is_what_python_writes() -> None:
    awkward = {"": [{}, [], [[]], {"a": None, "b": [True, 0, -1, 2**62]}], "".join(map(chr, range(0x3000))): "/"}
    assert by_the_list(awkward) == json.dumps(awkward, indent=1, ensure_ascii=False)
    (rule,) = re.findall(r"^- of a number (.*?)\n\n", FORMAT, flags=re.MULTILINE | re.DOTALL)
    numbers = re.findall("`(.*?)`", rule)
    assert len(numbers) == 5
    assert [json.dumps(float(number)) for number in numbers] == numbers


@pytest.mark.parametrize("version", [0, 2])
def test_other_versions_are_refused_whatever_else_there_is(version: int, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"plan": {"format_version": version, "unknown": 1}}))
    with pytest.raises(CorruptError, match=f"format version {version}; this kdcache reads version 1"):
        open_cache(tmp_path)


# Samples and views


def seed_of(*numbers: int) -> int:
    """g of 6.2."""
    return key_of(struct.pack("<QQQ", *numbers))


def key_of(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@pytest.mark.parametrize("numbers", [(0, 0, 0), (2**62, 2**40 - 1, 2**20 - 1), (5, 17, 1)])
def test_generators_are_seeded_as_the_text_says(numbers: tuple[int, int, int]) -> None:
    g = seed_of(*numbers)
    with seeded(*numbers):
        python, numpy, torchs = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    assert python == random.Random(g).getstate()  # noqa: S311
    np.testing.assert_equal(numpy, np.random.RandomState(g % 2**32).get_state(legacy=False))
    assert torch.equal(torchs, torch.Generator().manual_seed(g).get_state())


@pytest.mark.parametrize("name", DIGESTS)
def test_keys_and_digest_of_golden_samples_follow_from_their_images(name: str, caches: dict[str, Kept]) -> None:
    arrays = caches[name].arrays
    keys = [key_of(b"<f4(1, 4, 4)" + image.astype("<f4").tobytes()) for image in frozen(name)["images"]]
    assert arrays["sample_keys"].tolist() == keys
    content = struct.pack(f"<{len(keys)}Q", *keys) + struct.pack(f"<{len(keys)}i", *arrays["labels"].tolist())
    assert caches[name].plan["dataset"]["digest"] == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_keys_of_every_kind_of_image_are_those_of_the_table(tmp_path: Path) -> None:
    colors = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    gray = colors[:, :, 0].copy()
    pairs: list[tuple[Any, bytes]] = [
        (torch.arange(6.0).reshape(1, 2, 3), b"<f4(1, 2, 3)" + struct.pack("<6f", *range(6))),
        (colors, b"|u1(3, 2, 4)" + bytes(colors[:, :, band].tobytes()[i] for band in range(3) for i in range(8))),
        (gray.astype(np.int64), b"<i8(1, 2, 4)" + struct.pack("<8q", *range(0, 24, 3))),
        (Image.fromarray(colors), b"|u1(2, 4, 3)" + bytes(range(24))),
        (Image.fromarray(gray), b"|u1(2, 4)" + bytes(range(0, 24, 3))),
    ]
    items: Any = [(image, 0) for image, _ in pairs]
    assert wrap(items, num_classes=1).keys().tolist() == [key_of(content) for _, content in pairs]
    Image.fromarray(colors).save(tmp_path / "picture.png")
    images = FileImages([str(tmp_path / "picture.png")])
    assert images.content(0) == (tmp_path / "picture.png").read_bytes()


def sketch_of(image: Array) -> Array:
    """A sketch of [channels, height, width], cell by cell."""
    gray = (image.astype(np.float64) * np.arange(1, len(image) + 1)[:, None, None]).mean(axis=0)
    height, width = gray.shape
    rows = [slice(a * height // 2, -(-(a + 1) * height // 2)) for a in range(2)]
    columns = [slice(b * width // 4, -(-(b + 1) * width // 4)) for b in range(4)]
    return np.array([gray[cell].mean() for cell in product(rows, columns)], np.float32)


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 5, 7), (3, 8, 6)])
def test_sketches_of_images_that_do_not_come_out_even(shape: tuple[int, int, int]) -> None:
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    expected = [sketch_of(image.numpy()) for image in images]
    np.testing.assert_allclose(inputs_of(images).sketches, expected, rtol=1e-6)


# Rows


def log_sum(values: Iterable[float]) -> float:
    return math.log(math.fsum(map(math.exp, values)))


def test_rows_keep_what_section_4_says_of_the_logits(kept: Kept) -> None:
    c, k, dtype = (kept.encoding[name] for name in ("num_classes", "top_k", "dtype"))
    for view, sample in kept.rows:
        row, logits = kept.row(view, sample), kept.live[view, sample].astype(float)
        level = log_sum(logits)
        log_probs = logits - level
        head = sorted(range(c), key=lambda j: -logits[j])[:k] if k < c else range(c)
        tail = [j for j in range(c) if j not in head and j != row["label"]]
        expected = {
            "label_log_prob": log_probs[row["label"]] if row["label"] >= 0 else 0,
            "logit_mean": logits.mean(),
            "logit_std": np.sqrt(np.square(logits - logits.mean()).mean()),
            "entropy": -(np.exp(log_probs) * log_probs).sum(),
            "log_prob_max": log_probs.max(),
            "log_prob_range": log_probs.max() - log_probs.min(),
        }
        expected |= {
            f"tail_log_mass_t{t}": log_sum(logits[tail] / t) - log_sum(logits / t) for t in (1, 2, 4, 8) if tail
        }
        assert row["logsumexp"] == pytest.approx(level, rel=1e-6)
        for name in kept.columns:
            assert row[name] == pytest.approx(expected[name], rel=2**-11 + 1e-6, abs=1e-6), name
        if k < c:
            assert row["indices"].tolist() == head
        if kept.encoding["rank"]:
            np.testing.assert_allclose(row["tail"], fitted(logits, tail, kept.arrays), rtol=0, atol=0.51)
        if dtype == "uint8":
            steps = 255 * (row["log_prob_max"] - log_probs) / max(row["log_prob_range"], 1e-4)
            np.testing.assert_allclose(row["log_probs"], steps.clip(0, 255), rtol=0, atol=0.501)
        else:
            rounding = 2**-11 if dtype == "float16" else 0
            np.testing.assert_allclose(row["log_probs"], log_probs[head], rtol=rounding + 1e-6, atol=1e-6)


def fitted(logits: Array, tail: list[int], arrays: dict[str, Array]) -> Array:
    """What 4.3 rounds to coordinates, by a direct solution."""
    basis, scale = arrays["tail_basis"].astype(float)[:, tail], arrays["tail_scale"].astype(float)
    weights = (len(logits) * np.exp(logits / 2 - log_sum(logits / 2)) + 0.03)[tail]
    gram = (basis * weights) @ basis.T + 1e-6 * weights.sum() * np.eye(len(scale))
    solved = np.linalg.solve(gram, (basis * weights) @ (logits - arrays["tail_mean"])[tail])
    return np.asarray((solved / scale).clip(-127, 127))


def by_the_letter(kept: Kept, view: int, sample: int) -> dict[str, Any]:
    """What each step of section 5 gives, by class, and the numbers that it needs."""
    row, c = kept.row(view, sample), range(kept.encoding["num_classes"])
    steps: dict[str, Any] = {}
    x: dict[int, float] = dict(zip(c, row["log_probs"].tolist(), strict=False))
    if kept.encoding["dtype"] == "uint8":
        x = {j: row["log_prob_max"] - q * row["log_prob_range"] / 255 for j, q in x.items()}
    if kept.encoding["tail"] != "none":
        head, last = dict(zip(row["indices"].tolist(), x.values(), strict=True)), min(x.values())
        x = {j: shape_at(kept, row, j) for j in c if j not in head and j != row["label"]}
        steps["step 2"] = x
        mass, n = row["tail_log_mass_t1"], len(x)
        level, w = log_sum(x.values()), math.exp(mass - last)
        steps["step 3"] = x = {j: value - level + mass for j, value in x.items()}
        if w > 1:
            steps["w"], d = w, 0.0
            for _ in range(3):
                others = [math.exp(value - last) for value in x.values() if value + d < last]
                m, s = n - len(others), math.fsum(others)
                d = min(max(math.log(w - m) - math.log(s), 0), 40) if s and w > m else 0 if s else 40
            steps |= {"m": m, "s": s, "d": d}
            steps["step 4"] = x = {j: min(value + d, last) for j, value in x.items()}
            h = math.fsum(math.exp(value - last) for value in x.values())
            if w - h > 0.0005 * w:
                phi = min(max((w - h) / (n - h), 0), 1) if n > h else 1
                x = {j: last + math.log(math.exp(value - last) * (1 - phi) + phi) for j, value in x.items()}
                steps |= {"step 5": x, "n": n, "h": h, "φ": phi}
        x = x | ({row["label"]: min(row["label_log_prob"], last)} if row["label"] >= 0 else {}) | head
        steps["step 6"] = x
    z, entropy = log_sum(x.values()), -math.fsum(value * math.exp(value) for value in x.values())
    if kept.encoding["dtype"] == "uint8":
        x = {j: value - z for j, value in x.items()}
    if kept.encoding["dtype"] == "float16":
        delta = min(max(z / entropy, -(2**-11)), 2**-11)
        x = {j: value * (1 + delta) for j, value in x.items()}
        steps |= {"z": z, "entropy": entropy, "δ": delta}
    steps |= {"step 7": x, "logits": {j: x[j] + float(row["logsumexp"]) for j in c}}
    return steps


def shape_at(kept: Kept, row: dict[str, Any], j: int) -> float:
    """u_j of 4.3, or 0."""
    if kept.encoding["tail"] == "uniform":
        return 0.0
    basis, mean, scale = (kept.arrays[f"tail_{name}"].astype(float) for name in ("basis", "mean", "scale"))
    return float(mean[j] + sum(q * scale[r] * basis[r, j] for r, q in enumerate(row["tail"].tolist())))


def test_decoding_by_the_letter_gives_the_logits_of_kdcache(kept: Kept) -> None:
    for view, sample in kept.rows:
        steps = by_the_letter(kept, view, sample)
        atol = kept.near if "φ" in steps else 1e-5
        np.testing.assert_allclose(kept.decoded[view, sample], list(steps["logits"].values()), rtol=0, atol=atol)


def test_some_rows_need_each_step(caches: dict[str, Kept]) -> None:
    raised, filled = caches["lowrank-v1"], caches["rows that the basis does not fit"]
    assert any(by_the_letter(raised, *place).get("d", 0) > 0.1 for place in raised.rows)
    assert any("φ" in by_the_letter(filled, *place) for place in filled.rows)


def test_decoded_rows_keep_what_is_promised(kept: Kept) -> None:
    dtype, close = kept.encoding["dtype"], 1e-5
    for view, sample in kept.rows:
        row, true, decoded = kept.row(view, sample), kept.live[view, sample].astype(float), kept.decoded[view, sample]
        log_probs, error = np.abs(true - log_sum(true)), np.abs(decoded - true)
        assert log_sum(decoded.astype(float)) == pytest.approx(float(row["logsumexp"]), rel=0, abs=1e-3)
        head = row["indices"].astype(int) if "indices" in row else np.arange(len(true))
        if dtype == "uint8":
            top, spread = abs(row["log_prob_max"]), row["log_prob_range"]
            assert (error <= spread / 255 + 2**-10 * (top + spread) + 1e-4 + close).all()
        else:
            rounding = np.maximum(log_probs * 2**-10, 2**-24) if dtype == "float16" else np.zeros(len(true))
            assert (error[head] <= rounding[head] + close).all()
        if "indices" in row:
            relative = 2**-10 if dtype == "float16" else 2**-11
            assert row["label"] < 0 or error[row["label"]] <= log_probs[row["label"]] * relative + close
            assert (np.diff(decoded[head]) <= 0).all()
            assert np.delete(decoded, head).max() <= decoded[head[-1]]


def test_the_summary_is_that_of_the_rows(kept: Kept) -> None:
    decoded, known = kept.decoded.astype(float), kept.arrays["labels"] >= 0
    expected = {
        "teacher_accuracy": (decoded.argmax(2) == kept.arrays["labels"])[:, known].mean(),
        "mean_sharpness": kept.arrays["logsumexp"].astype(float).mean(),
        "mean_entropy": kept.arrays["statistics"][..., kept.columns.index("entropy")].astype(float).mean(),
        "mean_top_probability": np.exp(decoded.max(2) - np.logaddexp.reduce(decoded, axis=2)).mean(),
    }
    assert kept.manifest["summary"] == pytest.approx(expected, rel=1e-3)


# Other programs

READ_BY_EXAMPLE = """
import sys
from pathlib import Path
import numpy
sys.path.insert(0, sys.argv[1])
from read_with_tensorstore import read
numpy.savez(sys.argv[2], **{asked: read(Path(asked[2:]), int(asked[0])) for asked in sys.argv[3:]})
assert not {"zarr", "kdcache", "torch"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def read_by_example(caches: dict[str, Kept], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    """The logits of every view of every cache, as the example reads them, by `VIEW PATH`."""
    out = tmp_path_factory.mktemp("example") / "logits.npz"
    asked = [f"{view} {kept.path}" for kept in caches.values() for view in range(len(kept.live))]
    subprocess.run([sys.executable, "-W", "error", "-c", READ_BY_EXAMPLE, EXAMPLE.parent, out, *asked], check=True)
    with np.load(out) as logits:
        return dict(logits)


def test_the_example_gives_the_logits_of_kdcache(kept: Kept, read_by_example: dict[str, Array]) -> None:
    for view, decoded in enumerate(kept.decoded):
        logits = read_by_example[f"{view} {kept.path}"]
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, decoded, rtol=0, atol=kept.near)


def run_example(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", EXAMPLE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_example_prints_the_top_class_of_the_first_samples(caches: dict[str, Kept]) -> None:
    golden = caches["lowrank-v1"]
    done = run_example(golden.path, "1")
    assert done.returncode == 0, done.stderr
    found = [re.split(", p |: class |sample ", line)[1:] for line in done.stdout.splitlines()]
    for (sample, best, p), logits in zip(found, golden.live[1], strict=False):
        assert np.array_equal(golden.live[1, int(sample)], logits)
        assert int(best) == logits.argmax()
        assert float(p) == pytest.approx(np.exp(logits.max() - log_sum(logits)), rel=2e-3)
    assert len(found) == 10


@pytest.mark.parametrize("name", ["data.zarr/labels/c/0", "manifest.json"])
def test_the_example_refuses_a_changed_byte(name: str, caches: dict[str, Kept], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(caches["dense-v1"].path, tmp_path / "copy"))
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data.replace(b'"seed": 0', b'"seed": 1') if name == "manifest.json" else b"\0" + data[1:])
    assert (copy / name).read_bytes() != data
    done = run_example(copy)
    assert done.returncode == 1
    assert "is damaged, or not of version 1" in done.stderr
    assert not done.stdout


def test_the_example_is_as_short_as_the_text_says() -> None:
    (lines,) = re.findall(r"is a reader of (\d+) lines", FORMAT)
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) == int(lines) <= 60


READ_WITH_ZARRS = """
import sys
from pathlib import Path
import numpy, zarr, zarrs
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True})
arrays = {}
for cache in map(Path, sys.argv[2:]):
    for name, array in zarr.open_group(cache / "data.zarr", mode="r").arrays():
        assert type(array.async_array.codec_pipeline) is zarrs.ZarrsCodecPipeline
        arrays[f"{cache} {name}"] = array[...]
numpy.savez(sys.argv[1], **arrays)
"""


def test_zarrs_reads_the_same_arrays(caches: dict[str, Kept], tmp_path: Path) -> None:
    out, paths = tmp_path / "arrays.npz", [kept.path for kept in caches.values()]
    subprocess.run([sys.executable, "-W", "error", "-c", READ_WITH_ZARRS, out, *paths], check=True)
    expected = {f"{kept.path} {name}": array for kept in caches.values() for name, array in kept.arrays.items()}
    with np.load(out) as found:
        assert set(found) == set(expected)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array, err_msg=name)


# The examples of the text


def crc32c(data: bytes) -> int:
    crc = 2**32 - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ (2**32 - 1)


Line = tuple[int, bytes, str]


def shards() -> dict[str, list[Line]]:
    """(offset, bytes, meaning) of each line of each hexadecimal block, by file."""
    blocks = re.findall(r"^```hex (.+)\n((?:.*\n)*?)```$", FORMAT, flags=re.MULTILINE)
    return {
        name: [(int(line[:4], 16), bytes.fromhex(line[6:53]), line[57:]) for line in text.splitlines()]
        for name, text in blocks
    }


@pytest.mark.parametrize("name", shards())
def test_a_shard_has_the_bytes_of_the_text_and_they_mean_what_it_says(name: str) -> None:
    lines, data = shards()[name], (ROOT / name).read_bytes()
    assert b"".join(part for _, part, _ in lines) == data
    forms, checks = {"u1": "<B", "u4": "<I", "u8": "<Q", "f4": "<f"}, 0
    samples: dict[int, float] = {}
    for offset, part, meaning in lines:
        assert data[offset : offset + len(part)] == part
        if found := re.match("(u1|u4|u8|f4) ([^,]+), (?:sample ([0-9]+))?", meaning):
            kind, number, sample = found.groups()
            value = float(number) if kind == "f4" else int(number)
            assert part == struct.pack(forms[kind], value), meaning
            samples |= {int(sample): value} if sample else {}
        elif found := re.fullmatch("crc32c (.+) to (.+)", meaning):
            first, last = (int(place, 16) for place in found.groups())
            assert part == struct.pack("<I", crc32c(data[first : last + 1]))
            checks += 1
    assert checks == 2, "one of the chunk, one of the index"
    folder, _, chunk = name.partition("/c/")
    array = read_array(ROOT / folder)[int(chunk.partition("/")[0])]
    np.testing.assert_array_equal(np.array(list(samples.values()), array.dtype), array[list(samples)])


def test_a_row_is_decoded_with_the_numbers_of_the_text(caches: dict[str, Kept]) -> None:
    ((view, sample, name),) = re.findall(r"^View (\d+), sample (\d+) of `(.+)\.kdcache`: k", FORMAT, flags=re.MULTILINE)
    golden, place = caches[name], (int(view), int(sample))
    (text,) = re.findall(r"^```row\n((?:.*\n)*?)```$", FORMAT, flags=re.MULTILINE)
    inputs, by_class, scalars = text.split("\n\n")
    row = golden.row(*place) | {"tail_scale": golden.arrays["tail_scale"]}
    for line in inputs.splitlines():
        name, *numbers = line.split()
        value = np.atleast_1d(row[name])
        np.testing.assert_array_equal(np.array(numbers, float).astype(value.dtype), value, err_msg=name)
    steps = by_the_letter(golden, *place) | {"teacher": dict(enumerate(golden.live[place].tolist()))}
    (_, *classes), *lines = [[line[:17].strip(), *line[17:].split()] for line in by_class.splitlines()]
    assert [name for name, *_ in lines] == [name for name, value in steps.items() if isinstance(value, dict)]
    for name, *numbers in lines:
        assert numbers == [f"{steps[name][int(j)]:.6f}" if int(j) in steps[name] else "-" for j in classes]
    found = re.findall(r"(\S+) (-?\d[\d.e-]*)(?:,|$)", scalars, flags=re.MULTILINE)
    assert {name: float(number) for name, number in found} == pytest.approx(
        {name: value for name, value in steps.items() if not isinstance(value, dict)}, rel=1e-6
    )
