"""What a user meets at the prompt: names that complete, objects that print in a line, mistakes that are named."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import TinyTeacher, tiny_samples

import kdcache


@pytest.fixture
def cache(tmp_path: Path) -> kdcache.Cache:
    """A cache of 37 samples of 10 classes."""
    return kdcache.dump_teacher(TinyTeacher(), tiny_samples(), tmp_path / "c.kdcache", name="tiny")


def test_public_names_complete_before_they_are_used() -> None:
    assert set(dir(kdcache)) == set(kdcache.__all__)
    listed = subprocess.run(
        [sys.executable, "-c", "import kdcache; print(*dir(kdcache))"], capture_output=True, text=True, check=True
    )
    assert set(listed.stdout.split()) == set(kdcache.__all__)


PLAIN = {
    "CacheSpec",
    "DatasetSpec",
    "ModelSpec",
    "Placement",
    "Split",
    "TextFormat",
    "TokenCacheSection",
    "Tokenizer",
    "Transform",
    "View",
    "Views",
}
"""Types for which a caller passes a string, a number, a mapping, a list or `Samples`."""


def test_types_of_public_functions_are_public() -> None:
    functions = [(name, getattr(kdcache, name)) for name in kdcache.__all__]
    checked = 0
    for name, function in functions:
        if not inspect.isfunction(function):
            continue
        annotations = " ".join(map(str, function.__annotations__.values()))
        used = set(re.findall(r"(?<![.\w])[A-Z]\w+", annotations))
        outside = {"Any", "Callable", "Dataset", "Iterator", "Literal", "Mapping", "None", "Path", "Sequence", "Tensor"}
        assert used - outside - PLAIN <= set(kdcache.__all__), name
        checked += 1
    assert checked > 8


def test_a_misspelled_name_has_a_suggestion() -> None:
    with pytest.raises(AttributeError) as error:
        _ = kdcache.open_cach
    assert (error.value.name, error.value.obj) == ("open_cach", kdcache)


def test_objects_print_in_one_short_line(cache: kdcache.Cache) -> None:
    for shown in (repr(cache), repr(cache.teacher())):
        assert "\n" not in shown
        assert len(shown) < 400
    assert "samples=37, classes=10, views=1" in repr(cache)
    assert cache.manifest.digest in repr(cache)
    assert "samples=37, classes=10, views=1, placement='host', device='cpu'" in repr(cache.teacher())


@pytest.mark.parametrize("ids", [[1, 2], 1, range(3)])
def test_ids_that_are_not_a_tensor_are_refused(cache: kdcache.Cache, ids: object) -> None:
    with pytest.raises(kdcache.KdcacheError, match=f"ids are a {type(ids).__name__}"):
        cache.teacher()(ids)  # type: ignore[arg-type]
    assert cache.teacher()(torch.tensor([1, 2])).shape == (2, 10)
