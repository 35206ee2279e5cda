"""Choose the encoding of a teacher's vectors: the smallest one within a fidelity.

The axes of the codec klt are fitted to three quarters of a pilot, and every candidate is encoded, decoded and measured
on the rest. A fidelity of f bounds two errors: the mean of 1 - cosine by f, and the squared error, relative to that of
answering with the mean vector, by 2 f. For vectors around 0 these are the same bound. Features after a ReLU, however,
lie around a large mean, and a cosine hardly sees what distinguishes one from another, which losses such as RKD and the
mean squared error are about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.cache.format import zarr_store
from kdcache.cache.format.output_records import VectorEncoding, VectorFidelity, VectorRequest
from kdcache.cache.format.vector_codec import decode_vectors, encode_vectors, fit_basis
from kdcache.cache.format.vector_rows import VectorBasis
from kdcache.errors import UsageError

USUAL_VECTOR_FIDELITY = 1e-3
"""Largest mean of 1 - cosine, if the user does not say another."""

_STEPS = tuple(2.0 ** (exponent / 8) for exponent in range(12, -65, -1))
"""Steps that are tried, relative to the median deviation of the axes, the largest first."""

_ROUNDING = 1e-5
"""Deviation of an axis, relative to the largest, below which it holds what float32 rounded, and nothing else."""

_FINER_STEPS = tuple(2.0 ** (exponent / 32) for exponent in (3, 2, 1))
"""Steps that are tried between the first of `_STEPS` within the fidelity and the one before it, relative to the first.

A step of `_STEPS` changes the squared error by 19%, and a row of some 200 bytes by 5."""

_LARGEST_INT8 = 100
"""Largest magnitude on the pilot of numbers that are stored as int8: other rows may have larger ones."""

_RARELY = 1 / 512
"""Share of the pilot's rows in which an axis must round to something but 0 to be stored."""

_UNIT_TOLERANCE = 1e-3
"""Largest deviation from 1 of the length of vectors that are taken for normalized."""

_BASIS_BYTES = 0.93
"""Size of compressed random float32 numbers, relative to the numbers themselves."""


@dataclass(frozen=True)
class PlannedVectors:
    """An encoding of vectors and what was measured with it.

    Attributes:
        encoding: of the rows.
        basis: of the codec klt, on the CPU; else None.
        fidelity: on the held-out rows.
        bytes_per_row: compressed, on the held-out rows, without the basis.
    """

    encoding: VectorEncoding
    basis: VectorBasis | None
    fidelity: VectorFidelity
    bytes_per_row: float


def plan_vectors(pilot: Tensor, request: VectorRequest, n_rows: int | None = None) -> PlannedVectors:
    """Choose the encoding of a teacher's vectors.

    Args:
        pilot: [P, D] float32, finite, on any device.
        request: settings of the user.
        n_rows: rows of the cache, over which the size of the axes is divided; None to leave it out.

    Raises:
        UsageError: if the requested codec cannot hold the vectors, or is not within the fidelity.
    """
    pilot = pilot.float().cpu()
    held = torch.zeros(len(pilot), dtype=torch.bool)
    held[::4] = True
    fitted = pilot[~held] if len(pilot) > 1 else pilot
    limit = request.fidelity or USUAL_VECTOR_FIDELITY
    normalized = bool(((pilot.norm(dim=1) - 1).abs() <= _UNIT_TOLERANCE).all())
    best: tuple[float, PlannedVectors] | None = None
    nearest: PlannedVectors | None = None
    for planned in _candidates(fitted, pilot[held], request.encoding, normalized, limit):
        if nearest is None or planned.fidelity.one_minus_cosine < nearest.fidelity.one_minus_cosine:
            nearest = planned
        if request.fidelity is None and request.encoding not in ("auto", "klt"):
            return planned
        size = planned.bytes_per_row
        if planned.basis is not None and n_rows is not None:
            size += _BASIS_BYTES * 4 * planned.basis.axes.numel() / n_rows
        if _is_within(planned.fidelity, limit) and (best is None or size < best[0]):
            best = size, planned
    if best is not None:
        return best[1]
    if nearest is None:
        raise UsageError(
            f"float16 cannot hold the vectors, whose largest number is {float(pilot.abs().max()):.3g}",
            "set the output's encoding to auto, float32 or klt",
        )
    raise UsageError(
        f"encoding {request.encoding} is not within fidelity {limit:g}: 1 - cosine "
        f"{nearest.fidelity.one_minus_cosine:.2g}, relative squared error {nearest.fidelity.relative_error:.2g} "
        f"(allowed is {2 * limit:g}) on {nearest.fidelity.rows} held-out rows of the pilot",
        "raise the output's fidelity, set its encoding to auto or float32, or raise cache.pilot_rows",
    )


