"""With what a cache or a run was made."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

_LIBRARIES = ("kdcache", "torch", "torchvision", "numpy", "zarr", "numcodecs")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def commits() -> dict[str, str]:
    """The commits of kdcache's own checkout and of the one that the current folder is in, `-dirty` if changed since."""
    here = Path(__file__)
    # An installed copy may lie in somebody's checkout, which is not its own.
    own = _git(here.parent, "ls-files", "--error-unmatch", here.name) is not None
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    found = {"kdcache_commit": _git(here.parent, *describe) if own else None, "commit": _git(Path.cwd(), *describe)}
    return {name: commit for name, commit in found.items() if commit is not None}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where there is none, or it refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
