"""Inputs of real teachers that need no download: files of installed packages, and sentences of Python itself."""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

REAL = "pip install 'kdcache[real]'"
"""What brings most of the packages."""

_PHOTOGRAPHS = {
    "skimage": (
        "data/chelsea.png data/coffee.png data/rocket.jpg data/astronaut.png data/brick.png data/camera.png "
        "data/cell.png data/clock_motion.png data/coins.png data/grass.png data/gravel.png data/hubble_deep_field.jpg "
        "data/ihc.png data/moon.png data/motorcycle_left.png data/retina.jpg"
    ),
    "sklearn": "datasets/images/china.jpg datasets/images/flower.jpg",
    "matplotlib": "mpl-data/sample_data/grace_hopper.jpg",
}
_SHORTEST, _LONGEST = 40, 300
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n\s*\n")


class MissingInputsError(Exception):
    """A package or file that a section needs is not here."""


def package_folder(name: str, install: str) -> Path:
    """Return the folder of an installed package, without importing it.

    Raises:
        MissingInputsError: if it is not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise MissingInputsError(f"{name} is not installed: {install}")
    return Path(next(iter(found.submodule_search_locations)))


def photographs() -> list[Tensor]:
    """Return photographs that packages carry, [3, H, W] uint8 each, in a fixed random order.

    Raises:
        MissingInputsError: if a package is not installed.
    """
    paths = [package_folder(name, REAL) / path for name, listed in _PHOTOGRAPHS.items() for path in listed.split()]
    every = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in paths]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return [every[index] for index in order.tolist()]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return different sentences of Python's documentation and of the docstrings of its standard library, shuffled.

    Raises:
        MissingInputsError: if there are fewer of them.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "tests" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # files that lib2to3 tests itself with
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.update(dict.fromkeys(_sentences(ast.get_docstring(node) or "")))
    topics = library / "pydoc_data" / "topics.py"
    if topics.is_file():
        for node in ast.walk(ast.parse(topics.read_bytes())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update(dict.fromkeys(_sentences(node.value)))
    if len(found) < count:
        raise MissingInputsError(f"Python's documentation in {library} has {len(found)} sentences, {count} are needed")
    listed = list(found)
    order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(seed))
    return [listed[index] for index in order[:count].tolist()]


def _sentences(text: str) -> list[str]:
    split = (" ".join(part.split()) for part in _SENTENCE_END.split(text))
    return [part for part in split if _SHORTEST <= len(part) <= _LONGEST and part[0].isalpha()]
