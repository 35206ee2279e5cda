"""Measure the size and the fidelity of encodings: `python benchmarks/fidelity.py [LOGITS.npz]`.

The error is that of the KD gradient with respect to the student's logits, |p' - p| / |q - p|, at T = 1, 2, 4, 8, on
rows that neither the basis nor the plan was fitted to. The default rows are 1500 of a trained 300-class teacher and a
half-trained student. Your own npz holds `teacher` [N, C], `student` [N, C] and `labels` [N].
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import request
from torch import Tensor

from kdcache.cache.fidelity import TEMPERATURES, gradient_error
from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import decode, encode
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.planner import described, plan_encoding
from kdcache.cli import output

ROWS = Path(__file__).parent.parent / "tests" / "reference" / "glyphs300.npz"


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("logits", type=Path, nargs="?", default=ROWS)
    with np.load(arguments.parse_args().logits) as stored:
        teacher, student = (torch.from_numpy(stored[name].astype(np.float32)) for name in ("teacher", "student"))
        labels = torch.from_numpy(stored["labels"].astype(np.int64))
    held = torch.arange(len(teacher)) % 3 == 0

    def row(name: str, raw: float, compressed: float | None, decoded: Tensor) -> list[str]:
        errors = [gradient_error(teacher[held], decoded, student[held], t) for t in TEMPERATURES]
        return [name, f"{raw:.0f}", f"{compressed:.0f}" if compressed else "", *(f"{error:.4f}" for error in errors)]

    def ours(name: str, encoding: Encoding, basis: TailBasis | None = None) -> list[str]:
        rows = encode(teacher[held], labels[held], encoding, basis)
        raw = sum(value.numel() * value.element_size() for value in rows.arrays().values()) / len(rows)
        decoded = decode(rows, labels[held], encoding, basis)
        return row(name, raw, zarr_store.bytes_per_row(encoding, rows), decoded)

    def planned(**settings: Any) -> list[str]:
        choice = plan_encoding(teacher[~held], labels[~held], request(**settings))
        name = f"planned for {settings['fidelity']}: " if settings.get("fidelity") else "fitted: "
        return ours(name + described(choice.chosen), choice.chosen.encoding, choice.chosen.basis)

    classes = teacher.shape[1]
    top = teacher[held].topk(16)
    alone = torch.full_like(teacher[held], -1e9).scatter(1, top.indices, top.values)
    table = [
        row("top 16, renormalized", 16 * 4, None, alone),
        ours("top 16, uniform tail", Encoding(num_classes=classes, top_k=16, tail="uniform", dtype="float16")),
        planned(top_k=4, rank=48),
        planned(fidelity=0.02),
        planned(fidelity=0.01),
        planned(fidelity=0.005),
        ours("every class, uint8", Encoding(num_classes=classes, top_k=classes, tail="none", dtype="uint8")),
        ours("every class, float16", Encoding(num_classes=classes, top_k=classes, tail="none", dtype="float16")),
    ]
    output.table(
        f"{classes} classes, {int(held.sum())} rows: bytes per row, and relative error of the KD gradient",
        ["encoding", "raw", "on disk", *(f"T={t}" for t in TEMPERATURES)],
        table,
    )


if __name__ == "__main__":
    main()
