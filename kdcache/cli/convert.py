"""`kdcache convert`: dense logits to a cache, and back."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.cli import output
from kdcache.cli.info import describe
from kdcache.cli.options import json_option, out_option, read_pipeline, scheduler_option, set_option
from kdcache.errors import UsageError


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@out_option
@click.option(
    "--pipeline",
    type=click.Path(path_type=Path),
    help="Whose data set, transform and cache settings the logits take.",
)
@click.option("--name", help="Of the teacher.  [default: that of the file]")
@set_option
@scheduler_option
@json_option
def convert(
    source: Path,
    out: Path,
    pipeline: Path | None,
    name: str | None,
    overrides: tuple[str, ...],
    scheduler: str,
    as_json: bool,
) -> None:
    """Make a cache of dense logits, an npz (`logits` [N, C], perhaps `labels` and `sample_keys`) or npy file; or write
    what a cache decodes to, as npz or npy.

    FKD, TinyViT and ml-dr are not read: their crops are drawn by code of their own, and could not be replayed.

    \b
    Example: kdcache convert runs/digits.kdcache -o logits.npz
    Example: kdcache convert logits.npz --pipeline pipelines/digits.yaml -o mine.kdcache
    """
    from kdcache.cache import open_cache
    from kdcache.convert import cache_of_logits, logits_of_cache
    from kdcache.datasets import load_split

    if pipeline is None:
        if not source.is_dir():
            raise UsageError(
                f"{source} is no cache, and logits alone are none: whose images are they of?",
                "give a pipeline with that data set: --pipeline PIPELINE",
            )
        cache = open_cache(source)
        logits_of_cache(cache, out)
        views, size = cache.manifest.plan.views.count, [len(cache), cache.num_classes]
        shape = [views, *size] if views > 1 else size
        if as_json:
            output.as_json({"path": str(out), "shape": shape, "bytes": out.stat().st_size})
        else:
            output.facts({"logits": str(out), "shape": str(shape), "size": f"{out.stat().st_size:,} bytes, float32"})
        return
    resolved = read_pipeline(pipeline, overrides)
    made = cache_of_logits(
        source,
        load_split(resolved.dataset, "train"),
        out,
        name=name,
        transform=resolved.transform,
        spec=resolved.cache,
        scheduler=scheduler,
        progress=output.Terminal(),
    )
    describe(made, as_json)
