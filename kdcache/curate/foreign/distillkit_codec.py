"""The codec of DistillKit: log-probabilities of the top k as a few exact values, a polynomial and residuals.

Of a position, bytes follow one another, floats in little-endian order:

    exact_k values (exact_dtype), coefficients (term_dtype), per bin: scale (scale_dtype), packed residuals

Value exact_k + t is the polynomial at t, which counts from 0, or from 0 to 1 with `normalize_t`, plus the residual, if
a bin has one. With `delta_encoding` all but the first are differences to the one before. Packed numbers follow one
another without gaps, the most significant bit first, up to the next byte; so do the tokens, of ceil(log2 d) bits each.

Source: arcee-ai/DistillKit@a61c2e7, distillkit/compression: `DistributionQuantizationConfig`,
`decompress_monotonic_logprobs`, `unpack_from_bytes`, `LogprobCompressor`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from kdcache.config.section import Section, validated
from kdcache.config.yaml_lines import read_yaml
from kdcache.errors import UsageError

Float = Literal["float16", "bfloat16", "float32", "float64"]

_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}

_TERMS = {"sqrt": torch.sqrt, "exp": torch.exp}

Bytes = npt.NDArray[np.uint8]

_SECTIONS = ("teacher", "logprob_compressor")
"""Where a training configuration of DistillKit has the codec."""

_MOST_BITS = 62
"""Bits of a packed number, so that it is an int64 with its sign."""


class ResidualBin(Section):
    """Quantized residuals of a few values that follow one another."""

    scale_dtype: Float
    """Type of the scale."""
    element_bits: Annotated[int, Field(ge=1, le=_MOST_BITS)]
    """Bits per residual."""
    num_elements: Annotated[int, Field(ge=1)]
    """Number of values."""


class DistillKitCodec(Section):
    """`logprob_compressor` of DistillKit, with the defaults that it has there."""

    d: Annotated[int, Field(ge=2, le=2**31)]
    """Size of the vocabulary."""
    k: Annotated[int, Field(ge=1)]
    """Tokens per position."""
    exact_k: Annotated[int, Field(ge=0)]
    """Values that are stored as floats."""
    exact_dtype: Float = "float32"
    """Type of these."""
    polynomial_terms: list[Literal["sqrt", "exp"] | Annotated[int, Field(ge=0)]] | None = None
    """Powers, or functions, whose sum approximates the other values."""
    term_dtype: Float = "float32"
    """Type of the coefficients."""
    residual_bins: list[ResidualBin]
    """Residuals of the first of the other values."""
    delta_encoding: bool = True
    """Whether values are stored as differences."""
    error_diffusion: bool = False
    """How residuals were rounded; they are read in the same way."""
    normalize_t: bool = False
    """Whether the polynomial is of 0 to 1."""

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        others = self.k - self.exact_k
        if self.k > self.d:
            yield ("k", "d"), f"k is {self.k}, and d {self.d}"
        elif others < 0:
            yield ("exact_k", "k"), f"exact_k is {self.exact_k}, and k {self.k}"
        elif sum(one.num_elements for one in self.residual_bins) > others:
            yield ("residual_bins", "k", "exact_k"), f"the bins have more elements than the {others} that are not exact"
        elif others and not (self.polynomial_terms or self.residual_bins):
            yield ("polynomial_terms",), "nothing describes the values that are not exact"

    @property
    def index_bits(self) -> int:
        """Bits per token, from float32 as there."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def log_prob_bytes(self) -> int:
        """Bytes per position of the log-probabilities."""
        bins = sum(_size(one.scale_dtype) + _packed(one.num_elements, one.element_bits) for one in self.residual_bins)
        terms = len(self.polynomial_terms or ()) * _size(self.term_dtype)
        return self.exact_k * _size(self.exact_dtype) + terms + bins

    @property
    def index_bytes(self) -> int:
        """Bytes per position of the tokens."""
        return _packed(self.k, self.index_bits)

    @property
    def sure(self) -> int:
        """How many of the log-probabilities of a position can be relied on: k, or `exact_k`.

        DistillKit fits polynomials in float32. Where the condition number of the powers is beyond what float32
        resolves, the fit is wrong: with the configuration that its README recommends, by 5 nats at the last tokens.
        """
        if not self.polynomial_terms or not self.exact_k:
            return self.k
        singular = np.linalg.svd(self._powers(torch.float64).numpy(), compute_uv=False)
        is_resolved = len(singular) and singular[-1] > singular[0] * np.finfo(np.float32).eps
        return self.k if is_resolved else self.exact_k

    def tokens(self, packed: Bytes) -> Tensor:
        """Return the tokens of positions, [n, W] bytes -> [n, k] int64."""
        return torch.from_numpy(_unpacked(packed, self.index_bits, self.k))

    def log_probs(self, stored: Bytes) -> Tensor:
        """Return the log-probabilities of positions, [n, W] bytes -> [n, k] float32."""
        reader = _Reader(stored)
        exact = reader.floats(self.exact_k, self.exact_dtype).float()
        count = self.k - self.exact_k
        values = torch.zeros(len(stored), count)
        if self.polynomial_terms:
            coefficients = reader.floats(len(self.polynomial_terms), self.term_dtype)
            # In that type, since the residuals are those of what it gives.
            values += (self._powers(_DTYPES[self.term_dtype]) * coefficients.unsqueeze(1)).sum(dim=2).float()
        start = 0
        for one in self.residual_bins:
            scale = reader.floats(1, one.scale_dtype).float()
            steps = torch.from_numpy(reader.integers(one.num_elements, one.element_bits)).float()
            steps = steps * 2 - 1 if one.element_bits == 1 else steps - 2 ** (one.element_bits - 1)
            values[:, start : start + one.num_elements] += steps * scale
            start += one.num_elements
        stated = torch.cat([exact, values], dim=1)
        return stated.cumsum(dim=1) if self.delta_encoding else stated

    def _powers(self, dtype: torch.dtype) -> Tensor:
        """Return the terms of the polynomial at each value, [k - exact_k, terms]."""
        count = self.k - self.exact_k
        points = torch.linspace(0, 1, count, dtype=dtype) if self.normalize_t else torch.arange(count, dtype=dtype)
        terms = self.polynomial_terms or []
        return torch.stack([points**term if isinstance(term, int) else _TERMS[term](points) for term in terms], dim=1)


