"""A pipeline of text, and its cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.cli import ok
from helpers.texts import RECORDS, write_lines, write_pipeline

from kdcache import Cache, open_cache


@pytest.fixture(scope="module")
def pipeline(text_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    root = write_lines(folder / "texts.jsonl", RECORDS)
    return write_pipeline(folder / "text.yaml", root, text_teacher)


@pytest.fixture(scope="module")
def cache(pipeline: Path) -> Cache:
    ok("dump-teacher", pipeline, "-o", pipeline.parent / "c.kdcache", "--device", "cpu")
    return open_cache(pipeline.parent / "c.kdcache")
