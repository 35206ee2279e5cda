"""Answers of vLLM and SGLang, in every shape that they have, against the dense log-probabilities they are of."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cli import ok, refused
from helpers.engines import SIZE, K, prompts, sglang, vllm_dicts, vllm_early_v1, vllm_flat, vllm_numbers, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcache import KdcacheError, open_cache
from kdcache.cache.inspect.audit import audit
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.curate.foreign import cache_of_answers
from kdcache.curate.foreign.engine_answers import EngineAnswers
from kdcache.data.json_lines import JsonLines
from kdcache.errors import UsageError

Shape = Callable[[list[int], Tensor], dict[str, Any]]

SHAPES: dict[str, Shape] = {
    "vllm": lambda ids, lp: {"prompt_token_ids": ids, "prompt_logprobs": vllm_dicts(ids, lp)},
    "vllm, early v1": lambda ids, lp: {"prompt_token_ids": ids, "prompt_logprobs": vllm_early_v1(ids, lp)},
    "vllm numbers": lambda ids, lp: {"prompt_token_ids": ids, "prompt_logprobs": vllm_numbers(ids, lp)},
    "vllm flat": lambda ids, lp: {"prompt_token_ids": ids, "prompt_logprobs": vllm_flat(ids, lp)},
    "vllm server": lambda ids, lp: {
        "id": "cmpl-1",
        "choices": [{"index": 0, "text": "x", "prompt_logprobs": vllm_dicts(ids, lp), "prompt_token_ids": ids}],
    },
    "vllm chat": lambda ids, lp: {
        "choices": [{"index": 0, "message": {"content": "x"}, "logprobs": None}],
        "prompt_logprobs": vllm_dicts(ids, lp),
        "prompt_token_ids": ids,
    },
    "sglang": lambda ids, lp: {"text": "x", "meta_info": sglang(ids, lp)},
    "sglang, nothing for the first": lambda ids, lp: {
        "input_ids": ids,
        "meta_info": {**(found := sglang(ids, lp)), "input_token_logprobs": [None, *found["input_token_logprobs"][1:]]},
    },
    "sglang with ids": lambda ids, lp: {"input_ids": ids, "meta_info": sglang(ids, lp)},
    "with its request": lambda ids, lp: {
        "request": {"sampling_params": {"temperature": 1.0, "prompt_logprobs": K}},
        "prompt_token_ids": ids,
        "prompt_logprobs": vllm_dicts(ids, lp),
    },
}


def answers(shape: str, path: Path) -> list[tuple[list[int], Tensor]]:
    """Write a file of answers of a shape, and return the prompts and log-probabilities."""
    made = prompts()
    write_lines(path, [SHAPES[shape](ids, log_probs) for ids, log_probs in made])
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_those_of_the_engine(shape: str, tmp_path: Path) -> None:
    made = answers(shape, tmp_path / "a.jsonl")
    spec = TokenCacheSpec(dtype="float32")
    cache = cache_of_answers(tmp_path / "a.jsonl", tmp_path / "c.kdcache", vocabulary_size=SIZE, spec=spec)
    assert audit(cache.path).failure is None
    assert not cache.level_known
    teacher = cache.sequences()
    assert (teacher.encoding.temperatures, teacher.encoding.top_k, teacher.encoding.tail) == ((1.0,), K, "ghost")
    batch = teacher(range(len(made)))
    assert batch.tokens.tolist() == [token for ids, _ in made for token in ids]
    exact = torch.cat([log_probs[:-1] for _, log_probs in made]).double()
    top, targets = exact.topk(K, dim=1), teacher.targets(batch.rows)
    assert targets.indices.tolist() == top.indices.tolist()
    torch.testing.assert_close(targets.log_probs.double(), top.values, rtol=1e-6, atol=1e-6)
    rest = (1 - top.values.exp().sum(dim=1)).log()
    torch.testing.assert_close(targets.tail_log_mass[:, 0].double(), rest, rtol=2**-10, atol=1e-4)
    label = exact.gather(1, batch.next_tokens.unsqueeze(1)).squeeze(1)
    stated = batch.rows.part("statistics")[:, 0].double()
    torch.testing.assert_close(stated, label, rtol=2**-10, atol=1e-6)


def test_fewer_tokens_than_the_engine_listed(tmp_path: Path) -> None:
    made = answers("vllm", tmp_path / "a.jsonl")
    cache = cache_of_answers(tmp_path / "a.jsonl", tmp_path / "c.kdcache", vocabulary_size=SIZE, top_k=2)
    assert audit(cache.path).failure is None
    exact = torch.cat([log_probs[:-1] for _, log_probs in made]).double().topk(2, dim=1)
    targets = cache.sequences().targets(cache.sequences()(range(len(made))).rows)
    assert targets.indices.tolist() == exact.indices.tolist()
    rest = (1 - exact.values.exp().sum(dim=1)).log()
    torch.testing.assert_close(targets.tail_log_mass[:, 0].double(), rest, rtol=2**-9, atol=1e-3)


@given(length=st.integers(2, 6), size=st.integers(6, 30), k=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_a_single_answer_of_any_size(
    length: int, size: int, k: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """How many tokens an engine listed is in none of the shapes; still each row has only tokens of the top."""
    folder = tmp_path_factory.mktemp("any")
    [(ids, log_probs)] = prompts((length,), size, seed)
    exact = log_probs[:-1].double().sort(dim=1, descending=True).indices
    for shape in (vllm_dicts, vllm_early_v1, vllm_numbers, vllm_flat):
        record = {"prompt_token_ids": ids, "prompt_logprobs": shape(ids, log_probs, k)}
        write_lines(folder / "a.jsonl", [record])
        try:
            cache = cache_of_answers(folder / "a.jsonl", folder / f"{shape.__name__}.kdcache", vocabulary_size=size)
        except UsageError as error:
            assert k == 1, error
            continue
        rows = cache.sequences()([0]).rows
        listed = rows.part("indices").shape[1]
        assert listed >= k - 1
        assert rows.part("indices").tolist() == exact[:, :listed].tolist()


def test_a_folder_of_files_and_answers_from_a_later_token_on(tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    made = prompts((9, 6))
    for number, (ids, log_probs) in enumerate(made):
        record = {"input_ids": ids, "meta_info": sglang(ids, log_probs, start=3)}
        (folder / f"{number}.jsonl").write_text("\n" + json.dumps(record))  # a blank line, and none at the end
    cache = cache_of_answers(folder, tmp_path / "c.kdcache", vocabulary_size=SIZE)
    teacher = cache.sequences()
    assert [teacher.tokens(index)[1].nonzero().squeeze(1).tolist() for index in (0, 1)] == [[3, 4, 5, 6, 7], [3, 4]]
    assert teacher.tokens(1)[0].tolist() == made[1][0]


def test_parquet_has_the_same_answers_in_maps_structs_or_strings(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    made = prompts()
    logprob = pyarrow.struct([("logprob", pyarrow.float64()), ("rank", pyarrow.int64())])
    maps = pyarrow.list_(pyarrow.map_(pyarrow.int64(), logprob))
    dicts: list[list[Any]] = [vllm_dicts(ids, lp) for ids, lp in made]
    columns = {
        "maps": pyarrow.array([[list((entry or {}).items()) for entry in entries] for entries in dicts], maps),
        "structs": pyarrow.array(
            [[entry and {str(t): value for t, value in entry.items()} for entry in entries] for entries in dicts]
        ),
        "strings": pyarrow.array([json.dumps(entries) for entries in dicts]),
        "flat": pyarrow.array([vllm_flat(ids, lp) for ids, lp in made]),
    }
    ids = pyarrow.array([ids for ids, _ in made])
    found = []
    for name, column in columns.items():
        table = pyarrow.table({"prompt_token_ids": ids, "prompt_logprobs": column})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=3)
        cache = cache_of_answers(tmp_path / f"{name}.parquet", tmp_path / name, vocabulary_size=SIZE)
        found.append({part: value.tolist() for part, value in cache.sequences()(range(4)).rows.arrays().items()})
    assert all(one == found[0] for one in found)
    exact = torch.cat([log_probs[:-1] for _, log_probs in made]).topk(K, dim=1)
    assert found[0]["indices"] == exact.indices.tolist()
    whole = (tmp_path / "flat.parquet").read_bytes()
    (tmp_path / "flat.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(KdcacheError, match="cannot be read as parquet"):
        cache_of_answers(tmp_path / "flat.parquet", tmp_path / "c.kdcache", vocabulary_size=SIZE)


@pytest.mark.parametrize("found", [None, "14.0.0"])
def test_parquet_without_a_safe_pyarrow_is_refused(
    found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = None if found is None else SimpleNamespace(__version__=found)
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, fake)
    (tmp_path / "a.parquet").touch()
    command = ("convert", tmp_path / "a.parquet", "--from", "vllm", "--vocabulary-size", "9", "-o", tmp_path / "c")
    assert "pip install" in refused(2, *command)
    assert not (tmp_path / "c").exists()


def test_it_is_a_command(tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "c.kdcache"
    answers("vllm", source)
    assert "--vocabulary-size" in refused(2, "convert", source, "--from", "vllm", "-o", out)
    command = ("convert", source, "--from", "vllm", "--vocabulary-size", str(SIZE), "-o", out)
    assert "use --top-k 4" in refused(2, *command, "--top-k", "5")
    assert "--bos cannot be used" in refused(2, *command, "--bos", "1")
    assert "hold their data set" in refused(2, *command, "--pipeline", "digits")
    assert "only for --from vllm" in refused(2, "convert", source, "--vocabulary-size", "50", "-o", out)
    ok(*command, "--top-k", "3", "--name", "teacher-7b")
    assert open_cache(out).sequences().encoding.top_k == 3
    assert "teacher-7b" in ok("info", out)
    ok("verify", out)


def in_vllm(change: Callable[[list[int], list[Any]], object]) -> Callable[[list[int], Tensor], dict[str, Any]]:
    def record(ids: list[int], log_probs: Tensor) -> dict[str, Any]:
        ids, entries = [*ids], vllm_dicts(ids, log_probs)
        change(ids, entries)
        return {"prompt_token_ids": ids, "prompt_logprobs": entries}

    return record


def set_values(entry: dict[int, dict[str, Any]], value: float) -> None:
    for found in entry.values():
        found["logprob"] = value


DAMAGE: dict[str, tuple[Shape, str]] = {
    "NaN": (
        in_vllm(lambda ids, entries: set_values(entries[3], math.nan)),
        "line 2, token 3: a log-probability is NaN",
    ),
    "above 0": (
        in_vllm(lambda ids, entries: set_values(entries[3], 0.5)),
        "token 3: a log-probability is above 0: 0.5",
    ),
    "more than 1": (in_vllm(lambda ids, entries: set_values(entries[3], -0.1)), "token 3: .* add up to more than 1"),
    "less than 1": (in_vllm(lambda ids, entries: set_values(entries[3], -9.0)), "token 3: .* cannot add up to 1"),
    "ranks": (
        in_vllm(lambda ids, entries: [value.update(rank=9 - value["rank"]) for value in entries[1].values()]),
        "token 1: the log-probabilities are not in the order of the ranks",
    ),
    "other tokens": (
        in_vllm(lambda ids, entries: ids.__setitem__(2, (ids[2] + 1) % SIZE)),
        "own log-probability is not",
    ),
    "a prefix that was cached": (in_vllm(lambda ids, entries: entries.__setitem__(4, None)), "token 4 has no log-prob"),
    "fewer entries": (in_vllm(lambda ids, entries: entries.pop()), "has 6 entries for the 7 tokens"),
    "no entries": (in_vllm(lambda ids, entries: entries.clear()), "has 0 entries for the 7 tokens"),
    "the first token": (in_vllm(lambda ids, entries: entries.__setitem__(0, entries[1])), "its first token has"),
    "more tokens than k": (
        in_vllm(lambda ids, entries: entries[1].update({t: {"logprob": -30.0, "rank": 9} for t in range(SIZE)})),
        "it lists 50 tokens, and another one",
    ),
    "other vocabulary": (
        in_vllm(lambda ids, entries: [entry.update({SIZE: entry.pop(min(entry))}) for entry in entries[2:3]]),
        "token 2: (a token is outside of the vocabulary of 50|its own log-probability)",
    ),
    "text": (
        in_vllm(lambda ids, entries: entries[2].update({"the": {"logprob": -20.0}})),
        "shape of an engine's answer",
    ),
    "no ids": (lambda ids, lp: {"prompt_logprobs": vllm_dicts(ids, lp)}, "does not hold the prompt's ids"),
    "nothing": (lambda ids, lp: {"prompt_token_ids": ids, "prompt_logprobs": None}, "neither prompt_logprobs nor"),
    "a list": (lambda ids, lp: [ids], "is not a dictionary"),  # type: ignore[dict-item, return-value]
    "T = 2": (
        lambda ids, lp: {**SHAPES["vllm"](ids, lp), "sampling_params": {"temperature": 2.0}},
        "temperature 2.0; only log-probabilities at T = 1",
    ),
    "logits": (lambda ids, lp: {**SHAPES["vllm"](ids, lp), "logprobs_mode": "raw_logits"}, "logprobs_mode raw_logits"),
    "several choices": (lambda ids, lp: {"choices": [SHAPES["vllm"](ids, lp)] * 2}, "2 choices"),
    "flat, with a gap": (
        lambda ids, lp: {
            "prompt_token_ids": ids,
            "prompt_logprobs": {**vllm_flat(ids, lp), "start_indices": [0, *range(1, len(ids))]},
        },
        "indices of its entries do not follow",
    ),
    "SGLang without the top": (
        lambda ids, lp: {"meta_info": {**sglang(ids, lp), "input_top_logprobs": None}},
        "top_logprobs_num",
    ),
    "SGLang of other tokens": (
        lambda ids, lp: {"input_ids": [*ids[:-1], 0 if ids[-1] else 1], "meta_info": sglang(ids, lp)},
        "of other tokens than its ids",
    ),
    "SGLang with another own log-probability": (
        lambda ids, lp: {
            "meta_info": {
                **(found := sglang(ids, lp)),
                "input_token_logprobs": [
                    found["input_token_logprobs"][0],
                    *([-0.001, token, None] for token in ids[1:]),
                ],
            }
        },
        "the next token (has two log-probabilities|is not in the top k)",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_an_impossible_answer_is_refused_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    (ids, log_probs), *others = prompts((7, 5))
    record, message = DAMAGE[what]
    good = [SHAPES["vllm"](*other) for other in others]
    write_lines(tmp_path / "a.jsonl", [*good, record(ids, log_probs)])
    with pytest.raises(KdcacheError, match=message) as found:
        cache_of_answers(tmp_path / "a.jsonl", tmp_path / "c.kdcache", vocabulary_size=SIZE)
    assert "line 2" in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


JUNK = [None, True, 0, -1, 2**63, 2**70, 1e308, math.nan, -math.inf, "", "[1]", "[[[", [], {}, [[1, 2]], {"rank": 3}]


def places(value: Any) -> list[tuple[Any, Any]]:
    """All containers in a record, with each of their keys."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inside for found in ((value, key), *places(part))]


