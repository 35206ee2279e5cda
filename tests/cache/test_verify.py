"""`kdcache verify`: no damage is overlooked, no whole cache is accused, another data set or teacher is told apart."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import dask
import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import torch
from click.testing import Result
from helpers.caches import Made
from helpers.cli import kdcache, ok, refused
from helpers.corruption import contents, flipped, forge, refresh, setting
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcache import Cache, dump_teacher, open_cache
from kdcache.cache.format.codec import decode, encode
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.format.integrity import NOT_LISTED, _row_checks
from kdcache.cache.format.read_records import read_manifest
from kdcache.cache.format.schema import MANIFEST, PLAN, Encoding, Sharding, canonical, commit_file
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.zarr_store import read_inputs
from kdcache.cache.inspect.audit import Audit, audit
from kdcache.config.schema import CacheSpec
from kdcache.data.replay import Replay, replay
from kdcache.data.views import View, seeded
from kdcache.dump.check_teacher import compare_with_teacher
from kdcache.errors import CorruptError, IncompleteError, MismatchError
from kdcache.models import weights_digest

SPEC = CacheSpec(top_k=3, tail="lowrank", rank=4, views=2, seed=5, batch_size=5)
LABELS = [0, -1, 2, 3, 4, 5, 6, 7, -1, 9, 0, 1]
Values = npt.NDArray[Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Two views of twelve samples: a shard of two chunks, and one whose second chunk holds nothing."""
    with pytest.MonkeyPatch.context() as patch:
        shape = Sharding(shard_rows=8, chunk_rows=4, fingerprint_stride=1)
        patch.setattr("kdcache.dump.plan.choose_sharding", lambda *_: shape)
        out = tmp_path_factory.mktemp("whole") / "whole.kdcache"
        return dump_teacher(TinyTeacher(), tiny_samples(12, labels=LABELS), out, transform=FLIP, spec=SPEC)


@pytest.fixture
def copy(whole: Cache, tmp_path: Path) -> Path:
    """Its copy, to be damaged."""
    return Path(shutil.copytree(whole.path, tmp_path / "copy.kdcache"))


def where(found: Audit) -> list[str]:
    return [finding.where for finding in found.problems]


def accusation(cache: Path) -> str:
    """What an audit comes to that finds damage, be it in what all else is read by."""
    try:
        failure = audit(cache).failure
    except CorruptError as error:
        failure = error
    assert isinstance(failure, CorruptError)
    return failure.what


def failed(code: int, *arguments: object) -> Result:
    """What a verification printed that came to nothing good: a report, then one error with its fix."""
    done = kdcache("verify", *arguments)
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit)
    assert "error: " in done.stderr
    assert "fix: " in done.stderr
    assert "Traceback" not in done.output
    return done


# Bytes.


def test_a_whole_cache_is_whole(copy: Path, whole: Cache) -> None:
    (copy / "README.md").write_text("The card is prose.")
    found = audit(copy)
    assert (found.problems, found.failure) == ([], None)
    assert found.digest == whole.manifest.digest
    assert (found.files, found.rows) == (len(contents(whole.path)), 24)
    assert whole.manifest.digest in ok("verify", copy)


