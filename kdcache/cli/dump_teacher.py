"""`kdcache dump-teacher`: run a teacher once, and store its logits in a cache."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.cli import output
from kdcache.cli.options import (
    PathType,
    choose_device,
    decode_images_option,
    device_option,
    json_option,
    pipeline_argument,
    read_any_pipeline,
    set_option,
)


@click.command("dump-teacher")
@pipeline_argument
@click.option(
    "-o",
    "--out",
    required=True,
    type=PathType(),
    help="Folder of the cache, NAME.kdcache; an unsealed cache is resumed.",
)
@click.option(
    "--top-k", help="Classes, or tokens of a text, per row to store exactly, or all.  [same as --set cache.top_k=...]"
)
@click.option(
    "--tail",
    help="Encoding of the others: lowrank or uniform; of tokens lowrank, ghost or draws.  "
    "[same as --set cache.tail=...]",
)
@click.option("--precision", help="Of the teacher: fp32, bf16 or fp16.  [same as --set cache.precision=...]")
@click.option(
    "--extend",
    type=PathType(),
    help="A sealed cache of the same teacher with fewer views or samples; its shards are taken over.",
)
@click.option("--dry-run", is_flag=True, help="Run a pilot, print size and time of the cache, and write nothing.")
@decode_images_option
@set_option
@device_option
@json_option
def dump_teacher(
    pipeline: Path,
    out: Path,
    top_k: str | None,
    tail: str | None,
    precision: str | None,
    extend: Path | None,
    dry_run: bool,
    decode_images: bool,
    overrides: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Run the teacher of a PIPELINE once over every view of its training images, or over its texts, into a cache.

    If the command is interrupted or killed, the same command resumes at the first shard that is missing.

    \b
    Example: kdcache dump-teacher digits -o runs/digits.kdcache
    On several GPUs: torchrun --nproc-per-node N -m kdcache dump-teacher digits -o runs/digits.kdcache
    """
    from kdcache.cache import open_cache
    from kdcache.cli import language_models, plan
    from kdcache.cli.info import describe
    from kdcache.config.text import TextPipeline
    from kdcache.dump.dump import dump_teacher as dump
    from kdcache.dump.estimate import estimate_new_cache
    from kdcache.errors import UsageError
    from kdcache.models.teacher import load_teacher
    from kdcache.runtime.distributed import join_ranks

    shortcuts = {"cache__top_k": top_k, "cache__tail": tail, "cache__precision": precision}
    resolved = read_any_pipeline(pipeline, overrides, **shortcuts)
    progress = output.Terminal()
    if isinstance(resolved, TextPipeline):
        if extend is not None or decode_images:
            given = "--decode-images" if decode_images else "--extend"
            raise UsageError(f"{given} is for images, and {pipeline} is a pipeline of text", "leave it out")
        language_models.dump(resolved, out, dry_run, choose_device(device), as_json)
        return
    loaded = load_teacher(resolved, progress)
    if dry_run:
        estimated = estimate_new_cache(loaded, resolved.cache, out, choose_device(device), progress, decode_images)
        plan.describe(estimated, as_json)
        return
    with join_ranks() as ranks:
        cache = dump(
            loaded.model,
            loaded.samples,
            out,
            name=loaded.identity,
            transform=loaded.transform,
            spec=resolved.cache,
            extends=open_cache(extend) if extend is not None else None,
            ranks=ranks,
            decode_images=decode_images,
            device=choose_device(device),
            progress=progress,
        )
        if ranks.is_first:
            describe(cache, as_json)
