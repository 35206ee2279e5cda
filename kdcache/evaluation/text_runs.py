"""Finished runs of language models, read from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdcache.config.loader import load_any_pipeline
from kdcache.config.text import TextPipeline
from kdcache.errors import CorruptError, UsageError
from kdcache.evaluation.runs import IGNORED, Row, flattened, named_caches, read_epochs
from kdcache.train.run_folder import read_json
from kdcache.train.tokens.loop import TokenEpoch
from kdcache.train.tokens.train import MODEL, WEIGHTS

_PIPELINE, _METRICS = "resolved.yaml", "metrics.json"


class TextRun(NamedTuple):
    """A language model: a finished run, or a folder of transformers alone.

    Attributes:
        name: of its folder.
        folder: that transformers loads the network from.
        pipeline: that it was trained with; None for a folder of transformers.
        best: the selected epoch; None for a folder of transformers.
        seed: of its training.
        epochs: number of trained epochs.
        seconds: training time.
        caches: digests of the caches that it was trained from.
        held_out: number of sequences that were held out.
        rows: rows of metrics.csv, one per epoch.
    """

    name: str
    folder: Path
    pipeline: TextPipeline | None = None
    best: TokenEpoch | None = None
    seed: int = 0
    epochs: int = 0
    seconds: float = 0.0
    caches: tuple[str, ...] = ()
    held_out: int = 0
    rows: tuple[Row, ...] = ()

    @property
    def settings(self) -> dict[str, str]:
        """All that the run depends on except its seed, as one flat dictionary."""
        if self.pipeline is None or self.pipeline.student is None:
            return {"network": "student", "model": self.name, "loss": ""}
        student, loss = self.pipeline.student.model_dump(mode="json"), self.pipeline.loss.model_dump(mode="json")
        flat = {key: value for key, value in flattened(student) if key not in IGNORED}
        flat |= {f"loss.{key}": value for key, value in flattened(loss) if key != "name"}
        flat["cache"] = named_caches(self.caches)
        return {**flat, "network": "student", "model": self.pipeline.student.model, "loss": self.pipeline.loss.name}


def is_text_run(folder: Path) -> bool:
    """Return whether a folder is a run of a language model, or a network of transformers without a run."""
    return (folder / WEIGHTS).is_file() or is_transformers_folder(folder)


def is_transformers_folder(folder: Path) -> bool:
    """Return whether a folder holds a network of transformers, and is not a run."""
    return (folder / "config.json").is_file() and not (folder / _METRICS).is_file()


def divided_by_kind(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the folders of language models, and all others.

    Raises:
        UsageError: if there are both.
    """
    text = [folder for folder in folders if is_text_run(folder)]
    others = [folder for folder in folders if folder not in text]
    if text and others:
        raise UsageError(
            f"{text[0]} is a language model, and {others[0]} is not", "compare networks of one kind at a time"
        )
    return text, others


def read_text_run(folder: Path) -> TextRun:
    """Read a run folder, or name the network of a folder of transformers.

    Raises:
        UsageError: if the folder is not a finished run.
        CorruptError: if its files cannot be read.
    """
    if is_transformers_folder(folder):
        return TextRun(str(folder), folder)
    if missing := [name for name in (_PIPELINE, _METRICS) if not (folder / name).is_file()]:
        raise UsageError(
            f"{folder} is not a finished run: it has no {' and no '.join(missing)}",
            "run the command that trains it again, which resumes it",
        )
    pipeline = load_any_pipeline(folder / _PIPELINE)
    metrics: dict[str, Any] = read_json(folder / _METRICS)
    try:
        if not isinstance(pipeline, TextPipeline):
            raise ValueError(f"{_PIPELINE} is not of text")
        return TextRun(
            str(folder),
            folder / MODEL,
            pipeline,
            TokenEpoch(**metrics["best"]),
            int(metrics["seed"]),
            int(metrics["epochs"]),
            float(metrics["seconds"]),
            tuple(metrics["caches"]),
            int(metrics["held_out"]),
            tuple(read_epochs(folder)),
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CorruptError(
            f"cannot read the metrics of {folder}: {type(error).__name__}: {error}", "train it again, or leave it out"
        ) from None
