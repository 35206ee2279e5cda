"""Finished runs, read from their folders and grouped over seeds."""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kdcache.config.loader import load_pipeline
from kdcache.config.schema import Pipeline
from kdcache.errors import CorruptError, UsageError
from kdcache.evaluation.networks import NetworkRef, from_run

_POINT, _METRICS, _EPOCHS, _TABLE = "point.json", "metrics.json", "metrics.csv", "sweep.json"

IGNORED = {"train.seed", "train.data_seed", "train.num_workers", "train.trackers"}
"""Keys in which two runs of one experiment may differ."""

_DATASET_LOCATION = {"name", "root"}
"""Keys of the data set that only say where it is; what it contains is compared by content."""

Row = dict[str, float | None]


class RunRecord(NamedTuple):
    """A finished run.

    Attributes:
        network_ref: its network, not built yet; named after the folder.
        pipeline: configuration from its resolved.yaml.
        seed: seed of its training.
        accuracy: on the test split, [0, 1]; None without one.
        loss: negative log-likelihood on the test split, nats.
        validation: validation accuracy of the selected epoch, [0, 1]; None without a validation split.
        epochs: number of trained epochs.
        seconds: training time.
        caches: digests of the caches that it was trained from.
        images: images per epoch if they were only a part of the cache, else None.
        rows: rows of metrics.csv, one per epoch.
    """

    network_ref: NetworkRef
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
    def has_class_logits(self) -> bool:
        """Whether its network was trained to return class logits."""
        return self.network_ref.has_class_logits

    @property
    def uses_teacher(self) -> bool:
        """Whether it was trained on the logits of a teacher."""
        return self.network_ref.network == "student" and self.pipeline.loss.uses_cache


class Mean(NamedTuple):
    """A mean over the seeds of a group.

    Attributes:
        mean: mean of the known values.
        spread: standard deviation (n - 1); None for a single value.
    """

    mean: float
    spread: float | None

    @staticmethod
    def of(values: Iterable[float | None]) -> Mean | None:
        """Return the mean of the values that are not None; None if all are."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return Mean(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        index: position among the groups.
        label: short description of how it differs from the other groups.
        network: student or teacher.
        model: name of the model in the pipeline.
        loss: name of the loss; empty for a teacher.
        differences: other keys in which the groups differ, with the values of this group.
        members: indices of its runs.
    """

    index: int
    label: str
    network: str
    model: str
    loss: str
    differences: dict[str, str]
    members: tuple[int, ...]

    def as_record(self, runs: Sequence[RunRecord], means: Mapping[str, Mean | None]) -> dict[str, Any]:
        """Return the group with its runs and their means, for JSON."""
        return {
            "group": self.label,
            "network": self.network,
            "model": self.model,
            "loss": self.loss or None,
            "differences": self.differences,
            "runs": [run.network_ref.name for run in runs],
            "seeds": [run.seed for run in runs],
            **{name: mean and mean._asdict() for name, mean in means.items()},
        }


