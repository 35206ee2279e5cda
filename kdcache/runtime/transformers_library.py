"""The optional library transformers, which is loaded by name when it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from kdcache.errors import UsageError


def library(what: str = "`hf:` networks", extra: str = "transformers") -> Any:
    """Return transformers.

    Args:
        what: what needs it.
        extra: the extra of kdcache that installs it.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        return import_module("transformers")
    except ImportError:
        raise UsageError(f"{what} need the library transformers", f"pip install 'kdcache[{extra}]'") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars and tables, and from warnings."""
    logging = import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, and the second if the first announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {said}"
