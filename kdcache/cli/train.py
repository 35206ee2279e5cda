"""Stage two: students from a cache."""

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
    out_option,
    pipeline_argument,
    read_pipeline,
    set_option,
    views_shown,
)

if TYPE_CHECKING:
    from kdcache.cache.placement.choose import Placement


@click.command("train-teacher")
@pipeline_argument
@out_option
@set_option
@device_option
@json_option
def train_teacher(pipeline: Path, out: Path, overrides: tuple[str, ...], device: str, as_json: bool) -> None:
    """Train the teacher of a PIPELINE with cross-entropy, from random weights.

    Interrupted or killed, the same command goes on after the last whole epoch.

    \b
    Example: kdcache train-teacher pipelines/digits.yaml -o runs/digits-teacher
    """
    from kdcache.runtime.distributed import is_first
    from kdcache.train.train import train_teacher as train

    resolved = read_pipeline(pipeline, overrides)
    trained = train(resolved, out, device=choose_device(device), progress=output.Terminal() if is_first() else None)
    if is_first():
        output.run_result(out, trained, as_json)


@click.command("train-student")
@pipeline_argument
@out_option
@caches_option
@digest_option
@click.option(
    "--loss",
    help="ce, kd, dtkd, ka+dtd, dtkd+dkd, ...: see README. Options that the file has for another loss go with it.",
)
@click.option(
    "--placement",
    type=click.Choice(["auto", "device", "host", "mmap", "stream"]),
    default="auto",
    show_default=True,
    help="Where the cache's rows are held: on the GPU, in memory, in a mapped file, or read as they come.",
)
@click.option(
    "--allow-other-pixels", "other_pixels", is_flag=True, help="Train although the images are not what the teacher saw."
)
@click.option("--align", is_flag=True, help="Match samples by content, in whatever order they are; leave others out.")
@click.option("--allow-missing", is_flag=True, help="The same, and train although the data set lacks some of them.")
@click.option("--seed", type=int, help="[short for --set student.train.seed=...]")
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
    """Train the student of a PIPELINE from a cache; the teacher is not loaded.

    Interrupted or killed, the same command goes on after the last whole epoch. Under torchrun or `accelerate launch`,
    all processes share each batch.

    \b
    Example: kdcache train-student pipelines/digits.yaml --cache runs/digits.kdcache --loss dtkd -o runs/student
    """
    from kdcache.runtime.distributed import is_first
    from kdcache.train.inputs import CacheOptions
    from kdcache.train.train import train_student as train

    resolved = read_pipeline(pipeline, overrides, loss, student__train__seed=seed)
    progress = output.Terminal() if is_first() else None
    trained = train(
        resolved,
        open_caches(cache_names, digest, views_shown(resolved), progress),
        out,
        CacheOptions(placement, other_pixels, align, allow_missing),
        device=choose_device(device),
        progress=progress,
    )
    if is_first():
        output.run_result(out, trained, as_json)
