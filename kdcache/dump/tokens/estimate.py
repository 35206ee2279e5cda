"""Estimate what a cache of a language model would keep and cost, from a pilot; nothing is written."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.format import zarr_store
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.preconditions import check_place
from kdcache.cache.sequence_plan import CountedSequences, pilot_rows
from kdcache.cache.sequences import targets_of
from kdcache.dump.disk_size import bytes_besides_rows
from kdcache.dump.estimate import check_room
from kdcache.dump.tokens.agreement import gradient_errors, temperatures_of
from kdcache.dump.tokens.job import LanguageModelJob, tokens_of
from kdcache.dump.tokens.pilot import TokenPilot, fit_basis, run_pilot
from kdcache.dump.tokens.token_pass import Encoder
from kdcache.losses.token_targets import TokenTargets

_HELD_OUT, _EVERY = 256, 8
"""Rows of the pilot on which the stored ones are measured, at most, and the distance between them."""


class TokenEstimate(NamedTuple):
    """What a cache would keep and cost.

    Attributes:
        encoding: of the rows.
        sequences: number of sequences.
        tokens: of them.
        rows: number of rows.
        bytes_per_row: of the rows alone, measured.
        besides_rows: bytes of everything else in the cache.
        tokens_per_second: of the teacher's body.
        rows_per_second: that are encoded, with the head.
        held_out: rows on which the error was measured, which the basis was not fitted to.
        gradient_error: relative error of the KD gradient by temperature; see `gradient_errors`.
    """

    encoding: TokenEncoding
    sequences: int
    tokens: int
    rows: int
    bytes_per_row: float
    besides_rows: float
    tokens_per_second: float
    rows_per_second: float
    held_out: int
    gradient_error: dict[float, float]

    @property
    def bytes(self) -> float:
        """Size on disk."""
        return self.bytes_per_row * self.rows + self.besides_rows

    @property
    def seconds(self) -> float:
        """Time of the teacher pass, of one process."""
        return self.tokens / self.tokens_per_second + self.rows / self.rows_per_second


def estimate_language_model(job: LanguageModelJob) -> TokenEstimate:
    """Run a pilot, and estimate the cache of a job, after the checks that a dump begins with.

    Raises:
        IncompleteError: if the cache does not fit on the disk.
        KdcacheError: as the dump itself.
    """
    check_place(job.out)
    encoding = job.encoding
    counted = job.count()
    plan, teacher, section = job.plan(counted), job.running(), job.section
    pilot = run_pilot(teacher, job.sequences, counted, section.pilot_rows, section.batch_tokens, job.progress)
    every = min(_EVERY, max(len(pilot.hidden) // 2, 1))
    held = (torch.arange(len(pilot.hidden)) % every == every - 1).to(pilot.hidden.device)
    fitted, held_out = _some(pilot, ~held if encoding.rank else held | ~held), _some(pilot, held, _HELD_OUT)
    basis = fit_basis(teacher, fitted, job.spec, encoding)
    encode = Encoder(teacher, encoding, basis)
    rows = encode.rows(held_out.hidden, held_out.next_tokens)
    # More of them compress better, as in a cache.
    many = _some(pilot, held | ~held, max(teacher.rows_at_once, _HELD_OUT))
    start = time.perf_counter()
    stored = encode.rows(many.hidden, many.next_tokens)
    seconds = time.perf_counter() - start

    def parts() -> Iterator[tuple[Tensor, TokenTargets]]:
        size = min(teacher.rows_at_once, 32)
        for begin in range(0, len(rows), size):
            targets = targets_of(rows[begin : begin + size].to(job.device), encoding, basis)
            yield teacher.head.logits(held_out.hidden[begin : begin + size]), targets

    some = targets_of(rows[:1], encoding, None)
    with torch.no_grad():
        errors = gradient_errors(parts, temperatures_of(some))
    of = plan.sequences
    if of is None:
        raise TypeError("only sequences have tokens")
    found = TokenEstimate(
        encoding,
        len(counted.keys),
        sum(of.tokens),
        sum(of.rows),
        zarr_store.bytes_per_row(encoding, stored),
        _besides_rows(job, plan, counted),
        pilot.tokens_per_second,
        len(stored) / seconds,
        len(rows),
        errors,
    )
    check_room(job.out, found.bytes)
    return found


def _some(pilot: TokenPilot, which: Tensor, most: int | None = None) -> TokenPilot:
    """Return some rows of a pilot."""
    return pilot._replace(hidden=pilot.hidden[which][:most], next_tokens=pilot.next_tokens[which][:most])


def _besides_rows(job: LanguageModelJob, plan: Plan, counted: CountedSequences) -> float:
    """Return approximately the bytes of a cache besides its rows: tokens, vocabulary, basis, checksums, metadata."""
    tokens = tokens_of(job.vocabulary)
    ids = [job.sequences.tokens(each.sequence)[0] for each in pilot_rows(counted, len(counted.keys))[:64]]
    width = np.uint16 if job.vocabulary_size <= 2**16 else np.uint32
    sampled = np.concatenate(ids).astype(width).tobytes()
    per_token = len(zlib.compress(sampled, 1)) / (len(sampled) / np.dtype(width).itemsize)
    vocabulary = 0 if isinstance(tokens, int) else len(zlib.compress(b"".join(tokens), 1)) + len(tokens)
    counts = 4 * len(counted.keys)
    return bytes_besides_rows(plan, counted.labels) + per_token * int(counted.tokens.sum()) + vocabulary + counts
