"""The folder of a training run: everything that says what was done and what came of it.

model.safetensors   the selected weights
resolved.yaml       the pipeline, every default spelled out
metrics.csv         one line an epoch
metrics.json        the selected epoch, the test result, cost
versions.json       Python and libraries
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from kdcache.cache.writer import check_outside
from kdcache.errors import UsageError
from kdcache.models import save_weights
from kdcache.pipeline import Pipeline
from kdcache.provenance import versions

CHECKPOINT = "model.safetensors"


class Run:
    """A run folder that is being filled; `run_folder` puts it in its place when it is whole."""

    def __init__(self, folder: Path, pipeline: Pipeline) -> None:
        self.folder = folder
        (folder / "resolved.yaml").write_text(pipeline.to_yaml(), encoding="utf-8")
        self._json("versions.json", versions())

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Add a line to metrics.csv."""
        path = self.folder / "metrics.csv"
        begun = path.exists()
        with path.open("a", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, fieldnames=list(row))
            if not begun:
                writer.writeheader()
            writer.writerow(row)

    def finish(self, model: nn.Module, metrics: Mapping[str, Any]) -> None:
        """Write the selected weights and the results."""
        save_weights(model, self.folder / CHECKPOINT)
        self._json("metrics.json", metrics)

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_free(out: Path) -> None:
    """That a run may be written to `out`.

    Raises:
        UsageError: if something is there already, or the place is inside a cache.
    """
    if out.exists():
        raise UsageError(f"{out} exists", "give another folder with -o, or delete that one first")
    check_outside(out)


@contextmanager
def run_folder(out: Path, pipeline: Pipeline) -> Iterator[Run]:
    """A folder that appears under its name when the run is whole, and not at all if it fails.

    Raises:
        UsageError: if `out` exists.
    """
    check_free(out)
    unfinished = out.with_name(out.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield Run(unfinished, pipeline)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    unfinished.replace(out)
