"""Choose the encoding of a teacher's rows: the cheapest one within a fidelity.

A pilot of a few thousand rows is split: the basis is fitted to three quarters, and every candidate (k, R, step) is
encoded, decoded and measured on the rest. The cheapest in compressed bytes whose mean total variation is within the
target at T = 1, 2 and 4 wins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kdcache.cache.fidelity import TEMPERATURES, total_variation
from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import decode, encode, stated_classes
from kdcache.cache.format.encoding import Encoding, Fidelity, Request
from kdcache.cache.format.tail_basis import TailBasis, choose_scale, fit_coordinates, principal_components
from kdcache.errors import UsageError

FEW_CLASSES = 64
"""With at most this many classes, all are kept: exact, and smaller than a head with indices, statistics and a tail."""

MIN_CLASSES = 2
USUAL_FIDELITY = 0.02
MEASURED_AT = (1, 2, 4)
_HEADS = (1, 2, 4, 8, 16, 32)
_RANKS = (8, 16, 32, 48, 64, 80, 96, 128)
_LARGER_RANKS = (192, 256, 384)
"""Ranks that are tried only if none of `_RANKS` is within the target: every one takes long to fit and to measure."""

_STEPS = (1.2, 0.8, 0.6, 0.4, 0.2, 0.1)


@dataclass(frozen=True)
class Candidate:
    """An encoding and what was measured with it.

    Attributes:
        encoding: of the rows.
        step: quantization step of the tail's coordinates, in logits; 0 without a `lowrank` tail.
        bytes_per_row: compressed, on the held-out rows, without the basis.
        total_variation: mean over the held-out rows, by temperature.
        basis: of the tail.
    """

    encoding: Encoding
    step: float
    bytes_per_row: float
    total_variation: dict[int, float]
    basis: TailBasis | None

    @property
    def worst(self) -> float:
        """Largest mean total variation at T = 1, 2, 4: what a fidelity target bounds."""
        return max(self.total_variation[t] for t in MEASURED_AT)


@dataclass(frozen=True)
class Choice:
    """The chosen candidate and all measured ones.

    Attributes:
        chosen: the cheapest candidate within the target.
        tried: all candidates, in the order in which they were measured.
        held_out: number of rows on which they were measured.
    """

    chosen: Candidate
    tried: list[Candidate]
    held_out: int

    @property
    def fidelity(self) -> Fidelity:
        """The measured fidelity, for the manifest."""
        variation = {str(t): round(value, 8) for t, value in self.chosen.total_variation.items()}
        return Fidelity(rows=self.held_out, total_variation=variation)


def pilot_ids(samples: int, rows: int, seed: int = 0) -> list[int]:
    """Return the ordinals of a pilot, ascending: one random sample of each of `rows` equal parts of the data set."""
    rows = min(rows, samples)
    drawn = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return ((torch.arange(rows, dtype=torch.float64) + drawn) * samples / rows).long().clamp_max(samples - 1).tolist()


def encoding_without_pilot(classes: int, request: Request) -> Encoding | None:
    """Return the encoding if every class is kept, which needs no pilot; None if the encoding depends on one.

    Raises:
        UsageError: if the request is invalid.
    """
    if classes < MIN_CLASSES:
        raise UsageError("a teacher of one class cannot be distilled", "use a data set of two classes or more")
    if isinstance(request.top_k, int) and request.top_k > classes:
        raise UsageError(
            f"top_k {request.top_k} is larger than the number of classes, {classes}",
            "set cache.top_k to a smaller number, to all, or to auto",
        )
    few = classes <= FEW_CLASSES or request.dtype == "uint8"
    if request.top_k in ("all", classes) or (request.top_k == "auto" and few):
        return Encoding(num_classes=classes, top_k=classes, tail="none", dtype=request.dtype)
    if request.dtype == "uint8":
        raise UsageError("dtype uint8 requires all classes", "set cache.top_k to all, or cache.dtype to float16")
    if request.tail == "uniform" and request.top_k == "auto":
        raise UsageError(
            "tail uniform requires a value of top_k", "set cache.top_k to a number, or cache.tail to lowrank"
        )
    return None


def plan_encoding(logits: Tensor, labels: Tensor, request: Request) -> Choice:
    """Choose the encoding of a teacher's rows, if not every class is kept.

    Args:
        logits: [P, C] float32, of the pilot, on any device.
        labels: [P] int64, -1 if unknown.
        request: settings of the user.

    Raises:
        UsageError: if no candidate is within the requested fidelity; names the best one.
    """
    held = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    held[::4] = True
    fitted = ~held if len(logits) > 1 else held
    bench = _Bench(logits[fitted], labels[fitted], logits[held], labels[held], request)
    tried: list[Candidate] = []
    cheapest: Candidate | None = None
    for candidate in bench.candidates():
        tried.append(candidate)
        within = not bench.is_planned or candidate.worst <= bench.target
        if within and (cheapest is None or candidate.bytes_per_row < cheapest.bytes_per_row):
            cheapest = candidate
            bench.bound = candidate.bytes_per_row
    best = min(tried, key=lambda candidate: candidate.worst)
    if cheapest is None and request.fidelity is not None:
        raise UsageError(
            f"no encoding with these settings is within a fidelity of {request.fidelity}; the best one, "
            f"{described(best)}, has {best.worst:.4f}",
            "set cache.top_k to auto, or cache.fidelity to a larger value",
        )
    return Choice(cheapest or best, tried, int(held.sum()))


def described(candidate: Candidate) -> str:
    """Describe a candidate in a few words."""
    encoding = candidate.encoding
    if encoding.dense:
        return f"every class, {encoding.dtype}"
    tail = f"rank {encoding.rank}, step {candidate.step:g}" if encoding.rank else "uniform tail"
    return f"top {encoding.top_k}, {tail}"


class _Bench:
    """Fits, encodes and measures candidates on the two parts of a pilot."""

    def __init__(self, fitted: Tensor, fitted_labels: Tensor, held: Tensor, held_labels: Tensor, request: Request):
        self.fitted, self.fitted_labels = fitted.float(), fitted_labels
        self.held, self.held_labels = held.float(), held_labels
        self.request = request
        self.classes = held.shape[1]
        self.target = request.fidelity or USUAL_FIDELITY
        self.bound = math.inf
        """Bytes per row of the cheapest candidate within the target: larger ones need not be measured."""

    @cached_property
    def components(self) -> tuple[Tensor, Tensor]:
        """The principal components; each rank uses the first ones, as the decomposition is the expensive part."""
        return principal_components(self.fitted, min(*self.fitted.shape, self.request.rank or _LARGER_RANKS[-1]))

    @property
    def is_planned(self) -> bool:
        """Whether the target decides; not if the user has set the tail or its rank."""
        return self.request.tail == "lowrank" and self.request.rank is None

    def candidates(self) -> Iterator[Candidate]:
        """Yield the candidates that the request allows."""
        request = self.request
        if request.tail == "uniform" and isinstance(request.top_k, int):
            yield self.measure(request.top_k, "uniform", request.dtype)
            return
        if request.top_k == "auto":
            yield self.measure(self.classes, "none", request.dtype)
            if request.dtype == "float16":
                yield self.measure(self.classes, "none", "uint8")
        heads = (request.top_k,) if isinstance(request.top_k, int) else _HEADS
        ranks = _RANKS if request.rank is None else (request.rank,)
        steps = _STEPS if request.rank is None else (0.2,)
        every_class = self.bound
        for top_k in heads:
            yield from self._with_head(top_k, ranks, steps)
        has_more = min(self.classes, len(self.fitted)) > _RANKS[-1]
        if request.top_k == "auto" and request.rank is None and self.bound == every_class and has_more:
            for top_k in heads:
                yield from self._with_head(top_k, _LARGER_RANKS, steps)

    def _with_head(self, top_k: int, ranks: tuple[int, ...], steps: tuple[float, ...]) -> Iterator[Candidate]:
        """Yield candidates with one k, by rank, each with finer steps until the next one would gain too little."""
        largest = min(self.classes - top_k, len(self.fitted))
        if largest < 1:
            return
        stated = stated_classes(self.fitted, self.fitted_labels, top_k)
        components, mean = self.components
        for rank in sorted({min(rank, largest) for rank in ranks}):
            basis = components[:rank]
            coordinates = fit_coordinates(self.fitted, stated, basis, mean)
            before = math.inf
            for step in steps:
                fitted = TailBasis(basis, mean, choose_scale(coordinates, step))
                candidate = self.measure(top_k, "lowrank", self.request.dtype, fitted, step)
                yield candidate
                # A finer step takes more bytes; if the last one gained little, the rank is too low.
                too_large, gained = candidate.bytes_per_row >= self.bound, candidate.worst < 0.98 * before
                if candidate.worst <= self.target or too_large or not gained:
                    break
                before = candidate.worst
            if step == steps[0] and candidate.bytes_per_row >= self.bound:
                return  # a higher rank is larger still

    def measure(
        self, top_k: int, tail: str, dtype: str, basis: TailBasis | None = None, step: float = 0.0
    ) -> Candidate:
        """Encode and decode the held-out rows, and measure size and error."""
        encoding = Encoding.model_validate(
            {
                "num_classes": self.classes,
                "top_k": top_k,
                "tail": tail,
                "rank": len(basis.scale) if basis is not None else 0,
                "dtype": dtype,
            }
        )
        rows = encode(self.held, self.held_labels, encoding, basis)
        decoded = decode(rows, self.held_labels, encoding, basis)
        variation = {t: float(total_variation(self.held, decoded, t).mean()) for t in TEMPERATURES}
        on_cpu = basis.to("cpu") if basis is not None else None
        return Candidate(encoding, step, zarr_store.bytes_per_row(encoding, rows), variation, on_cpu)