WAYS: dict[str, Callable[[bytes], bytes | None]] = {
    "removed": lambda data: None,
    "emptied": lambda data: b"",
    "cut short": lambda data: data[:-1],
    "halved": lambda data: data[: len(data) // 2],
    "grown": lambda data: data + b"\0",
    **{f"flipped at {p}": lambda data, p=p: flipped(data, round(p * (len(data) - 1))) for p in (0, 0.2, 0.5, 0.9, 1)},  # type: ignore[misc]
}


def put(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("way", WAYS)
def test_every_damaged_file_is_named(way: str, copy: Path) -> None:
    files = {name: data for name, data in contents(copy).items() if name != MANIFEST}
    assert len(files) == 2 * 2 * (7 + 1) + 2 * 2 + 3 + 13
    for name, data in files.items():
        put(copy / name, WAYS[way](data))
    found = audit(copy)
    assert sorted(where(found)) == sorted(files)
    assert isinstance(found.failure, CorruptError)


def test_a_damaged_file_is_the_only_one_that_is_named(copy: Path) -> None:
    files = {name: data for name, data in contents(copy).items() if name != MANIFEST}
    for number, (name, data) in enumerate(files.items()):
        (copy / name).write_bytes(flipped(data, number % len(data)))
        assert where(audit(copy)) == [name]
        (copy / name).write_bytes(data)
    assert audit(copy).failure is None


def test_a_changed_manifest_is_found(copy: Path) -> None:
    data = (copy / MANIFEST).read_bytes()
    for spoil in WAYS.values():
        put(copy / MANIFEST, spoil(data))
        assert MANIFEST in accusation(copy)
    for position in range(0, len(data), len(data) // 97):
        (copy / MANIFEST).write_bytes(flipped(data, position))
        assert MANIFEST in accusation(copy)


def test_the_command_names_the_file_and_the_manifest(copy: Path) -> None:
    name = "data.zarr/tail/c/1/1/0"
    (copy / name).write_bytes(flipped((copy / name).read_bytes(), 3))
    done = failed(5, copy)
    assert f"{name}: has other bytes" in done.stdout
    assert f"{name}: has other bytes" in done.stderr
    assert "20 checked" in done.stdout, "the four rows of that shard were not"
    (copy / MANIFEST).write_bytes(flipped((copy / MANIFEST).read_bytes(), 1000))
    assert MANIFEST in refused(5, "verify", copy)


def test_files_that_no_digest_covers_are_found(copy: Path) -> None:
    strays = ["data.zarr/.x", "data.zarr/log_probs/c/0/2/0", "data.zarr/x/zarr.json", "commits/0/2.json", "commits/x"]
    for name in strays[:-1]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"")
    (copy / strays[-1]).symlink_to(copy / MANIFEST)
    found = audit(copy)
    assert [tuple(finding) for finding in found.problems] == [(name, NOT_LISTED) for name in strays]
    assert found.failure is not None
    assert "delete" in found.failure.fix
    said = failed(5, copy).stdout
    assert all(name in said for name in strays)


def test_what_is_no_cache(tmp_path: Path) -> None:
    assert "there is no cache" in refused(2, "verify", tmp_path / "nowhere")
    assert "neither manifest nor plan" in refused(2, "verify", tmp_path)


# Caches that are not sealed.


def unseal(cache: Path, *missing: tuple[int, int]) -> None:
    """As a killed run leaves a cache: of the `missing` shards there are files, of any content, and no marker."""
    plan = read_manifest(cache / MANIFEST).plan
    (cache / PLAN).write_bytes(canonical(plan))
    (cache / MANIFEST).unlink()
    for view, shard in missing:
        (cache / commit_file(view, shard)).unlink()
        (cache / f"data.zarr/logsumexp/c/{view}/{shard}").write_bytes(b"half")
        (cache / f"data.zarr/fingerprints/c/{view}/{shard}").unlink()


def test_an_unsealed_cache_is_incomplete(copy: Path) -> None:
    unseal(copy, (0, 1), (1, 0), (1, 1))
    found = audit(copy)
    assert (found.problems, found.digest, found.rows) == ([], None, 8)
    assert isinstance(found.failure, IncompleteError)
    assert "3 of its 4 shards are missing" in found.failure.what
    assert "3 of its 4 shards are missing" in failed(3, copy).stderr


def test_damage_to_an_unsealed_cache_is_found(copy: Path) -> None:
    unseal(copy, (1, 1))
    markers = [json.loads(marker.read_bytes()) for marker in sorted(copy.glob("commits/*/*.json"))]
    files = [name for marker in markers for name in marker["files"]]
    assert len(files) == 3 * 7
    for number, name in enumerate(files):
        data = (copy / name).read_bytes()
        put(copy / name, list(WAYS.values())[number % len(WAYS)](data))
        found = audit(copy)
        assert where(found) == [name]
        assert isinstance(found.failure, CorruptError)
        (copy / name).write_bytes(data)
    (copy / files[0]).unlink()
    done = failed(5, copy)
    assert files[0] in done.stdout
    assert "dump-teacher" in done.stderr


@pytest.mark.parametrize("name", ["labels/c/1", "sample_keys/c/0", "tail_basis/c/0/0", "log_probs/zarr.json"])
def test_damage_to_what_all_shards_share_is_found_before_it_is_sealed(name: str, copy: Path) -> None:
    unseal(copy, (1, 1))
    path = copy / "data.zarr" / name
    data = path.read_bytes()
    for spoil in (WAYS["removed"], WAYS["emptied"], WAYS["flipped at 0"]):
        put(path, spoil(data))
        assert name.split("/", maxsplit=1)[0] in accusation(copy)
        path.write_bytes(data)


def test_a_marker_that_was_changed_is_found(copy: Path) -> None:
    unseal(copy, (1, 1))
    marker = copy / commit_file(0, 1)
    data = marker.read_bytes()
    for position in range(0, len(data), 41):
        marker.write_bytes(flipped(data, position))
        assert "/0/1" in accusation(copy), "the marker, or a file that is not as it says"
    listed = json.loads(data)["files"]
    first = next(iter(listed))
    for files in ({}, listed | {"../../elsewhere": listed[first]}, dict(list(listed.items())[1:])):
        marker.write_bytes((json.dumps({"files": files}, indent=1) + "\n").encode())
        assert where(audit(copy)) == [commit_file(0, 1)]


# Values: the hashes are right, and the rows are not.


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


def cell(place: int, value: float) -> Callable[[Values], Values]:
    def change(row: Values) -> Values:
        row[place] = value
        return row

    return change


TOP_3 = Encoding(num_classes=10, top_k=3, tail="lowrank", rank=4, dtype="float16")
OUTSIDE, WITHOUT = 9, 8
"""Of shard 1: a sample whose label is outside the head in view 1, and one without a label."""

ROWS: list[tuple[str, str, int, Callable[[Values], object]]] = [
    ("a class occurs twice in the head", "indices", 10, lambda row: row[[0, 1, 0]]),
    ("the log-probabilities are not in descending order", "log_probs", 10, lambda row: row[[0, 2, 1]]),
    ("a log-probability is above 0", "log_probs", 10, cell(0, 2**-12)),
    ("a log-probability is NaN or infinite", "log_probs", 10, cell(1, math.nan)),
    ("a log-probability is NaN or infinite", "log_probs", 11, cell(2, -math.inf)),
    ("the logsumexp is NaN or infinite", "logsumexp", 10, lambda _: math.nan),
    ("the logsumexp is NaN or infinite", "logsumexp", 10, lambda _: math.inf),
    ("head, label and tail do not add up to 1", "log_probs", 11, lambda row: row[[0, 0, 0]]),
    ("head, label and tail do not add up to 1", "statistics", 10, column(TOP_3, "tail_log_mass_t1", -30)),
    ("a label outside the head is more probable", "statistics", OUTSIDE, column(TOP_3, "label_log_prob", -1e-3)),
    ("the log-probability of the label is above 0", "statistics", OUTSIDE, column(TOP_3, "label_log_prob", 2**-12)),
    ("a row without a label has", "statistics", WITHOUT, column(TOP_3, "label_log_prob", -1)),
    ("a statistic is NaN or infinite", "statistics", 10, column(TOP_3, "logit_mean", math.nan)),
    ("a statistic is NaN or infinite", "statistics", 10, column(TOP_3, "tail_log_mass_t8", -math.inf)),
    ("the entropy is not between 0 and log C", "statistics", 10, column(TOP_3, "entropy", -(2**-12))),
    ("the entropy is not between 0 and log C", "statistics", 10, column(TOP_3, "entropy", 2.32)),
    ("the standard deviation of the logits is", "statistics", 10, column(TOP_3, "logit_std", -1)),
    ("tail_log_mass_t4 is above 0", "statistics", 10, column(TOP_3, "tail_log_mass_t4", 0.01)),
]


@pytest.mark.parametrize(("what", "name", "sample", "change"), ROWS)
def test_a_row_that_cannot_be_is_found(
    what: str, name: str, sample: int, change: Callable[[Values], object], copy: Path, whole: Cache
) -> None:
    assert whole.manifest.plan.encoding == TOP_3
    rewrite(copy, name, (1, sample), change)
    open_cache(copy)
    found = audit(copy)
    assert set(where(found)) == {f"view 1, shard 1, sample {sample}"}
    assert any(finding.what.startswith(what) for finding in found.problems)
    assert found.failure is not None
    assert found.failure.exit_code == 5


def test_a_class_that_there_is_not_is_found(copy: Path) -> None:
    rewrite(copy, "indices", (1, 10), cell(1, 10))
    (finding,) = audit(copy).problems
    assert finding.where.startswith("view 1, shard 1")
    assert "class index of 10" in finding.what
    assert "view 1, shard 1" in failed(5, copy).stdout


def test_every_row_that_cannot_be_is_counted(copy: Path) -> None:
    rewrite(copy, "logsumexp", (0,), lambda rows: np.where(np.arange(12) % 3 == 2, math.nan, rows))
    found = {tuple(finding) for finding in audit(copy).problems}
    for where_, count in (("shard 0, sample 2", 2), ("shard 1, sample 8", 2)):
        assert (f"view 0, {where_}", f"the logsumexp is NaN or infinite ({count} rows of the shard)") in found
    done = failed(5, copy)
    assert "4 problems" in done.stdout
    assert "and 1 more problems" in done.stderr


def test_a_basis_that_decodes_to_nothing_is_found(copy: Path) -> None:
    rewrite(copy, "tail_mean", (), lambda mean: mean + np.float32(3e38) * (np.arange(10) % 2 * 2 - 1))
    found = audit(copy)
    assert where(found) == [f"view {v}, shard {s}, sample {8 * s}" for v in range(2) for s in range(2)]
    assert all("does not decode to finite logits" in finding.what for finding in found.problems)
    rewrite(copy, "tail_scale", (), cell(2, 0.0))
    assert all("tail basis" in finding.what for finding in audit(copy).problems)
    assert audit(copy).failure is not None


@pytest.mark.parametrize("label", [10, -2, 2**31 - 1])
def test_a_label_that_there_is_not_is_found(label: int, copy: Path, whole: Cache) -> None:
    rewrite(copy, "labels", (9,), lambda _: label)
    labels = whole.labels.copy()
    labels[9] = label
    forge(copy, setting(digest_of(whole.sample_keys, labels), "plan", "dataset", "digest"))
    (finding,) = audit(copy).problems
    assert f"label {label} for sample 9" in finding.what
    assert f"label {label} for sample 9" in failed(5, copy).stdout


def test_labels_and_keys_that_are_not_those_of_the_data_set_are_found(copy: Path) -> None:
    for name in ("labels", "sample_keys"):
        rewrite(copy, name, (4,), lambda value: value + 1)
        (finding,) = audit(copy).problems
        assert "have digest sha256:" in finding.what
        rewrite(copy, name, (4,), lambda value: value - 1)
    assert audit(copy).failure is None


def small(folder: Path, **spec: object) -> Cache:
    options = CacheSpec.model_validate({"shard_rows": 8, **spec})
    return dump_teacher(TinyTeacher(), tiny_samples(12, labels=LABELS), folder / "small.kdcache", spec=options)


DENSE: dict[str, tuple[str, str, Callable[[Encoding], Callable[[Values], object]]]] = {
    "the probabilities do not add up to 1": ("float16", "log_probs", lambda _: lambda row: np.roll(row, 1) / 2),
    "a log-probability is above 0": ("float32", "log_probs", lambda _: cell(4, 1e-6)),
    "a log-probability is NaN or infinite": ("float32", "log_probs", lambda _: cell(4, math.nan)),
    "does not decode to finite logits": ("float32", "log_probs", lambda _: cell(9, math.inf)),
    "the largest log-probability is above 0": ("uint8", "statistics", lambda e: column(e, "log_prob_max", 2**-12)),
    "the range of the log-probabilities is": ("uint8", "statistics", lambda e: column(e, "log_prob_range", -1)),
    "a statistic is NaN": ("uint8", "statistics", lambda e: column(e, "log_prob_range", math.nan)),
}


@pytest.mark.parametrize("what", DENSE)
def test_a_dense_row_that_cannot_be_is_found(what: str, tmp_path: Path) -> None:
    dtype, name, change = DENSE[what]
    cache = small(tmp_path, dtype=dtype)
    assert audit(cache.path).failure is None
    rewrite(cache.path, name, (0, 3), change(cache.manifest.plan.encoding))
    found = audit(cache.path)
    assert set(where(found)) == {"view 0, shard 0, sample 3"}
    assert any(finding.what.startswith(what) for finding in found.problems)


def crc32c(data: bytearray) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


CHUNKS = [
    *[(f"{name}/c/1/0/0", 2, 1) for name in ("log_probs", "indices", "statistics", "tail")],
    ("logsumexp/c/1/0", 2, 1),
    ("logsumexp/c/1/1", 2, 0),
    ("fingerprints/c/1/0", 1, 0),
    ("sketches/c/1/1/0", 1, 0),
    ("labels/c/0", 2, 1),
    ("sample_keys/c/1", 2, 0),
    ("tail_basis/c/0/0", 1, 0),
]


@pytest.mark.parametrize(("name", "chunks", "chunk"), CHUNKS)
def test_a_chunk_that_a_shard_says_it_has_not_is_found(name: str, chunks: int, chunk: int, copy: Path) -> None:
    path = copy / "data.zarr" / name
    body, index = path.read_bytes()[: -16 * chunks - 4], bytearray(path.read_bytes()[-16 * chunks - 4 : -4])
    assert path.read_bytes()[-4:] == struct.pack("<I", crc32c(index))
    index[16 * chunk : 16 * chunk + 16] = b"\xff" * 16
    path.write_bytes(body + index + struct.pack("<I", crc32c(index)))
    refresh(copy)
    with pytest.raises(CorruptError, match=f"chunk {chunk} of .*{name} is missing"):
        open_cache(copy).teacher()
    found = audit(copy)
    assert len(found.problems) == 1
    assert f"{name} is missing" in found.problems[0].what
    if name.split("/")[2] == "1" and name.count("/") > 2:
        assert found.problems[0].where == f"view 1, shard {name.split('/')[3]}"
    assert failed(5, copy).stdout.count("is missing") == 1


# No false alarms.


@st.composite
def encoded(draw: st.DrawFn) -> tuple[Tensor, Tensor, Encoding, TailBasis | None]:
    """Logits of many kinds and sizes, a third of them labeled with the teacher's choice, and any encoding."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**63 - 1)))
    size, classes = draw(st.integers(1, 8)), draw(st.integers(2, 300))
    normal = torch.randn(size, classes, generator=generator)
    kinds = {
        "normal": normal,
        "constant": normal[:, :1].expand(-1, classes),
        "one-hot": (normal == normal.amax(dim=1, keepdim=True)).float(),
        "with ties": normal.round(),
        "two levels": (normal > 0).float(),
        "half far below": normal - 30.0 * (torch.arange(classes) % 2),
        "far from 0": normal + 1000,
    }
    logits = kinds[draw(st.sampled_from(sorted(kinds)))] * draw(st.sampled_from([0, 1e-3, 1, 8, 100, 1e4, 1e6]))
    anything = torch.randint(-1, classes, (size,), generator=generator)
    labels = torch.where(torch.rand(size, generator=generator) < 0.3, logits.argmax(dim=1), anything)
    tail = draw(st.sampled_from(["none", "uniform", "lowrank"]))
    types = ["float16", "float32", *(["uint8"] if tail == "none" else [])]
    encoding = Encoding.model_validate(
        {
            "num_classes": classes,
            "top_k": classes if tail == "none" else draw(st.integers(1, classes - 1)),
            "tail": tail,
            "rank": min(4, classes) if tail == "lowrank" else 0,
            "dtype": draw(st.sampled_from(types)),
        }
    )
    if not encoding.rank:
        return logits, labels, encoding, None
    directions = torch.linalg.qr(torch.randn(classes, encoding.rank, generator=generator)).Q.T
    return logits, labels, encoding, TailBasis(directions.half(), logits.mean(dim=0), torch.full((encoding.rank,), 0.2))


def accusations(logits: Tensor, labels: Tensor, encoding: Encoding, basis: TailBasis | None = None) -> list[str]:
    rows = encode(logits, labels, encoding, basis)
    found = [what for what, wrong in _row_checks(rows, labels, encoding) if wrong.any()]
    return found if decode(rows, labels, encoding, basis).isfinite().all() else [*found, "not finite"]


def two_of_three(*logits: float) -> tuple[Tensor, Tensor, Encoding, None]:
    """The label is the class outside the head."""
    encoding = Encoding(num_classes=3, top_k=2, tail="uniform", dtype="float32")
    return torch.tensor([logits]), torch.tensor([2]), encoding, None


@settings(deadline=None, max_examples=300)
@given(batch=encoded())
@example(batch=two_of_three(0, -1e5, -2e5))  # lower than the label's float16 reaches
@example(batch=two_of_three(0, -1, -104.5))  # a mass that float32 hardly holds
def test_nothing_that_the_encoder_wrote_is_accused(
    batch: tuple[Tensor, Tensor, Encoding, TailBasis | None],
) -> None:
    assert accusations(*batch) == []


@pytest.mark.parametrize("kind", ["normal", "constant", "two levels"])
@pytest.mark.parametrize("top_k", [1, 1000, 69_999, 70_000])
def test_roundings_that_add_up_over_many_classes_are_not_accused(top_k: int, kind: str) -> None:
    # Of two levels all classes of one are rounded the same way.
    normal = torch.randn(4, 70_000, generator=torch.Generator().manual_seed(0))
    logits = {"normal": 3 * normal, "constant": torch.zeros(4, 70_000), "two levels": 3.0 * (normal > 0)}[kind]
    labels = torch.tensor([-1, 0, 5, 69_999])
    for dtype in ("float16", "float32", "uint8"):
        if dtype != "uint8" or top_k == 70_000:
            tail = "none" if top_k == 70_000 else "uniform"
            encoding = {"num_classes": 70_000, "top_k": top_k, "tail": tail, "dtype": dtype}
            assert accusations(logits, labels, Encoding.model_validate(encoding)) == []


class Loud(TinyTeacher):
    """Logits up to about a million."""

    def forward(self, images: Tensor) -> Tensor:
        return 2**17 * super().forward(images)


@pytest.mark.parametrize(
    ("top_k", "dtype"),
    [("all", "uint8"), ("all", "float16"), ("all", "float32"), (1, "float16"), (1, "float32"), (9, "float32")],
)
@pytest.mark.parametrize("teacher", [TinyTeacher(), Loud()], ids=["usual", "loud"])
def test_a_cache_of_any_encoding_is_whole(teacher: nn.Module, top_k: int | str, dtype: str, tmp_path: Path) -> None:
    spec = CacheSpec.model_validate({"top_k": top_k, "rank": 1, "dtype": dtype, "shard_rows": 8})
    out = tmp_path / "c.kdcache"
    cache = dump_teacher(teacher, tiny_samples(12, labels=LABELS), out, spec=spec)
    assert cache.manifest.plan.encoding.tail == ("none" if top_k == "all" else "lowrank")
    assert audit(out).problems == []


# In parallel.


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
    monkeypatch.setattr("kdcache.cache.format.integrity.ThreadPoolExecutor", partial(ThreadPoolExecutor, threads))
    with dask.config.set(num_workers=threads):
        assert [audit(copy) for _ in range(3)] == 3 * [usual]


# Pixels.

CROP = [{"RandomCrop": {"size": 4, "padding": 1}}, *FLIP]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two views of 100 samples, of which every third left a fingerprint, through a transform that draws at random."""
    samples, teacher = tiny_samples(100), TinyTeacher()
    spec = CacheSpec(views=2, seed=5, shard_rows=48, dtype="float32")
    cache = dump_teacher(teacher, samples, tmp_path_factory.mktemp("seen") / "c.kdcache", transform=CROP, spec=spec)
    assert cache.manifest.plan.shape.fingerprint_stride == 3
    return Made(cache, samples, teacher)


def another_library(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, int, int], Tensor]) -> None:
    """Let every image come out of its transform changed, by (pixels, sample, view)."""
    original = View._apply
    monkeypatch.setattr(
        View, "_apply", lambda view, picture, first: change(original(view, picture, first), first, view.view)
    )


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
    monkeypatch.setattr("kdcache.data.views.seeded", lambda seed, *parts: seeded(seed + 1, *parts))
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