@given(shape=st.sampled_from(sorted(SHAPES)), data=st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_is_in_an_answer_the_error_is_one_that_says_so(
    shape: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.jsonl"
    record = json.loads(json.dumps(SHAPES[shape](*prompts((5,))[0])))
    for _ in range(data.draw(st.integers(1, 2))):
        part, key = data.draw(st.sampled_from(places(record) or [({}, "")]))
        part[key] = deepcopy(data.draw(st.sampled_from(JUNK)))
    write_lines(path, [record])
    try:
        EngineAnswers(JsonLines([path]), SIZE, None).top_k(0)
    except KdcacheError as error:
        assert "junk.jsonl" in str(error)


def test_truncated_lines_and_files_without_answers_are_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "c.kdcache"
    answers("vllm", source)
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(KdcacheError, match=r"a\.jsonl, line 4 is not JSON.*as if truncated"):
        cache_of_answers(source, out, vocabulary_size=SIZE)
    source.write_text("\n \n")
    for wrong, message in ((source, "hold no answers"), (tmp_path, "hold no answers"), (tmp_path / "x", "is not a")):
        with pytest.raises(UsageError, match=message):
            cache_of_answers(wrong, out, vocabulary_size=SIZE)
    (tmp_path / "b.parquet").touch()
    with pytest.raises(UsageError, match="of one kind"):
        cache_of_answers(tmp_path, out, vocabulary_size=SIZE)
    write_lines(source, [{"prompt_token_ids": ids, "prompt_logprobs": vllm_dicts(ids, lp, 0)} for ids, lp in prompts()])
    with pytest.raises(UsageError, match="lists the 0 most probable"):
        cache_of_answers(source, out, vocabulary_size=SIZE)
    answers("vllm", source)
    with pytest.raises(UsageError, match="cannot be stored as lowrank"):
        cache_of_answers(source, out, vocabulary_size=SIZE, spec=TokenCacheSpec(tail="lowrank", rank=3))
    assert not out.exists()


def test_lines_longer_than_what_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.data.json_lines._BYTES_AT_ONCE", 5)
    for number, text in enumerate(("", "\n", " \n\n1\n", '"abcdefghijk"\n\n      \n[1, 2]', "1\n2\n3\n", "     \n 7")):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(text)
        found = JsonLines([path])
        expected = [(line, json.loads(part)) for line, part in enumerate(text.split("\n"), 1) if part.strip()]
        assert [(int(found.name(i).split()[-1]), found[i]) for i in range(len(found))] == expected
