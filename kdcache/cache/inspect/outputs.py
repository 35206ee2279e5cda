"""Describe the outputs that a cache holds beside class logits, for `info`, `plan` and the card."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kdcache.cache.format.array_specs import AnyEncoding, raw_bytes
from kdcache.cache.format.encoding import Encoding, Fidelity
from kdcache.cache.format.grid_encoding import GridEncoding, GridFidelity
from kdcache.cache.format.output_records import OutputRecord, VectorFidelity
from kdcache.cache.format.sequence_records import SequencesRecord
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.grid_planner import described


def described_outputs(
    outputs: Mapping[str, OutputRecord] | None, sizes: Mapping[str, float] = MappingProxyType({})
) -> dict[str, str]:
    """Return one line per output: what it is, how it is stored, and its measured fidelity.

    Args:
        outputs: by name; None if there are none.
        sizes: measured bytes per row, by name, of those of which they are known.
    """
    return {f"output {name}": described_output(record, sizes.get(name)) for name, record in (outputs or {}).items()}


def described_sequences(sequences: SequencesRecord) -> dict[str, str]:
    """Return what the sequences of a cache are, in words."""
    tokens, rows, of = sum(sequences.tokens), sum(sequences.rows), sequences.vocabulary
    known = "tokens not stored" if of.digest is None else f"{of.digest[:19]}..."
    special = ", ".join(f"{name} {token}" for name, token in of.special.items())
    template = "" if of.chat_template is None else f", chat template {of.chat_template[:19]}..."
    return {
        "tokens": f"{tokens:,}, {rows:,} of their positions with a row ({rows / tokens:.1%})",
        "vocabulary": f"{of.size:,} tokens, {known}{f'; {special}' if special else ''}",
        **({"tokenizer": f"{of.tokenizer[:19]}...{template}"} if of.tokenizer is not None else {}),
    }


def described_output(record: OutputRecord, bytes_per_row: float | None = None) -> str:
    """Return what an output is, how it is stored, and its measured fidelity, in one line."""
    nouns = {"vector": "vectors of {}", "score": "{} scores", "classes": "logits of {} classes"}
    noun = "distributions of the next of {} tokens" if record.places == "run" else nouns[record.kind]
    what = noun.format(f"{record.channels:,}").replace("1 scores", "one score")
    if isinstance(record.encoding, GridEncoding):
        what = f"maps of {record.encoding.height} x {record.encoding.width} places, {what} each"
    taken = f" from {record.source}" if record.source is not None else ""
    pooled = {"none": "", "mean": ", mean over its places", "first": ", its first place"}[record.pool]
    return f"{what}{taken}{pooled}; {_stored(record.encoding, bytes_per_row)}{_measured(record.fidelity)}"


def _stored(encoding: AnyEncoding, bytes_per_row: float | None) -> str:
    size = f"{raw_bytes(encoding)} bytes per row before compression"
    if bytes_per_row is not None:
        size = f"{bytes_per_row:.1f} bytes per row"
    if isinstance(encoding, GridEncoding):
        return _stored_maps(encoding, raw_bytes(encoding) if bytes_per_row is None else bytes_per_row, size)
    if isinstance(encoding, TokenEncoding):
        return f"{described_tokens(encoding)}, {size}"
    if isinstance(encoding, Encoding):
        stored = "every class" if encoding.dense else f"top {encoding.top_k}, {encoding.tail} tail"
        return f"{stored}, {encoding.dtype}, {size}"
    if encoding.step is not None:
        return f"{encoding.components} principal coordinates in steps of {encoding.step:.3g}, {encoding.dtype}, {size}"
    return f"{encoding.dtype}, {size}"


def _stored_maps(encoding: GridEncoding, row: float, size: str) -> str:
    """Return how a map is stored, in words; `row` is the bytes of one, and `size` says so."""
    stored: str = encoding.dtype
    if encoding.step is not None:
        what = f"{encoding.components} principal coordinates" if encoding.components else "numbers"
        level = "" if encoding.level else " without their level"
        stored = f"{what}{level} in steps of {encoding.step:.3g}, {encoding.dtype}"
    return f"{stored}, {size}, {row / encoding.places:.1f} per place"


def described_tokens(encoding: TokenEncoding) -> str:
    """Return how a distribution of the next token is stored, in words."""
    at = ", ".join(f"{t:.4g}" for t in encoding.temperatures)
    if encoding.tail == "draws":
        return f"{encoding.draws} draws at T = {at}"
    shape = f", tail of rank {encoding.rank}" if encoding.rank else ""
    return f"top {encoding.top_k}{shape}, mass of the tail at T = {at}, {encoding.dtype}"


def _measured(fidelity: Fidelity | VectorFidelity | GridFidelity | None) -> str:
    if isinstance(fidelity, GridFidelity):
        return f"; {described(fidelity)}"
    if isinstance(fidelity, VectorFidelity):
        return f"; 1 - cosine {fidelity.one_minus_cosine:.2g}, relative squared error {fidelity.relative_error:.2g}"
    if fidelity is not None:
        return f"; total variation {fidelity.total_variation['1']:.4f} at T = 1"
    return ""
