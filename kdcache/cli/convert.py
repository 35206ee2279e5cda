"""`kdcache convert`: import logits and other projects' files as a cache, and export a cache to them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdcache.cli import output
from kdcache.cli.convert_tokens import TOKEN_OPTIONS, check_token_options, export_columns, flag, import_tokens
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
    from kdcache.data.samples import Samples

_SOURCES = click.Choice(["fkd", "ml-dr", "tinyvit", "margin-mse", "llama-cpp", "vllm", "distillkit", "columns"])
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
    help="With --from vllm, distillkit or columns: number of tokens of the tokenizer.  [default of distillkit: d of "
    "the codec]",
)
@click.option(
    "--codec",
    type=PathType(),
    help="With --from distillkit: YAML file with logprob_compressor.  [default: compression_config.yaml with SOURCE]",
)
@click.option(
    "--columns",
    metavar="WHAT=NAME,...",
    help="With --from columns: the names of the columns of ids (default input_ids), top-ids, logprobs or logits, and "
    "optionally logsumexp, label-logprobs and taught.",
)
@click.option(
    "--renormalize",
    is_flag=True,
    help="With --from columns, of logits without logsumexp: take the probability of all other tokens as 0.",
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
    columns: str | None,
    renormalize: bool,
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
    distillkit, SOURCE is a parquet file of DistillKit with compressed_logprobs, or a folder of them. With --from
    columns, SOURCE is a JSON lines or parquet file with a sequence per line or row, or a folder of them, and --columns
    names its columns: of L tokens ids [L], and per token the k most probable next ones, top-ids and logprobs (or
    logits, and their logsumexp over the vocabulary) [L, k] or [L - 1, k].

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
    Example: kdcache convert k.jsonl --from columns --columns top-ids=top,logprobs=lp --vocabulary-size 99 -o k.kdcache
    Example: kdcache convert runs/text.kdcache --to jsonl -o text.jsonl
    """
    from kdcache.curate.dense_logits import cache_of_logits
    from kdcache.curate.foreign import cache_of_files, cache_of_scores
    from kdcache.data.datasets import load_split

    if layout and target:
        raise UsageError("--from and --to exclude each other", "import first, and then export the cache")
    of_tokens: dict[str, Any] = {
        "top_k": top_k,
        "rank": rank,
        "bos": bos,
        "vocabulary_size": vocabulary_size,
        "codec": codec,
        "columns": columns,
        "renormalize": renormalize or None,
    }
    given = {option for option, value in of_tokens.items() if value is not None}
    if layout in TOKEN_OPTIONS:
        check_token_options(layout, given, pipeline)
        import_tokens(source, out, layout, name, of_tokens, as_json)
        return
    if other := sorted(given - {"top_k"}):
        of = {option: [layout for layout, options in TOKEN_OPTIONS.items() if option in options] for option in other}
        raise UsageError(
            "; ".join(f"{flag(option)} is only for --from {' or '.join(layouts)}" for option, layouts in of.items()),
            "remove it" if len(other) == 1 else "remove them",
        )
    if top_k is not None and target is None:
        raise UsageError("--top-k is only for --to: a cache keeps all that the files hold", "remove it, or use select")
    if target in _COLUMN_FILES:
        if pipeline is not None:
            raise UsageError("a cache of sequences holds its data set, the tokens", "remove --pipeline")
        export_columns(source, target, out, top_k, as_json)
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
