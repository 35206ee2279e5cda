"""Measure what it saves to train students together: `python benchmarks/together.py`.

The same students are trained for an epoch in one pass, in which each batch is loaded once, and one after the other, in
a pass each: with KD on logits in memory, without validation. Both take turns; a ratio is the median of the ratios per
round.

Four MobileNets (V3 small, channels_last) of different seeds train on random crops of 224 pixels of JPEG files, as large
as those of ImageNet, and of 1200 x 1600 pixels; eight small networks of different seeds train on files of 32 pixels,
and on such images in memory. The bounds: 0.5 for the MobileNets, and for the small networks 0.8 on a CPU and 0.4 on a
GPU. What can be saved is loading. So the table has its share: the time of a pass that only loads, by the time of a pass
of one student; and the floor, the ratio if all of the loading but one pass were saved, and nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from live_teacher import FunctionTeacher
from torch import nn
from torchvision.models import mobilenet_v3_small

from data import END, made_up, save
from kdcache.cli import output
from kdcache.config.schema import TrainSpec
from kdcache.config.transform import Transform
from kdcache.data.images import ArrayImages, FileImages, Images
from kdcache.data.loader import Loader
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.losses import Loss
from kdcache.models.small import SmallCNN
from kdcache.train.passes import Clock, Loaders, Work, run_together
from kdcache.train.step import Trainer

_CLASSES = 100
_CROPS: dict[int, Transform] = {
    32: [{"RandomCrop": {"size": 32, "padding": 4}}, {"RandomHorizontalFlip": {}}],
    224: [{"RandomResizedCrop": {"size": 224}}, {"RandomHorizontalFlip": {}}],
}


class Case(NamedTuple):
    """Students that are trained together.

    Attributes:
        name: of the row.
        students: their number.
        network: makes one.
        images: of the training split.
        pixels: side of the crops.
        batch_size: images per step.
        channels_last: memory format.
        bound: of the ratio.
    """

    name: str
    students: int
    network: Callable[[], nn.Module]
    images: Images
    pixels: int
    batch_size: int
    channels_last: bool
    bound: float


class Timed(NamedTuple):
    """Seconds of the ways to train the students of a case, per round."""

    together: list[float]
    apart: list[float]
    loading: list[float]


def _measure(case: Case, workers: int, rounds: int, device: str) -> Timed:
    """Return the times of a case, after a round that is not counted."""
    count = len(case.images)
    labels = np.arange(count, dtype=np.int32) % _CLASSES
    samples = Samples("made-up", "train", case.images, labels, tuple(map(str, range(_CLASSES))), [])
    view = View(samples, [*_CROPS[case.pixels], *END])
    logits = torch.randn(count, _CLASSES, generator=torch.Generator().manual_seed(0))
    teacher = FunctionTeacher(lambda ids, _: logits[ids], count)
    spec = TrainSpec(batch_size=case.batch_size, lr=1e-3, num_workers=workers, channels_last=case.channels_last)
    loss, trainers = Loss.model_validate({"name": "kd"}), []
    for seed in range(case.students):
        torch.manual_seed(seed)
        trainers.append(Trainer(case.network(), spec, loss, count, device))
    loader = Loader(view, workers, device)
    shared: Loaders = {}
    alone: list[Loaders] = [{} for _ in trainers]
    timed = Timed([], [], [])
    for number in range(1, rounds + 2):

        def work(trainer: Trainer, number: int = number) -> Callable[[Clock], Work[object]]:
            return lambda _: trainer.epoch_work(view, number, teacher, view=number)

        def separately() -> None:
            for trainer, loaders in zip(trainers, alone, strict=True):
                run_together([work(trainer)], _raise, device, loaders)

        def load(number: int = number) -> None:
            cuts = torch.split(torch.randperm(count), case.batch_size)
            for _ in loader.batches([cut.tolist() for cut in cuts], number):
                pass

        ways = [
            lambda: run_together([work(trainer) for trainer in trainers], _raise, device, shared),
            separately,
            load,
        ]
        seconds = [_seconds(way, device) for way in ways]
        if number > 1:
            for values, value in zip(timed, seconds, strict=True):
                values.append(value)
    return timed


def _raise(_: int, outcome: object) -> None:
    if isinstance(outcome, Exception):
        raise outcome


def _seconds(way: Callable[[], None], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    way()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _row(case: Case, timed: Timed) -> list[str]:
    ratio = statistics.median(one / other for one, other in zip(timed.together, timed.apart, strict=True))
    pass_of_one = [value / case.students for value in timed.apart]
    share = statistics.median(one / other for one, other in zip(timed.loading, pass_of_one, strict=True))
    return [
        case.name,
        *(f"{statistics.median(values):.3f}" for values in (timed.together, timed.apart)),
        f"{ratio:.2f}",
        f"{min(share, 1.0):.2f}",
        f"{1 - min(share, 1.0) * (1 - 1 / case.students):.2f}",
        f"{case.bound:.2f}",
    ]


def _cases(folder: Path, quick: bool, device: str) -> Sequence[Case]:
    n_files, n_large, n_small = (8, 4, 64) if quick else (128, 64, 2048)
    save(made_up(n_files, 376, 504), folder / "files")
    save(made_up(n_large, 1200, 1600), folder / "large")
    pixels = made_up(n_small, 32, 32)
    save(pixels, folder / "32")
    files, large, tiny = (
        FileImages(sorted(map(str, (folder / name).glob("*/*.jpg")))) for name in ("files", "large", "32")
    )
    mobile_net, small_cnn = partial(mobilenet_v3_small, num_classes=_CLASSES), partial(SmallCNN, _CLASSES, 3, 8)
    batch_224, batch_32 = (4, 32) if quick else (32, 128)
    bound = 0.8 if device == "cpu" else 0.4
    return [
        Case("4 MobileNets, 376 x 504 JPEG", 4, mobile_net, files, 224, batch_224, True, 0.5),
        Case("4 MobileNets, 1200 x 1600 JPEG", 4, mobile_net, large, 224, batch_224, True, 0.5),
        Case("8 small networks, 32 JPEG", 8, small_cnn, tiny, 32, batch_32, False, bound),
        Case("8 small networks, 32 in memory", 8, small_cnn, ArrayImages(pixels), 32, batch_32, False, bound),
    ]


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, help="folder for temporary files")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--workers", type=int, default=0, help="number of loading processes")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with the bounds"
    )
    asked = arguments.parse_args()
    rounds = 1 if asked.quick else asked.rounds
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        cases = _cases(Path(name), asked.quick, asked.device)
        table = [_row(case, _measure(case, asked.workers, rounds, asked.device)) for case in cases]
    setting = f"{torch.get_num_threads()} threads, {asked.workers} workers, {asked.device}"
    output.table(
        f"seconds per epoch of all students; {setting}",
        ["work", "together", "apart", "ratio", "loading", "floor", "bound"],
        table,
    )


if __name__ == "__main__":
    main()