def find_runs(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Find the run folders among `paths` and inside the sweeps among them.

    Args:
        paths: run folders, and folders of sweeps, of one of their combinations, or their `sweep.json`.

    Returns:
        The run folders, each once, and the runs of sweeps that are not finished.

    Raises:
        UsageError: for a sweep without a finished run.
    """
    folders: list[Path] = []
    unfinished: list[Path] = []
    for path in paths:
        runs = _runs_of_sweep(path)
        finished = [run for run in runs if (run / _METRICS).is_file()]
        if runs and not finished:
            raise UsageError(
                f"no student of the sweep {path} is finished",
                "run the same sweep again: it resumes the unfinished runs",
            )
        unfinished += [run for run in runs if run not in finished]
        folders += finished or [path]
    unique = {run.resolve(): run for run in reversed(folders)}
    return [*reversed(unique.values())], unfinished


def _runs_of_sweep(path: Path) -> list[Path]:
    """Return the run folders of a sweep or of one of its combinations, finished or not; none for any other path."""
    if path.name == _TABLE and path.is_file():
        path = path.parent
    if (path / _METRICS).is_file():
        return []
    points = [path] if (path / _POINT).is_file() else sorted(point.parent for point in path.glob(f"*/{_POINT}"))
    return [run for point in points for run in sorted(point.glob("seed*"), key=_seed_order)]


def _seed_order(path: Path) -> tuple[int, str]:
    digits = re.search(r"\d+", path.name)
    return int(digits.group()) if digits else 0, path.name


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UsageError: if the folder is not a finished run.
        CorruptError: if its files cannot be read.
    """
    network_ref = from_run(folder)
    pipeline = load_pipeline(folder / "resolved.yaml")
    try:
        metrics = json.loads((folder / _METRICS).read_text(encoding="utf-8"))
        test = metrics["test"] or {"accuracy": None, "loss": None}
        rows = read_epochs(folder)
        return RunRecord(
            network_ref,
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


def read_epochs(folder: Path) -> list[Row]:
    """Return the lines of metrics.csv of a run folder.

    Raises:
        ValueError: if there are none, or a value is not a number.
    """
    with (folder / _EPOCHS).open(newline="", encoding="utf-8") as file:
        rows = [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]
    if not rows:
        raise ValueError(f"{_EPOCHS} has no rows")
    return rows


def without_copies(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], list[tuple[RunRecord, RunRecord]]]:
    """Return the runs without copies of them in other folders, and (copy, original) for each that is left out.

    A copy has the settings, the seed, every epoch and the training time of another run.
    """
    originals: dict[str, RunRecord] = {}
    copies: list[tuple[RunRecord, RunRecord]] = []
    for run in runs:
        contents = json.dumps([_settings(run), run.seed, run.rows, run.accuracy, run.seconds], sort_keys=True)
        if (original := originals.setdefault(contents, run)) is not run:
            copies.append((run, original))
    return [*originals.values()], copies


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Group runs with identical settings and caches; groups are in the order of their first runs."""
    return group_settings([_settings(run) for run in runs])


def group_settings(settings: Sequence[dict[str, str]]) -> list[Group]:
    """Group runs by their settings, of which each run has `network`, `model` and `loss`; see `group_runs`."""
    members: dict[str, list[int]] = {}
    for run_index, of_run in enumerate(settings):
        members.setdefault(json.dumps(of_run, sort_keys=True), []).append(run_index)
    of_groups = [settings[indices[0]] for indices in members.values()]
    differences = [_differences(own, of_groups) for own in of_groups]
    label_parts = [
        [own["network"], own["model"], own["loss"], *(f"{key} {value}" for key, value in differing.items())]
        for own, differing in zip(of_groups, differences, strict=True)
    ]
    return [
        Group(
            index,
            _label(parts, [other for other in label_parts if other[0] == parts[0]]),
            own["network"],
            own["model"],
            own["loss"],
            differing,
            tuple(indices),
        )
        for index, (own, parts, differing, indices) in enumerate(
            zip(of_groups, label_parts, differences, members.values(), strict=True)
        )
    ]


def _label(parts: list[str], peers: Sequence[list[str]]) -> str:
    """Return the parts that not all groups of the same network share; all parts if there is only one group."""
    common = set.intersection(*map(set, peers)) if len(peers) > 1 else {""}
    return ", ".join(part for part in parts if part not in common)


def _settings(run: RunRecord) -> dict[str, str]:
    """Return everything that a run depends on except its seed, as one flat dictionary."""
    network = run.network_ref.network
    pipeline = run.pipeline.model_dump(mode="json")
    flat = {key: value for key, value in flattened(pipeline[network]) if key not in IGNORED}
    student = network == "student"
    shared = ("transform", "eval_transform", *(("join",) if student else ()))
    settings = {**flat, **{key: value for name in shared for key, value in flattened({name: pipeline[name]})}}
    dataset = {key: value for key, value in pipeline["dataset"].items() if key not in _DATASET_LOCATION}
    settings |= {f"dataset.{key}": value for key, value in flattened(dataset)}
    if student:
        settings |= {f"loss.{key}": value for key, value in flattened(pipeline["loss"]) if key != "name"}
        settings["cache"] = named_caches(run.caches)
    return {**settings, "network": network, "model": flat["model"], "loss": run.pipeline.loss.name if student else ""}


def named_caches(digests: Sequence[str]) -> str:
    """Return the beginnings of the digests of caches."""
    return " ".join(digest.removeprefix("sha256:")[:8] for digest in digests)


def flattened(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield the values of a nested section by their dotted keys."""
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from flattened(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner if isinstance(inner, str) else json.dumps(inner)


def _differences(own: dict[str, str], all_groups: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return the keys in which the groups of one network differ, with the values of one group.

    Options of a loss are compared only between groups with that loss.
    """
    same_network = [other for other in all_groups if other["network"] == own["network"]]
    differing = {}
    for key in dict.fromkeys(key for other in same_network for key in other):
        if key in ("network", "model", "loss"):
            continue
        if key.startswith("loss."):
            peers = [other for other in same_network if other["loss"] == own["loss"]]
        elif key == "cache":  # a loss without a teacher has none, which is not a difference
            peers = [other for other in same_network if other[key]]
        else:
            peers = same_network
        if len({other.get(key) for other in peers}) > 1 and own.get(key):
            differing[key] = own[key]
    short_names = [key.rpartition(".")[2] for key in differing]
    return {
        short if short_names.count(short) == 1 else key: value
        for (key, value), short in zip(differing.items(), short_names, strict=True)
    }
