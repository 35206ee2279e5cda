"""Arguments and options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdcache.cli import output
from kdcache.config.recipes import file_or_recipe

if TYPE_CHECKING:
    from kdcache.cache import Cache
    from kdcache.config.schema import Pipeline
    from kdcache.runtime.progress import Progress


class CacheName(click.ParamType[str | Path]):
    """A folder, or a URL, in which a path would make one slash of two."""

    name = "cache"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        """A URL as it stands, anything else as a path."""
        return value if "://" in str(value) else Path(value)


cache_argument = click.argument("cache", type=CacheName())
caches_option = click.option(
    "--cache",
    "cache_names",
    multiple=True,
    type=CacheName(),
    help="The teacher's cache, a folder or a URL; not needed with --loss ce. Several are joined: see `join` in README.",
)
digest_option = click.option("--digest", help="Refuse any other cache; sha256:... as `kdcache info` prints it.")
pipeline_argument = click.argument(
    "pipeline", type=click.Path(path_type=Path), callback=lambda _context, _parameter, path: file_or_recipe(path)
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace one value of the pipeline; repeatable."
)
out_option = click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Where to write; must not exist."
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."
)
scheduler_option = click.option(
    "--scheduler",
    default="threads",
    show_default=True,
    metavar="threads|processes|ADDRESS",
    help="Who does it: this machine, or the workers of dask.distributed at tcp://HOST:PORT, which see the same files.",
)
data_option = click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="PIPELINE",
    help="Its data set has the images: those whose fingerprints are missing are looked at again.",
)
decode_images_option = click.option(
    "--decode-images",
    is_flag=True,
    help="Decode every image file first, and name all that cannot be decoded; by default only headers are checked.",
)
json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,  # before what may be a mistake in another option
    callback=output.owe_json,
    help="Print the result as JSON, or the mistake.",
)


def read_pipeline(path: Path, overrides: tuple[str, ...], loss: str | None = None, **shortcuts: object) -> Pipeline:
    """The pipeline, with `--set` and then the options that are short for one; those that are None were not given."""
    from kdcache.config.loader import load_pipeline

    short = [f"{key.replace('__', '.')}={value}" for key, value in shortcuts.items() if value is not None]
    return load_pipeline(file_or_recipe(path), [*overrides, *short], loss)


def views_shown(pipeline: Pipeline) -> int | None:
    """How many views a student will see at most, the first ones in their order; None for any of them."""
    train = pipeline.section("student").train
    return train.epochs if train.view_order == "cycle" else None


def open_caches(
    names: Sequence[str | Path], digest: str | None, views: int | None, progress: Progress | None
) -> list[Cache]:
    """The caches that were named, with their first `views` views, or all.

    Raises:
        UsageError: if one digest is given for several.
    """
    from kdcache.cache import open_cache
    from kdcache.errors import UsageError

    if digest is not None and len(names) != 1:
        raise UsageError(f"--digest is of one cache, and {len(names)} are given", "pin each: --cache NAME#sha256:...")
    return [open_cache(name, views, digest, progress) for name in names]


def choose_device(name: str) -> str:
    """The device that `--device` names.

    Raises:
        UsageError: if torch does not know it or this machine has not got it.
    """
    import torch

    from kdcache.errors import UsageError

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # of torchrun: each of its processes has a GPU of its own
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"no device {name!r} here: {first}", "use --device cpu, or leave it to auto") from None
    return name
