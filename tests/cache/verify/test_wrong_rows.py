"""Rows that cannot be right, and rows that are."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.corruption import forge, refresh, setting
from helpers.tiny import TinyTeacher, tiny_samples
from helpers.verify import LABELS, TOP_3, Values, column, failed, rewrite, where
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcache import Cache, dump_teacher, open_cache
from kdcache.cache.format.codec import decode, encode
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.format.integrity import _row_checks
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.inspect.audit import audit
from kdcache.config.cache import CacheSpec
from kdcache.errors import CorruptError


def cell(place: int, value: float) -> Callable[[Values], Values]:
    def change(row: Values) -> Values:
        row[place] = value
        return row

    return change


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
    assert "4 problems, listed in the report" in done.stderr
    assert "and 1 more problem\n" in failed(5, copy, "--json").stderr


def test_a_basis_that_decodes_to_nothing_is_found(copy: Path) -> None:
    rewrite(copy, "tail_mean", (), lambda mean: mean + np.float32(3e38) * (np.arange(10) % 2 * 2 - 1))
    found = audit(copy)
    assert where(found) == [f"view {v}, shard {s}, sample {8 * s}" for v in range(2) for s in range(2)]
    assert all("does not decode to finite numbers" in finding.what for finding in found.problems)
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
    "does not decode to finite numbers": ("float32", "log_probs", lambda _: cell(9, math.inf)),
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
