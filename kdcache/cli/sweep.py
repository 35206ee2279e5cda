"""`kdcache sweep`: many students from one cache."""

from __future__ import annotations

import json
from dataclasses import asdict
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
    set_option,
    views_shown,
)

if TYPE_CHECKING:
    from kdcache.cache.placement.choose import Placement
    from kdcache.train.sweep import SweepSummary


@click.command("sweep")
@pipeline_argument
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the runs, and the table.")
@caches_option
@digest_option
@click.option(
    "--over",
    multiple=True,
    help="KEY=VALUE,VALUE,...: a key of the pipeline and its values, or loss=NAME,NAME. Repeated: all combinations.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Students a combination.")
@click.option("-j", "processes", type=click.IntRange(min=1), default=1, show_default=True, help="Side by side.")
@click.option(
    "--placement",
    type=click.Choice(["auto", "device", "host", "mmap", "stream"]),
    default="auto",
    show_default=True,
    help="Where the cache's rows are held; auto with -j above 1 is mmap, which the processes share.",
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
    placement: Placement | Literal["auto"],
    other_pixels: bool,
    align: bool,
    allow_missing: bool,
    overrides: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Train the student of a PIPELINE with several losses, networks or options, over several seeds, from one cache.

    The cache and the data set are loaded once. What is trained already is not trained again: after an interruption,
    or with more seeds or values, the same command does the rest. Choose by the validation accuracy.

    \b
    Example: kdcache sweep pipelines/digits.yaml --cache runs/digits.kdcache --over loss=kd,dtkd --seeds 3 -o runs/sweep
    """
    from kdcache.errors import IncompleteError, InterruptedRun
    from kdcache.train.inputs import CacheOptions
    from kdcache.train.plots import draw_accuracies
    from kdcache.train.sweep import combinations
    from kdcache.train.sweep import sweep as run

    points = combinations(pipeline, overrides, over)
    shown = [views_shown(point.pipeline) for point in points]
    views = None if None in shown else max(filter(None, shown))
    caches = open_caches(cache_names, digest, views, output.Terminal())
    try:
        found = run(
            points,
            seeds,
            caches,
            out,
            CacheOptions(placement, other_pixels, align, allow_missing),
            device=choose_device(device),
            processes=processes,
            progress=output.Terminal(),
        )
    except (KeyboardInterrupt, InterruptedRun):
        raise InterruptedRun(
            f"interrupted; what is trained is kept in {out}", "run the same command again: it does the rest"
        ) from None
    content = {"points": [_facts(point) for point in found]}
    (out / "sweep.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    by_point = {point.point: point.accuracies for point in found}
    if any(by_point.values()):
        title = f"{points[0].pipeline.dataset.name}, {seeds} seed{'s'[: seeds - 1]}"
        draw_accuracies(by_point, None, title, out / "sweep.png", "student")
    if as_json:
        output.as_json(content)
    else:
        _print(found, out, seeds)
    failed = [student for point in found for student in point.students if student.failed is not None]
    if failed:
        raise IncompleteError(
            f"{len(failed)} of {sum(len(point.students) for point in found)} students failed; {failed[0].point}, "
            f"seed {failed[0].seed}: {failed[0].failed}",
            "leave out what cannot be, or mend it, and run the command again: the others are kept",
        )


def _facts(point: SweepSummary) -> dict[str, object]:
    return {
        "point": point.point,
        "test_mean": point.mean,
        "test_spread": point.spread,
        "validation_mean": point.validation,
        "seconds": point.seconds,
        "students": [asdict(student) for student in point.students],
    }


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _print(found: list[SweepSummary], out: Path, seeds: int) -> None:
    rows = []
    for point in found:
        low, high = min(point.accuracies, default=None), max(point.accuracies, default=None)
        spread = f"{100 * point.spread:.1f}" if len(point.accuracies) > 1 else ""
        between = f"{_percent(low)} to {_percent(high)}" if len(point.accuracies) > 1 else ""
        cells = [_percent(point.validation), _percent(point.mean), spread, between, f"{point.seconds:.1f}"]
        rows.append([point.point, *cells])
    columns = ["student", "validation", "test", "spread", "range", "training, s"]
    output.table(f"Accuracy, {'one seed' if seeds == 1 else f'mean over {seeds} seeds'}", columns, rows)
    output.facts({"runs": str(out), "table": str(out / "sweep.json"), "picture": str(out / "sweep.png")})
