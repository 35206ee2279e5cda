"""Create accelerate's `Accelerator` from the pipeline alone, whatever the environment configures.

`accelerate launch` and shells set variables that accelerate reads silently: some change the gradients (gradient
accumulation steps divide the loss) or the precision. They are hidden while an Accelerator is created, and reported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import distributed

from kdcache.errors import UsageError
from kdcache.runtime.distributed import meet
from kdcache.runtime.launched import agent_holds_store

_LONGEST_WAIT = timedelta(hours=12)
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}

_HEEDED = {"ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE"}
"""Variables of accelerate that change no result."""

_REPLACED_BY = {
    "ACCELERATE_DYNAMO_BACKEND": "train.compile",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "train.gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "train.max_grad_norm",
    "ACCELERATE_MIXED_PRECISION": "train.precision",
    "ACCELERATE_TORCH_DEVICE": "--device",
    "ACCELERATE_USE_CPU": "--device",
}
"""The key or option that configures what a variable would."""

_DEFAULTS = {"", "false", "no", "none"}

_OF_MPI = ("PMI_", "MPI_LOCAL", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
"""Prefixes of the variables of mpirun and srun, whose processes train a network each: only torchrun's share one."""

_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


def ignored_settings() -> dict[str, str]:
    """Return the variables of the environment that would change training under accelerate, and are ignored.

    Raises:
        UsageError: if they ask for a way to share a network among processes that kdcache does not support.
    """
    for name, what in _UNSUPPORTED.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise UsageError(
                f"the environment asks for {what} ({name}={os.environ[name]}), and kdcache trains data-parallel only",
                f"unset {name}, or start the processes with torchrun or `accelerate launch --multi_gpu`",
            )
    found = {name: os.environ[name] for name in _REPLACED_BY if name in os.environ}
    steps = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    return {name: value for name, value in found.items() if value.lower() not in {*_DEFAULTS, *["1"] * (name == steps)}}


def described_settings(ignored: dict[str, str]) -> str:
    """Return which variables are ignored, and the key that replaces each, in a line."""
    parts = (f"{name}={value} (use {_REPLACED_BY[name]})" for name, value in ignored.items())
    return f"ignored settings of accelerate in the environment: {', '.join(parts)}"


@contextmanager
def hidden_settings() -> Iterator[None]:
    """Remove accelerate's variables from the environment, and put them back at the end.

    Most are read while an Accelerator is created, some (the backend of fp8) whenever it is used.
    """
    names = [name for name in os.environ if name.startswith("ACCELERATE_") and name not in _HEEDED]
    if "WORLD_SIZE" not in os.environ:
        names += [name for name in os.environ if name == "LOCAL_RANK" or name.startswith(_OF_MPI)]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def join_processes(device: torch.device | str, precision: str, *, uses_all: bool = True) -> Accelerator:
    """Return this process among those that torchrun or `accelerate launch` started; alone if there are no others.

    Args:
        device: of the network.
        precision: `train.precision`.
        uses_all: whether the loss depends on all parameters of the network; those of its last layers may be unused
            where the loss compares features only.

    Raises:
        UsageError: for fp16 without a GPU.
    """
    device, mixed = torch.device(device), _MIXED_PRECISION[precision]
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("fp16 needs a GPU: its gradients underflow without a scaler", "set precision to bf16 or fp32")
    # accelerate keeps its state per process; an earlier run may have used another device, precision or compiler.
    if PartialState._shared_state and PartialState().device.type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)
    elif AcceleratorState._shared_state:
        AcceleratorState._reset_state()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    _start_group(device)
    # While the first process validates, the others wait.
    wait = InitProcessGroupKwargs(timeout=_LONGEST_WAIT)
    with hidden_settings():
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=mixed,
            gradient_accumulation_steps=1,  # micro-batches are summed by `Trainer`, which scales their losses itself
            dynamo_backend="no",
            kwargs_handlers=[wait, DistributedDataParallelKwargs(find_unused_parameters=not uses_all)],
        )


def _start_group(device: torch.device) -> None:
    """Start the process group of torchrun's processes, which accelerate then uses.

    Accelerate would not find the others after a restart (`--max-restarts`); see `meet`.
    """
    if not agent_holds_store() or device.type not in _BACKENDS or distributed.is_initialized():
        return
    store, rank, count = meet(_LONGEST_WAIT)
    distributed.init_process_group(
        _BACKENDS[device.type], store=store, rank=rank, world_size=count, timeout=_LONGEST_WAIT
    )


def start_trackers(names: Sequence[str], folder: Path) -> list[Any]:
    """Return accelerate's trackers of these names, which write to a folder."""
    with hidden_settings():
        accelerator = Accelerator(log_with=[*names], project_dir=folder, gradient_accumulation_steps=1)
        accelerator.init_trackers("kdcache")
    return list(accelerator.trackers)
