"""The folder of a training run: what was configured, and the results.

model.safetensors   the selected weights; of a language model a folder `model/` of transformers
resolved.yaml       the pipeline with all defaults
metrics.csv         one line per epoch
metrics.json        the selected epoch, the test score, class names, cost
curves.png          plot of metrics.csv
versions.json       versions of Python and libraries, commits of kdcache and of the current folder
logs/               files of trackers such as TensorBoard

Until the run is complete, the folder is NAME.partial, and one process at a time may write it. In it, `state.pt` is the
state after the last complete epoch, from which an interrupted run resumes, and `begun.json` is the configuration, with
which that of the resuming command is compared.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers

from kdcache.cache.preconditions import check_outside, differences, not_ours
from kdcache.config.schema import Pipeline
from kdcache.config.text import TextPipeline
from kdcache.config.yaml_lines import read_yaml
from kdcache.errors import CorruptError, InterruptedRun, MismatchError, UsageError
from kdcache.runtime.atomic_write import move_into_place, temporary, write_file
from kdcache.runtime.folder_lock import locked
from kdcache.runtime.launched import is_first
from kdcache.runtime.paths import check_writable
from kdcache.runtime.versions import commits, versions
from kdcache.train.accelerator import start_trackers
from kdcache.train.epochs import Diverged

CHECKPOINT = "model.safetensors"
_PIPELINE, _METRICS = "resolved.yaml", "metrics.json"
_STATE, _BEGUN = "state.pt", "begun.json"

_MADE_FROM: dict[str, Any] = {"network": None, "caches": [], "code": None}
"""What a run depends on beside its pipeline, as metrics.json has it, and what is meant if it does not."""

_SHOWN = 8
"""Settings that differ, in one message."""


class Run:
    """A run folder that is being written; see `run_folder`.

    With several processes, only the first one writes.
    """

    def __init__(self, folder: Path, trackers: Sequence[str] = (), state: dict[str, Any] | None = None) -> None:
        self.folder, self._names, self._state = folder, [*trackers], state
        self._rows: list[dict[str, Any]] = []
        self._trackers: list[Any] | None = None

    def epoch(self, row: Any) -> None:
        """Append a line to metrics.csv, a NamedTuple, and log it to the trackers."""
        if not is_first():
            return
        with (self.folder / "metrics.csv").open("a" if self._rows else "w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, fieldnames=row._fields)
            if not self._rows:
                writer.writeheader()
            writer.writerow(row._asdict())
        self._rows.append(row._asdict())
        if self._names and self._trackers is None:
            # After a resume, all lines are logged again.
            shutil.rmtree(self.folder / "logs", ignore_errors=True)
            self._trackers = start_trackers(self._names, self.folder / "logs")
        for tracker in self._trackers or ():
            tracker.log({key: value for key, value in row._asdict().items() if value is not None}, step=row.epoch)

    def load(self) -> dict[str, Any] | None:
        """Return the state of an interrupted run, once; None for a new run."""
        state, self._state = self._state, None
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Write the state of the run atomically."""
        serialized = io.BytesIO()
        torch.save(state, serialized)
        write_file(self.folder / _STATE, serialized.getbuffer())

    def finish(
        self,
        save: Callable[[Path], None],
        draw: Callable[[Sequence[Mapping[str, Any]], Path], None],
        metrics: Mapping[str, Any],
    ) -> None:
        """Write the selected weights, the metrics and the plot.

        Args:
            save: writes the weights into the folder.
            draw: writes a PNG of the lines of metrics.csv.
            metrics: of the run.
        """
        if not is_first():
            return
        for tracker in self._trackers or ():
            tracker.finish()
        save(self.folder)
        draw(self._rows, self.folder / "curves.png")
        write_json(self.folder / _METRICS, metrics)


def check_free(out: Path) -> None:
    """Check that a run can be written to `out`.

    Raises:
        UsageError: if it exists, or is inside a cache.
    """
    if out.exists():
        raise UsageError(f"{out} exists", "write to another folder with -o, or delete it first")
    check_outside(out)
    check_writable(out)


def check_run(out: Path, weights: str = CHECKPOINT) -> None:
    """Check that a run can be written to `out`, or is complete there.

    Args:
        out: its folder.
        weights: path of its weights in there.

    Raises:
        UsageError: if it is something else, or inside a cache.
    """
    if missing := [name for name in (weights, _PIPELINE, _METRICS) if not (out / name).is_file()]:
        if out.exists():
            raise UsageError(
                f"{out} exists and is not a complete run: it has no {' and no '.join(missing)}",
                "write to another folder with -o, or delete it first",
            )
        check_outside(out)
        check_writable(out)


