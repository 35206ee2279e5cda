"""Files that operating systems, file managers and notebooks add to folders without being asked."""

from __future__ import annotations

_NAMES = {
    ".ds_store",
    ".directory",
    ".ipynb_checkpoints",
    ".localized",
    ".fseventsd",
    ".spotlight-v100",
    ".trashes",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "__macosx",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "icon\r",
}
_PREFIXES = ("._", ".nfs", ".trash-")


def is_system_file(name: str) -> bool:
    """Whether a file or folder has a name that a system gives, such as `.DS_Store`, `._0.jpg` or `Thumbs.db`."""
    return name.lower() in _NAMES or name.lower().startswith(_PREFIXES)
