"""The pipeline files that kdcache ships, by name."""

from __future__ import annotations

from pathlib import Path

from kdcache.errors import UsageError
from kdcache.runtime.package_data import package_data


def recipes() -> dict[str, Path]:
    """The pipeline files that kdcache ships, by name."""
    return {path.stem: path for path in sorted(package_data("pipelines").glob("*.yaml"))}


def recipe(name: str) -> Path:
    """The recipe of that name.

    Raises:
        UsageError: if there is none.
    """
    found = recipes()
    if name not in found:
        raise UsageError(
            f"there is no recipe {name!r}", f"take one of {', '.join(found)}, or the path of a pipeline file"
        )
    return found[name]


def file_or_recipe(given: Path) -> Path:
    """A pipeline file as the command line names it: a file that is there, or a bare name that is a recipe's.

    Raises:
        UsageError: for a bare name that is neither.
    """
    return given if given.is_file() or given.suffix or given.name != str(given) else recipe(given.name)