def complete_run(out: Path, pipeline: Pipeline | TextPipeline, made_from: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a complete run, after checking that it has these settings.

    Args:
        out: its folder.
        pipeline: resolved.
        made_from: entries of the metrics that must be equal, such as the digests of caches.

    Raises:
        MismatchError: if it has other settings; it names each of them with both values.
        CorruptError: if its files cannot be read.
    """
    metrics: dict[str, Any] = read_json(out / _METRICS)
    before = {key: metrics.get(key, default) for key, default in {**made_from, **_MADE_FROM}.items()}
    now = {"pipeline": _as_dict(pipeline), **_MADE_FROM, **made_from}
    if changes := described_differences({"pipeline": _read_pipeline(out), **before}, now):
        raise MismatchError(
            f"{out} is a complete run with other settings: {changes}",
            "write to another folder with -o, or delete it first",
        )
    return metrics


def _as_dict(pipeline: Pipeline | TextPipeline) -> Any:
    return read_yaml(pipeline.to_yaml(), "")[0]


def _read_pipeline(out: Path) -> Any:
    try:
        return read_yaml((out / _PIPELINE).read_text(encoding="utf-8"), str(out / _PIPELINE))[0]
    except (OSError, ValueError) as error:
        raise CorruptError(f"cannot read {out / _PIPELINE}: {error}", f"delete {out}, and train again") from error


def check_trackers(names: Sequence[str]) -> None:
    """Check that the trackers of a pipeline are installed.

    Raises:
        UsageError: if one is not.
    """
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in available:
            raise UsageError(f"the tracker {name} is not installed", f"pip install {name}, or remove it from trackers")


@contextmanager
def run_folder(
    out: Path, pipeline: Pipeline | TextPipeline, begun_with: Mapping[str, Any], trackers: Sequence[str] = ()
) -> Iterator[Run]:
    """Create the folder of a run, or reopen that of an interrupted one, and rename it to `out` when it is complete.

    If the run fails or is interrupted after an epoch, NAME.partial is kept so that it can be resumed; before that, or
    if the loss diverges, it is removed.

    Args:
        out: path of the complete folder.
        pipeline: resolved.
        begun_with: other values that the run depends on, such as the digests of caches.
        trackers: names of the trackers to which metrics are logged.

    Raises:
        UsageError: if `out` exists, another process is writing it, or NAME.partial is something else.
        MismatchError: if another run was interrupted there.
        CorruptError: if its state cannot be read; it is kept.
        InterruptedRun: on Ctrl-C, if the run can be resumed.
    """
    check_outside(out)
    with locked(out) if is_first() else nullcontext():
        if out.exists():
            raise UsageError(
                f"{out} exists: another process completed it just now",
                "run the same command again: it ends at once if the run has the same settings",
            )
        unfinished = temporary(out)
        state = _begin(unfinished, pipeline, begun_with) if is_first() else None
        try:
            yield Run(unfinished, trackers, state)
        except Diverged:
            _remove(unfinished)  # it would diverge again after a resume
            raise
        except KeyboardInterrupt:
            if (unfinished / _STATE).is_file():
                raise InterruptedRun(
                    f"interrupted; the run is kept in {unfinished} after its last complete epoch",
                    "run the same command again to resume",
                ) from None
            _remove(unfinished)
            raise
        except BaseException:
            if not (unfinished / _STATE).is_file():
                _remove(unfinished)
            raise
        if is_first():
            for name in (_STATE, _BEGUN):
                (unfinished / name).unlink(missing_ok=True)
            move_into_place(unfinished, out)


def _remove(folder: Path) -> None:
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)


def _begin(folder: Path, pipeline: Pipeline | TextPipeline, begun_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """Create the folder of a new run, or return the state of the interrupted run in it.

    Raises:
        MismatchError: if the interrupted run had another configuration.
        CorruptError: if its files cannot be read.
    """
    configuration = {"pipeline": _as_dict(pipeline), **begun_with, "versions": versions()}
    if (folder / _STATE).is_file():
        before = read_json(folder / _BEGUN)
        if changes := described_differences(before, json.loads(json.dumps(configuration))):
            raise MismatchError(
                f"{folder} holds another run that was interrupted: {changes}",
                f"run the command that started it, write to another folder with -o, or delete {folder}",
            )
        return _read_state(folder)
    _remove_earlier(folder)
    folder.mkdir(parents=True)
    try:
        write_json(folder / _BEGUN, configuration)
        write_json(folder / "versions.json", {**versions(), **commits()})
        write_file(folder / _PIPELINE, pipeline.to_yaml())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return None


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(folder / _STATE, "cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        # Only the first line of torch's message: the others advise to unpickle untrusted files.
        why = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
        raise CorruptError(f"cannot read {folder / _STATE}: {why}", f"delete {folder}, and start again") from error
    return state


def _remove_earlier(folder: Path) -> None:
    """Remove what a run left that was killed before its first epoch was complete.

    Raises:
        UsageError: if something else has the name of the folder.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise not_ours(folder)
    names = {path.name for path in folder.iterdir()}
    if names and not names & {_BEGUN, temporary(folder / _BEGUN).name, _PIPELINE}:
        raise not_ours(folder)
    shutil.rmtree(folder)


def described_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return `KEY was OLD, and is NEW now` for each difference between two configurations; empty if there is none.

    The keys of the pipeline are shown as in its file.
    """
    changes = differences(before, now)
    shown = [f"{key.removeprefix('pipeline.')} was {old}, and is {new} now" for key, old, new in changes[:_SHOWN]]
    more = [f"and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else []
    return "; ".join([*shown, *more])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_file(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of a run.

    Raises:
        CorruptError: if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptError(f"cannot read {path}: {error}", f"delete {path.parent}, and start again") from error
