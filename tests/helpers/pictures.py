"""Small pictures in place of those that matplotlib draws of each new cache and each run, which take most of their time.

A small picture has the digest of what was to be drawn: two are equal if, and only if, they show the same figures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kdcache.cache.inspect import card
from kdcache.runtime.atomic_write import open_atomic
from kdcache.train import sweep_results, train

DRAWN: list[tuple[ModuleType, str, Callable[..., None]]] = [
    (module, name, getattr(module, name))
    for module, name in ((card, "draw_census"), (train, "draw_curves"), (sweep_results, "draw_accuracies"))
]
"""Where the package draws pictures beside its results: module, name of the function there, and the function."""


def draw_small(name: str, *shown: Any) -> None:
    """Write a PNG of one pixel with the digest of the arguments of a function that draws, to the path among them."""
    (path,) = (value for value in shown if isinstance(value, Path))
    text = PngInfo()
    figures = [value for value in shown if value is not path]
    text.add_text("digest", hashlib.sha256(repr((name, figures)).encode()).hexdigest())
    with open_atomic(path) as file:
        Image.new("L", (1, 1)).save(file, format="PNG", pnginfo=text)


def are_small() -> bool:
    return any(getattr(module, name) is not function for module, name, function in DRAWN)


def set_small(small: bool) -> None:
    for module, name, function in DRAWN:
        setattr(module, name, partial(draw_small, name) if small else function)


@contextmanager
def drawn(small: bool) -> Iterator[None]:
    """Draw small pictures, or those of the package, until the block ends."""
    before = are_small()
    set_small(small)
    try:
        yield
    finally:
        set_small(before)
