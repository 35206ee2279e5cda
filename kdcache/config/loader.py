"""Read a pipeline file, apply overrides, and report every problem with its line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from kdcache.config.schema import TEXT, Pipeline
from kdcache.config.section import places_of_keys
from kdcache.config.text import TextPipeline
from kdcache.config.yaml_lines import Place, override, read_yaml, refusal
from kdcache.errors import UsageError
from kdcache.runtime.paths import expand


def load_pipeline(path: str | Path, overrides: Sequence[str] = (), loss: str | None = None) -> Pipeline:
    """Read a pipeline file, apply `KEY=VALUE` overrides, and check all of it; see `load_any_pipeline`.

    Raises:
        UsageError: also for a pipeline of language models.
    """
    return of_images(load_any_pipeline(path, overrides, loss), path)


def of_images(pipeline: Pipeline | TextPipeline, path: str | Path) -> Pipeline:
    """Return a pipeline that is not of text.

    Raises:
        UsageError: for one of text.
    """
    if isinstance(pipeline, TextPipeline):
        raise UsageError(
            f"{path} is a pipeline of text, and this is for images",
            "give a pipeline of images; dump-teacher, train-student and sweep take one of text",
        )
    return pipeline


def load_any_pipeline(
    path: str | Path, overrides: Sequence[str] = (), loss: str | None = None
) -> Pipeline | TextPipeline:
    """Read a pipeline file of images or of text, apply `KEY=VALUE` overrides, and check all of it.

    Args:
        path: the YAML file.
        overrides: such as `student.train.epochs=5`; the value is read as YAML.
        loss: name of a loss that replaces the file's; the options of another loss in the file are then dropped.

    Raises:
        UsageError: with every problem of the file and of the overrides, each with its line or its `--set`.
    """
    path = expand(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read the pipeline {path}: {reason}", "give the path of a YAML file") from None
    data, lines = read_yaml(text, str(path))
    data = data or {}
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds a {type(data).__name__}, not sections", "see pipelines/digits.yaml")
    places: dict[Place, str] = {place: f"{path}:{line}" for place, line in lines.items()}
    if loss is not None and (not isinstance(data.get("loss"), dict) or data["loss"].get("name") != loss):
        data["loss"] = {"name": loss}
        places["loss",] = places["loss", "name"] = f"--loss {loss}"
    for given in overrides:
        override(data, given, places)
    dataset = data.get("dataset")
    kind = TextPipeline if isinstance(dataset, dict) and dataset.get("name") == TEXT else Pipeline
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise refusal(error, places, str(path), places_of_keys(kind)) from None
