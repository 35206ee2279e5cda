"""Find files that kdcache ships: in a checkout, or inside the installed package."""

from __future__ import annotations

from pathlib import Path

from kdcache.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent.parent


def package_data(relative: str) -> Path:
    """Return the path of a file or folder that kdcache ships, such as `data/digits/digits.csv.gz`.

    Raises:
        UsageError: if this installation lacks it.
    """
    for root in (_PACKAGE / "package_data", _PACKAGE.parent):
        if (root / relative).exists():
            return root / relative
    raise UsageError(f"this installation of kdcache lacks {relative}", "pip install --force-reinstall kdcache")
