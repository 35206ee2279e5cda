"""Compare students of a cache with students of the live teacher: `python benchmarks/students.py`.

A teacher of 200 classes is trained on rendered letters and run once. Students are trained with KD at T = 4 (weight 0.9,
cross-entropy 0.1) and with DTKD (sharpness: logsumexp, as in the paper; with the largest logit, as in the authors'
code, students do not learn in so few epochs, from the live teacher either), over several seeds and two schedules, from

    live                 the teacher itself, run on every batch
    default cache        as `dump-teacher` writes it by default (fidelity 0.02)
    fidelity 0.005       a cache with a smaller error
    dense cache          every class, float32
    top 16, renormalized another loss: only the teacher's 16 largest classes (`truncated`), from the default cache
    top 16, uniform tail another loss: a cache of 16 classes, the rest of the mass spread evenly (--tail uniform)
    labels alone         cross-entropy, no teacher

The letters are drawn in typefaces that come with matplotlib, rotated, sheared, shifted, dimmed and with noise
(`glyphs.py`): 12,000 images in seven of them for the students, new ones of the same kind for the teacher, and 6,000 in
three others for the test. The claim is that students of the default cache equal those of the live teacher within the
spread over seeds.

Accuracy is in percent, of the last epoch, mean and standard deviation (n - 1) over the seeds. The last column is the
mean and the standard error of the difference to `live`, per seed, over all schedules and losses. A run takes about 20
minutes on two cores; `--quick` takes seconds, and its accuracies mean nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from common import distance, spread
from glyphs import Typefaces, letters_of, network, trained
from live_teacher import FunctionTeacher
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kdcache import Samples, dump_teacher, wrap
from kdcache.cache.teacher import Teacher
from kdcache.cli import output
from kdcache.config.cache import CacheSpec
from kdcache.config.schema import TrainSpec
from kdcache.data.views import View
from kdcache.losses import Loss
from kdcache.models.evaluate import evaluate
from kdcache.train.loop import fit

_TRAIN = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif-Bold",
          "DejaVuSerif-Italic", "STIXGeneralBol")  # fmt: skip
_TEST = ("DejaVuSerif", "DejaVuSansMono-Oblique", "STIXGeneral")
_KD: dict[str, object] = {"name": "kd", "temperature": {"kind": "constant", "tau": 4.0}}
_DTKD: dict[str, object] = {"name": "dtkd", "warmup_epochs": 1.0, "temperature": {"sharpness": "logsumexp"}}
_RATE = {"kd": 0.1, "dtkd": 0.05}


class Scale(NamedTuple):
    """How much work is done: classes, images, steps of the teacher, epochs of the schedules, seeds."""

    classes: int
    images: int
    tested: int
    steps: int
    schedules: dict[str, int]
    seeds: int


_WHOLE = Scale(200, 12_000, 6_000, 1500, {"short": 4, "long": 16}, 3)
_QUICK = Scale(100, 300, 100, 10, {"short": 1}, 2)


class Source(NamedTuple):
    """A source of the teacher's logits, and what is added to the loss."""

    teacher: Teacher | None
    adjustment: dict[str, object]
    bytes_per_row: float | None


