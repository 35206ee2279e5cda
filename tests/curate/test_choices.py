"""Choices of samples and classes by name, by file and by range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import TinyTeacher, tiny_samples

from kdcache import dump_teacher
from kdcache.curate.choices import parse_range, read_class_names, read_ordinals, samples_of_classes
from kdcache.errors import UsageError


def test_files_have_one_choice_per_line(tmp_path: Path) -> None:
    (tmp_path / "classes").write_text("a cat\n\n  dog \r\nü", encoding="utf-8")
    assert read_class_names(tmp_path / "classes") == ["a cat", "dog", "ü"]
    (tmp_path / "ids").write_text("3\n1\n\n2\n")
    assert read_ordinals(tmp_path / "ids").tolist() == [3, 1, 2]
    (tmp_path / "ids").write_text("")
    assert read_ordinals(tmp_path / "ids").tolist() == []


@pytest.mark.parametrize("text", ["-1", "1.5", "x", "²", "٣", "9223372036854775808"])
def test_what_is_not_an_ordinal_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ids").write_text(f"0\n{text}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="is not an ordinal"):
        read_ordinals(tmp_path / "ids")


def test_ranges_include_both_ends() -> None:
    assert [*parse_range("2-4", "--views")] == [2, 3, 4]
    assert [*parse_range("7", "--views")] == [7]
    assert [*parse_range("4-2", "--views")] == []
    for text in ("", "-", "1-", "-1", "a-b", "1-2-3", "1 - 2", "²"):
        with pytest.raises(UsageError, match=r"--views is .* which is not a range"):
            parse_range(text, "--views")


def test_samples_of_classes_are_those_with_their_labels(tmp_path: Path) -> None:
    cache = dump_teacher(TinyTeacher(12), tiny_samples(37, 12), tmp_path / "c.kdcache")
    names = cache.manifest.plan.dataset.class_names
    chosen = samples_of_classes(cache, [names[3], names[1], "no class"])
    assert chosen.tolist() == [i for i, label in enumerate(cache.labels) if label in (1, 3)]
    assert chosen.dtype == np.int64
    assert samples_of_classes(cache, []).tolist() == []
