"""Caches made of caches: `kdcache select` and `kdcache merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcache.cli import output
from kdcache.cli.info import describe
from kdcache.cli.options import CacheName, cache_argument, data_option, json_option, out_option, scheduler_option
from kdcache.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kdcache.cache import Cache
    from kdcache.data.samples import Samples

_OF_CLASSES = "of-classes"


@click.command("select")
@cache_argument
@out_option
@click.option("--views", metavar="0-N", help="The first views; others could not be replayed.")
@click.option("--classes", metavar="FILE|A,B,...", help="Names of classes: one a line of a file, or with commas.")
@click.option(
    "--samples",
    metavar="FILE|N-M|of-classes",
    help="Ordinals: one a line of a file, or a range; of-classes: those whose label is one of --classes.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="How many classes of a row are kept.")
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
    data: Path | None,
    scheduler: str,
    as_json: bool,
) -> None:
    """Make a smaller cache of some views, samples or classes of a CACHE, or of a shorter head; no teacher is run.

    Interrupted or killed, the same command goes on where it stopped.

    \b
    Example: kdcache select runs/digits.kdcache --samples 0-999 -o runs/first.kdcache
    """
    from kdcache.cache import open_cache
    from kdcache.curate.select import select as run

    opened = open_cache(cache)
    names = _names(classes) if classes is not None else None
    made = run(
        opened,
        out,
        views=range(*_range(views, "--views")) if views is not None else None,
        classes=names,
        samples=_ids(samples, opened, names) if samples is not None else None,
        top_k=top_k,
        data=_samples(data),
        scheduler=scheduler,
        progress=output.Terminal(),
    )
    describe(made, as_json)


@click.command("merge")
@click.argument("caches", nargs=-1, required=True, type=CacheName())
@out_option
@click.option("--reencode", is_flag=True, help="Encode rows of other encodings or bases as those of the first cache.")
@data_option
@scheduler_option
@json_option
def merge(
    caches: tuple[str | Path, ...], out: Path, reencode: bool, data: Path | None, scheduler: str, as_json: bool
) -> None:
    """Join CACHES of one teacher on parts of a data set, in this order, to one.

    The transform must draw nothing at random. Interrupted or killed, the same command goes on where it stopped.

    \b
    Example: kdcache merge here.kdcache there.kdcache -o whole.kdcache
    """
    from kdcache.cache import open_cache
    from kdcache.curate.merge import merge as run

    opened = [open_cache(path) for path in caches]
    made = run(opened, out, reencode=reencode, data=_samples(data), scheduler=scheduler, progress=output.Terminal())
    describe(made, as_json)


def _samples(pipeline: Path | None) -> Samples | None:
    from kdcache.cli.options import read_pipeline
    from kdcache.data.datasets import load_split

    return load_split(read_pipeline(pipeline, ()).dataset, "train") if pipeline is not None else None


def _names(given: str) -> list[str]:
    if Path(given).is_file():
        return [line for line in map(str.strip, Path(given).read_text(encoding="utf-8").splitlines()) if line]
    return given.split(",")


def _ids(given: str, cache: Cache, classes: list[str] | None) -> npt.NDArray[np.int64]:
    import numpy as np

    if given == _OF_CLASSES:
        if classes is None:
            raise UsageError("--samples of-classes says nothing without --classes", "name the classes")
        names = cache.manifest.plan.dataset.class_names
        return np.flatnonzero(np.isin(cache.labels, [place for place, name in enumerate(names) if name in classes]))
    if Path(given).is_file():
        lines = Path(given).read_text(encoding="utf-8").split()
        if wrong := [line for line in lines if not line.isdecimal()]:
            raise UsageError(f"{given} holds {wrong[0]!r} for an ordinal", "write one whole number a line")
        return np.array(lines, np.int64)
    return np.arange(*_range(given, "--samples"))


def _range(given: str, option: str) -> tuple[int, int]:
    """(first, one after the last) of N-M, or of N alone."""
    first, dash, last = given.partition("-")
    if not (first.isdecimal() and (last.isdecimal() or not dash)):
        raise UsageError(f"{option} is {given!r}", f"write a range such as {option} 0-3")
    return int(first), int(last or first) + 1
