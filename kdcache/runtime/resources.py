"""Free memory and disk space of this machine, and kdcache's own folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import torch

from kdcache.runtime.paths import existing

_sharing = 1
"""Number of processes that share the cores."""

_CGROUP = Path("/sys/fs/cgroup")


def home() -> Path:
    """Return kdcache's own folder: `$KDCACHE_HOME`, or `kdcache` in the user's cache folder."""
    given = os.environ.get("KDCACHE_HOME")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdcache"


def free_memory(device: torch.device | str = "cpu") -> int:
    """Return the free memory of a device in bytes; on the host, within the limit of the container."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = int(psutil.virtual_memory().available)
    try:
        limit, current = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # The page cache counts as used, and is dropped when memory is needed.
        return min(available, limit - current + int(counts["inactive_file"]) + int(counts["active_file"]))
    except (OSError, ValueError, KeyError):  # no such limit, or another kind of system
        return available


def free_disk(folder: Path) -> int:
    """Return the free disk space in bytes for a folder, which may not exist yet."""
    return shutil.disk_usage(existing(folder)).free


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // _sharing, 1)


def share_cores(processes: int) -> None:
    """Let this process use its share of the cores, as one of several that do the same work."""
    global _sharing  # noqa: PLW0603  # a fact about this process
    _sharing = processes
