"""Devices of this machine."""

from __future__ import annotations

import os

import torch

from kdcache.errors import UsageError, did_you_mean, indices_below

_DEVICES = ("cpu", "cuda", "mps", "xpu")


def check_device(device: torch.device | str) -> None:
    """Check that this machine has a device.

    Raises:
        UsageError: if torch does not know it, or it is not there.
    """
    name = str(device)
    kind, _, index = name.partition(":")
    if kind not in _DEVICES or not (index.isdecimal() or name == kind):
        meant = ", did you mean cuda?" if kind.lower() in ("gpu", "nvidia", "") else did_you_mean(kind, _DEVICES)
        raise UsageError(
            f"no device {name!r} on this machine{meant}", "use auto, cpu, cuda, cuda:0, cuda:1, ..., mps or xpu"
        )
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        # Only the first sentence: lists of torch's operations follow.
        reason = str(error).splitlines()[0].split(". ")[0]
        if kind == "mps":
            reason = "torch has no MPS here"
        elif kind == "cuda" and index and torch.cuda.is_available():
            reason = f"it has {indices_below(torch.cuda.device_count())}"
        raise UsageError(
            f"no device {name!r} on this machine: {reason}",
            "use the device cpu, on the command line --device cpu or auto",
        ) from None


def chosen_device(name: str) -> str:
    """Return the device that a name means: `auto` is a GPU if there is one, and `cuda` that of this process.

    Raises:
        UsageError: if torch does not know the device, or this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # each process of torchrun has its own GPU
    check_device(name)
    return name