def main() -> None:
    """Train the teacher and all students, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int)
    given = parser.parse_args()
    scale = _QUICK if given.quick else _WHOLE
    scale = scale._replace(seeds=given.seeds or scale.seeds)
    letters = letters_of([*_TRAIN, *_TEST], scale.classes)
    seen, held_out = Typefaces(_TRAIN, letters), Typefaces(_TEST, letters)
    output.say(f"training a teacher of {scale.classes} classes, {scale.steps} steps")
    teacher = trained(network(scale.classes, width=32, features=512), seen, scale.steps, seed=1)
    train, test = _samples(seen, scale.images, 3), _samples(held_out, scale.tested, 4)
    score = evaluate(teacher, View(test, []))
    output.say(f"accuracy of the teacher: {score.accuracy:.1%} on images in other typefaces")
    with tempfile.TemporaryDirectory() as folder:
        sources = _sources(teacher, train, Path(folder))
        _table(_accuracies(sources, train, test, scale), sources, scale)


def _samples(typefaces: Typefaces, count: int, seed: int) -> Samples:
    images, labels = typefaces.images(count, torch.Generator().manual_seed(seed))
    return wrap(TensorDataset(images, labels), num_classes=typefaces.classes, name="glyphs")


def _sources(teacher: nn.Module, train: Samples, folder: Path) -> dict[str, Source]:
    """Return the sources by name; caches are written to `folder`."""
    images = View(train, [])

    @torch.no_grad()
    def live(ids: Tensor, view: int) -> Tensor:
        logits: Tensor = teacher(images.__getitems__(ids.tolist()).images)
        return logits

    def cached(name: str, **spec: object) -> tuple[Teacher, float]:
        cache = dump_teacher(teacher, train, folder / name, spec=CacheSpec.model_validate(spec))
        return cache.teacher(), cache.bytes_on_disk / len(cache)

    default, small = cached("default")
    precise, of_precise = cached("precise", fidelity=0.005)
    dense, large = cached("dense", top_k="all", dtype="float32")
    even, of_even = cached("even", top_k=16, tail="uniform")
    return {
        "live": Source(FunctionTeacher(live, len(train)), {}, None),
        "default cache": Source(default, {}, small),
        "fidelity 0.005": Source(precise, {}, of_precise),
        "dense cache": Source(dense, {}, large),
        "top 16, renormalized": Source(default, {"adjustment": {"kind": "truncation", "top": 16}}, None),
        "top 16, uniform tail": Source(even, {}, of_even),
        "labels alone": Source(None, {}, None),
    }


def _accuracies(
    sources: dict[str, Source], train: Samples, test: Samples, scale: Scale
) -> dict[str, dict[str, list[float]]]:
    """Train all students, and return [source][loss and schedule] -> test accuracies, one per seed."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in sources}
    runs = [(schedule, loss) for schedule in scale.schedules for loss in ("kd", "dtkd")]
    with output.Terminal().task("students", scale.seeds * len(runs) * len(sources), "students") as task:
        for seed in range(scale.seeds):
            for schedule, loss in runs:
                for name, source in sources.items():
                    task.advance(1, name)
                    if source.teacher is None and loss == "dtkd":
                        continue
                    distilled = {**(_KD if loss == "kd" else _DTKD), **source.adjustment}
                    given = distilled if source.teacher else {"name": "ce"}
                    spec = TrainSpec(epochs=scale.schedules[schedule], batch_size=128, lr=_RATE[loss], seed=seed)
                    accuracy = _student(train, test, spec, Loss.model_validate(given), source.teacher)
                    found[name].setdefault(f"{loss}, {schedule}", []).append(accuracy)
    return found


def _student(train: Samples, test: Samples, spec: TrainSpec, loss: Loss, teacher: Teacher | None) -> float:
    torch.manual_seed(spec.seed)
    student = network(train.num_classes, width=8, features=64)
    fit(student, View(train, []), None, spec, loss, teacher=teacher)
    return 100 * evaluate(student, View(test, [])).accuracy


def _table(found: dict[str, dict[str, list[float]]], sources: dict[str, Source], scale: Scale) -> None:
    """Print the table of accuracies."""
    columns = list(found["live"])
    rows = []
    for name, by_column in found.items():
        size = sources[name].bytes_per_row
        cells = [spread(by_column[column]) if column in by_column else "" for column in columns]
        own, live = ([value for column in by_column for value in of[column]] for of in (by_column, found["live"]))
        difference = "" if name == "live" else distance(own, live)
        rows.append([name, "" if size is None else f"{size:.0f}", *cells, difference])
    epochs = ", ".join(f"{name} {count} epochs" for name, count in scale.schedules.items())
    title = f"Test accuracy in %, {scale.classes} classes, {scale.images:,} images, {scale.seeds} seeds; {epochs}"
    output.table(title, ["logits from", "bytes per row", *columns, "to live"], rows)


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    output.say(f"{time.perf_counter() - began:,.0f} s")
