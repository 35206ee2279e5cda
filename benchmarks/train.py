"""Compare training from a cache with plain training: `python benchmarks/train.py`.

An epoch of kdcache's trainer with KD and with DTKD from a cache, with plain cross-entropy, and of a bare loop of about
30 lines of PyTorch with cross-entropy; for a ResNet-18 with 1000 classes on images of 64 pixels, and a small network
with 100 classes on images of 28. All are interleaved in one process; a ratio is the median of the ratios per round. The
bounds: on a CPU KD from a cache 1.015 and DTKD 1.025 of cross-entropy, on a GPU 1.02 both; cross-entropy 1.03 of the
bare loop.

The logits of such small caches are decoded once and kept in memory; those of a large one are decoded batch by batch,
which has its own row, as has DTKD on logits in a tensor: the cost of the loss without a cache. Then the same trainer
with a live teacher whose forward pass costs 1, 5 and 20 times that of the student, compared with the cache. Last, the
time of the command `train-student` to its first step, and where it is spent. (For the speed of gathering and decoding
rows see `codec.py` and `load.py`.)
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from common import encoded, planned, write_cache
from live_teacher import FunctionTeacher
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from kdcache import Samples, open_cache
from kdcache.cache.decoded_teacher import decode_if_small
from kdcache.cache.teacher import Teacher
from kdcache.cli import output
from kdcache.config.schema import TrainSpec
from kdcache.data.images import ArrayImages
from kdcache.data.views import View
from kdcache.losses import Loss
from kdcache.models.small import SmallCNN
from kdcache.train.step import Trainer

_BOUNDS = {"cpu": {"KD": 1.015, "DTKD": 1.025}, "cuda": {"KD": 1.02, "DTKD": 1.02}}
_BOUND_OF_CE = 1.03
_TIMES = (1, 5, 20)
_CE, _KD, _DTKD = ({"name": name} for name in ("ce", "kd", "dtkd"))
_TRACE = """
import time; began = time.perf_counter()
import sys, json
import kdcache.cli.train, kdcache.train.train, kdcache.train.step
marks = {"Python and libraries": time.perf_counter() - began}
def timed(owner, name, label):
    original = getattr(owner, name)
    def inner(*args, **kwargs):
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            marks[label] = marks.get(label, 0) + time.perf_counter() - start
    setattr(owner, name, inner)
import kdcache.cache, kdcache.train.inputs
timed(kdcache.cache, "open_cache", "opening the cache, every byte checked")
timed(kdcache.train.inputs, "load_split", "loading the data set")
timed(kdcache.train.inputs, "load_held_out", "loading the data set")
timed(kdcache.train.inputs, "check_matches_cache", "content keys of all images")
timed(kdcache.train.inputs, "_replay", "replaying 32 images")
timed(kdcache.cache.reader.Cache, "teacher", "bringing the rows into memory")
class First(BaseException): pass
step = kdcache.train.step.Trainer._step
def first(*args):
    began_step = time.perf_counter()
    step(*args)
    marks["the first step"] = time.perf_counter() - began_step
    raise First
kdcache.train.step.Trainer._step = first
try:
    kdcache.cli.main(sys.argv[1:], standalone_mode=False)
except First:
    pass
marks["everything"] = time.perf_counter() - began
print(json.dumps(marks))
"""


class Case(NamedTuple):
    """A student and its images; `shown` is its name in the table."""

    shown: str
    make: Callable[[], nn.Module]
    classes: int
    side: int
    channels: int
    images: int
    batch: int


def _resnet() -> nn.Module:
    network: nn.Module = resnet18(num_classes=1000)
    return network


def _small() -> nn.Module:
    return SmallCNN(100, 1, width=16)


_CASES = (
    Case("ResNet-18, 1000 classes", _resnet, 1000, 64, 3, 256, 64),
    Case("small, 100 classes", _small, 100, 28, 1, 4096, 128),
)
_QUICK = (Case("small, 100 classes", _small, 100, 28, 1, 256, 64),)


def main() -> None:
    """Print all three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small sizes; the results do not compare with the bounds")
    given = parser.parse_args()
    cases, rounds = (_QUICK, 1) if given.quick else (_CASES, given.rounds)
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            _measure(case, given.device, rounds, Path(folder) / str(number))
        _start_up(Path(folder), 1 if given.quick else 3)


def _samples(case: Case, folder: Path) -> Samples:
    """Return samples of noise, and write a cache with synthetic logits for them to `folder`."""
    pixels = torch.rand(case.images, case.channels, case.side, case.side, generator=torch.Generator().manual_seed(0))
    pool = encoded(planned(case.classes), case.images)
    write_cache(folder, pool, case.images)
    names = tuple(map(str, range(case.classes)))
    return Samples("noise", "train", ArrayImages(pixels), pool.labels.int().numpy(), names, [])


