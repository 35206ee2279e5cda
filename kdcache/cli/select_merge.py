"""`kdcache select` and `kdcache merge`: make caches from caches, without the teacher."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.cli import output
from kdcache.cli.info import describe
from kdcache.cli.options import (
    CacheName,
    cache_argument,
    data_option,
    json_option,
    out_option,
    read_samples,
    scheduler_option,
)


@click.command("select")
@cache_argument
@out_option
@click.option("--views", metavar="0-N", help="Range of views from 0, such as 0-3.")
@click.option(
    "--classes", metavar="FILE|A,B,...", help="Names of classes: a file with one per line, or a comma-separated list."
)
@click.option(
    "--samples",
    metavar="FILE|N-M|of-classes",
    help="Sample ids: a file with one per line, or a range; of-classes: the samples whose label is in --classes.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Classes per row to keep.")
@click.option(
    "--output", "outputs", metavar="NAME", multiple=True, help="Output to keep, such as logits; may be repeated."
)
@data_option
@scheduler_option
@json_option
def select(
    cache: str | Path,
    out: Path,
    views: str | None,
    classes: str | None,
    samples: str | None,
    top_k: int | None,
    outputs: tuple[str, ...],
    data: Path | None,
    scheduler: str,
    as_json: bool,
) -> None:
    """Write a new cache with some of the views, samples, classes or outputs of a CACHE, or with fewer classes per row.

    The teacher is not run. If the command is interrupted or killed, the same command resumes.

    \b
    Example: kdcache select runs/digits.kdcache --samples 0-499 -o runs/first.kdcache
    """
    from kdcache.cache import open_cache
    from kdcache.curate.select import select as run
    from kdcache.curate.selection import parse_classes, parse_samples
    from kdcache.runtime.ranges import parse_range

    opened = open_cache(cache, progress=output.Terminal())
    opened.check_files(output.Terminal())
    names = parse_classes(classes) if classes is not None else None
    with output.working(f"writing {out}"):
        selected = run(
            opened,
            out,
            views=parse_range(views, "--views") if views is not None else None,
            classes=names,
            samples=parse_samples(samples, opened, names) if samples is not None else None,
            top_k=top_k,
            outputs=list(outputs) or None,
            data=read_samples(data),
            scheduler=scheduler,
            progress=output.Terminal(),
        )
    describe(selected, as_json, out)


@click.command("merge")
@click.argument("caches", nargs=-1, required=True, type=CacheName())
@out_option
@click.option("--reencode", is_flag=True, help="Re-encode rows with another encoding or basis as in the first cache.")
@data_option
@scheduler_option
@json_option
def merge(
    caches: tuple[str | Path, ...], out: Path, reencode: bool, data: Path | None, scheduler: str, as_json: bool
) -> None:
    """Write one cache from CACHES of the same teacher on parts of a data set, in this order.

    The transform must not be random. If the command is interrupted or killed, the same command resumes.

    \b
    Example: kdcache merge runs/first.kdcache runs/second.kdcache -o runs/merged.kdcache
    """
    from kdcache.cache import open_cache
    from kdcache.curate.merge import merge as run

    progress = output.Terminal()
    opened = [open_cache(path, progress=progress) for path in caches]
    for each in opened:
        each.check_files(progress)
    with output.working(f"writing {out}"):
        merged = run(opened, out, reencode=reencode, data=read_samples(data), scheduler=scheduler, progress=progress)
    describe(merged, as_json, out)
