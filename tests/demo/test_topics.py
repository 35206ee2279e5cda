"""The texts of the demo: held-out topics share no paragraph with those that are trained on."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics as given

import pytest

from kdcache.data.text_records import read_records
from kdcache.demo.topics import load_topics, write_topics
from kdcache.errors import UsageError


def paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def test_each_paragraph_is_in_one_topic_and_one_part() -> None:
    train, held_out = load_topics()
    found = [part for text in chain(train.values(), held_out.values()) for part in paragraphs(text)]
    assert len(found) == len(set(found))


def test_only_paragraphs_that_are_repeated_and_very_short_topics_are_left_out() -> None:
    train, held_out = load_topics()
    found = set(chain.from_iterable(map(paragraphs, chain(train.values(), held_out.values()))))
    kept = sum(map(len, found))
    everything = sum(map(len, set(chain.from_iterable(map(paragraphs, given.values())))))
    assert kept > 0.99 * everything


def test_a_tenth_or_so_is_held_out() -> None:
    train, held_out = load_topics()
    sizes = [sum(map(len, part.values())) for part in (train, held_out)]
    assert 0.05 < sizes[1] / sum(sizes) < 0.25
    assert not train.keys() & held_out.keys()


def test_a_file_of_topics_is_read_as_texts(tmp_path: Path) -> None:
    train, _ = load_topics(6)
    path = write_topics(train, tmp_path / "texts" / "train.jsonl")
    assert [record["text"] for record in read_records(path)] == list(train.values())
    before = path.stat().st_mtime_ns
    assert write_topics(train, path).stat().st_mtime_ns == before


def test_a_python_without_them_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match=r"no pydoc_data\.topics"):
        load_topics()