def _measure(case: Case, device: str, rounds: int, folder: Path) -> None:
    """Measure one case, and print its table."""
    samples = _samples(case, folder)
    cached = open_cache(folder).teacher(device=device)
    kept = decode_if_small(cached, len(samples), case.classes)
    torch.manual_seed(0)
    first = case.make()
    spec = TrainSpec(batch_size=case.batch, schedule="constant")

    def ours(given: dict[str, str], teacher: Teacher | None = None) -> Callable[[], object]:
        trainer = Trainer(copy.deepcopy(first), spec, Loss.model_validate(given), len(samples), device)
        view, numbers = View(samples, []), iter(range(1, 10**6))
        return lambda: trainer.epoch(view, next(numbers), teacher)

    works: dict[str, Callable[[], object]] = {
        "bare loop": _bare(copy.deepcopy(first), samples, spec, device),
        "cross-entropy": ours(_CE),
        "KD from the cache": ours(_KD, kept),
        "DTKD from the cache": ours(_DTKD, kept),
        "KD, decoded batch by batch": ours(_KD, cached),
        "DTKD, logits in a tensor": ours(_DTKD, _looked_up(cached, len(samples))),
    }
    for times in _TIMES:
        works[f"KD, live teacher of {times} x the student"] = ours(_KD, _live(first, samples, times, device))
    seconds = _in_turn(works, rounds, device)
    rows = []
    for name, taken in seconds.items():
        against = "" if name == "bare loop" else "bare loop" if name == "cross-entropy" else "cross-entropy"
        bounds = {"cross-entropy": _BOUND_OF_CE} | {
            f"{loss} from the cache": bound for loss, bound in _BOUNDS[torch.device(device).type].items()
        }
        rows.append(
            [
                name,
                f"{statistics.median(taken):.3f}",
                _ratio(taken, seconds[against]) if against else "",
                against,
                f"{bounds[name]:.3f}" if name in bounds else "",
                _ratio(taken, seconds["KD from the cache"]) if "live" in name else "",
            ]
        )
    threads = f"{torch.get_num_threads()} threads of a CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    title = f"{case.shown}: an epoch of {case.images} images in batches of {case.batch}, {rounds} rounds; {threads}"
    output.table(title, ["", "seconds", "ratio", "to", "bound", "ratio to cache"], rows)


def _bare(network: nn.Module, samples: Samples, spec: TrainSpec, device: str) -> Callable[[], object]:
    """Return an epoch of plain PyTorch with cross-entropy."""
    images: Tensor = samples.images.pixels  # type: ignore[attr-defined]  # they are in memory
    labels = torch.from_numpy(samples.labels).long()
    loader = DataLoader(TensorDataset(images, labels), batch_size=spec.batch_size, shuffle=True, drop_last=True)
    network.to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=spec.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def epoch() -> None:
        network.train()
        for pixels, truth in loader:
            loss = F.cross_entropy(network(pixels.to(device)), truth.to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()

    return epoch


def _looked_up(teacher: Teacher, count: int) -> Teacher:
    """Return a teacher with its logits in a tensor: the rest of the time is that of the loss."""
    logits = teacher(torch.arange(count), 0)
    return FunctionTeacher(lambda ids, _: logits[ids], count)


def _live(network: nn.Module, samples: Samples, times: int, device: str) -> Teacher:
    teacher = copy.deepcopy(network).to(device).eval()
    view = View(samples, [])

    @torch.no_grad()
    def answer(ids: Tensor, _: int) -> Tensor:
        images = view.__getitems__(ids.tolist()).images.to(device)
        answers: list[Tensor] = [teacher(images) for _ in range(times)]
        return answers[0]

    return FunctionTeacher(answer, len(samples))


def _in_turn(works: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each round of each function, after a warm-up; every other round in reverse order."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        names = list(works) if number % 2 else list(works)[::-1]
        for name in names:
            began = time.perf_counter()
            works[name]()
            if device != "cpu":
                torch.cuda.synchronize(device)
            if number:
                taken[name].append(time.perf_counter() - began)
    return taken


def _ratio(taken: Sequence[float], other: Sequence[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(taken, other, strict=True)):.3f}"


def _start_up(folder: Path, times: int) -> None:
    """Print the seconds to the first step on the digits, with files in the page cache."""
    recipe = Path(__file__).parent.parent / "pipelines" / "digits.yaml"
    quick = ["--set", "teacher.train.epochs=1"]
    weights = ["--set", f"teacher.weights={folder / 'teacher' / 'model.safetensors'}"]
    kdcache = [sys.executable, "-m", "kdcache"]
    _run([*kdcache, "train-teacher", str(recipe), "-o", str(folder / "teacher"), *quick])
    _run([*kdcache, "dump-teacher", str(recipe), "-o", str(folder / "digits.kdcache"), *weights])
    command = ["train-student", str(recipe), "--cache", str(folder / "digits.kdcache"), "-o", str(folder / "run")]
    traced = [sys.executable, "-c", _TRACE, *command, "--device", "cpu"]
    runs = [_marks(_run(traced)) for _ in range(times)]
    rows = [[name, f"{statistics.median(run[name] for run in runs):.2f}"] for name in runs[0]]
    output.table("train-student on the digits: seconds until the first step has ended", ["", "seconds"], rows)


def _marks(text: str) -> dict[str, float]:
    """Return the times that a traced run has printed last."""
    marks: dict[str, float] = json.loads(text.splitlines()[-1])
    return marks


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
