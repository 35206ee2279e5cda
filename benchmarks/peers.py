"""Compare the size and the fidelity of kdcache with other formats: `python benchmarks/peers.py [LOGITS.npz]`.

The rows are those of `glyphs.py` (1000 classes; a teacher and a half-trained student that are trained first, two to
four minutes; `--save` stores them as an npz), then 1500 of a trained 300-class teacher. No logits of an ImageNet
teacher come with this repository: your own npz holds `teacher` [N, C], `student` [N, C] and `labels` [N], and is then
measured alone. A third of the rows is measured; the basis is fitted and the encoding planned on the others. (The logits
of the 300-class teacher are stored as float16, so that a dense cache of float16 has no error there.)

Columns, in bytes per row:
    raw       the logits alone, as numbers: here, head, label, statistics and tail
    files     their size in files: here, the Zarr store (without the basis, 2 R C bytes per cache)
    replay    what else the files hold to replay the augmentation and to find the row; here nothing: a view is drawn
              from (seed, id, view)
TV is the mean total variation between decoded and true softmax at T = 4, and the worst of T = 1, 2 and 4, which is what
`--fidelity 0.02` bounds; the last four columns are the relative error of the KD gradient with respect to the student's
logits, |p' - p| / |q - p|.

What others store, from their code. All store probabilities p at one temperature, 1 unless stated otherwise; at another
temperature their target is softmax(log p' / T).

FKD, github.com/szq0214/FKD at afd5294b43c8b8c437c4d314c01661b24569aa0e. FKD/FKD_SLG/generate_soft_label.py
    (label_quantization): the k = 5 or 10 largest of softmax(logits / --temp) and their classes, all as float32, or
    float16 with --use_fp16; torch.save of [coords, flips, labels [500, 2, k]], a file per image, 500 crops
    (`marginal_smoothing_k5` is the default). FKD/utils_FKD.py (Recover_soft_label): the rest of the mass evenly over
    all other classes. Their scatter refuses float16 values; they are read as float32 here. numpy pickles bytes as text
    in protocol 2, that of torch.save, where those above 127 take two: hence files are larger than raw.
TinyViT, github.com/microsoft/Cream at 4a13c4091e78f9abd2160e7e01c02e48c1cf8fb9. TinyViT/save_logits.py: the k largest
    of the softmax as float16, classes as int16, and an int32 seed, k * 4 + 4 bytes per row and epoch;
    data/augmentation/manager.py: a line of text with its key. k is 100 in config.py; the 16 GB of README.md
    for 300 epochs of ImageNet-1k are k = 10, the 481 GB for 90 of ImageNet-22k k = 100. main.py: the rest of the mass
    evenly over all other classes.
ml-dr, github.com/apple/ml-dr at a21113c779714b68bcc8b6518f2a4ad149b29f00. dr/utils.py (sparsify): the 10 largest
    probabilities and classes as Python lists; reinforce.py: torch.save, pickle protocol 4, of (id, [{params, prob}]), a
    file per image, in a .tar.gz for distribution (configs/imagenet/reinforce/randaug.yaml). `files` is the archive,
    `raw` the files that training reads. densify, `smooth`: the rest evenly over all other classes; but where
    rounding carries the sum past 1, zeros, and the softmax of the ten probabilities. Published, 400 rows per image:
    37.5 GB, 73 bytes per row with its augmentation, as all rows of a file are of one image; here they are of many.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import glyphs
import numpy as np
import numpy.typing as npt
import torch
from common import request
from glyphs import Logits
from torch import Tensor

from kdcache.cache.fidelity import TEMPERATURES, gradient_error, total_variation
from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import decode, encode
from kdcache.cache.planner import MEASURED_AT, USUAL_FIDELITY, described, plan_encoding
from kdcache.cli import output

ROWS = Path(__file__).parent.parent / "tests" / "reference" / "glyphs300.npz"
FKD_CROPS = 500
ML_DR_SAMPLES = 400
TINYVIT_SEED = 4
TINYVIT_KEY = len("1281166\n")


class Format(NamedTuple):
    """A format for logits.

    Attributes:
        name: of it.
        raw: bytes per row of the logits.
        files: bytes per row of them in files.
        replay: bytes per row of what replays the augmentation.
        decoded: temperature -> logits [B, C] to use at it.
    """

    name: str
    raw: float
    files: float
    replay: float
    decoded: Callable[[float], Tensor]


def main() -> None:
    """Print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("logits", type=Path, nargs="?", help="measure these rows instead")
    arguments.add_argument("--save", type=Path, metavar="NPZ", help="store the rows of the 1000-class teacher")
    arguments.add_argument("--quick", action="store_true", help="a teacher of 100 classes, trained for seconds")
    asked = arguments.parse_args()
    if asked.logits is not None:
        _print(asked.logits.name, _read(asked.logits))
        return
    classes, steps, rows = (100, 40, 300) if asked.quick else (1000, 2000, 6144)
    trained = glyphs.train(classes, steps, rows)
    if asked.save is not None:
        np.savez(asked.save, **{name: values.numpy() for name, values in trained._asdict().items()})
    _print("letters, trained here", trained)
    _print("glyphs300.npz", _read(ROWS))


