"""The folder of a training run: everything that says what was done and what came of it.

model.safetensors   the selected weights
resolved.yaml       the pipeline, every default spelled out
metrics.csv         one line an epoch
metrics.json        the selected epoch, the test result, cost
curves.png          the lines of metrics.csv as a picture
versions.json       Python, libraries, and the commits of kdcache and of the folder that it was started in
logs/               what trackers such as TensorBoard wrote

It is NAME.partial until it is whole. `state.pt` in it is what a killed run goes on with: everything after the last
whole epoch, and what it was begun with, so that no other run is gone on with by mistake.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import nn

from kdcache.cache.preconditions import check_outside
from kdcache.config.schema import Pipeline
from kdcache.config.yaml_lines import read_yaml
from kdcache.errors import CorruptError, InterruptedRun, MismatchError, UsageError
from kdcache.models import save_weights
from kdcache.runtime.atomic_write import move_into_place, temporary, write_file
from kdcache.runtime.distributed import is_first
from kdcache.runtime.versions import commits, versions
from kdcache.train.loop import Diverged, Epoch
from kdcache.train.plots import draw_curves

CHECKPOINT = "model.safetensors"
_STATE = "state.pt"
_BEGUN = "begun.json"


class Run:
    """A run folder that is being filled; `run_folder` puts it in its place when it is whole.

    Of several processes the first one writes; the others go through the same motions.
    """

    def __init__(self, folder: Path, trackers: Sequence[str] = (), kept: dict[str, Any] | None = None) -> None:
        self.folder, self._names, self._kept = folder, [*trackers], kept
        self._rows: list[Epoch] = []
        self._trackers: list[Any] | None = None

    def epoch(self, row: Epoch) -> None:
        """Add a line to metrics.csv, and tell the trackers."""
        if not is_first():
            return
        with (self.folder / "metrics.csv").open("a" if self._rows else "w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, fieldnames=row._fields)
            if not self._rows:
                writer.writeheader()
            writer.writerow(row._asdict())
        self._rows.append(row)
        if self._names and self._trackers is None:
            # Those of a run that is gone on with are told all of its lines once more.
            shutil.rmtree(self.folder / "logs", ignore_errors=True)
            accelerator = Accelerator(log_with=self._names, project_dir=self.folder / "logs")
            accelerator.init_trackers("kdcache")
            self._trackers = accelerator.trackers
        for tracker in self._trackers or ():
            tracker.log({key: value for key, value in row._asdict().items() if value is not None}, step=row.epoch)

    def load(self) -> dict[str, Any] | None:
        """What an interrupted run was kept with, once; None at the beginning."""
        kept, self._kept = self._kept, None
        return kept

    def save(self, state: dict[str, Any]) -> None:
        """Keep the state of a run: whole, or as it was before."""
        held = io.BytesIO()
        torch.save(state, held)
        # Written by Python, so that a full disk is the OSError that it is everywhere else.
        write_file(self.folder / _STATE, held.getbuffer())

    def finish(self, model: nn.Module, metrics: Mapping[str, Any]) -> None:
        """Write the selected weights, the results and the picture."""
        if not is_first():
            return
        for tracker in self._trackers or ():
            tracker.finish()
        save_weights(model, self.folder / CHECKPOINT)
        draw_curves([row._asdict() for row in self._rows], self.folder / "curves.png")
        _write_json(self.folder / "metrics.json", metrics)


def check_free(out: Path) -> None:
    """That a run may be written to `out`.

    Raises:
        UsageError: if something is there already, or the place is inside a cache.
    """
    if out.exists():
        raise UsageError(f"{out} exists", "give another folder with -o, or delete that one first")
    check_outside(out)


def check_trackers(names: Sequence[str]) -> None:
    """That the trackers that a pipeline names are installed.

    Raises:
        UsageError: if one is not.
    """
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in available:
            raise UsageError(f"the tracker {name} is not installed", f"pip install {name}, or remove it from trackers")


@contextmanager
def run_folder(
    out: Path, pipeline: Pipeline, begun_with: Mapping[str, Any], trackers: Sequence[str] = ()
) -> Iterator[Run]:
    """A folder that appears under its name when the run is whole.

    If it is interrupted or fails after an epoch, what it needs to go on stays in NAME.partial; before that, or if its
    loss diverges, nothing.

    Args:
        out: its name.
        pipeline: resolved.
        begun_with: what else the run depends on, such as the digests of caches; plain values.
        trackers: who is told of the metrics.

    Raises:
        UsageError: if `out` exists.
        MismatchError: if another run was begun there.
        CorruptError: if what it kept cannot be read; it stays.
        InterruptedRun: on Ctrl-C, if it can be gone on with.
    """
    check_free(out)
    unfinished = temporary(out)
    kept = _begin(unfinished, pipeline, begun_with) if is_first() else None
    run = Run(unfinished, trackers, kept)
    try:
        yield run
    except Diverged:
        # It would again, from wherever it is gone on with.
        _remove(unfinished)
        raise
    except KeyboardInterrupt:
        if (unfinished / _STATE).is_file():
            raise InterruptedRun(
                f"interrupted; the run is kept in {unfinished} after its last whole epoch",
                "run the same command again: it goes on there",
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


def _begin(folder: Path, pipeline: Pipeline, begun_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make the folder of a new run, or give what the interrupted one in it was kept with."""
    now = {"pipeline": read_yaml(pipeline.to_yaml(), "")[0], **begun_with, "versions": versions()}
    if (folder / _STATE).is_file():
        before = json.loads((folder / _BEGUN).read_text(encoding="utf-8"))
        if differs := next(_differences(before, json.loads(json.dumps(now))), None):
            key, then, here = differs
            raise MismatchError(
                f"{folder} holds another run that was interrupted: {key} was {then}, and is {here} now",
                f"give the command that began it, or another folder with -o, or delete {folder}",
            )
        return _read_state(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_json(folder / _BEGUN, now)
    _write_json(folder / "versions.json", {**versions(), **commits()})
    write_file(folder / "resolved.yaml", pipeline.to_yaml())
    return None


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(folder / _STATE, "cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of a broken file make torch stumble over
        # Of torch's words the first line: the others advise to unpickle anything.
        why = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
        raise CorruptError(f"cannot read {folder / _STATE}: {why}", f"delete {folder}, and begin anew") from error
    return state


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            yield from _differences(
                before.get(name), now.get(name), f"{key}.{name}".removeprefix(".pipeline").lstrip(".")
            )
    elif before != now:
        yield key, before, now


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=2) + "\n")
