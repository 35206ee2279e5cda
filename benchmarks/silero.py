"""silero-vad, a score of speech per 32 ms: its cache, and small students of it (`real_teachers.py`).

The network keeps a state from frame to frame. A sample is therefore a clip of 31 frames (992 ms), which begins with an
empty state, and its row is 31 scores. It runs in ONNX Runtime: to kdcache, it is a plain function.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import real_dump
import real_inputs
import torch
from sounds import RATE, speech
from torch import Tensor, nn

import kdcache
from kdcache.cli import output

_FRAMES, _FRAME, _BEFORE = 31, 512, 64
_CLIP = _FRAMES * _FRAME
_OUTPUTS: dict[str, dict[str, object]] = {
    "score": {"kind": "score"},
    "float16": {"encoding": "float16"},
    "int8": {"encoding": "int8"},
}


class _Teacher:
    """silero-vad as a function from clips to scores."""

    def __init__(self) -> None:
        folder = real_inputs.package_folder("silero_vad", real_inputs.REAL)
        real_inputs.package_folder("onnxruntime", real_inputs.REAL)
        import onnxruntime  # noqa: PLC0415  # only where it is installed

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a frame is too small to divide
        path = str(folder / "data" / "silero_vad.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def scores(self, clips: Tensor) -> Tensor:
        """Return the scores [B, 31] of clips [B, 31 * 512], frame by frame, as the package's own wrapper does."""
        state: npt.NDArray[np.float32] = np.zeros((2, len(clips), 128), np.float32)
        heard, found = np.pad(clips.numpy(), ((0, 0), (_BEFORE, 0))), []
        for start in range(0, _CLIP, _FRAME):
            part = heard[:, start : start + _BEFORE + _FRAME]
            score, state = self._session.run(None, {"input": part, "state": state, "sr": np.array(RATE, np.int64)})
            found.append(torch.from_numpy(score))
        return torch.cat(found, dim=1)


def _clips(count: int) -> Tensor:
    """Return clips [N, 31 * 512] of synthesized speech and pauses in noise, at -10 to 30 dB."""
    generator = torch.Generator().manual_seed(0)
    parts, have = [], 0
    for spoken in speech(real_inputs.sentences(count // 2 + 8)):
        pause = torch.zeros(int(RATE * (0.2 + 1.5 * torch.rand((), generator=generator))))
        parts += [spoken, pause]
        have += len(spoken) + len(pause)
        if have >= count * _CLIP:
            break
    clips = torch.cat(parts)[: count * _CLIP].reshape(-1, _CLIP)
    clips = clips[torch.randperm(len(clips), generator=generator)]
    loudness = 10 ** (-(40 * torch.rand(len(clips), 1, generator=generator) - 10) / 20)
    noise = torch.randn(clips.shape, generator=generator)
    return 0.3 * (clips + 0.05 * loudness * noise)


class _Student(nn.Module):
    """Two convolutions and a recurrent layer over the spectrum, 23 thousand weights."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Sequential(nn.Conv1d(65, 48, 3, padding=1), nn.ReLU())
        self.memory = nn.GRU(48, 32, batch_first=True)
        self.score = nn.Linear(32, 1)

    def forward(self, clips: Tensor) -> Tensor:
        """Return scores [B, 31] of clips [B, 31 * 512]."""
        frames = clips.reshape(len(clips) * _FRAMES, 4, 128) * torch.hann_window(128)
        spectrum = torch.fft.rfft(frames).abs().square().mean(dim=1).add(1e-6).log()
        hidden = self.frames(spectrum.reshape(len(clips), _FRAMES, 65).transpose(1, 2)).transpose(1, 2)
        scores: Tensor = self.score(self.memory(hidden)[0]).squeeze(2).sigmoid()
        return scores


def silero(asked: argparse.Namespace) -> None:
    """Scores of speech: bytes, and students of the cache and of the live teacher."""
    teacher = _Teacher()
    rows = asked.rows or (64 if asked.quick else 1536)
    clips = _clips(rows + max(rows // 4, 16))
    held_out = clips[rows:]
    outputs = {name: {"source": "scores", **spec} for name, spec in _OUTPUTS.items()}

    def named(given: Tensor) -> dict[str, Tensor]:
        return {"scores": teacher.scores(given)}

    with tempfile.TemporaryDirectory() as folder:
        dumped = real_dump.dump(named, clips[:rows], rows // 2, Path(folder), logits=False, outputs=outputs)
        true = real_dump.live(teacher.scores, dumped.views, 256)
        _encodings(dumped, true[dumped.unseen])
        said = teacher.scores(held_out)
        sources: dict[str, Callable[[Tensor], Tensor]] = {
            "live": lambda ids: true[ids],
            "cache": dumped.cache.teacher("score"),
        }
        steps = asked.steps or (5 if asked.quick else 600)

        def student(source: Callable[[Tensor], Tensor], seed: int) -> list[float]:
            return _student(dumped, source, seed, steps, held_out, said)

        learned = real_dump.related(sources, student, asked.seeds)
    same = float(((said > 0.5).float().mean() - 0.5).abs() + 0.5)
    output.table(
        f"Students of silero-vad, {steps} steps of 32 clips, {asked.seeds} seeds; {len(held_out) * _FRAMES:,} frames "
        f"of other clips, of which one answer has {same:.1%}",
        ["scores from", "error", "sd", "to live", "same side of .5", "sd", "to live"],
        learned,
    )


def _encodings(dumped: real_dump.Dumped, true: Tensor) -> None:
    """Print bytes and errors of scores, as they are kept and as vectors."""
    rows = []
    for name in _OUTPUTS:
        apart, size = (dumped.decoded(name) - true).abs(), dumped.bytes_per_row(name)
        shown = "score (float32)" if name == "score" else f"vector, {name}"
        rows.append(
            [shown, f"{size:.1f}", f"{size / _FRAMES:.2f}", f"{float(apart.mean()):.1e}", f"{float(apart.max()):.1e}"]
        )
    output.table(
        f"silero-vad: {len(true):,} clips of {_FRAMES} frames; {float((true > 0.5).float().mean()):.0%} are speech",
        ["encoding", "bytes", "per frame", "mean error", "largest"],
        rows,
    )


def _student(
    dumped: real_dump.Dumped,
    source: Callable[[Tensor], Tensor],
    seed: int,
    steps: int,
    clips: Tensor,
    said: Tensor,
) -> list[float]:
    """Train a small network by the squared error, and return its measures on other clips."""
    torch.manual_seed(seed)
    student = _Student()
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    squared = kdcache.output_loss("mse")
    for given, ids in real_dump.batches(dumped.views, steps, 32, seed):
        loss = squared(student(given), source(ids))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
    with torch.inference_mode():
        scores = student(clips)
    return [float((scores - said).abs().mean()), float(((scores > 0.5) == (said > 0.5)).float().mean())]