# The teacher.


class Mirrored(TinyTeacher):
    """The same weights, and another use of them."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.flip(3))


class OneClassFarBelow(TinyTeacher):
    """In 255ths of their range, its logits are hardly told apart."""

    def forward(self, images: Tensor) -> Tensor:
        return 0.2 * super().forward(images) - 300 * (torch.arange(10) == 9)


def dense_figures(live: Tensor, cached: Tensor, t: float) -> list[float]:
    """What `TeacherAgreement` holds of a view at a temperature, from logits in float64."""
    live, cached = live.double(), cached.double()
    p, p_cached = (np.exp(x.numpy() / t) / np.exp(x.numpy() / t).sum(axis=1, keepdims=True) for x in (live, cached))
    gradients = []
    for logits in (live, cached):
        student = torch.zeros_like(live, requires_grad=True)
        log_q = (student / t).log_softmax(1)
        (t * t * torch.nn.functional.kl_div(log_q, (logits / t).softmax(1), reduction="sum")).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        gradients.append(student.grad)
    return [
        float(np.abs(p - p_cached).sum(axis=1).mean() / 2),
        float((p * np.log(p / p_cached)).sum(axis=1).mean()),
        float((live.argmax(1) == cached.argmax(1)).double().mean()),
        float((gradients[1] - gradients[0]).norm() / gradients[0].norm()),
    ]


@pytest.mark.parametrize(("tail", "rank"), [("lowrank", 3), ("uniform", None)])
def test_figures_against_the_live_teacher_are_those_of_the_dense_logits(
    tail: str, rank: int | None, tmp_path: Path
) -> None:
    samples, teacher = tiny_samples(), TinyTeacher()
    spec = CacheSpec.model_validate({"top_k": 2, "tail": tail, "rank": rank, "views": 2, "shard_rows": 8})
    made = Made(dump_teacher(teacher, samples, tmp_path / "c.kdcache", transform=FLIP, spec=spec), samples, teacher)
    found = compare_with_teacher(made.cache, teacher, samples, rows=1000)
    assert [(one.view, one.temperature, one.rows) for one in found] == [
        (v, t, 37) for v in (0, 1) for t in (1, 2, 4, 8)
    ]
    answers = made.cache.teacher()
    for one in found:
        expected = dense_figures(made.live(one.view), answers(torch.arange(37), one.view), one.temperature)
        assert list(one[3:]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert max(one.total_variation for one in found) > 1e-3, "a cache without loss shows nothing"


def test_rows_that_the_teacher_runs_on_are_spread(tmp_path: Path) -> None:
    samples, teacher = tiny_samples(), TinyTeacher()
    cache = dump_teacher(teacher, samples, tmp_path / "c.kdcache")
    shown: list[int] = []
    teacher.register_forward_pre_hook(lambda _, given: shown.extend((given[0][:, 0, 0, 0] * 8).int().tolist()))
    assert {one.rows for one in compare_with_teacher(cache, teacher, samples, rows=5)} == {5}
    assert [sample * 5 // 37 for sample in shown] == [0, 1, 2, 3, 4]


def test_a_teacher_of_other_weights_is_refused(seen: Made) -> None:
    other = TinyTeacher(seed=2)
    with pytest.raises(MismatchError) as caught:
        compare_with_teacher(seen.cache, other, seen.samples)
    assert weights_digest(other) in caught.value.what
    assert seen.cache.manifest.plan.teacher.weights_digest in caught.value.what


def test_a_teacher_of_other_behavior_is_refused(seen: Made) -> None:
    with pytest.raises(MismatchError, match="in view 0 the teacher's logits are not those of the cache") as caught:
        compare_with_teacher(seen.cache, Mirrored(), seen.samples)
    live, cached = Mirrored()(seen.images(0)), seen.live(0)
    variation = (live.softmax(1) - cached.softmax(1)).abs().sum(1).mean() / 2
    same = (live.argmax(1) == cached.argmax(1)).float().mean()
    assert f"{variation:.4f} at T = 1, the same class in {same:.1%} of 100 rows" in caught.value.what


def test_what_an_encoding_loses_accuses_no_teacher(tmp_path: Path) -> None:
    samples, teacher = tiny_samples(), OneClassFarBelow()
    cache = dump_teacher(teacher, samples, tmp_path / "c.kdcache", spec=CacheSpec(dtype="uint8"))
    found = compare_with_teacher(cache, teacher, samples)
    assert found[0].total_variation > 0.05
    cached = cache.teacher()(torch.arange(37))
    live = Made(cache, samples, teacher).live()
    assert list(found[0][3:]) == pytest.approx(dense_figures(live, cached, 1), rel=1e-3)


# The command, with a pipeline.

NETWORK = """
import torch
class Network(torch.nn.Module):
    def __init__(self, num_classes, seed, mirrored):
        super().__init__()
        self.mirrored = mirrored
        self.weight = torch.nn.Parameter(torch.randn(64, num_classes, generator=torch.Generator().manual_seed(seed)))
    def forward(self, images):
        return (images.flip(3) if self.mirrored else images).flatten(1) @ self.weight
