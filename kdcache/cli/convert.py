"""`kdcache convert`: dense logits, or other projects' files, to a cache, and back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from kdcache.cli import output
from kdcache.cli.info import describe
from kdcache.cli.options import json_option, out_option, read_pipeline, scheduler_option, set_option
from kdcache.errors import UsageError

_LAYOUTS = click.Choice(["fkd", "ml-dr", "tinyvit"])


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@out_option
@click.option("--from", "layout", type=_LAYOUTS, help="SOURCE is the folder that this project's students read.")
@click.option("--to", "target", type=_LAYOUTS, help="Write the cache SOURCE as a folder that they can read.")
@click.option(
    "--pipeline",
    type=click.Path(path_type=Path),
    help="Whose data set, transform and cache settings the logits take; with --to, whose data set the cache is of.",
)
@click.option("--name", help="Of the teacher.  [default: that of the file]")
@click.option("--top-k", type=click.IntRange(1), help="With --to: classes of a row.  [default: those of the cache]")
@set_option
@scheduler_option
@json_option
def convert(
    source: Path,
    out: Path,
    layout: str | None,
    target: str | None,
    pipeline: Path | None,
    name: str | None,
    top_k: int | None,
    overrides: tuple[str, ...],
    scheduler: str,
    as_json: bool,
) -> None:
    """Make a cache of dense logits, an npz (`logits` [N, C], perhaps `labels` and `sample_keys`) or npy file; or write
    what a cache decodes to, as npz or npy.

    With --from and --to: the files of FKD, ml-dr and TinyViT. Crops and flips that FKD and ml-dr have recorded are
    replayed; what ml-dr's RandAugment, RandomErasing or mixing has changed is refused. What TinyViT's seeds draw can
    only be drawn by TinyViT: such a cache has rows for your own loop, and no images. These files hold probabilities:
    losses that need the level of the teacher's logits, such as dtkd if not centered, are refused.

    \b
    Example: kdcache convert runs/digits.kdcache -o logits.npz
    Example: kdcache convert logits.npz --pipeline pipelines/digits.yaml -o mine.kdcache
    Example: kdcache convert FKD_soft_label --from fkd --pipeline fkd.yaml -o fkd.kdcache
    Example: kdcache convert mine.kdcache --to ml-dr --pipeline mine.yaml -o reinforced --top-k 10
    """
    from kdcache.cache import open_cache
    from kdcache.curate.dense_logits import cache_of_logits, logits_of_cache
    from kdcache.data.datasets import load_split

    if layout and target:
        raise UsageError("--from makes a cache, and --to is of a cache", "do one, and then the other")
    if top_k is not None and target is None:
        raise UsageError("--top-k belongs to --to: a cache keeps what the files have", "remove it, or use select")
    if target is not None:
        _write_files(source, target, out, pipeline, overrides, top_k, as_json)
        return
    if pipeline is None:
        if not source.is_dir() or layout:
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
    samples = load_split(resolved.dataset, "train")
    from kdcache.curate.foreign import cache_of_files

    make = partial(cache_of_logits, source) if layout is None else partial(cache_of_files, source, layout)
    made = make(
        samples,
        out,
        name=name,
        transform=resolved.transform,
        spec=resolved.cache,
        scheduler=scheduler,
        progress=output.Terminal(),
    )
    describe(made, as_json)


def _write_files(
    source: Path,
    target: str,
    out: Path,
    pipeline: Path | None,
    overrides: tuple[str, ...],
    top_k: int | None,
    as_json: bool,
) -> None:
    """Write a cache in another project's layout, and say what was written."""
    from kdcache.cache import open_cache
    from kdcache.curate.foreign import files_of_cache
    from kdcache.data.datasets import load_split

    cache = open_cache(source)
    samples = None if pipeline is None else load_split(read_pipeline(pipeline, overrides).dataset, "train")
    kept = files_of_cache(cache, target, out, samples, top_k=top_k, progress=output.Terminal())
    views = cache.manifest.plan.views.count
    if as_json:
        output.as_json({"path": str(out), "layout": target, "samples": len(cache), "views": views, "top_k": kept})
    else:
        output.facts({target: str(out), "holds": f"{views} views of {len(cache):,} samples, {kept} classes a row"})
