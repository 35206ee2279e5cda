"""Caches of sequences: what is written is what is read, in any prefix, from any placement; and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from helpers.cli import ok, refused
from helpers.format_text import read_array
from helpers.sequences import Text, some_text, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache import Cache, KdcacheError, open_cache
from kdcache.cache import sequences
from kdcache.cache.format.sequence_integrity import token_row_checks
from kdcache.cache.format.stored_sequences import vocabulary_record
from kdcache.cache.format.token_rows import TokenRows
from kdcache.cache.inspect.audit import audit
from kdcache.cache.push_pull import pull, push
from kdcache.cache.sequence_plan import CountedSequences, sequences_per_shard, sequences_record
from kdcache.cache.sequences import CachedSequences
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.curate.token_cache import write_token_cache
from kdcache.errors import CorruptError, MismatchError, UsageError

TAILS = ("ghost", "lowrank")


def test_draws_are_an_unbiased_estimate_at_their_temperature(tmp_path: Path) -> None:
    """Of 4000 rows with one distribution: the error of the mean falls as one by the square root of all draws."""
    live = 2 * torch.randn(60, generator=torch.Generator().manual_seed(5))
    texts = [(np.arange(41) + shift) % 60 for shift in range(10) for _ in range(10)]
    spec = TokenCacheSpec(tail="draws", draws=50, temperature=2.0)
    cache = write_token_cache(texts, lambda _: live.expand(41, 60), tmp_path / "c", vocabulary=60, spec=spec)
    assert audit(cache.path).failure is None
    assert "50 draws at T = 2" in ok("info", cache.path)
    targets = cache.sequences().targets(cache.sequences()(range(100)).rows)
    assert targets.draws is not None
    tokens, counts = targets.draws
    assert targets.temperatures == (2.0,)
    assert counts.sum(dim=1).eq(50).all()
    total = torch.zeros(60).index_add_(0, tokens.flatten(), counts.flatten()) / counts.sum()
    # Sequences of one key are drawn alike: ten different ones of 40 rows with 50 draws.
    assert (total - (live / 2).softmax(dim=0)).abs().sum() < 4 * (60 / (10 * 40 * 50)) ** 0.5
    again = write_token_cache(texts, lambda _: live.expand(41, 60), tmp_path / "d", vocabulary=60, spec=spec)
    assert again.manifest.digest == cache.manifest.digest


def test_draws_that_are_impossible_are_refused_and_found(text: Text, tmp_path: Path) -> None:
    for settings_of, message in ((({"draws": 256}), "256 draws"), ({"temperature": 0.0}, "0.0")):
        with pytest.raises(UsageError, match=message):
            write(text, tmp_path / "c", tail="draws", **settings_of)
    teacher = write(text, tmp_path / "c", tail="draws", draws=20).sequences()
    batch = teacher([6])
    for part, column, value, message in (
        ("counts", 0, 0, "not as many as the encoding has"),
        ("draws", 1, 0, "not in ascending order"),
        ("draws", 19, 7, "a place without a draw is not 0"),
    ):
        row = int((batch.rows.part("counts") == 0)[:, 19].nonzero()[0])
        found = _found(teacher, changed(batch.rows, part, row, column, value), batch.next_tokens)
        assert any(message in problem and rows == [row] for problem, rows in found.items()), (message, found)


@pytest.fixture(scope="module")
def text() -> Text:
    return some_text()


@pytest.fixture(scope="module", params=TAILS)
def cache(request: pytest.FixtureRequest, text: Text, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return write(text, tmp_path_factory.mktemp("sequences") / "c.kdcache", tail=request.param)


def test_a_cache_is_whole_and_says_what_it_is(cache: Cache, text: Text) -> None:
    assert audit(cache.path).failure is None
    assert audit(cache.path).rows == sum(mask.sum() for mask in text.taught)
    assert cache.vocabulary == text.vocabulary
    assert "tokens" in ok("info", cache.path)
    assert "9 sequences" in ok("info", cache.path)
    ok("verify", cache.path)
    assert "cache.sequences" in (cache.path / "README.md").read_text()


@pytest.mark.parametrize("placement", ["host", "mmap", "stream"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_prefixes_in_any_order_have_their_rows(
    placement: Literal["host", "mmap", "stream"], cache: Cache, text: Text, data: st.DataObject
) -> None:
    teacher = cache.sequences(placement=placement)
    which = data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=6))
    lengths = [data.draw(st.integers(1, 90)) for _ in which]
    batch = teacher(which, lengths)
    tokens, rows, positions = list[int](), list[torch.Tensor](), list[int]()
    for index, length in zip(which, lengths, strict=True):
        cut = text.sequences[index][:length]
        mask = text.taught[index][:length].copy()
        mask[-1] = False
        positions += [len(tokens) + position for position in np.flatnonzero(mask).tolist()]
        tokens += cut.tolist()
        rows.append(text.logits[index][: len(cut)][torch.from_numpy(mask)])
    assert batch.tokens.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.token_start.diff().tolist() == [
        min(n, len(text.sequences[i])) for i, n in zip(which, lengths, strict=True)
    ]
    assert batch.row_start.diff().tolist() == [len(part) for part in rows]
    expected = torch.cat(rows).double().log_softmax(dim=1).topk(4, dim=1)
    targets = teacher.targets(batch.rows)
    assert targets.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(targets.log_probs.double(), expected.values, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("placement", ["host", "stream"])
def test_the_order_is_random_and_has_every_sequence_once(
    placement: Literal["host", "stream"], cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequences, "_BLOCK_ROWS", 40)
    monkeypatch.setattr(sequences, "_MIXED_ROWS", 80)
    teacher = cache.sequences(placement=placement)
    orders = {tuple(teacher.order(torch.Generator().manual_seed(seed)).tolist()) for seed in range(8)}
    assert len(orders) > 4
    assert all(sorted(order) == [*range(9)] for order in orders)
    assert teacher.order(torch.Generator().manual_seed(3)).tolist() in [list(order) for order in orders]


def test_the_tail_has_the_shape_of_the_teacher(cache: Cache, text: Text) -> None:
    teacher = cache.sequences()
    targets = teacher.targets(teacher([1]).rows)
    if teacher.encoding.tail == "ghost":
        assert targets.coordinates is None
        return
    assert targets.mean is not None and targets.coordinates is not None and targets.basis is not None
    tails = targets.mean + targets.coordinates @ targets.basis
    live = text.of_rows(1).float()
    in_head = torch.zeros_like(live, dtype=torch.bool).scatter_(1, targets.indices, True)
    left = (live - tails)[~in_head].square().mean()
    assert left < 0.02 * live[~in_head].var()  # the noise, whose variance is 0.09


def test_tensorstore_reads_what_the_format_says(cache: Cache, text: Text) -> None:
    """Sections 12.1 to 12.3, without the package."""
    store, plan = cache.path / "data.zarr", json.loads((cache.path / "manifest.json").read_bytes())["plan"]
    arrays = {path.parent.relative_to(store).as_posix(): read_array(path.parent) for path in store.rglob("*/zarr.json")
              if json.loads(path.read_bytes())["node_type"] == "array"}  # fmt: skip
    of, per_shard = plan["sequences"], plan["shape"]["shard_rows"]
    room = {
        name: -(-max(of[name]) // of[chunk]) * of[chunk]
        for name, chunk in (("tokens", "token_chunk"), ("rows", "row_chunk"))
    }
    sha, begin = hashlib.sha256(), 0
    for token, length in zip(text.vocabulary, arrays["vocabulary_length"].tolist(), strict=True):
        assert arrays["vocabulary"][begin : begin + length].tobytes() == token
        sha.update(struct.pack("<I", length) + token)
        begin += length
    assert of["vocabulary"]["digest"] == f"sha256:{sha.hexdigest()}"
    for index, ids in enumerate(text.sequences):
        shard, mask = index // per_shard, text.taught[index]
        before = slice(shard * per_shard, index)
        at_token = shard * room["tokens"] + int(arrays["token_count"][before].sum())
        at_row = shard * room["rows"] + int(arrays["row_count"][before].sum())
        assert arrays["tokens"][0, at_token : at_token + len(ids)].tolist() == ids.tolist()
        assert arrays["taught"][0, at_token : at_token + len(ids)].tolist() == mask.astype(int).tolist()
        key = hashlib.blake2b(ids.astype("<u4").tobytes() + mask.astype("u1").tobytes(), digest_size=8).digest()
        assert int(arrays["sample_keys"][index]) == int.from_bytes(key, "little")
        live = text.of_rows(index)
        rows = slice(at_row, at_row + len(live))
        top = live.log_softmax(dim=1).topk(4, dim=1)
        assert arrays["outputs/next_token/indices"][0, rows].tolist() == top.indices.tolist()
        found = torch.from_numpy(arrays["outputs/next_token/log_probs"][0, rows].astype(float))
        torch.testing.assert_close(found, top.values, rtol=2**-10, atol=1e-6)
        level = torch.from_numpy(arrays["outputs/next_token/logsumexp"][0, rows].astype(float))
        torch.testing.assert_close(level, live.logsumexp(dim=1), rtol=1e-6, atol=1e-5)
    columns = json.loads((store / "outputs/next_token/statistics/zarr.json").read_bytes())["attributes"]["columns"]
    assert columns == ["label_log_prob", "entropy", *(f"tail_log_mass_t{t}" for t in ("1", "4/3", "2", "4"))]


# Resuming


class Stop(Exception):
    pass


def test_an_interrupted_write_resumes_to_the_same_digest(cache: Cache, text: Text, tmp_path: Path) -> None:
    tail, asked = cache.sequences().encoding.tail, list[int]()
    out = tmp_path / "c.kdcache"
    spec = TokenCacheSpec(top_k=4, rank=6, pilot_rows=100, shard_sequences=4, tail=tail)

    def some(stop: int) -> Cache:
        def logits(index: int) -> torch.Tensor:
            asked.append(index)
            if index == stop and (out / "commits/0/0.json").exists():
                raise Stop
            return text.logits[index]

        return write_token_cache(
            text.sequences, logits, out, vocabulary=text.vocabulary, taught=text.taught, special={"eos": 1}, spec=spec
        )

    with pytest.raises(Stop):
        some(6)
    refused(3, "info", out)
    asked.clear()
    assert some(-1).manifest.digest == cache.manifest.digest
    assert sorted(asked) == [4, 5, 6, 7, 8]  # the first shard, and a basis, are there already
    with pytest.raises(UsageError, match="already a sealed cache"):
        some(-1)


def test_another_text_does_not_resume(text: Text, tmp_path: Path) -> None:
    def logits(index: int) -> torch.Tensor:
        if index == 6:
            raise Stop
        return text.logits[index]

    spec = TokenCacheSpec(top_k=4, shard_sequences=4)
    with pytest.raises(Stop):
        write_token_cache(text.sequences, logits, tmp_path / "c.kdcache", vocabulary=300, spec=spec)
    changed = [*text.sequences[:8], text.sequences[8][::-1].copy()]
    with pytest.raises(MismatchError, match=r"dataset\.digest"):
        write_token_cache(changed, text.logits, tmp_path / "c.kdcache", vocabulary=300, spec=spec)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, mask: (ids, mask | True), "sequence 1 is taught at its last token, 39"),
        (lambda ids, mask: (ids, mask & False), "sequence 1 has no taught position"),
        (lambda ids, mask: (ids + 290, mask), "the vocabulary has 300"),
        (lambda ids, mask: (ids - 300, mask), "the vocabulary has 300"),
        (lambda ids, mask: (ids[:-1], mask), r"tokens int64 \[39\] and taught \[40\]"),
        (lambda ids, mask: (ids.astype(float), mask), "tokens float64"),
    ],
)
def test_bad_sequences_are_refused_and_leave_nothing(
    change: Callable[..., tuple[Any, Any]], message: str, text: Text, tmp_path: Path
) -> None:
    ids, mask = change(text.sequences[1], text.taught[1])
    every, taught = list(text.sequences), list(text.taught)
    every[1], taught[1] = ids, mask
    with pytest.raises(UsageError, match=message):
        write_token_cache(every, text.logits, tmp_path / "c.kdcache", vocabulary=300, taught=taught)
    assert not [*tmp_path.iterdir()]


def test_bad_logits_are_refused_and_leave_nothing(text: Text, tmp_path: Path) -> None:
    logits: list[Any] = list(text.logits)
    for wrong, message in (
        (text.logits[1][:, :299], r"\[31, 299\], and it has 31 taught"),
        (text.logits[1][:7], r"\[7, 300\], and it has 31 taught"),
        (text.logits[1].int(), "torch.int32"),
        (torch.full((40, 300), torch.nan), "sequence 1: row 0 holds NaN"),
    ):
        logits[1] = wrong
        with pytest.raises(KdcacheError, match=message):
            write_token_cache(text.sequences, logits, tmp_path / "c.kdcache", vocabulary=300, taught=text.taught)
        assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("settings_of", "message"),
    [
        ({"tail": "uniform"}, "unknown tail 'uniform'"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_k": 300}, "top_k 300"),
        ({"tail": "lowrank", "rank": 301}, "rank 301"),
        ({"tail": "lowrank", "rank": 200}, "rank 200 needs as many rows, and there are 100"),
        ({"tail": "lowrank", "step": 0.0}, r"step 0\.0"),
        ({"dtype": "uint8"}, "cannot be uint8"),
        ({"shard_sequences": 0}, "shard_sequences is 0"),
    ],
)
def test_bad_settings_are_refused_and_leave_nothing(
    settings_of: dict[str, Any], message: str, text: Text, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        write(text, tmp_path / "c.kdcache", **settings_of)
    assert not [*tmp_path.iterdir()]


def test_logits_of_fewer_sequences_are_refused(text: Text, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="8 logits are given for 9 sequences"):
        write_token_cache(text.sequences, text.logits[:8], tmp_path / "c", vocabulary=300)
    with pytest.raises(MismatchError, match="8 taught are given for 9"):
        write_token_cache(text.sequences, text.logits, tmp_path / "c", vocabulary=300, taught=text.taught[:8])
    assert not [*tmp_path.iterdir()]


def test_padding_of_the_head_is_cut(text: Text, tmp_path: Path) -> None:
    padded = [torch.cat([logits, torch.full((len(logits), 20), 50.0)], dim=1) for logits in text.logits]
    digests = [
        write_token_cache(text.sequences, logits, tmp_path / name, vocabulary=300).manifest.digest
        for name, logits in (("a", text.logits), ("b", padded))
    ]
    assert digests[0] == digests[1]


def test_another_batch_or_vocabulary_is_refused_with_the_first_difference(cache: Cache, text: Text) -> None:
    teacher = cache.sequences()
    teacher.check_tokens(3, text.sequences[3])
    teacher.check_tokens(3, text.sequences[3][:10])
    other = text.sequences[3].copy()
    other[7] += 1 if other[7] < 299 else -1
    with pytest.raises(MismatchError, match=f"token 7 of sequence 3 is {text.sequences[3][7]} in the cache"):
        teacher.check_tokens(3, other)
    with pytest.raises(MismatchError, match="33 tokens in the cache, and 34"):
        teacher.check_tokens(3, np.append(text.sequences[3], 1))
    cache.check_vocabulary([*text.vocabulary, b"more"])
    with pytest.raises(MismatchError, match="token 4 is b'<4>' in the cache, and b'x' in the student"):
        cache.check_vocabulary([*text.vocabulary[:4], b"x", *text.vocabulary[5:]])
    with pytest.raises(MismatchError, match="has 299 tokens"):
        cache.check_vocabulary(text.vocabulary[:-1])


def test_of_a_vocabulary_of_which_only_the_number_is_known_the_number_is_compared(text: Text, tmp_path: Path) -> None:
    cache = write_token_cache(text.sequences, text.logits, tmp_path / "c", vocabulary=300)
    assert cache.vocabulary is None
    cache.check_vocabulary([b"x"] * 300)
    with pytest.raises(MismatchError, match="has 299 tokens"):
        cache.check_vocabulary([b"x"] * 299)


@pytest.mark.parametrize("sequence", [-1, 9])
def test_a_sequence_that_was_not_dumped_is_refused(sequence: int, cache: Cache) -> None:
    with pytest.raises(UsageError, match=f"no sequence {sequence}"):
        cache.sequences()([0, sequence])
    with pytest.raises(UsageError, match="lengths"):
        cache.sequences()([0], [0])


def test_what_is_of_samples_refuses_sequences(cache: Cache, tmp_path: Path) -> None:
    for arguments in (
        ("select", cache.path, "-o", tmp_path / "x", "--samples", "0-3"),
        ("merge", cache.path, cache.path, "-o", tmp_path / "x"),
        ("diff", cache.path, cache.path),
        ("summarize", cache.path),
        ("convert", cache.path, "-o", tmp_path / "x.npz"),
        ("info", cache.path, "--fidelity"),
        ("train-student", "digits", "--cache", cache.path, "-o", tmp_path / "run"),
        ("verify", cache.path, "digits"),
    ):
        assert "needs samples with one row each" in refused(2, *arguments), arguments
    assert not [*tmp_path.iterdir()]
    with pytest.raises(UsageError, match=r"cache\.sequences"):
        cache.teacher("next_token")
    with pytest.raises(UsageError, match="no output 'next'"):
        cache.sequences("next")


def test_it_is_pushed_and_pulled(cache: Cache, tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'shared' / 'c'}"
    push(cache.path, url)
    pull(url, tmp_path / "pulled")
    assert audit(tmp_path / "pulled").failure is None
    assert open_cache(f"{url}#{cache.manifest.digest}").sequences()([2]).tokens.tolist() == (
        cache.sequences()([2]).tokens.tolist()
    )


# Damage


def test_a_flipped_byte_is_found_before_it_is_used(cache: Cache, tmp_path: Path) -> None:
    for name in (
        "tokens/c/0/1",
        "taught/c/0/0",
        "outputs/next_token/indices/c/0/2/0",
        "row_count/c/0",
        "vocabulary/c/0",
    ):
        copy = tmp_path / "c.kdcache"
        shutil.copytree(cache.path, copy)
        file = copy / "data.zarr" / name
        content = bytearray(file.read_bytes())
        content[5] ^= 1
        file.write_bytes(content)
        with pytest.raises(CorruptError, match=f"data.zarr/{name} has the sha256"):
            open_cache(copy).sequences()([0, 5, 8])
        assert audit(copy).failure is not None
        shutil.rmtree(copy)


def changed(rows: TokenRows, part: str, row: int, column: int | None, value: float) -> TokenRows:
    """The same rows with one number changed."""
    arrays = {name: values.clone() for name, values in rows.arrays().items()}
    arrays[part][(row,) if column is None else (row, column)] = value
    return TokenRows.of(arrays)


WRONG_ROWS: dict[str, tuple[str, int | None, float, str]] = {
    "a head that does not descend": ("log_probs", 0, -20.0, "not in descending order"),
    "a log-probability above 0": ("log_probs", 0, 0.5, "is above 0"),
    "a log-probability that is not finite": ("log_probs", 3, float("nan"), "NaN or infinite"),
    "a mass that does not add up": ("statistics", 2, -0.01, "do not add up to 1"),
    "a mass above 0": ("statistics", 3, 0.5, "tail_log_mass_t4/3 is above 0"),
    "a mass that falls with T": ("statistics", 5, -3.0, "falls with the temperature"),
    "a mass that is not finite": ("statistics", 4, float("inf"), "a statistic is NaN or infinite"),
    "a next token above 0": ("statistics", 0, 1.0, "of the next token is above 0"),
    "a next token above the head": ("statistics", 0, -0.001, "more probable than the last token of the head"),
    "an entropy below 0": ("statistics", 1, -1.0, "entropy is not between"),
    "a level that is not finite": ("logsumexp", None, float("inf"), "logsumexp is NaN or infinite"),
}


@pytest.mark.parametrize("what", WRONG_ROWS)
def test_impossible_rows_are_found(what: str, cache: Cache) -> None:
    teacher = cache.sequences()
    batch = teacher([6])
    part, column, value, message = WRONG_ROWS[what]
    outside = ~(batch.rows.part("indices").long() == batch.next_tokens.unsqueeze(1)).any(dim=1)
    row = int(outside.nonzero()[2])
    assert not _found(teacher, batch.rows, batch.next_tokens)
    found = _found(teacher, changed(batch.rows, part, row, column, value), batch.next_tokens)
    assert any(message in problem and rows == [row] for problem, rows in found.items()), found


def test_a_token_twice_in_the_head_is_found(cache: Cache) -> None:
    batch = cache.sequences()([6])
    twice = changed(batch.rows, "indices", 1, 3, int(batch.rows.part("indices")[1, 0]))
    assert _found(cache.sequences(), twice, batch.next_tokens)["a token occurs twice in the head"] == [1]


def _found(teacher: CachedSequences, rows: TokenRows, next_tokens: torch.Tensor) -> dict[str, list[int]]:
    checks = token_row_checks(rows, next_tokens, teacher.encoding)
    return {what: wrong.nonzero().squeeze(1).tolist() for what, wrong in checks if wrong.any()}


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "fewer rows than there are": lambda plan: plan["sequences"]["rows"].__setitem__(0, 5),
    "a shard less": lambda plan: plan["sequences"]["rows"].pop(),
    "as many rows as tokens": lambda plan: plan["sequences"].update(rows=plan["sequences"]["tokens"]),
    "rows of many chunks": lambda plan: plan["sequences"]["rows"].__setitem__(0, 2**39),
    "a chunk of nothing": lambda plan: plan["sequences"].update(row_chunk=0),
    "another vocabulary": lambda plan: plan["sequences"]["vocabulary"].update(size=299),
    "bytes without a digest": lambda plan: plan["sequences"]["vocabulary"].update(digest=None),
    "a special token outside": lambda plan: plan["sequences"]["vocabulary"].update(special={"eos": 300}),
    "an unknown key": lambda plan: plan["sequences"].update(color=1),
    "no sequences": lambda plan: plan.pop("sequences"),
    "two views": lambda plan: plan["views"].update(count=2),
    "class names": lambda plan: plan["dataset"].update(class_names=["a"]),
    "one place": lambda plan: plan["outputs"]["next_token"].update(places="one"),
    "the name of the tokens": lambda plan: plan.update(outputs={"tokens": plan["outputs"]["next_token"]}),
    "no head": lambda plan: plan["outputs"]["next_token"]["encoding"].update(top_k=0),
    "other temperatures": lambda plan: plan["outputs"]["next_token"]["encoding"].update(temperatures=[1.0, 2.0]),
    "an unknown level": lambda plan: plan["outputs"]["next_token"].update(level="unknown"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_plan_is_refused(what: str, cache: Cache, tmp_path: Path) -> None:
    copy = tmp_path / "c.kdcache"
    shutil.copytree(cache.path, copy)
    written = json.loads((copy / "manifest.json").read_bytes())
    FORGED[what](written["plan"])
    written["digest"] = "sha256:" + "0" * 64
    data = json.dumps(written, indent=1, ensure_ascii=False) + "\n"
    written["digest"] = f"sha256:{hashlib.sha256(data.encode()).hexdigest()}"
    (copy / "manifest.json").write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    with pytest.raises(CorruptError, match=r"damaged|do not have"):
        open_cache(copy).sequences()([0])


# Sharding


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 5000), min_size=1, max_size=300), st.integers(1, 1000))
def test_shards_hold_all_rows_and_are_not_too_large(lengths: list[int], row_bytes: int) -> None:
    tokens = np.array(lengths, np.uint32)
    counted = CountedSequences(np.zeros(len(lengths), np.uint64), tokens, tokens - 1)
    number = sequences_per_shard(counted, row_bytes)
    record = sequences_record(counted, number, row_bytes, vocabulary_record(5))
    assert len(record.rows) == -(-len(lengths) // number)
    assert sum(record.tokens) == tokens.sum()
    assert sum(record.rows) == (tokens - 1).sum()
    assert record.row_capacity >= max(record.rows) > record.row_capacity - record.row_chunk
    if number > 1:
        assert max(record.rows) * row_bytes <= 2 * 2**28
