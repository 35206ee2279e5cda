"""Versions of the software that writes a cache or a run."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

_LIBRARIES = ("kdcache", "torch", "torchvision", "numpy", "zarr", "numcodecs")


def versions(*others: str) -> dict[str, str]:
    """Return the versions of Python, of the libraries that results depend on, and of others that are installed."""
    return {"python": platform.python_version(), **{name: _installed(name) for name in (*_LIBRARIES, *others)}}


@cache
def _installed(name: str) -> str:
    """Return the version of a library, which is searched for once: that takes a tenth of the time of a small cache."""
    return version(name)


def commits() -> dict[str, str]:
    """Return the git commits of kdcache's checkout and of the current folder's, with `-dirty` if modified."""
    here = Path(__file__)
    # An installed copy may be inside another project's checkout.
    own = _git(here.parent, "ls-files", "--error-unmatch", here.name) is not None
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    found = {"kdcache_commit": _git(here.parent, *describe) if own else None, "commit": _git(Path.cwd(), *describe)}
    return {name: commit for name, commit in found.items() if commit is not None}


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a git command; None if git is missing or fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
