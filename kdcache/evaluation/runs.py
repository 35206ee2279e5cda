"""Finished runs, read back from their folders, and put together where they differ in nothing but the seed."""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kdcache.config.loader import load_pipeline
from kdcache.config.schema import Pipeline
from kdcache.errors import CorruptError, UsageError
from kdcache.evaluation.networks import NetworkRef, from_run

_POINT, _METRICS, _ROWS = "point.json", "metrics.json", "metrics.csv"

# What two runs may differ in and be the same experiment all the same.
_NO_MATTER = {"train.seed", "train.num_workers", "train.trackers"}

Row = dict[str, float | None]


class RunRecord(NamedTuple):
    """A run that came to its end.

    Attributes:
        trained: its network, not yet built; its name is the folder's.
        pipeline: as its resolved.yaml has it.
        seed: of its training.
        accuracy: on the test split, [0, 1]; None without one.
        loss: negative log-likelihood there, nats.
        validation: accuracy of the selected epoch; None without a validation split.
        epochs: that were trained.
        seconds: of training.
        caches: digests of those that it was trained from.
        images: of an epoch, where it was not the whole cache.
        rows: of metrics.csv, one an epoch.
    """

    trained: NetworkRef
    pipeline: Pipeline
    seed: int
    accuracy: float | None
    loss: float | None
    validation: float | None
    epochs: int
    seconds: float
    caches: tuple[str, ...]
    images: int | None
    rows: list[Row]

    @property
    def uses_teacher(self) -> bool:
        """Whether it learned from a teacher's logits."""
        return self.trained.network == "student" and self.pipeline.loss.uses_teacher


class Mean(NamedTuple):
    """Over the seeds of a group; `spread` is the standard deviation (n - 1), None of one."""

    mean: float
    spread: float | None

    @staticmethod
    def of(values: Iterable[float | None]) -> Mean | None:
        """Of those that are known; None if none is."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return Mean(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        number: its place among the groups.
        label: in what it differs from the other groups, in a few words.
        network: student or teacher.
        model: as the pipeline names it.
        loss: its name.
        differences: the other keys in which the groups differ, and their values here.
        members: their places among all runs.
    """

    number: int
    label: str
    network: str
    model: str
    loss: str
    differences: dict[str, str]
    members: tuple[int, ...]


def find_runs(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The run folders among `paths` and in the sweeps among them, each once, and those that are not finished.

    Raises:
        UsageError: for a sweep in which nothing is finished.
    """
    found: list[Path] = []
    unfinished: list[Path] = []
    for path in paths:
        points = [] if (path / _METRICS).is_file() else sorted(point.parent for point in path.glob(f"*/{_POINT}"))
        inside = [run for point in points for run in sorted(point.glob("seed*"), key=_in_order)]
        done = [run for run in inside if (run / _METRICS).is_file()]
        if points and not done:
            raise UsageError(f"no student of the sweep {path} is finished", "run the sweep again: it does the rest")
        unfinished += [run for run in inside if run not in done]
        found += done or [path]
    once = {run.resolve(): run for run in reversed(found)}
    return [*reversed(once.values())], unfinished


def _in_order(path: Path) -> tuple[int, str]:
    number = re.search(r"\d+", path.name)
    return int(number.group()) if number else 0, path.name


def read_run(folder: Path) -> RunRecord:
    """What a run folder says.

    Raises:
        UsageError: if it is none, or not finished.
        CorruptError: if what it holds cannot be read.
    """
    trained = from_run(folder)
    pipeline = load_pipeline(folder / "resolved.yaml")
    try:
        metrics = json.loads((folder / _METRICS).read_text(encoding="utf-8"))
        test = metrics["test"] or {"accuracy": None, "loss": None}
        with (folder / _ROWS).open(newline="", encoding="utf-8") as opened:
            rows = [
                {key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(opened)
            ]
        if not rows:
            raise ValueError(f"{_ROWS} has no line")
        return RunRecord(
            trained,
            pipeline,
            int(metrics["seed"]),
            test["accuracy"],
            test["loss"],
            metrics["best"]["validation_accuracy"],
            int(metrics["epochs"]),
            float(metrics["seconds"]),
            tuple(metrics.get("caches", ())),
            metrics.get("alignment", {}).get("matched"),
            rows,
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CorruptError(
            f"cannot read the metrics of {folder}: {type(error).__name__}: {error}", "train it again, or leave it out"
        ) from None


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """The runs put together by what their pipelines and caches say, in the order in which they are given."""
    settings = [_settings(run) for run in runs]
    members: dict[str, list[int]] = {}
    for place, said in enumerate(settings):
        members.setdefault(json.dumps(said, sort_keys=True), []).append(place)
    firsts = [places[0] for places in members.values()]
    told = [_told(settings[place], [settings[other] for other in firsts]) for place in firsts]
    parts = [
        [one["network"], one["model"], one["loss"], *(f"{key} {value}" for key, value in other.items())]
        for one, other in zip((settings[place] for place in firsts), told, strict=True)
    ]
    return [
        Group(
            number,
            _label(said, [other for other in parts if other[0] == said[0]]),
            settings[first]["network"],
            settings[first]["model"],
            settings[first]["loss"],
            other,
            tuple(places),
        )
        for number, (first, said, other, places) in enumerate(zip(firsts, parts, told, members.values(), strict=True))
    ]


def _label(parts: list[str], peers: Sequence[list[str]]) -> str:
    """What sets a group apart from the others of its network; all that it is, if it is the only one."""
    common = set.intersection(*map(set, peers)) if len(peers) > 1 else {""}
    return ", ".join(part for part in parts if part not in common)


def _settings(run: RunRecord) -> dict[str, str]:
    """All that a run depends on but the seed, flat."""
    network = run.trained.network
    whole = run.pipeline.model_dump(mode="json")
    flat = {key: value for key, value in _flat(whole[network]) if key not in _NO_MATTER}
    student = network == "student"
    shared = ("transform", "eval_transform", *(("join",) if student else ()))
    said = {**flat, **{key: value for name in shared for key, value in _flat({name: whole[name]})}}
    if student:
        said |= {f"loss.{key}": value for key, value in _flat(whole["loss"]) if key != "name"}
        said["cache"] = " ".join(digest.removeprefix("sha256:")[:8] for digest in run.caches)
    return {**said, "network": network, "model": flat["model"], "loss": run.pipeline.loss.name if student else ""}


def _flat(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner if isinstance(inner, str) else json.dumps(inner)


def _told(own: dict[str, str], all_groups: Sequence[dict[str, str]]) -> dict[str, str]:
    """The keys in which groups of a network differ, and their values in one of them.

    What a loss is made of is told only where two of one name are made differently.
    """
    alike = [other for other in all_groups if other["network"] == own["network"]]
    differing = {}
    for key in dict.fromkeys(key for other in alike for key in other):
        if key in ("network", "model", "loss"):
            continue
        peers = [other for other in alike if other["loss"] == own["loss"]] if key.startswith("loss.") else alike
        # A loss that needs no cache is not told apart by having none.
        if key == "cache":
            peers = [other for other in peers if other[key]]
        if len({other.get(key) for other in peers}) > 1 and own.get(key):
            differing[key] = own[key]
    short = [key.rpartition(".")[2] for key in differing]
    return {
        name if short.count(name) == 1 else key: value
        for (key, value), name in zip(differing.items(), short, strict=True)
    }
