"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdcache.cli import output
from kdcache.config.recipes import file_or_recipe
from kdcache.runtime.paths import expand

if TYPE_CHECKING:
    from kdcache.cache import Cache
    from kdcache.config.schema import Pipeline
    from kdcache.config.text import TextPipeline
    from kdcache.data.samples import Samples
    from kdcache.evaluation.exposure import Canaries
    from kdcache.runtime.progress import Progress


class CacheName(click.ParamType[str | Path]):
    """The name of a cache: a folder, or a URL, which `Path` would damage, as it makes one slash of two."""

    name = "cache"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        """Return a URL unchanged, anything else as a path."""
        return value if "://" in str(value) else expand(value)


class PathType(click.Path):
    """A path, in which `~` and variables are replaced: a shell leaves those after `=` or in quotes as they are."""

    def __init__(self, **checks: Any) -> None:
        super().__init__(path_type=Path, **checks)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        return super().convert(expand(value), param, ctx)


cache_argument = click.argument("cache", type=CacheName())
caches_option = click.option(
    "--cache",
    "cache_names",
    multiple=True,
    type=CacheName(),
    help="Cache of the teacher, a folder or a URL; not needed with --loss ce. Repeatable: the logits of several are "
    "combined, see `join` in docs/PIPELINES.md.",
)
digest_option = click.option(
    "--digest", help="Refuse a cache with another digest than this, sha256:..., see `kdcache info`."
)
pipeline_argument = click.argument(
    "pipeline", type=PathType(), callback=lambda _context, _parameter, path: file_or_recipe(path)
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set one value of the pipeline; repeatable."
)
out_option = click.option("-o", "--out", required=True, type=PathType(), help="Path to write to; must not exist.")
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, ..., mps or xpu; auto uses a GPU if there is one.",
)
scheduler_option = click.option(
    "--scheduler",
    default="threads",
    show_default=True,
    metavar="threads|processes|ADDRESS",
    help="Backend: threads, processes, or the address of a dask scheduler whose workers see the same files.",
)
data_option = click.option(
    "--data",
    type=PathType(),
    metavar="PIPELINE",
    help="Pipeline with the data set of the cache, to compute missing fingerprints of images.",
)
decode_images_option = click.option(
    "--decode-images",
    is_flag=True,
    help="Decode all image and mask files first, and name those that cannot be used; by default only headers are read.",
)
canaries_option = click.option(
    "--canaries",
    metavar="FILE|N-M",
    help="Measure the exposure of these samples, which the teacher was trained on: a file of ids, or a range.",
)
references_option = click.option(
    "--references", metavar="FILE|N-M", help="Samples that it was not trained on, with which --canaries are compared."
)
json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,  # so that errors in other options are printed as JSON too
    callback=output.expect_json,
    help="Print the result, or the error, as one JSON document.",
)


def read_pipeline(path: Path, overrides: tuple[str, ...], loss: str | None = None, **shortcuts: object) -> Pipeline:
    """Load a pipeline file or recipe of images; see `read_any_pipeline`.

    Raises:
        UsageError: also for a pipeline of language models.
    """
    return pipeline_of_images(read_any_pipeline(path, overrides, loss, **shortcuts), path)


def read_any_pipeline(
    path: Path, overrides: tuple[str, ...], loss: str | None = None, **shortcuts: object
) -> Pipeline | TextPipeline:
    """Load a pipeline file or recipe, of images or of text.

    Args:
        path: of the file, or name of a recipe.
        overrides: `KEY=VALUE`, from `--set`.
        loss: name from `--loss`; None to keep that of the file.
        shortcuts: options that set one key each, written with `__` for a dot; None if not given.
    """
    from kdcache.config.loader import load_any_pipeline

    short = [f"{key.replace('__', '.')}={value}" for key, value in shortcuts.items() if value is not None]
    return load_any_pipeline(file_or_recipe(path), [*overrides, *short], loss)


def pipeline_of_images(pipeline: Pipeline | TextPipeline, path: Path) -> Pipeline:
    """Return a pipeline that is not of text.

    Raises:
        UsageError: for one of text.
    """
    from kdcache.config.loader import of_images

    return of_images(pipeline, path)


def read_canaries(canaries: str | None, references: str | None) -> Canaries | None:
    """Return the samples that `--canaries` and `--references` name; None without both options.

    Raises:
        UsageError: if one is given without the other, or they name a sample twice.
    """
    from kdcache.errors import UsageError
    from kdcache.evaluation.exposure import named_canaries
    from kdcache.runtime.ranges import parse_ids

    if canaries is None and references is None:
        return None
    if canaries is None or references is None:
        given, missing = ("--canaries", "--references") if references is None else ("--references", "--canaries")
        raise UsageError(f"{given} needs {missing}", "use: --canaries 100-103 --references 104-199, or files of ids")
    return named_canaries(parse_ids(canaries, "--canaries"), parse_ids(references, "--references"))


def read_samples(pipeline: Path | None, overrides: tuple[str, ...] = ()) -> Samples | None:
    """Return the training split of a pipeline's data set; None without a pipeline."""
    from kdcache.data.datasets import load_split

    return None if pipeline is None else load_split(read_pipeline(pipeline, overrides).dataset, "train")


def views_used(pipeline: Pipeline | TextPipeline) -> int | None:
    """Return how many views, from the first, a student will use; None for all."""
    from kdcache.config.text import TextPipeline

    if isinstance(pipeline, TextPipeline):
        return 1
    train = pipeline.section("student").train
    return train.epochs if train.view_order == "cycle" else None


def open_caches(
    names: Sequence[str | Path], digest: str | None, views: int | None, progress: Progress | None
) -> list[Cache]:
    """Open caches with their first `views` views, or all.

    Raises:
        UsageError: if one digest is given for several caches.
    """
    from kdcache.cache import open_cache
    from kdcache.errors import UsageError

    if digest is not None and len(names) != 1:
        raise UsageError(f"--digest is for one cache, {len(names)} are given", "pin each one: --cache NAME#sha256:...")
    return [open_cache(name, views, digest, progress) for name in names]


def choose_device(name: str) -> str:
    """Return the device that `--device` names; see `chosen_device`."""
    from kdcache.runtime.devices import chosen_device

    return chosen_device(name)
