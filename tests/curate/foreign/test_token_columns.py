"""Caches of sequences as columns, against the dense logits that they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import ok, refused
from helpers.sequences import Text, some_text, write

from kdcache import KdcacheError, open_cache
from kdcache.cache.format.token_encoding import TOKEN_TEMPERATURES
from kdcache.curate.foreign import columns_of_cache
from kdcache.curate.foreign import token_columns as module


def check(records: list[dict[str, Any]], text: Text, k: int, tolerance: float) -> None:
    """Compare with the log-softmax of all logits in float64."""
    assert [record["input_ids"] for record in records] == [ids.tolist() for ids in text.sequences]
    assert [record["taught"] for record in records] == [taught.tolist() for taught in text.taught]
    for index, record in enumerate(records):
        logits = text.of_rows(index)
        # Some of these logits are equal: of such, the first token comes first.
        top = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
        assert record["top_ids"] == top.tolist()
        exact = logits.log_softmax(dim=1).gather(1, top)
        torch.testing.assert_close(torch.tensor(record["top_logprobs"]).double(), exact, rtol=2**-10, atol=1e-6)
        assert record["temperatures"] == list(TOKEN_TEMPERATURES)
        for place, temperature in enumerate(TOKEN_TEMPERATURES):
            outside = (logits / temperature).softmax(dim=1).scatter(1, top, 0.0).sum(dim=1)
            found = torch.tensor(record["tail_log_mass"])[:, place].double().exp()
            torch.testing.assert_close(found, outside, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize(("settings", "k"), [({}, None), ({"tail": "lowrank"}, None), ({"top_k": 7}, 3)])
def test_lines_have_the_distributions_of_the_logits(
    settings: dict[str, Any], k: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 50)
    text = some_text()
    cache = write(text, tmp_path / "c.kdcache", **settings)
    found = columns_of_cache(cache, "jsonl", tmp_path / "c.jsonl", top_k=k)
    assert found == (9, sum(int(taught.sum()) for taught in text.taught), k or 4)
    records = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    check(records, text, k or 4, 5e-3)


def test_parquet_has_the_same_columns(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    text = some_text()
    cache = write(text, tmp_path / "c.kdcache")
    columns_of_cache(cache, "parquet", tmp_path / "c.parquet")
    columns_of_cache(cache, "jsonl", tmp_path / "c.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert parquet.read_table(tmp_path / "c.parquet").to_pylist() == lines


def test_it_is_a_command(tmp_path: Path) -> None:
    source, out = tmp_path / "c.kdcache", tmp_path / "c.jsonl"
    write(some_text(), source)
    command = ("convert", source, "--to", "jsonl", "-o", out)
    assert "4 tokens per row, not 5" in refused(2, *command, "--top-k", "5")
    assert "remove --pipeline" in refused(2, *command, "--pipeline", "digits")
    assert not out.exists()
    assert json.loads(ok(*command, "--json", "--top-k", "2"))["top_k"] == 2
    assert "exists already" in refused(2, *command)
    assert "9 sequences" in ok(*command[:-1], tmp_path / "d.jsonl")
    assert "inside" in refused(2, *command[:-1], source / "x.jsonl")


def test_rows_without_a_head_are_refused(tmp_path: Path) -> None:
    cache = write(some_text(), tmp_path / "c.kdcache", tail="draws")
    with pytest.raises(KdcacheError, match="are draws"):
        columns_of_cache(open_cache(cache.path), "jsonl", tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").exists()
