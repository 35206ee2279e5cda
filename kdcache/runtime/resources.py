"""What this machine has to spare: memory, disk, and a folder for what is kept between runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def home() -> Path:
    """Where kdcache keeps files of its own: `$KDCACHE_HOME`, or `kdcache` in the user's cache folder."""
    given = os.environ.get("KDCACHE_HOME")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdcache"


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that a device has to spare; of the host's memory, what the container's limit leaves of it."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = int(psutil.virtual_memory().available)
    try:
        limit, current = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Files that were read count as taken, and are dropped when memory is asked for.
        return min(available, limit - current + int(counts["inactive_file"]) + int(counts["active_file"]))
    except (OSError, ValueError, KeyError):  # no such limit, or another kind of system
        return available


def free_disk(folder: Path) -> int:
    """Bytes that may still be written to a folder, which need not be there yet."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder
