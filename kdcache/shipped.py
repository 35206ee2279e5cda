"""Where the files that come with kdcache lie: in a checkout, or inside the installed package."""

from __future__ import annotations

from pathlib import Path

from kdcache.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent


def shipped(relative: str) -> Path:
    """Path of a file or folder that kdcache ships, such as `data/digits/digits.csv.gz`.

    Raises:
        UsageError: if this installation lacks it.
    """
    for root in (_PACKAGE / "shipped", _PACKAGE.parent):
        if (root / relative).exists():
            return root / relative
    raise UsageError(f"this installation of kdcache lacks {relative}", "pip install --force-reinstall kdcache")


def recipes() -> dict[str, Path]:
    """The pipeline files that kdcache ships, by name."""
    return {path.stem: path for path in sorted(shipped("pipelines").glob("*.yaml"))}


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
