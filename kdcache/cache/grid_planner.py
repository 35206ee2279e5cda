"""Choose the encoding of a teacher's maps: the smallest one within a fidelity.

The axes of the codec klt are fitted to the places of three quarters of the pilot's maps, and the candidates are
measured on the others: whole maps, since the differences between neighboring places are what is stored. The errors
grow with the step, so the largest step within the fidelity is found by bisection.

A fidelity of f bounds, of classes, the mean total variation per place at T = 1 by f; of vectors and scores it bounds
what `vector_planner.py` says, with places in place of samples. Where distributions over the places of a channel are to
be kept (`over_places`), their mean total variation is bounded by f too, which takes a step several times smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdcache.cache.fidelity import total_variation
from kdcache.cache.format import zarr_store
from kdcache.cache.format.grid_codec import coordinates_of, decode_grids, encode_grids
from kdcache.cache.format.grid_encoding import GridEncoding, GridFidelity, GridRequest
from kdcache.cache.format.vector_rows import VectorBasis
from kdcache.cache.vector_planner import USUAL_VECTOR_FIDELITY, vector_fidelity
from kdcache.errors import UsageError

USUAL_CLASS_FIDELITY = 0.005
"""Largest mean total variation per place, if the user does not say another."""

Kind = Literal["classes", "vector", "score"]

_PILOT_NUMBERS, PILOT_MAPS = 2**25, 128
"""Numbers, and maps, of a pilot at most, but at least four maps: their places are many more rows than they are maps."""

_FITTED_PLACES = 2**16
"""Places that axes are fitted to at most."""

_MEASURED_NUMBERS = 2**20
"""Numbers of the held-out maps that are compressed to measure a size."""

_EXPONENTS = range(-384, 97)
"""Steps that are tried are 2^(n / 32) of the deviation of the numbers, for n of this range."""

_LARGEST_INT8 = 100
"""Largest magnitude on the pilot of numbers that are stored as int8: other maps may have larger ones."""

_RARELY = 1 / 512
"""Share of the places in which an axis must round to something but 0 to be stored."""

_PAYS = 0.95
"""Size of the codec klt, relative to steps, up to which it is chosen: decoding it takes longer."""

_UNIT_TOLERANCE = 1e-3
"""Largest deviation from 1 of the length of vectors that are taken for normalized."""


@dataclass(frozen=True)
class PlannedGrids:
    """An encoding of maps and what was measured with it.

    Attributes:
        encoding: of the rows.
        basis: of the codec klt, on the CPU; else None.
        fidelity: on the held-out maps.
        bytes_per_row: compressed, on held-out maps, without the basis.
    """

    encoding: GridEncoding
    basis: VectorBasis | None
    fidelity: GridFidelity
    bytes_per_row: float


def pilot_stride(maps: int, numbers: int) -> int:
    """Return the distance of the maps of a pilot that are kept to plan an encoding, of so many numbers each."""
    most = min(max(_PILOT_NUMBERS // numbers, 4), PILOT_MAPS)
    return -(-maps // most)


def plan_grids(
    pilot: Tensor, kind: Kind, request: GridRequest, n_rows: int | None = None, *, level_known: bool = True
) -> PlannedGrids:
    """Choose the encoding of a teacher's maps.

    Args:
        pilot: [P, C, h, w] float32, finite, on any device.
        kind: of the output.
        request: settings of the user.
        n_rows: rows of the cache, over which the size of the axes is divided; None to leave it out.
        level_known: whether class logits are known exactly, not only up to a constant per place.

    Raises:
        UsageError: if the requested codec cannot hold the maps, or is not within the fidelity; or distributions over
            places are to be kept of logits whose level is not known.
    """
    if request.over_places and not level_known:
        raise UsageError(
            "it is probabilities, from which logits are known up to a constant per place, and over_places compares the "
            "logits of different places",
            "let the teacher return logits, or remove over_places",
        )
    bench = _Bench(pilot.float().cpu(), kind, request)
    if request.encoding in ("float16", "float32") and request.fidelity is None:
        bench.check_range(request.encoding)
        return bench.plain(request.encoding)
    if kind == "score" and request.encoding == "auto":
        return bench.plain("float32")
    best: tuple[float, PlannedGrids] | None = None
    nearest: PlannedGrids | None = None
    for planned in bench.candidates():
        if not bench.is_within(planned.fidelity):
            nearest = nearest or planned
            continue
        size = planned.bytes_per_row
        if planned.basis is not None:
            size = (size + 4 * planned.basis.axes.numel() / (n_rows or float("inf"))) / _PAYS
        if best is None or size < best[0]:
            best = size, planned
    if best is not None:
        return best[1]
    if nearest is None:
        bench.check_range("float16")
        raise UsageError(
            f"the maps are the same everywhere, and encoding {request.encoding} has no step for them",
            "set the output's encoding to auto or float32",
        )
    raise UsageError(
        f"encoding {request.encoding} is not within fidelity {bench.limit:g}: {described(nearest.fidelity)} on "
        f"{nearest.fidelity.maps} held-out maps of the pilot",
        "raise the output's fidelity, or set its encoding to auto or float32",
    )


def described(fidelity: GridFidelity) -> str:
    """Return the measured errors of maps, in words."""
    measured = {
        "total variation {:.4f} per place at T = 1": fidelity.total_variation,
        "total variation {:.4f} over the places at T = 1": fidelity.over_places,
        "1 - cosine {:.2g}": fidelity.one_minus_cosine,
        "relative squared error {:.2g}": fidelity.relative_error,
    }
    return ", ".join(text.format(value) for text, value in measured.items() if value is not None)


def grid_fidelity(
    true: Tensor, decoded: Tensor, kind: Kind, over_places: bool = False, center: Tensor | None = None
) -> GridFidelity:
    """Return the errors of decoded maps [B, C, h, w] against the true ones [B, C, h, w].

    Args:
        true: the teacher's maps.
        decoded: from their rows.
        kind: of the output.
        over_places: whether to compare the distributions over the places of a channel.
        center: [C], the mean of the teacher's vectors; None for that of `true`.
    """
    spread = None
    if over_places:
        variation = sum(float(total_variation(*_channels(pair), 1).sum()) for pair in _each(true, decoded))
        spread = round(variation / (len(true) * true.shape[1]), 8)
    if kind == "classes":
        variation = sum(float(total_variation(*_places(pair), 1).sum()) for pair in _each(true, decoded))
        count = len(true) * true.shape[2] * true.shape[3]
        return GridFidelity(maps=len(true), total_variation=round(variation / count, 8), over_places=spread)
    rows, again = _places((true, decoded))
    found = vector_fidelity(rows, again, center)
    return GridFidelity(
        maps=len(true),
        over_places=spread,
        one_minus_cosine=found.one_minus_cosine if kind == "vector" else None,
        relative_error=found.relative_error,
    )


def _one_by_one(maps: Tensor) -> Iterator[Tensor]:
    """Yield maps one by one, [1, C, h, w] each, so that measuring takes little memory."""
    return (maps[index : index + 1] for index in range(len(maps)))


def _each(true: Tensor, decoded: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(_one_by_one(true), _one_by_one(decoded), strict=True)


def _places(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return maps [B, C, h, w] as the rows of their places, [B h w, C]."""
    first, second = (maps.movedim(1, 3).flatten(0, 2) for maps in pair)
    return first, second


