"""`kdcache sweep`: train many students from one cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from kdcache.cli import output
from kdcache.cli.options import (
    PathType,
    caches_option,
    choose_device,
    device_option,
    digest_option,
    json_option,
    open_caches,
    pipeline_argument,
    set_option,
    views_used,
)

if TYPE_CHECKING:
    from kdcache.cache.placement.choose import Placement
    from kdcache.train.sweep_results import SweepSummary


@click.command("sweep")
@pipeline_argument
@click.option("-o", "--out", required=True, type=PathType(), help="Folder for the runs and the table.")
@caches_option
@digest_option
@click.option(
    "--over",
    multiple=True,
    help="KEY=VALUE,VALUE,...: a key of the pipeline, or loss=NAME,NAME; sections as KEY=[{...}, {...}]. Repeatable: "
    "all combinations are trained.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Students per combination.")
@click.option("-j", "processes", type=click.IntRange(min=1), default=1, show_default=True, help="Number of processes.")
@click.option(
    "--together",
    is_flag=True,
    help="Load each batch once for all students that can share it; those of several seeds see the images in one order.",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Train in the workers of a dask scheduler, tcp://HOST:PORT, that see the same files, a student per thread.",
)
@click.option(
    "--placement",
    type=click.Choice(["auto", "device", "host", "mmap", "stream"]),
    default="auto",
    show_default=True,
    help="Where to hold the rows of the cache, see train-student; auto with -j above 1 or --scheduler is mmap, shared "
    "by processes.",
)
@click.option("--allow-other-pixels", "other_pixels", is_flag=True, help="See train-student.")
@click.option("--align", is_flag=True, help="See train-student.")
@click.option("--allow-missing", is_flag=True, help="See train-student.")
@set_option
@device_option
@json_option
def sweep(
    pipeline: Path,
    out: Path,
    cache_names: tuple[str | Path, ...],
    digest: str | None,
    over: tuple[str, ...],
    seeds: int,
    processes: int,
    together: bool,
    scheduler: str | None,
    placement: Placement | Literal["auto"],
    other_pixels: bool,
    align: bool,
    allow_missing: bool,
    overrides: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Train the student of a PIPELINE with several losses, networks or options, over several seeds, from one cache.

    The cache and the data set are loaded once. Students that exist are not trained again: the same command resumes an
    interrupted sweep, and adds seeds or values. Select by the validation accuracy, not by the test accuracy.

    Language models are compared on the sequences that are held out (student.train.held_out_fraction).

    \b
    Example: kdcache sweep digits --cache runs/digits.kdcache --over loss=kd,dtkd --seeds 3 -o runs/sweep

    \b
    On a cluster: start `dask scheduler` on one machine, and `dask worker tcp://HOST:8786 --nthreads 1` on each that
    trains; then add --scheduler tcp://HOST:8786. A student of a worker that dies is resumed by another one.
    """
    from kdcache.errors import IncompleteError, InterruptedRun, counted
    from kdcache.train.inputs import CacheOptions
    from kdcache.train.sweep import sweep as run
    from kdcache.train.sweep_points import combinations
    from kdcache.train.sweep_results import as_record, write_results

    points = combinations(pipeline, overrides, over)
    used = [views_used(point.pipeline) for point in points]
    views = None if None in used else max(filter(None, used))
    caches = open_caches(cache_names, digest, views, output.Terminal())
    try:
        summaries = run(
            points,
            seeds,
            caches,
            out,
            CacheOptions(placement, other_pixels, align, allow_missing),
            device=choose_device(device) if scheduler is None else device,
            processes=processes,
            together=together,
            scheduler=scheduler,
            progress=output.Terminal(),
        )
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted; the trained students are kept in {out}", "run the same command again to resume"
        ) from None
    table, picture = write_results(summaries, points[0].pipeline.dataset.name, out)
    if as_json:
        output.as_json(as_record(summaries))
    else:
        of_text = summaries[0].is_of_text
        columns, rows = text_table(summaries) if of_text else results_table(summaries)
        accuracy = "Mean IoU" if any(summary.is_of_pixels for summary in summaries) else "Accuracy"
        measure = (
            accuracy if "test" in columns else f"Loss on {'sequences' if of_text else 'samples'} that were held out"
        )
        output.table(f"{measure}, {'one seed' if seeds == 1 else f'mean of {seeds} seeds'}", columns, rows)
        output.result("")
        shown = {"picture": str(picture)} if picture is not None else {}
        output.facts({"runs": str(out), "table": str(table), **shown})
    students = [student for summary in summaries for student in summary.students]
    failed = [student for student in students if student.failed is not None]
    if failed:
        raise IncompleteError(
            f"{len(failed)} of {counted(len(students), 'student')} failed; {failed[0].point}, seed {failed[0].seed}: "
            f"{failed[0].failed}",
            "remove or correct that value, and run the command again: the other students are kept",
        )


def results_table(summaries: Sequence[SweepSummary]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table of accuracies or held-out losses, one row per combination."""
    rows = []
    for summary in summaries:
        spread = interval = ""
        if len(summary.accuracies) > 1:
            spread = f"{100 * summary.spread:.1f}"
            ends = [f"{accuracy:.1%}" for accuracy in (min(summary.accuracies), max(summary.accuracies))]
            interval = " to ".join(dict.fromkeys(ends))
        accuracies = [_percent(summary.validation), _percent(summary.mean)]
        held_out = "" if summary.held_out is None else f"{summary.held_out:.4g}"
        rows.append([summary.point, held_out, *accuracies, spread, interval, f"{summary.seconds:.1f}"])
    columns = ["student", "held-out loss", "validation", "test", "std, points", "range", "training, s"]
    has_losses = any(summary.held_out is not None for summary in summaries)
    has_accuracies = not has_losses or any(row[2] or row[3] for row in rows)
    shown = [0, *([1] if has_losses else []), *(range(2, 6) if has_accuracies else []), 6]
    return [columns[index] for index in shown], [[row[index] for index in shown] for row in rows]


def text_table(summaries: Sequence[SweepSummary]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table of language models, one row per combination."""
    formats = {"held_out": ".4g", "perplexity": ".4g", "kl": ".4f", "agreement": ".2%"}
    rows = []
    for summary in summaries:
        cells = []
        for name, form in formats.items():
            mean = summary.mean_of(name)
            spread = f" ± {mean.spread:{form}}" if mean is not None and len(summary.students) > 1 else ""
            cells.append("" if mean is None else f"{mean.mean:{form}}{spread}")
        rows.append([summary.point, *cells, f"{summary.seconds:.1f}"])
    columns = ["student", "held-out loss", "perplexity", "KL", "agreement", "training, s"]
    shown = [0, *(index for index in range(1, 5) if any(row[index] for row in rows)), 5]
    return [columns[index] for index in shown], [[row[index] for index in shown] for row in rows]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
