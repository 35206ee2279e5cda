"""The pipeline files that come with kdcache ("recipes")."""

from __future__ import annotations

from pathlib import Path

from kdcache.errors import UsageError, did_you_mean
from kdcache.runtime.package_data import package_data


def recipes() -> dict[str, Path]:
    """Return the paths of the recipes, by name."""
    return {path.stem: path for path in sorted(package_data("pipelines").glob("*.yaml"))}


def recipe(name: str) -> Path:
    """Return the path of a recipe.

    Raises:
        UsageError: for an unknown name.
    """
    known = recipes()
    if name not in known:
        raise UsageError(
            f"there is no recipe {name!r}{did_you_mean(name, known)}",
            f"use one of {', '.join(known)}, or the path of a pipeline file",
        )
    return known[name]


def file_or_recipe(given: Path) -> Path:
    """Return the path of a pipeline that the command line names: an existing file, or the name of a recipe.

    Raises:
        UsageError: for a name without a suffix or folder that is neither.
    """
    return given if given.is_file() or given.suffix or given.name != str(given) else recipe(given.name)
