"""Compare `dump-teacher` with its teacher alone, and measure its peak memory: `python benchmarks/dump.py`.

The pass of `dump-teacher` (loading, teacher, encoding, fingerprints, writing, flushing) against a bare loop of the same
DataLoader and forward pass that discards the output. The teacher is torchvision's ResNet-50 with random weights and
1000 classes, in the encoding that is planned for it; the images, 224 pixels, are made in advance, and flipped, scaled
and normalized one by one. Each round runs both, in alternating order; the ratio is the median over the rounds. The
bound is 1.05 on a CPU and 1.03 on a GPU.

The time before the pass (content keys, pilot, plan) and after it (sealing) is printed as a share of the pass. The pilot
is 128 images here, a fixed number that does not grow with the data set.

Then the peak memory of a process that dumps N and 10 N rows of a network of one layer, 1000 classes, every class as
float16, compared with the size of these rows. (`load.py` measures the speed of writing alone.)
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from kdcache import Samples, dump_teacher
from kdcache.cli import output
from kdcache.config.cache import CacheSpec
from kdcache.config.transform import Transform
from kdcache.data.loader import batches, cut_range
from kdcache.data.views import View
from kdcache.models.small import SmallCNN
from kdcache.runtime.progress import Silent, Task

_BOUNDS = {"cpu": 1.05, "cuda": 1.03}
_DIFFERENT = 256
_TRANSFORM: Transform = [
    {"RandomHorizontalFlip": {"p": 0.5}},
    {"ToDtype": {"dtype": "float32", "scale": True}},
    {"Normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}},
]
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class MadeImages:
    """Color noise; the first 256 images are repeated."""

    parallel: ClassVar[bool] = True

    def __init__(self, count: int, side: int) -> None:
        self.count, self.side = count, side
        shape = (min(count, _DIFFERENT), 3, side, side)
        self.pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.count

    def picture(self, index: int) -> Tensor:
        """Return an image [3, side, side] uint8."""
        return self.pixels[index % _DIFFERENT]

    def content(self, index: int) -> bytes:
        """Return the index in place of the pixels, which need not be hashed before the pass."""
        return index.to_bytes(8, "little")

    def shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width)."""
        return 3, self.side, self.side

    def stamp(self) -> None:
        """Do nothing: the images are in memory."""