def scores_encoding(length: int) -> VectorEncoding:
    """Return the encoding of scores: float32, so exact."""
    return VectorEncoding(codec="float32", length=length, dtype="float32")


def vector_fidelity(true: Tensor, decoded: Tensor, center: Tensor | None = None) -> VectorFidelity:
    """Return the errors of decoded vectors [B, D] against the true ones [B, D].

    Args:
        true: the teacher's vectors.
        decoded: from their rows.
        center: [D], the mean of the teacher's vectors; None for that of `true`.
    """
    true, decoded = true.double(), decoded.double().to(true.device)
    center = true.mean(dim=0) if center is None else center.double()
    # Between two zero vectors the cosine is 0 by torch's definition, and nothing was lost.
    cosine = torch.where((true == decoded).all(dim=1), 1.0, functional.cosine_similarity(true, decoded, dim=1))
    squared = float((true - decoded).square().sum())
    spread = float((true - center).square().sum()) or float(true.square().sum())  # of vectors that are all the same
    return VectorFidelity(
        rows=len(true),
        one_minus_cosine=round(max(float((1 - cosine).mean()), 0.0), 10),
        relative_error=round(squared / spread if spread else float(squared > 0), 10),
    )


def _is_within(fidelity: VectorFidelity, limit: float) -> bool:
    return fidelity.one_minus_cosine <= limit and fidelity.relative_error <= 2 * limit


def _candidates(
    fitted: Tensor,
    held: Tensor,
    codec: Literal["auto", "klt", "int8", "float16", "float32"],
    normalized: bool,
    limit: float,
) -> Iterator[PlannedVectors]:
    """Measure the encodings that a request allows; of klt the steps around the largest one within the limit."""
    length, center = held.shape[1], fitted.mean(dim=0)

    def measured(encoding: VectorEncoding, basis: VectorBasis | None = None) -> PlannedVectors:
        rows = encode_vectors(held, encoding, basis)
        fidelity = vector_fidelity(held, decode_vectors(rows, encoding, basis), center)
        return PlannedVectors(encoding, basis, fidelity, zarr_store.bytes_per_row(encoding, rows))

    for plain in ("int8", "float16", "float32"):
        fits = plain != "float16" or bool(torch.cat([fitted, held]).abs().max() < torch.finfo(torch.float16).max)
        if codec in (plain, "auto") and fits:
            # Rounding to float32 loses nothing: dividing by the length would.
            divided = normalized and plain != "float32"
            yield measured(VectorEncoding(codec=plain, length=length, dtype=plain, normalized=divided))
    if codec not in ("klt", "auto"):
        return
    basis, _ = fit_basis(fitted)
    coordinates = (torch.cat([fitted, held]) - basis.mean) @ basis.axes.T
    # Axes in which the fitted rows do not vary are needed for others, if there are fewer rows than axes.
    deviations = coordinates.square().mean(dim=0).sqrt()
    varying = deviations[deviations > deviations.max() * _ROUNDING]
    if not len(varying):
        return  # all vectors are the same: int8 and float16 store them in a byte or two

    def at(factor: float) -> PlannedVectors:
        step = float(torch.tensor(factor * float(varying.median()), dtype=torch.float32))
        rounded = (coordinates / step).round()
        used = (rounded != 0).double().mean(dim=0) > _RARELY
        count = int(used.nonzero().max()) + 1 if used.any() else 1
        encoding = VectorEncoding(
            codec="klt",
            length=length,
            dtype="int8" if float(rounded.abs().max()) <= _LARGEST_INT8 else "int16",
            components=count,
            step=step,
            normalized=normalized,
        )
        return measured(encoding, VectorBasis(basis.axes[:count].contiguous(), basis.mean))

    for factor in _STEPS:
        planned = at(factor)
        yield planned
        if _is_within(planned.fidelity, limit):
            yield from (at(factor * finer) for finer in _FINER_STEPS if factor < _STEPS[0])
            return
