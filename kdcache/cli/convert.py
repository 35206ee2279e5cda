"""`kdcache convert`: import logits and other projects' files as a cache, and export a cache to them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdcache.cli import output
from kdcache.cli.info import describe
from kdcache.cli.options import (
    PathType,
    json_option,
    out_option,
    read_pipeline,
    read_samples,
    scheduler_option,
    set_option,
)
from kdcache.errors import UsageError, counted

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.data.samples import Samples

_SOURCES = click.Choice(["fkd", "ml-dr", "tinyvit", "margin-mse", "llama-cpp", "vllm", "distillkit"])
_TOKEN_OPTIONS = {
    "llama-cpp": {"top_k", "rank", "bos"},
    "vllm": {"top_k", "vocabulary_size"},
    "distillkit": {"top_k", "vocabulary_size", "codec"},
}
"""Layouts of rows of tokens, and the options that each has."""

_COLUMN_FILES = ("jsonl", "parquet")
_TARGETS = click.Choice(["fkd", "ml-dr", "tinyvit", *_COLUMN_FILES])


@click.command("convert")
@click.argument("source", type=PathType())
@out_option
@click.option("--from", "layout", type=_SOURCES, help="Import SOURCE, the files of this project.")
@click.option(
    "--to",
    "target",
    type=_TARGETS,
    help="Export the cache SOURCE to a folder of this project, or to a file of columns.",
)
@click.option(
    "--pipeline",
    type=PathType(),
    help="Import with the data set, transform and cache settings of this file; with --to, the data set of the cache.",
)
@click.option("--name", help="Name of the teacher.  [default: that in the file]")
@click.option(
    "--top-k",
    type=click.IntRange(1),
    help="With --to: classes per row.  [default: those of the cache]  Of sequences, and with --from: tokens per row.",
)
@click.option("--rank", type=click.IntRange(1), help="With --from llama-cpp: coordinates of the tail.  [default: none]")
@click.option("--bos", help="With --from llama-cpp: id of the token that begins each chunk, or none.")
@click.option(
    "--vocabulary-size",
    type=click.IntRange(2),
    help="With --from vllm or distillkit: number of tokens of the tokenizer.  [default of distillkit: d of the codec]",
)
@click.option(
    "--codec",
    type=PathType(),
    help="With --from distillkit: YAML file with logprob_compressor.  [default: compression_config.yaml with SOURCE]",
)
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
    rank: int | None,
    bos: str | None,
    vocabulary_size: int | None,
    codec: Path | None,
    overrides: tuple[str, ...],
    scheduler: str,
    as_json: bool,
) -> None:
    """Import the logits in SOURCE as a cache, or export the cache SOURCE to files.

    Logits are an npz or pt file (`logits` [N, C], optionally `labels` and `sample_keys`) or an npy file. They become a
    cache with --pipeline; without it, a cache is decoded to npz or npy, by the suffix of -o. Other outputs are arrays
    [N, D] under their names in `cache.outputs`.

    With --from and --to, SOURCE and -o are folders of FKD, ml-dr (dataset reinforcement) or TinyViT.
    Crops and flips that FKD and ml-dr record are replayed; RandAugment, RandomErasing and mixing of ml-dr cannot be
    replayed and are refused. Augmentations that TinyViT draws from its seeds can only be drawn by TinyViT: such a cache
    has no images, only rows for your own training loop. These files hold probabilities, so losses that need the level
    of the teacher's logits, such as dtkd without centering, are refused.

    With --from margin-mse, SOURCE is a file of teacher scores, one line per triple of a query and two passages. The
    data set holds the pairs, whose `sample_names` say which they are; kdcache.read_margin_mse lists pairs and
    triples.

    With --from llama-cpp, SOURCE is a file of `llama-perplexity --kl-divergence-base`. It becomes a cache of sequences
    of tokens, for T = 1. If the model's tokenizer adds a token such as BOS, llama.cpp begins each chunk with it, but
    does not write so into the file: name it with --bos.

    With --from vllm, SOURCE is a file of answers of vLLM or SGLang with the log-probabilities of their prompts, in JSON
    lines or parquet, or a folder of them. They become a cache of sequences of tokens, for T = 1. With --from
    distillkit, SOURCE is a parquet file of DistillKit with compressed_logprobs, or a folder of them.

    With --to jsonl or parquet, SOURCE is a cache of sequences of tokens, and -o a file with the columns input_ids,
    taught, top_ids, top_logprobs, temperatures and tail_log_mass.

    \b
    Example: kdcache convert runs/digits.kdcache -o logits.npz
    Example: kdcache convert logits.npz --pipeline digits -o runs/imported.kdcache
    Example: kdcache convert FKD_soft_label --from fkd --pipeline fkd.yaml -o runs/fkd.kdcache
    Example: kdcache convert runs/mine.kdcache --to ml-dr --pipeline mine.yaml -o reinforced --top-k 10
    Example: kdcache convert scores.tsv --from margin-mse --pipeline pairs.yaml -o runs/scores.kdcache
    Example: kdcache convert base.kld --from llama-cpp --bos 1 -o runs/text.kdcache
    Example: kdcache convert answers.jsonl --from vllm --vocabulary-size 49152 -o runs/text.kdcache
    Example: kdcache convert logits/ --from distillkit --codec distill.yaml --top-k 32 -o runs/text.kdcache
    Example: kdcache convert runs/text.kdcache --to jsonl -o text.jsonl
    """
    from kdcache.curate.dense_logits import cache_of_logits
    from kdcache.curate.foreign import cache_of_files, cache_of_scores
    from kdcache.data.datasets import load_split

    if layout and target:
        raise UsageError("--from and --to exclude each other", "import first, and then export the cache")
    of_tokens = {"top_k": top_k, "rank": rank, "bos": bos, "vocabulary_size": vocabulary_size, "codec": codec}
    given = {option for option, value in of_tokens.items() if value is not None}
    if layout in _TOKEN_OPTIONS:
        _check_token_options(layout, given, pipeline)
        _import_tokens(source, out, layout, name, of_tokens, as_json)
        return
    if other := sorted(given - {"top_k"}):
        of = {option: [layout for layout, options in _TOKEN_OPTIONS.items() if option in options] for option in other}
        raise UsageError(
            "; ".join(f"{_flag(option)} is only for --from {' or '.join(layouts)}" for option, layouts in of.items()),
            "remove it" if len(other) == 1 else "remove them",
        )
    if top_k is not None and target is None:
        raise UsageError("--top-k is only for --to: a cache keeps all that the files hold", "remove it, or use select")
    if target in _COLUMN_FILES:
        if pipeline is not None:
            raise UsageError("a cache of sequences holds its data set, the tokens", "remove --pipeline")
        _export_columns(source, target, out, top_k, as_json)
    elif target is not None:
        samples = read_samples(pipeline, overrides)
        _export(source, target, out, samples, top_k, as_json)
    elif pipeline is None:
        if not source.is_dir() or layout:
            raise UsageError(
                f"{source} is not a cache, and logits do not include the images that they are of",
                "to import logits also pass --pipeline PIPELINE, with their data set",
            )
        _decode(source, out, as_json)
    else:
        resolved = read_pipeline(pipeline, overrides)
        make = (
            partial(cache_of_logits, source)
            if layout is None
            else partial(cache_of_scores, source)
            if layout == "margin-mse"
            else partial(cache_of_files, source, layout)
        )
        cache = make(
            load_split(resolved.dataset, "train"),
            out,
            name=name,
            transform=resolved.transform,
            spec=resolved.cache,
            scheduler=scheduler,
            progress=output.Terminal(),
        )
        describe(cache, as_json, out)


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _check_token_options(layout: str, given: set[str], pipeline: Path | None) -> None:
    """Check the options of an import of rows of tokens; raises UsageError."""
    if pipeline is not None:
        raise UsageError(f"the files of --from {layout} hold their data set, the tokens", "remove --pipeline")
    if other := sorted(given - _TOKEN_OPTIONS[layout]):
        raise UsageError(f"{', '.join(map(_flag, other))} cannot be used with --from {layout}", "remove it")


def _import_tokens(
    source: Path, out: Path, layout: str, name: str | None, options: dict[str, Any], as_json: bool
) -> None:
    """Make a cache of files with rows of tokens, and describe it."""
    from kdcache.curate.foreign import cache_of_answers, cache_of_distillkit

    of_top_k = {"top_k": options["top_k"], "name": name, "progress": output.Terminal()}
    if layout == "llama-cpp":
        cache = _cache_of_kld(source, out, name, options["top_k"], options["rank"], options["bos"])
    elif layout == "distillkit":
        cache = cache_of_distillkit(
            source, out, codec=options["codec"], vocabulary_size=options["vocabulary_size"], **of_top_k
        )
    elif options["vocabulary_size"] is None:
        raise UsageError(
            "answers of an engine do not say how many tokens the vocabulary has",
            "pass --vocabulary-size, the number of tokens of the tokenizer: len(tokenizer) in transformers",
        )
    else:
        cache = cache_of_answers(source, out, vocabulary_size=options["vocabulary_size"], **of_top_k)
    describe(cache, as_json, out)


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


def _decode(source: Path, out: Path, as_json: bool) -> None:
    """Write the decoded outputs of a cache to an npz or npy file, and print their shapes and its size."""
    from kdcache.cache import open_cache
    from kdcache.curate.decoded_files import logits_of_cache

    cache = open_cache(source, progress=output.Terminal())
    cache.check_files(output.Terminal())
    with output.working(f"decoding {source}"):
        shapes = logits_of_cache(cache, out)
    size, logits = out.stat().st_size, shapes.pop("logits", None)
    if as_json:
        output.as_json({"path": str(out), "shape": logits, "outputs": shapes, "bytes": size})
    else:
        described = {} if logits is None else {"shape": str(logits)}
        others = {"outputs": ", ".join(f"{name} {shape}" for name, shape in shapes.items())} if shapes else {}
        name = "file" if logits is None else "logits"
        output.facts({name: str(out), **described, **others, "size": f"{size:,} bytes, float32"})


def _export_columns(source: Path, kind: str, out: Path, top_k: int | None, as_json: bool) -> None:
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


def _export(source: Path, target: str, out: Path, samples: Samples | None, top_k: int | None, as_json: bool) -> None:
    """Write a cache in another project's layout, and print what was written."""
    from kdcache.cache import open_cache
    from kdcache.curate.foreign import files_of_cache

    cache = open_cache(source, progress=output.Terminal())
    cache.check_files(output.Terminal())
    classes = files_of_cache(cache, target, out, samples, top_k=top_k, progress=output.Terminal())
    views = cache.manifest.plan.views.count
    if as_json:
        output.as_json({"path": str(out), "layout": target, "samples": len(cache), "views": views, "top_k": classes})
    else:
        per_row = "1 class" if classes == 1 else f"{classes} classes"
        contents = f"{counted(views, 'view')} of {counted(len(cache), 'sample')}, {per_row} per row"
        output.facts({target: str(out), "contents": contents})