def make(num_classes, seed=0, mirrored=False):
    return Network(num_classes, seed, mirrored)
"""


class Work(NamedTuple):
    """A folder with a pipeline and its cache; arrays of its data set."""

    recipe: Path
    cache: Path
    images: Values
    labels: Values

    def other(self, folder: Path, images: Values | None = None, labels: Values | None = None) -> list[str]:
        """Arguments that make the pipeline's data set another."""
        path = folder / "pictures.npz"
        given = {
            "images": self.images if images is None else images,
            "labels": self.labels if labels is None else labels,
        }
        np.savez(path, **given)  # type: ignore[arg-type]  # numpy's stub takes the names for its flags
        return ["--set", f"dataset.root={path}"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("work")
    images = np.random.default_rng(0).integers(0, 255, (50, 8, 8), np.uint8)
    labels = np.arange(50) % 10
    np.savez(folder / "pictures.npz", images=images, labels=labels)
    (folder / "net.py").write_text(NETWORK)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"dataset: {{name: npz, root: {folder / 'pictures.npz'}, validation_fraction: 0.0, test_fraction: 0.0}}\n"
        "transform: [{RandomCrop: {size: 8, padding: 1}}, {ToDtype: {dtype: float32, scale: true}}]\n"
        "eval_transform: [{ToDtype: {dtype: float32, scale: true}}]\n"
        f"teacher: {{model: '{folder / 'net.py'}:make'}}\n"
        "cache: {top_k: 3, rank: 4, views: 2, shard_rows: 20, seed: 3}\n"
        "student: {model: 'small:mlp', train: {epochs: 1}}\n"
    )
    ok("dump-teacher", recipe, "-o", folder / "c.kdcache", "--device", "cpu")
    return Work(recipe, folder / "c.kdcache", images, labels)


