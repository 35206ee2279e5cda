"""Check that the files of a cache match its manifest, and that its rows hold possible values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.format import stored_bases, zarr_store
from kdcache.cache.format.array_specs import STORE, AnyEncoding, labels_of, output_encoding
from kdcache.cache.format.codec import Rows
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.format.grid_codec import GridRows, sums_of
from kdcache.cache.format.grid_encoding import GridEncoding
from kdcache.cache.format.output_codec import Basis, decode_output
from kdcache.cache.format.output_records import DEFAULT_OUTPUT
from kdcache.cache.format.recorded_views import recorded
from kdcache.cache.format.schema import FileRecord, Plan
from kdcache.cache.format.sequence_integrity import check_shard_of_sequences
from kdcache.cache.format.vector_rows import VectorRows
from kdcache.cache.format.verified_files import Problem, damaged_files, raise_first
from kdcache.errors import CorruptError
from kdcache.runtime.system_files import is_system_file

NOT_LISTED = "is not in the manifest"
_BLOCK_ROWS = 4096
"""Rows that are decoded at once."""

_BLOCK_NUMBERS = 2**24
"""Numbers of maps that are decoded at once."""


def check_files(cache: Path, expected: dict[str, FileRecord]) -> None:
    """Check that every file exists with the size and the bytes that were written.

    zarr itself would silently read a missing or empty chunk as zeros.

    Raises:
        CorruptError: with the first file that differs, and the number of such files.
    """
    raise_first(cache, damaged_files(cache, expected), f"files of {len(expected)}")


def unlisted_files(cache: Path, listed: dict[str, FileRecord]) -> tuple[list[Problem], list[str]]:
    """Return files in the folders of a cache that its manifest does not list, so that no digest covers them.

    Returns:
        (problems, names of files that the system added, which nothing reads)
    """
    paths = (path for part in (STORE, "commits") for path in sorted((cache / part).rglob("*")) if not path.is_dir())
    unlisted = [name for path in paths if (name := path.relative_to(cache).as_posix()) not in listed]
    by_system = [name for name in unlisted if any(map(is_system_file, name.split("/")))]
    return [Problem(name, NOT_LISTED) for name in unlisted if name not in by_system], by_system


def check_shard_rows(
    cache: Path, plan: Plan, view: int, shard: int, labels: Tensor
) -> tuple[list[Problem], Rows | None]:
    """Return the problems in the rows of one shard, per kind the first row and the number of rows.

    Returns:
        (problems, rows of the class logits; None if there are none, or they cannot be read)

    Args:
        cache: folder of the cache.
        plan: its plan.
        view: index of the view.
        shard: index of the shard.
        labels: [N] int64.
    """
    ids, of_logits = plan.shard_ids(shard), None
    problems = []
    try:
        if plan.sequences is not None:
            return check_shard_of_sequences(cache, plan, view, shard), None
        if recorded(plan.views.transform):
            zarr_store.read_recorded(cache, plan, view, ids)
        for output in plan.output_names:
            rows = zarr_store.output_reader(cache, plan, output).read(view, ids)
            basis = stored_bases.read_output_basis(cache, plan, output)
            truth = torch.from_numpy(labels_of(plan, output, labels[ids.start : ids.stop].numpy()))
            where = "" if output == DEFAULT_OUTPUT else f"output {output}, "
            for what, wrong in _defects(rows, truth, output_encoding(plan, output), basis).items():
                first = f"{where}view {view}, shard {shard}, sample {ids.start + wrong[0]}"
                problems.append(Problem(first, f"{what} ({len(wrong)} rows of the shard)"))
            of_logits = rows if output == DEFAULT_OUTPUT else of_logits
    except CorruptError as error:
        return [Problem(f"view {view}, shard {shard}", error.what)], None
    return problems, of_logits


def _defects(rows: Any, labels: Tensor, encoding: AnyEncoding, basis: Basis) -> dict[str, list[int]]:
    """Return each defect of some rows, with the indices of the rows that have it; in blocks, so in little memory."""
    found: dict[str, list[int]] = {}
    size = _BLOCK_ROWS
    if isinstance(encoding, GridEncoding):
        size = max(_BLOCK_NUMBERS // math.prod(encoding.shape), 1)
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        truth = labels[start : start + size]
        checks = _row_checks(block, truth, encoding) if isinstance(encoding, Encoding) else _number_checks(block)
        decoded = decode_output(block, truth, encoding, basis)
        not_finite = ("does not decode to finite numbers", ~decoded.isfinite().flatten(1).all(dim=1))
        for what, wrong in (*checks, not_finite):
            if wrong.any():
                found.setdefault(what, []).extend((wrong.nonzero().squeeze(1) + start).tolist())
    return found


def _number_checks(rows: VectorRows | GridRows) -> Iterator[tuple[str, Tensor]]:
    """Yield each possible defect of encoded vectors or maps with a mask of the rows that have it, [B] bool."""
    if rows.values.is_floating_point():
        yield "a number is NaN or infinite", ~rows.values.isfinite().flatten(1).all(dim=1)
    elif isinstance(rows, GridRows):
        least = torch.iinfo(rows.values.dtype).min
        yield (
            f"a rounded number is {least}, which none is rounded to",
            (sums_of(rows.values) == least).flatten(1).any(1),
        )
    if isinstance(rows, VectorRows) and rows.scale is not None:
        yield "the scale is NaN, infinite or not positive", ~(rows.scale.isfinite() & (rows.scale > 0))


def _row_checks(rows: Rows, labels: Tensor, encoding: Encoding) -> Iterator[tuple[str, Tensor]]:
    """Yield each possible defect with a mask of the rows that have it, [B] bool."""
    # float16 log-probabilities have a relative error up to 2^-11, so their sum up to 2^-11 of the entropy (<= log C).
    rounding = 2**-11 * (2 + math.log(encoding.num_classes))
    columns = dict(zip(encoding.statistics, rows.statistics.float().unbind(dim=1), strict=True))
    known, label_log_prob = labels >= 0, columns["label_log_prob"]
    yield "the logsumexp is NaN or infinite", ~rows.logsumexp.isfinite()
    yield "a statistic is NaN or infinite", ~rows.statistics.isfinite().all(dim=1)
    entropy = columns["entropy"]
    yield (
        "the entropy is not between 0 and log C",
        (entropy < 0) | (entropy > math.log(encoding.num_classes) + rounding),
    )
    yield "the standard deviation of the logits is negative", columns["logit_std"] < 0
    yield "the log-probability of the label is above 0", known & (label_log_prob > 0)
    yield "a row without a label has a log-probability of the label", ~known & (label_log_prob != 0)
    if encoding.dtype == "uint8":
        yield "the largest log-probability is above 0", columns["log_prob_max"] > 0
        yield "the range of the log-probabilities is negative", columns["log_prob_range"] < 0
        return
    head = rows.log_probs.float()
    yield "a log-probability is NaN or infinite", ~head.isfinite().all(dim=1)
    yield "a log-probability is above 0", (head > 0).any(dim=1)
    stated = head.double().exp().sum(dim=1)
    if rows.indices is None:
        yield "the probabilities do not add up to 1", (stated - 1).abs() > rounding
        return
    yield "the log-probabilities are not in descending order", (head.diff(dim=1) > 0).any(dim=1)
    yield "a class occurs twice in the head", (rows.indices.sort(dim=1).values.diff(dim=1) == 0).any(dim=1)
    in_head = (rows.indices.long() == labels.unsqueeze(1)).any(dim=1)
    tail = columns["tail_log_mass_t1"].double().exp()
    stated = stated + torch.where(known & ~in_head, label_log_prob.double().exp(), 0.0)
    yield "head, label and tail do not add up to 1", (stated + tail - 1).abs() > rounding
    # A float32 head may hold lower values than the label's float16.
    above = label_log_prob > head[:, -1].clamp_min(torch.finfo(torch.float16).min) * (1 - 2**-10)
    yield "a label outside the head is more probable than the last class of the head", known & ~in_head & above
    for name, values in columns.items():
        if name.startswith("tail_log_mass"):
            yield f"{name} is above 0", values > rounding


def check_inputs(cache: Path, plan: Plan, views: Iterable[int]) -> list[Problem]:
    """Return the problems in the fingerprints of the teacher's input in some views."""
    problems: list[Problem] = []
    if plan.sequences is not None:
        return problems
    for view in views:
        try:
            sketches = zarr_store.read_inputs(cache, plan, view).sketches
        except CorruptError as error:
            problems.append(Problem(f"view {view}, fingerprints", error.what))
            continue
        wrong = ~np.isfinite(sketches).all(axis=1)
        if wrong.any():
            sample = int(wrong.argmax()) * plan.shape.fingerprint_stride
            what = f"its sketch is NaN or infinite ({wrong.sum()} sketches of the view)"
            problems.append(Problem(f"view {view}, sample {sample}", what))
    return problems


def check_samples(cache: Path, plan: Plan) -> list[Problem]:
    """Return the problems in labels and content keys."""
    try:
        labels, keys = zarr_store.read_samples(cache, plan)
    except CorruptError as error:
        return [Problem("labels and sample_keys", error.what)]
    digest = digest_of(keys, labels)
    if digest != plan.dataset.digest:
        return [Problem("labels and sample_keys", f"have digest {digest}, the plan has {plan.dataset.digest}")]
    return []