def read_codec(path: Path) -> DistillKitCodec:
    """Return the codec in a YAML file: that of a training configuration, or `compression_config.yaml` of the sampler.

    Raises:
        UsageError: if the file is not there, or does not describe a codec.
    """
    if not path.is_file():
        raise UsageError(f"file not found: {path}", "pass --codec, a YAML file with DistillKit's logprob_compressor")
    try:
        given, _ = read_yaml(path.read_text(), str(path))
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text", "pass a YAML file with DistillKit's logprob_compressor") from None
    for name in _SECTIONS:
        if isinstance(given, dict) and isinstance(given.get(name), dict):
            given = given[name]
    return validated(DistillKitCodec, given, f"the codec of {path}")


class _Reader:
    """Bytes of positions, read from left to right.

    Args:
        stored: [n, W].
    """

    def __init__(self, stored: Bytes) -> None:
        self._stored, self._begin = stored, 0

    def floats(self, count: int, name: Float) -> Tensor:
        """Return the next floats, [n, count]."""
        width = count * _size(name)
        part = self._next(width).copy()
        return torch.from_numpy(part).view(_DTYPES[name]) if width else torch.empty(len(part), 0, dtype=_DTYPES[name])

    def integers(self, count: int, bits: int) -> npt.NDArray[np.int64]:
        """Return the next packed numbers, [n, count]."""
        return _unpacked(self._next(_packed(count, bits)), bits, count)

    def _next(self, width: int) -> Bytes:
        self._begin += width
        return self._stored[:, self._begin - width : self._begin]


def _size(name: Float) -> int:
    """Return the bytes of a float."""
    size: int = _DTYPES[name].itemsize
    return size


def _packed(count: int, bits: int) -> int:
    """Return the bytes of packed numbers."""
    return -(-count * bits // 8)


def _unpacked(packed: Bytes, bits: int, count: int) -> npt.NDArray[np.int64]:
    """Return packed numbers, [n, W] bytes -> [n, count]."""
    stream = np.unpackbits(packed, axis=1, count=count * bits).reshape(len(packed), count, bits)
    numbers = np.zeros((len(packed), count), np.int64)
    for bit in range(bits):
        numbers <<= 1
        numbers |= stream[:, :, bit]
    return numbers