def told(code: int, *arguments: object) -> Any:
    """What `--json` prints: nothing else goes to stdout."""
    done = kdcache("verify", *arguments, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_a_cache_of_the_pipeline_passes_all_checks(work: Work) -> None:
    text = ok("verify", work.cache, work.recipe, "--replay", "--teacher", "--device", "cpu")
    assert "the same 50 samples" in text
    assert "100 images are those that the teacher saw, bit for bit" in text
    assert "50 rows per view" in text
    found = told(0, work.cache, work.recipe, "--replay", "--teacher", "--rows", 7, "--device", "cpu")
    assert found["replay"] == {"checked": 100, "rounded": 0, "teacher_seen": True}
    assert [(one["view"], one["temperature"], one["rows"]) for one in found["teacher"]] == [
        (view, t, 7) for view in (0, 1) for t in (1, 2, 4, 8)
    ]
    for one in told(0, work.cache, work.recipe, "--teacher", "--device", "cpu")["teacher"]:
        assert f"{one['total_variation']:.5f}" in text
        assert f"{one['gradient_error']:.5f}" in text


def test_what_is_said_to_programs(work: Work, copy: Path) -> None:
    assert told(0, work.cache, work.recipe)["dataset"] == {"samples": 50}
    found = told(0, copy)
    assert found == {
        "cache": str(copy),
        "ok": True,
        "digest": open_cache(copy).manifest.digest,
        "files": len(contents(copy)),
        "rows": 24,
        "problems": [],
    }
    (copy / "commits/0/0.json").unlink()
    found = told(5, copy, work.recipe, "--replay")
    assert (found["ok"], found["rows"]) == (False, 24)
    assert found["problems"] == [{"where": "commits/0/0.json", "what": "is missing or not a plain file"}]
    assert "dataset" not in found, "of a damaged cache nothing more is said"
    (copy / "commits/0/0.json").write_bytes(b"")
    unseal(copy, (0, 0))
    found = told(3, copy)
    assert (found["ok"], found["digest"], found["problems"]) == (False, None, [])
    refused(4, "verify", work.cache, work.recipe, "--set", "dataset.validation_fraction=0.1")


def test_options_that_need_a_pipeline(work: Work) -> None:
    for options in (["--replay"], ["--teacher"], ["--set", "cache.top_k=4"]):
        assert f"kdcache verify {work.cache} PIPELINE" in refused(2, "verify", work.cache, *options)
    assert "nowhere.yaml" in refused(2, "verify", work.cache, "nowhere.yaml")


def test_another_data_set_is_refused(work: Work, tmp_path: Path) -> None:
    arguments = ["verify", work.cache, work.recipe]
    ok(*arguments, *work.other(tmp_path))
    shuffled = np.arange(50)
    shuffled[[5, 8]] = 8, 5
    same = {"images": work.images[shuffled], "labels": work.labels[shuffled]}
    assert "in another order, first at sample 5" in refused(4, *arguments, *work.other(tmp_path, **same))
    other = work.images.copy()
    other[7, 0, 0] ^= 1
    assert "1 of 50 samples" in refused(4, *arguments, *work.other(tmp_path, other))
    relabeled = work.labels.copy()
    relabeled[9] = 3
    assert "sample 9 of pictures/train has label 3, in the cache 9" in refused(
        4, *arguments, *work.other(tmp_path, labels=relabeled)
    )
    assert "has 40" in refused(4, *arguments, *work.other(tmp_path, work.images[:40], work.labels[:40]))


def test_another_teacher_is_refused(work: Work) -> None:
    arguments = ["verify", work.cache, work.recipe, "--teacher", "--device", "cpu", "--set"]
    assert "this teacher has the weights" in refused(4, *arguments, "teacher.args={seed: 1}")
    message = refused(4, *arguments, "teacher.args={mirrored: true}")
    assert "mean total variation" in message
    assert "the same class in" in message


def test_a_student_is_not_trained_on_other_pixels(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = ["train-student", work.recipe, "--cache", work.cache, "--device", "cpu", "-o"]

    def recorded(name: str, *options: str) -> Any:
        done = kdcache(*student, tmp_path / name, *options)
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / name / "metrics.json").read_text())["replay"][0], done.stderr

    assert recorded("same")[0] == {"checked": 32, "rounded": 0}
    with monkeypatch.context() as patch:
        another_library(patch, lambda pixels, sample, view: pixels * (1 + 2**-23))
        found, said = recorded("rounded")
        assert found == {"checked": 32, "rounded": 32}
        assert "32 of 32 images differ from the teacher's by rounding alone" in said
        assert "100 of them up to rounding" in ok("verify", work.cache, work.recipe, "--replay")
    another_library(monkeypatch, lambda pixels, sample, view: pixels.roll(1, dims=2))
    assert "view 0 of sample 0 is not what" in refused(4, "verify", work.cache, work.recipe, "--replay")
    message = refused(4, *student, tmp_path / "refused")
    assert "--allow-other-pixels" in message.split("fix: ")[1]
    assert not (tmp_path / "refused").exists()
    found, said = recorded("allowed", "--allow-other-pixels")
    assert f"error: {found['other_pixels']}\n" in message
    assert "continuing because of --allow-other-pixels" in said
