"""Paths as users write them, in pipeline files, options and calls."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kdcache.errors import UsageError

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def expand(given: str | Path) -> Path:
    """Return a path with `~`, `~user`, `$VAR` and `${VAR}` replaced; one that exists as it is written stays so.

    Raises:
        UsageError: if a variable in it is not set.
    """
    text = os.fspath(given)
    if os.path.lexists(text):
        return Path(text)
    expanded = os.path.expandvars(text)
    if (unset := _VARIABLE.search(expanded)) is not None:
        name = unset[1].strip("{}")
        raise UsageError(f"the variable {name} in the path {text} is not set", f"export {name}=..., or write the path")
    return Path(expanded).expanduser() if expanded.startswith("~") else Path(expanded)
