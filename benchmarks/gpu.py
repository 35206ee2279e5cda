"""Measure everything that has a bound on a GPU, in at most 8 minutes: `python benchmarks/gpu.py`.

It needs a checkout, torch and the other dependencies of kdcache, and no network. The parts run one after the other,
each in a process of its own:

    dump        `dump-teacher` beside a bare loop, ResNet-50, in fp32, fp16 and bf16 (`dump.py`)
    codec       encoding beside inference, and the cached logits beside a training step, ResNet-18 (`codec.py`)
    train       KD and DTKD from a cache beside cross-entropy, a bare loop, and live teachers (`train.py`, larger sizes)
    placements  rows per second, decoded on the device, of each placement of a cache
    together    students in one pass beside separate passes (`together.py`)

A part that would take longer than what is left of the time is ended, and what it has printed until then is kept; the
last lines say so. `--device cpu --quick` runs all of it with small sizes, whose figures do not compare with the bounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import recorded
import torch
import train
from common import encoded, in_turn, planned, write_cache
from torch import nn
from torchvision.models import resnet18, resnet50

from kdcache import CachedTeacher, open_cache
from kdcache.cache.placement.choose import PLACEMENTS
from kdcache.cli import output
from kdcache.models.small import SmallCNN

_LIMIT = 470
_BATCH = 256
_PRECISIONS = ("fp32", "fp16", "bf16")


def _resnet50() -> nn.Module:
    network: nn.Module = resnet50(num_classes=1000)
    return network


def _resnet18() -> nn.Module:
    network: nn.Module = resnet18(num_classes=1000)
    return network


def _small() -> nn.Module:
    return SmallCNN(100, 1, width=16)


_CASES = (
    train.Case("ResNet-50, 224 pixels", _resnet50, 1000, 224, 3, 1024, 128),
    train.Case("ResNet-18, 64 pixels", _resnet18, 1000, 64, 3, 8192, 256),
)
_QUICK = (train.Case("small, 28 pixels", _small, 100, 28, 1, 128, 64),)


def main() -> None:
    """Print the table."""
    began = time.monotonic()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--part", choices=["train", "placements"], help="run this part alone, and print its tables")
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with the bounds"
    )
    asked = arguments.parse_args()
    if asked.device != "cpu" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU; --device cpu --quick tries the command without one")
    if asked.part == "train":
        _train(asked.device, asked.quick)
    elif asked.part == "placements":
        _placements(asked.device, asked.quick)
    else:
        _everything(asked.device, ["--quick"] if asked.quick else [], began)


def _everything(device: str, quick: list[str], began: float) -> None:
    """Run all parts, and print one table."""
    usual = ["--device", device, *quick]
    # (name of the part, benchmark, its arguments, tables after which it ends, share of the remaining time)
    parts = [
        *(
            (f"dump, {precision}", "dump", [*usual, "--precision", precision, "--rounds", "2"], 1, 0.25)
            for precision in _PRECISIONS
        ),
        ("codec", "codec", usual, 1, 0.4),
        ("placements", "gpu", [*usual, "--part", "placements"], 1, 0.4),
        ("train", "gpu", [*usual, "--part", "train"], 0, 0.7),
        ("together", "together", usual, 1, 1.0),
    ]
    rows, notes = [], []
    for part, benchmark, options, n_tables, share in parts:
        if not (Path(__file__).parent / f"{benchmark}.py").exists():
            continue
        left = _LIMIT - (time.monotonic() - began)
        outcome = recorded.run(benchmark, options, max(left * share, 1), n_tables)
        if outcome.problem:
            notes.append(f"{part}: {outcome.problem}")
        for table in outcome.tables:
            rows += _rows(part, table)
    output.table(recorded.machine(device), ["part", "measure", "figure", "bound"], rows)
    for note in notes:
        output.result(note)
    if notes:
        sys.exit(1)


def _rows(part: str, table: recorded.Recorded) -> list[list[str]]:
    """Return the rows (part, measure, figure, bound) of a table that a part has printed."""
    setting = f"{part}, {table.title.split(':')[0]}" if part == "train" else part
    shown = []
    for row in table.rows:
        cells = dict(zip(table.columns, row, strict=True))
        if cells.get("ratio"):
            against = f", per {cells['to']}" if part == "train" else ""
            shown.append([setting, f"{row[0]}{against}", cells["ratio"], cells.get("bound", "")])
        if cells.get("ratio to cache"):
            shown.append([setting, f"{row[0]}, per KD from the cache", cells["ratio to cache"], ""])
        if cells.get("rows/s"):
            shown.append([setting, f"{row[0]}, rows/s", cells["rows/s"], ""])
    return shown


def _train(device: str, quick: bool) -> None:
    """Print the tables of `train.py` for sizes that keep a GPU busy."""
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(_QUICK if quick else _CASES):
            train._measure(case, device, 1 if quick else 3, Path(folder) / str(number))


def _placements(device: str, quick: bool) -> None:
    """Print the rows per second of each placement, in the order that a trainer uses with it."""
    samples, classes = (2000, 100) if quick else (400_000, 1000)
    with tempfile.TemporaryDirectory() as folder:
        chosen = planned(classes, top_k=4, rank=48)
        cache = write_cache(Path(folder) / "c.kdcache", encoded(chosen, min(samples, 20_000)), samples).path
        n_rows = min(samples, 65_536)
        works: dict[str, Callable[[], object]] = {
            name: _pass(open_cache(cache).teacher(device=device, placement=name), n_rows) for name in PLACEMENTS
        }
        seconds = in_turn(works, 1 if quick else 3, device)
    output.table(
        f"logits of {n_rows:,} rows of {samples:,}, {classes} classes, in batches of {_BATCH}, on {device}",
        ["placement", "rows/s"],
        [[placement, f"{n_rows / taken:,.0f}"] for placement, taken in seconds.items()],
    )


def _pass(teacher: CachedTeacher, n_rows: int) -> Callable[[], None]:
    """Return a pass over some rows."""
    batches = torch.split(teacher.order(torch.Generator().manual_seed(0))[:n_rows], _BATCH)

    def run() -> None:
        teacher.prefetch(batches)
        for ids in batches:
            teacher(ids)

    return run


if __name__ == "__main__":
    main()
