"""The points of a sweep: combinations of overrides of a pipeline file."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdcache.config.loader import load_any_pipeline
from kdcache.config.schema import Pipeline
from kdcache.config.text import TextPipeline
from kdcache.config.yaml_lines import read_yaml
from kdcache.errors import UsageError


class Point(NamedTuple):
    """One combination of the values that a sweep goes over.

    Attributes:
        name: of its folder and its line in the table.
        pipeline: resolved.
    """

    name: str
    pipeline: Pipeline | TextPipeline


def combinations(path: Path, overrides: Sequence[str], over: Sequence[str]) -> list[Point]:
    """All combinations of the values of some keys, in a pipeline file.

    Args:
        path: the file.
        overrides: `KEY=VALUE`, for all of them.
        over: `KEY=VALUE,VALUE,...` or `KEY=[VALUE, ...]`; the key `loss` takes names, and with each the file's options
            of another loss go, or whole sections.

    Raises:
        UsageError: with everything that is wrong with the first combination that is not a good pipeline.
    """
    axes = [_axis(given) for given in over]
    keys = [key for key, _ in axes]
    if len(set(keys)) < len(keys):
        raise UsageError(f"--over names a key twice: {', '.join(keys)}", "give all values of a key in one --over")
    points: list[Point] = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = dict(zip(keys, values, strict=True))
        loss = chosen.get("loss")
        loss_name = None if loss is None or isinstance(loss, dict) else str(loss)
        given = [f"{key}={json.dumps(value)}" for key, value in chosen.items() if key != "loss" or loss_name is None]
        try:
            pipeline = load_any_pipeline(path, [*overrides, *given], loss_name)
        except UsageError as error:
            typed = dict(zip(keys, over, strict=True))
            options = {f"--set {key}={json.dumps(value)}": typed[key] for key, value in chosen.items()}
            raise _as_typed(error, {**options, f"--loss {loss}": typed.get("loss", "")}) from None
        name = ",".join(f"{key.rpartition('.')[2]}={_plain(value)}" for key, value in chosen.items()) or "student"
        if any(point.name == name for point in points):
            name = f"{name},{len(points)}"
        points.append(Point(name, pipeline))
    return points


def _as_typed(error: UsageError, options: Mapping[str, str]) -> UsageError:
    """Return an error that names the `--over` that was typed, instead of the options of one combination."""
    what = error.what
    for option, over in options.items():
        what = what.replace(option, f"--over {over}")
    return UsageError(what, error.fix)


def _axis(given: str) -> tuple[str, list[Any]]:
    key, sign, text = given.partition("=")
    if not (sign and key and text):
        raise UsageError(f"--over {given!r} is not KEY=VALUE,VALUE", "write for instance --over loss=kd,dtkd")
    values, _ = read_yaml(text, f"--over {given}")
    if isinstance(values, str) and "," in values:
        values = [read_yaml(part, f"--over {given}")[0] for part in values.split(",")]
    return key, values if isinstance(values, list) else [values]


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", text).strip("-")
