"""Stage one: make a teacher, and run it once."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.cli import output
from kdcache.cli.options import choose_device, device_option, json_option, pipeline_argument, read_pipeline, set_option


@click.command("dump-teacher")
@pipeline_argument
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The cache, NAME.kdcache.")
@click.option("--top-k", help="How many classes to keep exactly, or all.  [short for --set cache.top_k=...]")
@click.option("--tail", help="What to keep of the others: uniform.  [short for --set cache.tail=...]")
@click.option("--precision", help="fp32, bf16 or fp16.  [short for --set cache.precision=...]")
@click.option(
    "--extend",
    type=click.Path(path_type=Path),
    help="A sealed cache with fewer views or samples, whose shards are taken over.",
)
@click.option("--dry-run", is_flag=True, help="Run a pilot, say what the cache would be and cost, and write nothing.")
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
    overrides: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Run the teacher of a PIPELINE once over every view, and keep its logits in a sealed cache.

    Interrupted or killed, the same command goes on where it stopped. On several GPUs: torchrun --nproc-per-node N
    -m kdcache dump-teacher ...

    \b
    Example: kdcache dump-teacher pipelines/digits.yaml -o runs/digits.kdcache
    """
    from kdcache.cache import open_cache
    from kdcache.cli import plan
    from kdcache.cli.info import describe
    from kdcache.cli.inspect import draw_card
    from kdcache.dump.dump import dump_teacher as dump
    from kdcache.dump.dump import plan_for_teacher
    from kdcache.models.teacher import load_teacher
    from kdcache.runtime.distributed import join_ranks

    shortcuts = {"cache__top_k": top_k, "cache__tail": tail, "cache__precision": precision}
    resolved = read_pipeline(pipeline, overrides, **shortcuts)
    if dry_run:
        plan.describe(plan_for_teacher(resolved, choose_device(device), output.Terminal(), out), as_json)
        return
    loaded = load_teacher(resolved, output.Terminal())
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
            device=choose_device(device),
            progress=output.Terminal(),
        )
        if ranks.is_first:
            draw_card(cache)
            describe(cache, as_json)
