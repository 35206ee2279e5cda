"""Columns of the most probable tokens, against the dense distributions that they are of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import ok, refused
from helpers.engines import SIZE, K, prompts, write_lines
from torch import Tensor

from kdcache import open_cache
from kdcache.cache.inspect.audit import audit
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.curate.foreign import cache_of_columns
from kdcache.errors import UsageError
from kdcache.losses.token_targets import log_tail_sum
from kdcache.runtime.progress import Silent

NAMES = "top-ids=top,logprobs=lp"
Made = list[tuple[list[int], Tensor]]


def logits() -> Made:
    """Return sequences and raw logits [L, V], whose level is not 0."""
    return [(ids, log_probs.double() + 3 + torch.arange(len(ids))[:, None]) for ids, log_probs in prompts()]


def record(ids: list[int], raw: Tensor, rows: int | None = None, **more: Any) -> dict[str, Any]:
    """Return a record of log-probabilities, of the first rows."""
    top = raw[:rows].log_softmax(dim=1).topk(K, dim=1)
    return {"input_ids": ids, "top": top.indices.tolist(), "lp": top.values.tolist(), **more}


def of_logits(ids: list[int], raw: Tensor) -> dict[str, Any]:
    """Return a record as NeMo-Aligner has it."""
    top = raw.topk(K, dim=1)
    level = raw.logsumexp(dim=1)
    return {
        "tokens": ids,
        "topk_token_ids": top.indices.tolist(),
        "topk_logits": top.values.tolist(),
        "log_sum_exp_logits": level.tolist(),
    }


def convert(folder: Path, records: list[dict[str, Any]], columns: str = NAMES, *more: object) -> tuple[object, ...]:
    """Write records, and return the arguments of the command that imports them."""
    write_lines(folder / "a.jsonl", records)
    names = ("--columns", columns, "--vocabulary-size", SIZE)
    return "convert", folder / "a.jsonl", "--from", "columns", *names, "-o", folder / "c.kdcache", *more


def check_rows(made: Made, path: Path, level: bool = False) -> None:
    """Check that a cache has the top k and the mass of the rest of dense distributions."""
    cache = open_cache(path)
    assert audit(path).failure is None
    assert cache.level_known == level
    teacher = cache.sequences()
    batch = teacher(range(len(made)))
    targets = teacher.targets(batch.rows)
    assert batch.tokens.tolist() == [token for ids, _ in made for token in ids]
    raw = torch.cat([each[:-1] for _, each in made])
    exact = raw.log_softmax(dim=1)
    top = exact.topk(K, dim=1)
    assert targets.indices.tolist() == top.indices.tolist()
    torch.testing.assert_close(targets.log_probs.double(), top.values, rtol=2**-10, atol=1e-3)
    rest = (1 - top.values.exp().sum(dim=1)).log()
    torch.testing.assert_close(targets.tail_log_mass[:, 0].double(), rest, rtol=2**-9, atol=1e-3)
    if level:
        assert targets.logsumexp is not None
        torch.testing.assert_close(targets.logsumexp.double(), raw.logsumexp(dim=1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("cut", [None, -1])
def test_log_probs_of_all_positions_or_of_all_but_the_last(tmp_path: Path, cut: int | None) -> None:
    made = logits()
    ok(*convert(tmp_path, [record(*each, cut) for each in made]))
    check_rows(made, tmp_path / "c.kdcache")


def test_logits_with_their_logsumexp_have_a_level(tmp_path: Path) -> None:
    made = logits()
    names = "ids=tokens,top-ids=topk_token_ids,logits=topk_logits,logsumexp=log_sum_exp_logits"
    ok(*convert(tmp_path, [of_logits(*each) for each in made], names))
    check_rows(made, tmp_path / "c.kdcache", level=True)


def test_logits_alone_are_renormalized_only_when_that_is_asked_for(tmp_path: Path) -> None:
    made = logits()
    names = "ids=tokens,top-ids=topk_token_ids,logits=topk_logits"
    arguments = convert(tmp_path, [of_logits(*each) for each in made], names)
    assert "--renormalize" in refused(2, *arguments)
    ok(*arguments, "--renormalize")
    cache = open_cache(tmp_path / "c.kdcache")
    assert audit(cache.path).failure is None
    teacher = cache.sequences()
    targets = teacher.targets(teacher(range(len(made))).rows)
    raw = torch.cat([each[:-1] for _, each in made])
    expected = raw.topk(K, dim=1).values.log_softmax(dim=1)
    torch.testing.assert_close(targets.log_probs.double(), expected, rtol=2**-10, atol=1e-3)
    assert float(targets.tail_log_mass.max()) < math.log(2**-23)


def test_a_masked_token_has_no_probability_and_other_infinite_logits_are_refused(tmp_path: Path) -> None:
    names = "ids=tokens,top-ids=topk_token_ids,logits=topk_logits,logsumexp=log_sum_exp_logits"
    [(ids, raw), *_] = logits()
    each = of_logits(ids, raw)
    each["topk_logits"][1][0] = math.inf
    assert "line 1: topk_logits holds NaN or infinite logits" in refused(5, *convert(tmp_path, [each], names))
    masked = torch.full_like(raw, -math.inf)
    masked[:, :2] = 0.0
    ok(*convert(tmp_path, [of_logits([1, 0, 1, 1, 0, 1, 0], masked)], names))
    teacher = open_cache(tmp_path / "c.kdcache").sequences()
    found = teacher.targets(teacher([0]).rows).log_probs
    torch.testing.assert_close(found[:, :2].exp(), torch.full((6, 2), 0.5), rtol=1e-3, atol=0)
    assert float(found[:, 2:].max()) < -60_000


def test_rows_that_are_not_sorted_are_sorted(tmp_path: Path) -> None:
    made = logits()
    records = [record(*each) for each in made]
    for each in records:
        each["top"], each["lp"] = ([row[::-1] for row in each[name]] for name in ("top", "lp"))
    ok(*convert(tmp_path, records))
    check_rows(made, tmp_path / "c.kdcache")


def test_a_mask_says_which_positions_are_taught(tmp_path: Path) -> None:
    [(ids, raw), *_] = logits()
    taught = [False, True, True, False, True, False, True]
    top = raw.log_softmax(dim=1).topk(K, dim=1)
    kept = torch.tensor(taught)
    alone = {"top": top.indices[kept].tolist(), "lp": top.values[kept].tolist()}
    for name, each in {"all": record(ids, raw), "alone": {"input_ids": ids, **alone}}.items():
        folder = tmp_path / name
        folder.mkdir()
        ok(*convert(folder, [{**each, "mask": taught}], NAMES + ",taught=mask"))
        teacher = open_cache(folder / "c.kdcache").sequences()
        assert teacher.tokens(0)[1].tolist() == [*taught[:-1], False]
        rows = teacher.targets(teacher([0]).rows)
        assert rows.indices.tolist() == top.indices[torch.tensor([1, 2, 4])].tolist()


def test_stated_log_probs_of_next_tokens_are_kept(tmp_path: Path) -> None:
    made = logits()
    labels = [raw[:-1].log_softmax(dim=1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1) for ids, raw in made]
    records = [record(*each, own=found.tolist()) for each, found in zip(made, labels, strict=True)]
    ok(*convert(tmp_path, records, NAMES + ",label-logprobs=own"))
    teacher = open_cache(tmp_path / "c.kdcache").sequences()
    found = teacher(range(len(made))).rows.part("statistics")[:, 0].double()
    torch.testing.assert_close(found, torch.cat(labels), rtol=2**-10, atol=1e-3)


def test_the_export_of_a_cache_can_be_imported_again(tmp_path: Path) -> None:
    made = logits()
    ok(*convert(tmp_path, [record(*each) for each in made]))
    ok("convert", tmp_path / "c.kdcache", "--to", "jsonl", "-o", tmp_path / "b.jsonl")
    names = ("--columns", "top-ids=top_ids,logprobs=top_logprobs,taught=taught", "--vocabulary-size", SIZE)
    ok("convert", tmp_path / "b.jsonl", "--from", "columns", *names, "-o", tmp_path / "b.kdcache")
    check_rows(made, tmp_path / "b.kdcache")


@pytest.mark.parametrize("fixed", [False, True])
def test_parquet_has_lists_of_any_or_of_a_fixed_length(tmp_path: Path, fixed: bool) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    made = logits()
    records = [record(*each) for each in made]
    width = K if fixed else -1
    types = {"top": pyarrow.list_(pyarrow.int64(), width), "lp": pyarrow.list_(pyarrow.float32(), width)}
    columns = {
        "input_ids": pyarrow.array([each["input_ids"] for each in records]),
        **{name: pyarrow.array([each[name] for each in records], pyarrow.list_(kind)) for name, kind in types.items()},
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    arguments = ("convert", path, "--from", "columns", "--columns", NAMES, "--vocabulary-size", SIZE)
    ok(*arguments, "-o", tmp_path / "c.kdcache")
    check_rows(made, tmp_path / "c.kdcache")
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read as parquet" in refused(5, *arguments, "-o", tmp_path / "d.kdcache")


def test_a_student_at_another_temperature_is_refused_with_the_reason(tmp_path: Path) -> None:
    ok(*convert(tmp_path, [record(*each) for each in logits()]))
    teacher = open_cache(tmp_path / "c.kdcache").sequences()

    with pytest.raises(UsageError, match="at T = 1 only"):
        log_tail_sum(teacher.targets(teacher([0]).rows), 2.0)


BAD_NAMES = {
    "nothing": ("", "top-ids is not named"),
    "unknown": ("topids=top,logprobs=lp", "did you mean top-ids"),
    "both": (NAMES + ",logits=lp", "either logprobs or logits"),
    "neither": ("top-ids=top", "either logprobs or logits"),
    "twice": (NAMES + ",logprobs=top", "names logprobs twice"),
    "no name": ("top-ids", "does not name a column"),
    "column": ("top-ids=tops,logprobs=lp", "no column 'tops' for top-ids, did you mean top?"),
    "level": (NAMES + ",logsumexp=lp", "are for logits"),
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_wrong_names_of_columns_are_refused(tmp_path: Path, name: str) -> None:
    given, what = BAD_NAMES[name]
    assert what in refused(2, *convert(tmp_path, [record(*logits()[0])], given))


def changed(name: str, row: int, column: int, value: float) -> dict[str, Any]:
    """Return the second of two records with one value changed."""
    each = record(*logits()[1], None)
    each[name][row][column] = value
    return each


BAD_RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "above 0": (changed("lp", 0, 0, 0.5), "line 2: position 0: a log-probability is above 0"),
    "NaN": (changed("lp", 0, 1, math.nan), "position 0: a log-probability is NaN"),
    "outside": (changed("top", 0, 1, SIZE), "outside of the vocabulary of 50"),
    "fewer": ({**record(*logits()[0]), "lp": record(*logits()[0])["lp"][:3]}, "lp has 3 rows for 7 tokens; 7 or 6"),
    "ragged": ({**record(*logits()[0]), "top": [[1, 2, 3, 4], [1]]}, "top has lists of different lengths"),
    "width": ({**record(*logits()[0]), "lp": [[-3.0]] * 7}, "top has 4 tokens per row, and lp 1 values"),
    "text": ({**record(*logits()[0]), "lp": ["-1"] * 7}, "lp does not hold numbers"),
    "lacks": ({"input_ids": [1, 2], "top": [[1]]}, "it has no column 'lp', which earlier records have"),
    "short": ({"input_ids": [1], "top": [[1]], "lp": [[-1.0]]}, "not a list of two or more integers"),
    "list": ([1, 2], "is not a dictionary"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_impossible_records_are_refused_by_their_line(tmp_path: Path, name: str) -> None:
    bad, what = BAD_RECORDS[name]
    message = refused(5, *convert(tmp_path, [record(*logits()[0]), bad]))
    assert what in message, message
    assert "line 2" in message


def test_rows_of_their_own_tokens_are_refused(tmp_path: Path) -> None:
    """Such as those of vLLM, whose entry i is of the token i."""
    shifted = []
    for ids, raw in logits():
        rows = torch.cat([raw[:1], raw[:-1]])
        shifted.append(record([ids[0], *raw[:-1].argmax(dim=1).tolist()], rows))
    message = refused(4, *convert(tmp_path, shifted * 3))
    assert "as if row i were of the token i" in message


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [record(*logits()[0])])
    source = ("convert", tmp_path / "a.jsonl", "-o", tmp_path / "c.kdcache")
    assert "--vocabulary-size" in refused(2, *source, "--from", "columns", "--columns", NAMES)
    assert "--columns is only for --from columns" in refused(2, *source, "--columns", NAMES)
    assert "--columns cannot be used with --from vllm" in refused(2, *source, "--from", "vllm", "--columns", NAMES)
    more = ("--from", "columns", "--columns", NAMES, "--vocabulary-size", SIZE, "--top-k", 9)
    assert "has 4 tokens per row, and 9 are requested" in refused(2, *source, *more)
    (tmp_path / "a.jsonl").write_text(json.dumps(record(*logits()[0]))[:-9])
    assert "truncated" in refused(5, *source, *more[:-2])


def test_renormalized_probabilities_are_noted(tmp_path: Path) -> None:
    said: list[str] = []

    class Notes(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    records = [record(*each) for each in logits()]
    for each in records:
        each["lp"] = torch.tensor(each["lp"], dtype=torch.float64).log_softmax(dim=1).flip(1).tolist()
        each["top"] = torch.tensor(each["top"]).flip(1).tolist()
    write_lines(tmp_path / "a.jsonl", records)
    names = {"top-ids": "top", "logprobs": "lp"}
    cache_of_columns(
        tmp_path / "a.jsonl",
        tmp_path / "c.kdcache",
        columns=names,
        vocabulary_size=SIZE,
        spec=TokenCacheSpec(dtype="float32"),
        progress=Notes(),
    )
    assert any("add up to 1" in text for text in said)
    assert any("were sorted" in text for text in said)
