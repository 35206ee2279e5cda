"""Import of rows of tokens by `kdcache convert`, and their export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cli import output
from kdcache.cli.info import describe
from kdcache.errors import UsageError, counted

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache

TOKEN_OPTIONS = {
    "llama-cpp": {"top_k", "rank", "bos"},
    "vllm": {"top_k", "vocabulary_size"},
    "distillkit": {"top_k", "vocabulary_size", "codec"},
    "columns": {"top_k", "vocabulary_size", "columns", "renormalize"},
}
"""Layouts of rows of tokens, and the options that each has."""


def flag(option: str) -> str:
    """Return the option of a parameter."""
    return f"--{option.replace('_', '-')}"


def check_token_options(layout: str, given: set[str], pipeline: Path | None) -> None:
    """Check the options of an import of rows of tokens; raises UsageError."""
    if pipeline is not None:
        raise UsageError(f"the files of --from {layout} hold their data set, the tokens", "remove --pipeline")
    if other := sorted(given - TOKEN_OPTIONS[layout]):
        raise UsageError(f"{', '.join(map(flag, other))} cannot be used with --from {layout}", "remove it")


def import_tokens(
    source: Path, out: Path, layout: str, name: str | None, options: dict[str, Any], as_json: bool
) -> None:
    """Make a cache of files with rows of tokens, and describe it."""
    from kdcache.curate.foreign import cache_of_answers, cache_of_columns, cache_of_distillkit

    of_top_k = {"top_k": options["top_k"], "name": name, "progress": output.Terminal()}
    if layout == "llama-cpp":
        cache = _cache_of_kld(source, out, name, options["top_k"], options["rank"], options["bos"])
    elif layout == "distillkit":
        cache = cache_of_distillkit(
            source, out, codec=options["codec"], vocabulary_size=options["vocabulary_size"], **of_top_k
        )
    elif options["vocabulary_size"] is None:
        raise UsageError(
            f"the files of --from {layout} do not say how many tokens the vocabulary has",
            "pass --vocabulary-size, the number of tokens of the tokenizer: len(tokenizer) in transformers",
        )
    elif layout == "columns":
        cache = cache_of_columns(
            source,
            out,
            columns=_named_columns(options["columns"] or ""),
            vocabulary_size=options["vocabulary_size"],
            renormalize=bool(options["renormalize"]),
            **of_top_k,
        )
    else:
        cache = cache_of_answers(source, out, vocabulary_size=options["vocabulary_size"], **of_top_k)
    describe(cache, as_json, out)


def _named_columns(given: str) -> dict[str, str]:
    """Return the columns of WHAT=NAME,...; raises UsageError."""
    found: dict[str, str] = {}
    for text in given.split(",") if given else ():
        role, is_there, name = text.strip().partition("=")
        if not is_there or not name:
            raise UsageError(f"{text!r} of --columns does not name a column", "write ids=input_ids,top-ids=NAME,...")
        if role in found:
            raise UsageError(f"--columns names {role} twice: {found[role]} and {name}", "remove one")
        found[role] = name
    return found


def _cache_of_kld(
    source: Path, out: Path, name: str | None, top_k: int | None, rank: int | None, bos: str | None
) -> Cache:
    """Make a cache of a file of llama.cpp."""
    from kdcache.cache.token_spec import TokenCacheSpec
    from kdcache.curate.foreign import cache_of_kld

    if bos is None or not (bos == "none" or bos.isdecimal()):
        raise UsageError(
            "the file of llama.cpp does not say whether each chunk began with another token than it holds",
            "pass --bos ID with the token's id if the tokenizer adds BOS (tokenizer.ggml.add_bos_token of the GGUF "
            "file, tokenizer.ggml.bos_token_id), else --bos none",
        )
    spec = TokenCacheSpec(top_k=top_k or TokenCacheSpec.top_k)
    if rank is not None:
        spec = replace(spec, tail="lowrank", rank=rank)
    return cache_of_kld(
        source, out, bos=None if bos == "none" else int(bos), name=name, spec=spec, progress=output.Terminal()
    )


def export_columns(source: Path, kind: str, out: Path, top_k: int | None, as_json: bool) -> None:
    """Write the rows of a cache of sequences to a file, and print what was written."""
    from kdcache.cache import open_cache
    from kdcache.curate.foreign import columns_of_cache

    cache = open_cache(source, progress=output.Terminal())
    cache.check_files(output.Terminal())
    found = columns_of_cache(cache, kind, out, top_k=top_k, progress=output.Terminal())
    if as_json:
        output.as_json({"path": str(out), "layout": kind, **found._asdict()})
    else:
        contents = f"{counted(found.rows, 'row')} of {counted(found.sequences, 'sequence')}"
        output.facts({kind: str(out), "contents": f"{contents}, {counted(found.top_k, 'token')} per row"})
