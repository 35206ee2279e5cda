"""What `dump-teacher` and `verify` do for a pipeline of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cli import output
from kdcache.cli.plan import duration, size
from kdcache.errors import counted

if TYPE_CHECKING:
    from kdcache.cache import Cache
    from kdcache.config.text import TextPipeline
    from kdcache.dump.tokens.estimate import TokenEstimate


def dump(pipeline: TextPipeline, out: Path, dry_run: bool, device: str, as_json: bool) -> None:
    """Run the language model of a pipeline over its texts, or estimate that."""
    from kdcache.cache.format.schema import MANIFEST
    from kdcache.cache.preconditions import check_place
    from kdcache.cli.info import describe
    from kdcache.dump.tokens.dump import dump_language_model
    from kdcache.dump.tokens.estimate import estimate_language_model
    from kdcache.dump.tokens.inputs import load_inputs
    from kdcache.dump.tokens.job import LanguageModelJob
    from kdcache.runtime.distributed import join_ranks
    from kdcache.runtime.launched import is_first
    from kdcache.runtime.progress import Silent

    progress = output.Terminal()
    if dry_run or not (out / MANIFEST).is_file():
        check_place(out)  # tokenizing may take long
    teacher, text = load_inputs(pipeline, progress if is_first() else Silent())
    if dry_run:
        data = (text.name, text.split)
        given = (teacher.model, teacher.identity, text, data, text.vocabulary, pipeline.cache, out, device, progress)
        _describe(estimate_language_model(LanguageModelJob(*given)), as_json)
        return
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


def _describe(estimated: TokenEstimate, as_json: bool) -> None:
    """Print what a cache would keep and cost."""
    from kdcache.cache.inspect.outputs import described_tokens

    if as_json:
        output.as_json(
            {
                **estimated._asdict(),
                "encoding": estimated.encoding.model_dump(),
                "gradient_error": {f"{t:g}": error for t, error in estimated.gradient_error.items()},
                "bytes": round(estimated.bytes),
                "besides_rows": round(estimated.besides_rows),
                "seconds": estimated.seconds,
            }
        )
        return
    errors = ", ".join(f"{error:.3f} at T = {t:g}" for t, error in estimated.gradient_error.items())
    output.facts(
        {
            "rows": described_tokens(estimated.encoding),
            "text": f"{counted(estimated.sequences, 'sequence')}, {estimated.tokens:,} tokens, "
            f"{counted(estimated.rows, 'row')} ({estimated.rows / estimated.tokens:.1%})",
            "error": f"{errors}: relative error of the KD gradient of a student that knows only how frequent tokens "
            f"are, on {counted(estimated.held_out, 'held-out row')}",
            "size": f"{size(estimated.bytes)}, {estimated.bytes / estimated.rows:.1f} bytes per row: "
            f"{estimated.bytes_per_row:.1f} of distributions, the rest of tokens, vocabulary, basis and checksums",
            "time": f"about {duration(estimated.seconds)} on this device: {estimated.tokens_per_second:,.0f} tokens/s "
            f"of the network, {estimated.rows_per_second:,.0f} rows/s of head and encoding",
        }
    )


def verify(cache: Cache, pipeline: TextPipeline, replay: bool, teacher: bool, rows: int, device: str) -> dict[str, Any]:
    """Compare a cache with the texts of a pipeline, and on request with its teacher.

    Returns:
        What was compared, by name.
    """
    from kdcache.cache.format.stored_sequences import check_same_tokens
    from kdcache.data.replay_text import check_same_text, replay_text
    from kdcache.dump.tokens.check_teacher import compare_language_model
    from kdcache.dump.tokens.inputs import text_of, tokenizer_of
    from kdcache.errors import UsageError
    from kdcache.models.language_teacher import load_language_teacher

    progress, plan = output.Terminal(), cache.manifest.plan
    if plan.sequences is None:
        raise UsageError(f"the samples of {cache.path} are not sequences of tokens", "name a pipeline of images")
    results: dict[str, Any] = {}
    tokenizer = tokenizer_of(pipeline)
    if tokenizer is not None:
        check_same_tokens(cache.path, plan, tokenizer.vocabulary.tokens, str(tokenizer))
    if pipeline.dataset.root is not None or replay or not teacher:
        text = text_of(pipeline.dataset, tokenizer, plan.sequences.vocabulary.size, progress)
        check_same_text(cache, text)
        results["text"] = {"sequences": len(text)}
        if replay:
            results["replayed_text"] = replay_text(cache, text, progress)._asdict()
    if teacher:
        loaded = load_language_teacher(pipeline.section("teacher"), pipeline.cache.precision, progress)
        found = compare_language_model(
            cache, loaded.model, loaded.identity, pipeline.cache.precision, rows, device, progress
        )
        results["language_model"] = [agreement._asdict() for agreement in found]
    return results


def compared(agreements: list[dict[str, Any]]) -> None:
    """Print a table of the agreement with the live teacher, by temperature."""
    is_drawn = agreements[0]["top1"] is None
    what = "log p of the draws, less its expectation" if is_drawn else "total variation of head and tail"
    output.table(
        f"Cached distributions against those of the live teacher, {counted(agreements[0]['rows'], 'row')}",
        ["T", what, "of all tokens", "same top token"],
        [
            [
                f"{one['temperature']:g}",
                f"{one['head_variation']:.5f}",
                "" if one["total_variation"] is None else f"{one['total_variation']:.5f}",
                "" if one["top1"] is None else f"{one['top1']:.2%}",
            ]
            for one in agreements
        ],
    )
