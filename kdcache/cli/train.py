"""`kdcache train-teacher` and `kdcache train-student`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from kdcache.cli import output
from kdcache.cli.options import (
    caches_option,
    choose_device,
    device_option,
    digest_option,
    json_option,
    open_caches,
    pipeline_argument,
    read_any_pipeline,
    read_pipeline,
    set_option,
    views_used,
)

if TYPE_CHECKING:
    from kdcache.cache.placement.choose import Placement

run_option = click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Run folder; an interrupted run is resumed, and the results of a complete one are printed.",
)


@click.command("train-teacher")
@pipeline_argument
@run_option
@set_option
@device_option
@json_option
def train_teacher(pipeline: Path, out: Path, overrides: tuple[str, ...], device: str, as_json: bool) -> None:
    """Train the teacher of a PIPELINE with cross-entropy, from random weights, and write it to the folder -o.

    If the command is interrupted or killed, the same command resumes after the last complete epoch.

    \b
    Example: kdcache train-teacher digits -o runs/digits-teacher
    """
    from kdcache.runtime.launched import is_first
    from kdcache.train.train import train_teacher as train

    resolved = read_pipeline(pipeline, overrides)
    result = train(resolved, out, device=choose_device(device), progress=output.Terminal() if is_first() else None)
    if is_first():
        output.run_result(out, result, as_json)


@click.command("train-student")
@pipeline_argument
@run_option
@caches_option
@digest_option
@click.option(
    "--loss",
    help="ce, kd, dtkd, ka+dtd, ...: see docs/LOSSES.md. Options in the file for another loss are dropped.",
)
@click.option(
    "--placement",
    type=click.Choice(["auto", "device", "host", "mmap", "stream"]),
    default="auto",
    show_default=True,
    help="Where to hold the rows of the cache: GPU memory, host memory, memory-mapped file, or read while training.",
)
@click.option(
    "--allow-other-pixels",
    "other_pixels",
    is_flag=True,
    help="Train even if the pixels differ from those that the teacher saw.",
)
@click.option(
    "--align",
    is_flag=True,
    help="Match samples by content instead of by order; samples that are not cached are left out.",
)
@click.option("--allow-missing", is_flag=True, help="As --align, even if cached samples are missing from the data set.")
@click.option("--seed", type=int, help="Of the training.  [same as --set student.train.seed=...]")
@set_option
@device_option
@json_option
def train_student(
    pipeline: Path,
    out: Path,
    cache_names: tuple[str | Path, ...],
    digest: str | None,
    loss: str | None,
    placement: Placement | Literal["auto"],
    other_pixels: bool,
    align: bool,
    allow_missing: bool,
    seed: int | None,
    overrides: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Train the student of a PIPELINE from a cache, and write it to the folder -o; the teacher is not loaded.

    If the command is interrupted or killed, the same command resumes after the last complete epoch. With torchrun or
    `accelerate launch`, each batch is divided among the processes. The student of a pipeline of text is a language
    model, which is trained on the sequences in the cache.

    \b
    Example: kdcache train-student digits --cache runs/digits.kdcache --loss dtkd -o runs/digits-student
    """
    from kdcache.config.text import TextPipeline
    from kdcache.runtime.launched import is_first
    from kdcache.train.inputs import CacheOptions
    from kdcache.train.tokens.train import train_language_student
    from kdcache.train.train import train_student as train

    resolved = read_any_pipeline(pipeline, overrides, loss, student__train__seed=seed)
    progress = output.Terminal() if is_first() else None
    options = CacheOptions(placement, other_pixels, align, allow_missing)
    if isinstance(resolved, TextPipeline):
        caches = open_caches(cache_names, digest, None, progress)
        trained = train_language_student(
            resolved, caches, out, options, device=choose_device(device), progress=progress
        )
        if is_first():
            output.language_run_result(out, trained, as_json)
        return
    if loss is not None and progress is not None:
        dropped = set(read_pipeline(pipeline, ()).loss.outputs).difference(resolved.loss.outputs)
        for name in sorted(dropped):
            progress.say(f"note: --loss {loss} replaces the losses of the pipeline, that of the output {name} too")
    result = train(
        resolved,
        open_caches(cache_names, digest, views_used(resolved), progress),
        out,
        options,
        device=choose_device(device),
        progress=progress,
    )
    if is_first():
        output.run_result(out, result, as_json)
