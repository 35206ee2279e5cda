"""What `dump-teacher` does for a pipeline of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cli import output

if TYPE_CHECKING:
    from kdcache.config.text import TextPipeline


def dump(pipeline: TextPipeline, out: Path, dry_run: bool, device: str, as_json: bool) -> None:
    """Run the language model of a pipeline over its texts, or estimate that."""
    from kdcache.cli.info import describe
    from kdcache.dump.tokens.dump import dump_language_model
    from kdcache.dump.tokens.inputs import load_inputs
    from kdcache.runtime.distributed import join_ranks

    progress = output.Terminal()
    teacher, text = load_inputs(pipeline, progress)
    with join_ranks() as ranks:
        cache = dump_language_model(
            teacher.model,
            text,
            out,
            name=teacher.identity,
            spec=pipeline.cache,
            ranks=ranks,
            device=device,
            progress=progress,
        )
        if ranks.is_first:
            describe(cache, as_json)