def _read(path: Path) -> Logits:
    with np.load(path, allow_pickle=False) as stored:
        teacher, student = (torch.from_numpy(stored[name].astype(np.float32)) for name in ("teacher", "student"))
        return Logits(teacher, student, torch.from_numpy(stored["labels"].astype(np.int64)))


def _print(name: str, rows: Logits) -> None:
    """Measure all formats on some rows, and print the table."""
    held = torch.arange(len(rows.teacher)) % 3 == 0
    measured = Logits(*(values[held] for values in rows))
    true, student, labels = measured
    table = []
    for kept in [
        planned(Logits(*(values[~held] for values in rows)), measured),
        dense(true),
        top_renormalized(true, 16),
        top_even(true, 16),
        least_even(true),
        fkd(true, 5),
        fkd(true, 5, np.float16),
        fkd(true, 10),
        fkd_at_every_temperature(true, 5),
        tinyvit(true, 10),
        tinyvit(true, min(100, true.shape[1] // 2)),
        ml_dr(true, 10),
    ]:
        variation = {t: float(total_variation(true, kept.decoded(t), t).mean()) for t in MEASURED_AT}
        errors = [gradient_error(true, kept.decoded(t), student, t) for t in TEMPERATURES]
        sizes = [f"{size:.0f}" for size in (kept.raw, kept.files, kept.replay)]
        worst = max(variation.values())
        table.append([kept.name, *sizes, *(f"{value:.4f}" for value in (variation[4], worst, *errors))])
    top = true.softmax(dim=1).amax(dim=1).mean()
    correct = [float((logits.argmax(dim=1) == labels).float().mean()) for logits in (true, student)]
    output.table(
        f"{name}: {true.shape[1]} classes, {len(true)} rows; accuracy: teacher {correct[0]:.1%} (mean top probability "
        f"{top:.2f}), student {correct[1]:.1%}",
        ["format", "raw", "files", "replay", "TV T=4", "worst TV", *(f"T={t}" for t in TEMPERATURES)],
        table,
    )


def planned(pilot: Logits, measured: Logits) -> Format:
    """Return the encoding that `--fidelity 0.02` chooses on the pilot."""
    chosen = plan_encoding(pilot.teacher, pilot.labels, request(fidelity=USUAL_FIDELITY)).chosen
    rows = encode(measured.teacher, measured.labels, chosen.encoding, chosen.basis)
    decoded = decode(rows, measured.labels, chosen.encoding, chosen.basis)
    raw = sum(value.numel() * value.element_size() for value in rows.arrays().values()) / len(rows)
    name = f"kdcache, planned for {USUAL_FIDELITY}: {described(chosen)}"
    return Format(name, raw, zarr_store.bytes_per_row(chosen.encoding, rows), 0, lambda _: decoded)


def dense(logits: Tensor) -> Format:
    """Return every logit in float16."""
    stored = logits.half()
    return Format("dense, float16", 2 * logits.shape[1], 2 * logits.shape[1], 0, lambda _: stored.float())


def top_renormalized(logits: Tensor, top_k: int) -> Format:
    """Return the largest logits in float16 and their classes in int16; the others have no probability."""
    top = logits.topk(top_k)
    decoded = torch.full_like(logits, -math.inf).scatter(1, top.indices, top.values.half().float())
    return Format(f"top {top_k}, renormalized", 4 * top_k, 4 * top_k, 0, lambda _: decoded)


def top_even(logits: Tensor, top_k: int) -> Format:
    """Return the largest log-probabilities and that of the tail, float16; the other classes share the tail."""
    log_probs = logits.log_softmax(dim=1)
    top = log_probs.topk(top_k)
    tail = log_probs.scatter(1, top.indices, -math.inf).logsumexp(dim=1, keepdim=True).half().float()
    each = (tail - math.log(logits.shape[1] - top_k)).expand_as(logits)
    decoded = each.scatter(1, top.indices, top.values.half().float())
    return Format(f"top {top_k}, uniform tail", 4 * top_k + 2, 4 * top_k + 2, 0, lambda _: decoded)


def least_even(logits: Tensor) -> Format:
    """Return the smallest top k whose uniform tail has the fidelity of the planned encoding."""
    fewest, enough = 1, logits.shape[1] - 1
    while fewest < enough:
        top_k = (fewest + enough) // 2
        decoded = top_even(logits, top_k).decoded(1)
        if max(float(total_variation(logits, decoded, t).mean()) for t in MEASURED_AT) <= USUAL_FIDELITY:
            enough = top_k
        else:
            fewest = top_k + 1
    kept = top_even(logits, enough)
    return kept._replace(name=f"{kept.name}: the least within {USUAL_FIDELITY}")


def _even_tail(values: Tensor, classes: Tensor, count: int) -> Tensor:
    """Return logits [B, C] of probabilities [B, k], with the rest of the mass spread evenly over the others."""
    rest = (1 - values.sum(dim=1, keepdim=True)) / (count - values.shape[1])
    return rest.repeat(1, count).scatter(1, classes, values).clamp_min(0).log()


def fkd(logits: Tensor, top_k: int, dtype: type[np.floating[Any]] = np.float32) -> Format:
    """Return FKD with `marginal_smoothing`."""
    labels, decoded = _fkd_through(logits, top_k, dtype, 1)
    alone = with_crops = 0
    for start in range(0, len(labels), FKD_CROPS):
        of_image = labels[start : start + FKD_CROPS]
        coords, flips = np.random.default_rng(0).random((len(of_image), 4)).astype(dtype), np.arange(len(of_image)) % 2
        alone += len(_saved([of_image]))
        with_crops += len(_saved([coords, flips == 1, of_image]))
    name = f"FKD, top {top_k}, {np.dtype(dtype).name}"
    rows = len(logits)
    return Format(name, labels.nbytes / rows, alone / rows, (with_crops - alone) / rows, lambda _: decoded)


def fkd_at_every_temperature(logits: Tensor, top_k: int) -> Format:
    """Return FKD, generated again with --temp T for each T."""
    kept = fkd(logits, top_k)
    return kept._replace(
        name=f"FKD, top {top_k}, another cache for every T",
        decoded=lambda temperature: _fkd_through(logits, top_k, np.float32, temperature)[1],
    )


def _fkd_through(
    logits: Tensor, top_k: int, dtype: type[np.floating[Any]], temperature: float
) -> tuple[npt.NDArray[np.floating[Any]], Tensor]:
    top = (logits / temperature).softmax(dim=1).topk(top_k)
    stored = torch.stack([top.indices.float(), top.values], dim=1).numpy().astype(dtype)
    classes, values = torch.from_numpy(stored).float().unbind(dim=1)
    return stored, temperature * _even_tail(values, classes.long(), logits.shape[1])


def tinyvit(logits: Tensor, top_k: int) -> Format:
    """Return TinyViT."""
    top = logits.softmax(dim=1).topk(top_k)
    decoded = _even_tail(top.values.half().float(), top.indices, logits.shape[1])
    return Format(f"TinyViT, top {top_k}", 4 * top_k, 4 * top_k, TINYVIT_SEED + TINYVIT_KEY, lambda _: decoded)


def ml_dr(logits: Tensor, top_k: int) -> Format:
    """Return ml-dr with `densify: smooth`."""
    labels = []
    for row in logits.softmax(dim=1).numpy():
        classes = np.argpartition(row, -top_k)[-top_k:]
        labels.append((row[classes].tolist(), classes.tolist()))
    decoded = torch.stack([_densified(*label, logits.shape[1]) for label in labels]).log()
    draw = random.Random(0)  # noqa: S311  # of crops, not of keys
    alone = _ml_dr_files([{"prob": label} for label in labels])
    whole = _ml_dr_files([{"params": _ml_dr_params(draw), "prob": label} for label in labels])
    raw, files, with_params = (size / len(labels) for size in (sum(map(len, alone)), _tarred(alone), _tarred(whole)))
    return Format(f"ml-dr, top {top_k}", raw, files, with_params - files, lambda _: decoded)


def _densified(kept: list[float], classes: list[int], count: int) -> Tensor:
    values = torch.tensor(kept)
    rest = 1 - values.sum()
    if rest < 0:
        values, rest = values.softmax(dim=0), torch.tensor(0.0)
    return (torch.ones(count) * rest / (count - len(kept))).index_put((torch.tensor(classes),), values)


def _ml_dr_files(rows: list[dict[str, object]]) -> list[bytes]:
    starts = range(0, len(rows), ML_DR_SAMPLES)
    return [_saved((start, rows[start : start + ML_DR_SAMPLES]), protocol=4) for start in starts]


def _ml_dr_params(draw: random.Random) -> list[object]:
    """Return the parameters of a random-resized crop, a flip, two operations of RandAugment and an erasing."""
    crop = (draw.randrange(200), draw.randrange(200), draw.randrange(50, 400), draw.randrange(50, 400))
    operations = [(draw.randrange(14), draw.uniform(-1, 1)) for _ in range(2)]
    erased = tuple(draw.randrange(224) for _ in range(4)) if draw.random() < 0.25 else None
    return [crop, draw.random() < 0.5, operations, erased]


def _saved(content: object, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def _tarred(files: list[bytes]) -> int:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for number, content in enumerate(files):
            entry = tarfile.TarInfo(f"reinforced_data/{number}.pth.tar")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return len(buffer.getvalue())


if __name__ == "__main__":
    main()
