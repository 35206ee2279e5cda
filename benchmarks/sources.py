"""Compare ways to get a teacher's logits for a batch: `python benchmarks/sources.py`.

Batches of 256 rows of 1000 classes in random order, as float32 [B, C] on the CPU, each from

    kdcache, in memory   a cache at fidelity 0.02, placement `host`
    kdcache, mapped      the same cache, placement `mmap`, with look-ahead
    np.memmap            every logit as float16 in one file
    FKD files            a file per image, written by torch.save, with the 5 largest probabilities and their classes
    tar of logits        a tar with a .npy file of float16 logits per sample, read by `tarfile` from start to end and
                         shuffled in a buffer of 1000, as the package webdataset does; the package is not used
    live teacher         a DataLoader of images of 224 pixels in memory and the forward pass of a ResNet-18, without
                         decoding or transforming an image; it runs on a few batches only

All files are in the page cache, and the sources take turns; medians, in microseconds per row. (`peers.py` compares the
errors of these formats.) Dense logits need no decoding: while they fit in memory, `np.memmap` is faster, at many times
the size. The bound: files per image, a tar and a live teacher take at least as long as the cache in memory.
"""

from __future__ import annotations

import argparse
import io
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from common import encoded, in_turn, made_up_logits, planned, write_cache
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from kdcache import open_cache
from kdcache.cache.placement.choose import Placement
from kdcache.cache.planner import USUAL_FIDELITY, described
from kdcache.cli import output

_BATCH = 256
_BUFFER = 1000
_FKD_CLASSES = 5


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, help="folder for temporary files")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with the bounds"
    )
    asked = arguments.parse_args()
    n_rows, classes, side, live = (1024, 100, 32, 32) if asked.quick else (16_384, 1000, 224, 64)
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        logits = made_up_logits(n_rows, classes, seed=3)
        chosen = planned(classes, fidelity=USUAL_FIDELITY)
        cache = write_cache(folder / "c.kdcache", encoded(chosen, n_rows), n_rows).path
        works = {
            "kdcache, in memory": _cached(cache, "host"),
            "kdcache, mapped": _cached(cache, "mmap"),
            "np.memmap": _memmap(folder, logits),
            "FKD files": _fkd(folder / "fkd", logits),
            "tar of logits": _tar(folder / "logits.tar", logits),
            "live teacher": _live(live, side, classes),
        }
        seconds = in_turn(works, 1 if asked.quick else asked.rounds)
        sizes = {
            **dict.fromkeys(("kdcache, in memory", "kdcache, mapped"), _size(cache)),
            "np.memmap": _size(folder / "dense"),
            "FKD files": _size(folder / "fkd"),
            "tar of logits": _size(folder / "logits.tar"),
        }
    each = {work: taken / (live if work == "live teacher" else n_rows) * 1e6 for work, taken in seconds.items()}
    ours = each["kdcache, in memory"]
    output.table(
        f"logits of {n_rows:,} rows, {classes} classes, in batches of {_BATCH}; cache: {described(chosen)}; "
        f"{torch.get_num_threads()} CPU threads",
        ["source", "us/row", "rows/s", "per kdcache", "bound", "bytes/row"],
        [
            [
                work,
                f"{taken:.2f}",
                f"{1e6 / taken:,.0f}",
                f"{taken / ours:.2f}",
                "" if "kdcache" in work or work == "np.memmap" else "1.00",
                f"{sizes[work] / n_rows:,.0f}" if work in sizes else "",
            ]
            for work, taken in each.items()
        ],
    )


def _size(path: Path) -> int:
    paths = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in paths if file.is_file())


def _orders(n_rows: int) -> Iterator[Tensor]:
    """Yield a new random order of all rows for each pass."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randperm(n_rows, generator=generator)


def _cached(cache: Path, placement: Placement) -> Callable[[], None]:
    teacher = open_cache(cache).teacher(device="cpu", placement=placement)
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        batches = torch.split(teacher.order(generator), _BATCH)
        teacher.prefetch(batches)
        for ids in batches:
            teacher(ids)

    return run


def _memmap(folder: Path, logits: Tensor) -> Callable[[], None]:
    logits.half().numpy().tofile(folder / "dense")
    mapped = np.memmap(folder / "dense", np.float16, "r", shape=tuple(logits.shape))
    orders = _orders(len(logits))

    def run() -> None:
        for ids in torch.split(next(orders), _BATCH):
            torch.from_numpy(mapped[ids.numpy()]).float()

    return run


def _fkd(folder: Path, logits: Tensor) -> Callable[[], None]:
    """Return a pass over files as `FKD/utils_FKD.py` reads them, a row per file: [classes, probabilities] float32."""
    folder.mkdir()
    top = logits.softmax(dim=1).topk(_FKD_CLASSES)
    for index, row in enumerate(torch.stack([top.indices.float(), top.values], dim=1)):
        torch.save(row.clone(), folder / f"{index}.tar")
    orders, classes = _orders(len(logits)), logits.shape[1]

    def run() -> None:
        for ids in torch.split(next(orders), _BATCH):
            rows = torch.stack([torch.load(folder / f"{index}.tar", weights_only=True) for index in ids.tolist()])
            rest = (1 - rows[:, 1].sum(dim=1, keepdim=True)) / (classes - _FKD_CLASSES)
            rest.repeat(1, classes).scatter(1, rows[:, 0].long(), rows[:, 1]).log()

    return run


def _tar(path: Path, logits: Tensor) -> Callable[[], None]:
    with tarfile.open(path, "w") as archive:
        for index, row in enumerate(logits.half().numpy()):
            buffer = io.BytesIO()
            np.save(buffer, row)
            entry = tarfile.TarInfo(f"{index:08}.npy")
            entry.size = buffer.tell()
            buffer.seek(0)
            archive.addfile(entry, buffer)

    def rows() -> Iterator[np.ndarray]:
        draw, buffer = random.Random(0), []  # noqa: S311  # an order, not a key
        with tarfile.open(path, "r|") as archive:
            for entry in archive:
                opened = archive.extractfile(entry)
                buffer.append(np.load(io.BytesIO(opened.read() if opened else b"")))
                archive.members = []  # type: ignore[attr-defined]  # as webdataset does, so that entries are freed
                if len(buffer) == _BUFFER:
                    where = draw.randrange(_BUFFER)
                    buffer[where], buffer[-1] = buffer[-1], buffer[where]
                    yield buffer.pop()
        draw.shuffle(buffer)
        yield from buffer

    def run() -> None:
        batch = []
        for row in rows():
            batch.append(row)
            if len(batch) == _BATCH:
                torch.from_numpy(np.stack(batch)).float()
                batch = []

    return run


def _live(n_rows: int, side: int, classes: int) -> Callable[[], None]:
    torch.manual_seed(0)
    teacher = resnet18(num_classes=classes).eval()
    loader = DataLoader(TensorDataset(torch.rand(n_rows, 3, side, side)), batch_size=_BATCH, shuffle=True)

    @torch.no_grad()
    def run() -> None:
        for (images,) in loader:
            teacher(images)

    return run


if __name__ == "__main__":
    main()