class Pass(Silent):
    """A progress reporter that records when the pass begins and ends: it is the last task."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
        """Record the times of a task."""
        self.began = time.perf_counter()
        with super().task(what, total, unit) as task:
            yield task
        self.ended = time.perf_counter()


class Turn(NamedTuple):
    """Seconds of one round: of dump-teacher before, in and after its pass, and of the bare loop."""

    before: float
    dumped: float
    after: float
    bare: float


class Bench:
    """A teacher and its images, run by dump-teacher and by a bare loop."""

    def __init__(self, asked: argparse.Namespace, samples: int, batch: int, side: int, classes: int) -> None:
        self.device = torch.device(asked.device)
        names = tuple(map(str, range(classes)))
        labels = (np.arange(samples) % classes).astype(np.int32)
        self.samples = Samples("made", "train", MadeImages(samples, side), labels, names, _TRANSFORM)
        torch.manual_seed(0)
        self.model = (SmallCNN(classes, 3) if asked.quick else resnet50(num_classes=classes)).to(self.device).eval()
        self.spec = CacheSpec(
            batch_size=batch, shard_rows=4 * batch, num_workers=asked.workers, precision=asked.precision, pilot_rows=128
        )

    def dump(self, folder: Path) -> tuple[float, float, float]:
        """Return the seconds of dump-teacher before, in and after its pass."""
        reporter = Pass()
        began = time.perf_counter()
        dump_teacher(
            self.model, self.samples, folder / "c.kdcache", spec=self.spec, device=self.device, progress=reporter
        )
        return reporter.began - began, reporter.ended - reporter.began, time.perf_counter() - reporter.ended

    @torch.no_grad()
    def bare(self) -> float:
        """Return the seconds of a loop over the same batches that discards the logits."""
        dtype = _AUTOCAST[self.spec.precision]
        began = time.perf_counter()
        cuts = cut_range(range(len(self.samples)), self.spec.batch_size)
        for batch in batches(View(self.samples, _TRANSFORM), cuts, self.spec.num_workers, self.device):
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                self.model(batch.images.to(self.device, non_blocking=True))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def turn(self, dump_first: bool) -> Turn:
        """Run both, one after the other."""
        with tempfile.TemporaryDirectory() as folder:
            if dump_first:
                dumped = self.dump(Path(folder))
                return Turn(*dumped, self.bare())
            bare = self.bare()
            return Turn(*self.dump(Path(folder)), bare)


def main() -> None:
    """Print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.add_argument("--device", default=usual, help=f"device of the teacher; default {usual}")
    arguments.add_argument("--precision", default="fp32", choices=list(_AUTOCAST), help="of the teacher")
    arguments.add_argument("--workers", type=int, default=0 if usual == "cpu" else 8, help="processes that load images")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with the bounds"
    )
    asked = arguments.parse_args()
    on_cpu = torch.device(asked.device).type == "cpu"
    size = (256, 32, 224, 1000) if on_cpu else (16_384, 256, 224, 1000)
    bench = Bench(asked, *((64, 8, 32, 100) if asked.quick else size))
    bench.turn(dump_first=True)  # does not count
    turns = [bench.turn(dump_first=bool(number % 2)) for number in range(1 if asked.quick else asked.rounds)]
    _print_times(bench, turns)
    _print_memory((500, 5000) if asked.quick else (10_000, 100_000))


def _print_times(bench: Bench, turns: list[Turn]) -> None:
    """Print the table of times."""
    before, dumped, after, bare = (statistics.median(values) for values in zip(*turns, strict=True))
    ratios = sorted(turn.dumped / turn.bare for turn in turns)
    kind = bench.device.type
    on = torch.cuda.get_device_name(bench.device) if kind == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    output.table(
        f"{type(bench.model).__name__}, {bench.spec.precision}, {len(bench.samples):,} images in batches of "
        f"{bench.spec.batch_size}, {bench.spec.num_workers} workers, {len(turns)} rounds; on {on}; in seconds",
        ["work", "pass", "bare loop", "ratio", "from", "to", "bound", "before", "after"],
        [
            [
                "dump-teacher",
                *(f"{seconds:.3f}" for seconds in (dumped, bare)),
                *(f"{ratio:.3f}" for ratio in (statistics.median(ratios), ratios[0], ratios[-1])),
                f"{_BOUNDS[kind]:.2f}",
                *(f"{seconds / dumped:.1%}" for seconds in (before, after)),
            ]
        ],
    )


class OneLayer(nn.Module):
    """A linear layer with 1000 logits for images [3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, 1000] of images [B, 3, 8, 8]."""
        logits: Tensor = self.layer(images.flatten(1))
        return logits


def _peak(folder: str, samples: int) -> int:
    """Return the peak memory of this process after a dump, in bytes."""
    names, labels = tuple(map(str, range(1000))), np.zeros(samples, np.int32)
    made = Samples("made", "train", MadeImages(samples, 8), labels, names, _TRANSFORM)
    dump_teacher(
        OneLayer(), made, Path(folder) / "c.kdcache", spec=CacheSpec(top_k="all", shard_rows=500, num_workers=0)
    )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _print_memory(counts: tuple[int, int]) -> None:
    rows = []
    for count in counts:
        # In a new process each, as the peak of a process never decreases.
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, context) as pool:
            peak = pool.submit(_peak, folder, count).result()
        rows.append([f"{count:,}", f"{count * 2 * 1000 / 1e6:.1f}", f"{peak / 1e6:.1f}"])
    output.table("peak memory, MB", ["rows", "log-probabilities", "process"], rows)


if __name__ == "__main__":
    main()