def _channels(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return maps [B, C, h, w] as the rows of their channels, [B C, h w]."""
    first, second = (maps.flatten(2).flatten(0, 1) for maps in pair)
    return first, second


class _Range(NamedTuple):
    """How large the numbers are that are rounded.

    Attributes:
        largest: magnitude of all.
        usual: [W], magnitude of each plane that is exceeded in a share of the places of `_RARELY`.
    """

    largest: float
    usual: Tensor


def _some_places(maps: Tensor) -> Tensor:
    """Return some of the places of maps [B, C, h, w], spread over all of them, [P, C]."""
    stride = -(-len(maps) * maps.shape[2] * maps.shape[3] // _FITTED_PLACES)
    # An odd distance meets all columns.
    return maps.movedim(1, 3).flatten(0, 2)[:: stride | 1]


class _Bench:
    """The maps of a pilot, on which encodings are measured."""

    def __init__(self, pilot: Tensor, kind: Kind, request: GridRequest) -> None:
        held = torch.zeros(len(pilot), dtype=torch.bool)
        held[::4] = True
        self._pilot, self._held = pilot, pilot[held]
        self._fitted = pilot[~held] if len(pilot) > 1 else pilot
        self._kind, self._request = kind, request
        self._level = kind != "classes" or request.over_places
        self._center = self._fitted.mean(dim=(0, 2, 3))
        lengths = pilot.norm(dim=1) if kind == "vector" else torch.zeros(1)
        self._normalized = bool(((lengths - 1).abs() <= _UNIT_TOLERANCE).all())
        self.limit = request.fidelity or (USUAL_CLASS_FIDELITY if kind == "classes" else USUAL_VECTOR_FIDELITY)

    def check_range(self, codec: str) -> None:
        """Raise UsageError if float16 cannot hold the numbers."""
        if codec == "float16" and not self._fits_float16():
            raise UsageError(
                f"float16 cannot hold the maps, whose largest number is {float(self._pilot.abs().max()):.3g}",
                "set the output's encoding to auto, steps or float32",
            )

    def _fits_float16(self) -> bool:
        return bool(self._pilot.abs().max() < torch.finfo(torch.float16).max)

    def is_within(self, fidelity: GridFidelity) -> bool:
        """Return whether all errors that were measured are within the limit."""
        bounds = (
            (fidelity.total_variation, self.limit),
            (fidelity.over_places, self.limit),
            (fidelity.one_minus_cosine, self.limit),
            (fidelity.relative_error, 2 * self.limit),
        )
        return all(value is None or value <= bound for value, bound in bounds)

    def candidates(self) -> Iterator[PlannedGrids]:
        """Measure the encodings that the request allows; of those with a step the largest one within the limit."""
        asked = self._request.encoding
        for codec in ("steps", "klt"):
            if asked in (codec, "auto") and (codec == "steps" or self._held.shape[1] > 1):
                yield from self._stepped(codec)
        for plain in ("float16", "float32"):
            if asked in (plain, "auto") and (plain == "float32" or self._fits_float16()):
                yield self.plain(plain)

    def plain(self, codec: Literal["float16", "float32"]) -> PlannedGrids:
        """Measure numbers that are stored as they are."""
        # Rounding to float32 loses nothing: dividing by the length would.
        normalized = self._normalized and codec == "float16"
        return self._measured(self._encoding(codec=codec, dtype=codec, normalized=normalized), None)

    def _encoding(self, **settings: object) -> GridEncoding:
        _, channels, height, width = self._pilot.shape
        shape = {"channels": channels, "height": height, "width": width, "level": self._level}
        return GridEncoding.model_validate({**shape, "compression": self._request.compression, **settings})

    def _stepped(self, codec: Literal["steps", "klt"]) -> Iterator[PlannedGrids]:
        """Yield the largest step within the limit, or the smallest that is tried; nothing for equal maps."""
        places = _some_places(self._fitted)
        places = places if self._level else places - places.mean(dim=1, keepdim=True)
        deviation = float(places.std(dim=0, correction=0).square().mean().sqrt())
        if not deviation > 0:
            return
        basis = _fit_places(places) if codec == "klt" else None
        numbers = self._range_of_numbers(basis, places)
        below, above = _EXPONENTS.start, _EXPONENTS.stop
        while above - below > 1:
            middle = (below + above) // 2
            within = self.is_within(self._fidelity(*self._at(codec, deviation, middle, numbers, basis)))
            below, above = (middle, above) if within else (below, middle)
        yield self._measured(*self._at(codec, deviation, below, numbers, basis))

    def _range_of_numbers(self, basis: VectorBasis | None, places: Tensor) -> _Range:
        """Return how large the numbers are that are rounded; `places` [P, C] are some of those of the pilot."""
        largest = 0.0
        for maps in _one_by_one(self._pilot):
            numbers = maps if self._level else maps - maps.mean(dim=1, keepdim=True)
            numbers = numbers if basis is None else coordinates_of(numbers, basis)
            largest = max(largest, float(numbers.abs().max()))
        coordinates = places if basis is None else (places - basis.mean) @ basis.axes.T
        rank = max(int(len(places) * (1 - _RARELY)), 1)
        return _Range(largest, coordinates.abs().kthvalue(rank, dim=0).values)

    def _at(
        self, codec: str, deviation: float, exponent: int, numbers: _Range, basis: VectorBasis | None
    ) -> tuple[GridEncoding, VectorBasis | None]:
        """Return the encoding of a step, and its basis; `numbers` are those that are rounded."""
        step = float(torch.tensor(deviation * 2.0 ** (exponent / 32), dtype=torch.float32))
        kept = basis
        if basis is not None:
            used = numbers.usual > step / 2
            count = int(used.nonzero().max()) + 1 if used.any() else 1
            kept = VectorBasis(basis.axes[:count].contiguous(), basis.mean)
        encoding = self._encoding(
            codec=codec,
            dtype="int8" if numbers.largest / step <= _LARGEST_INT8 else "int16",
            components=0 if kept is None else len(kept.axes),
            step=step,
            normalized=self._normalized,
        )
        return encoding, kept

    def _fidelity(self, encoding: GridEncoding, basis: VectorBasis | None) -> GridFidelity:
        parts = [decode_grids(encode_grids(maps, encoding, basis), encoding, basis) for maps in _one_by_one(self._held)]
        decoded = torch.cat(parts)
        return grid_fidelity(self._held, decoded, self._kind, self._request.over_places, self._center)

    def _measured(self, encoding: GridEncoding, basis: VectorBasis | None) -> PlannedGrids:
        few = self._held[:: -(-self._held.numel() // _MEASURED_NUMBERS)]
        size = zarr_store.bytes_per_row(encoding, encode_grids(few, encoding, basis))
        return PlannedGrids(encoding, basis, self._fidelity(encoding, basis), size)


def _fit_places(places: Tensor) -> VectorBasis:
    """Return the principal axes [C, C] of places [P, C], by decreasing variance.

    The largest component of each axis is positive, so that the signs do not depend on the library.
    """
    rows = places.double()
    mean = rows.mean(dim=0)
    _, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean))
    axes = vectors.flip(1).T
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return VectorBasis((axes * torch.where(largest < 0, -1.0, 1.0)).float().contiguous(), mean.float())
