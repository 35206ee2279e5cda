"""With what a cache or a run was made."""

from __future__ import annotations

import platform
from importlib.metadata import version

_LIBRARIES = ("kdcache", "torch", "torchvision", "numpy", "zarr", "numcodecs")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}
