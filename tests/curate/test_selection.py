"""Selections of samples and classes by name, by file and by range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import TinyTeacher, tiny_samples

from kdcache import Cache, dump_teacher
from kdcache.curate.selection import parse_classes, parse_samples
from kdcache.errors import UsageError
from kdcache.runtime.ranges import parse_range


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of 37 samples of 12 classes."""
    folder = tmp_path_factory.mktemp("selection")
    return dump_teacher(TinyTeacher(12), tiny_samples(37, 12), folder / "c.kdcache")


def test_files_have_one_choice_per_line(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "classes").write_text("a cat\n\n  dog \r\nü", encoding="utf-8")
    assert parse_classes(str(tmp_path / "classes")) == ["a cat", "dog", "ü"]
    assert parse_classes("a cat,dog") == ["a cat", "dog"]
    (tmp_path / "ids").write_text("3\n1\n\n2\n")
    assert parse_samples(str(tmp_path / "ids"), cache, None).tolist() == [3, 1, 2]
    (tmp_path / "ids").write_text("")
    assert parse_samples(str(tmp_path / "ids"), cache, None).tolist() == []


@pytest.mark.parametrize("text", ["-1", "1.5", "x", "²", "٣", "9223372036854775808"])
def test_what_is_not_an_id_is_refused(cache: Cache, tmp_path: Path, text: str) -> None:
    (tmp_path / "ids").write_text(f"0\n{text}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="is not a sample id"):
        parse_samples(str(tmp_path / "ids"), cache, None)


def test_ranges_include_both_ends(cache: Cache) -> None:
    assert [*parse_range("2-4", "--views")] == [2, 3, 4]
    assert [*parse_range("7", "--views")] == [7]
    assert [*parse_range("4-4", "--views")] == [4]
    assert parse_samples("2-4", cache, None).tolist() == [2, 3, 4]
    for text in ("", "-", "1-", "-1", "a-b", "1-2-3", "1 - 2", "²"):
        with pytest.raises(UsageError, match="--views must be an index or a range"):
            parse_range(text, "--views")
    with pytest.raises(UsageError, match="--views 4-2 ends before it begins") as raised:
        parse_range("4-2", "--views")
    assert raised.value.fix == "write --views 2-4"


def test_samples_of_classes_are_those_with_their_labels(cache: Cache) -> None:
    names = cache.manifest.plan.dataset.class_names
    chosen = parse_samples("of-classes", cache, [names[3], names[1], "no class"])
    assert chosen.tolist() == [i for i, label in enumerate(cache.labels) if label in (1, 3)]
    assert chosen.dtype == np.int64
    assert parse_samples("of-classes", cache, []).tolist() == []
    with pytest.raises(UsageError, match="needs --classes"):
        parse_samples("of-classes", cache, None)
