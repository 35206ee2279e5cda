"""Records of outputs at places `grid`: numbers at every place of a map (docs/FORMAT.md, section 13)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdcache.cache.format.encoding import Record, Size

LARGEST_MAP = 2**28
"""Numbers of a decoded map at most, in float32 a GiB (docs/FORMAT.md, section 13.1)."""

_LARGEST_CHUNK = 2**31
"""Bytes of a chunk before compression, at least one fewer (docs/FORMAT.md, section 3)."""

_BYTES = {"int8": 1, "int16": 2, "float16": 2, "float32": 4}

Compression = Literal["fast", "small"]

GridCodec = Literal["steps", "klt", "float16", "float32"]


class GridEncoding(Record):
    """How a map [C, h, w] becomes a row of planes [W, h, w].

    Attributes:
        codec: "steps" (numbers rounded to multiples of one step, as differences between neighboring places), "klt"
            (the same of the principal coordinates of each place), "float16" or "float32".
        channels: C, numbers per place.
        height: h.
        width: w.
        dtype: type of the stored numbers; int8 or int16 for steps and klt.
        components: R, number of principal coordinates of klt; else 0.
        step: quantization step of steps and klt, in the unit of the numbers; else None.
        level: whether the numbers of a place are stored as they are; if not, their mean is 0.
        normalized: whether the vector of a place is divided by its length, since those of the teacher have length 1.
        compression: "fast" or "small", the effort of the compressor.
    """

    codec: GridCodec
    channels: Annotated[int, Field(ge=1, le=2**24)]
    height: Annotated[int, Field(ge=1, le=2**16)]
    width: Annotated[int, Field(ge=1, le=2**16)]
    dtype: Literal["int8", "int16", "float16", "float32"]
    components: Annotated[int, Field(ge=0)] = 0
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    level: bool = True
    normalized: bool = False
    compression: Compression = "fast"

    @model_validator(mode="after")
    def _agrees(self) -> GridEncoding:
        rounded = self.codec in ("steps", "klt")
        if self.dtype not in (("int8", "int16") if rounded else (self.codec,)):
            raise ValueError(f"dtype {self.dtype} is invalid for the codec {self.codec}")
        if (self.components > 0) != (self.codec == "klt") or self.components > self.channels:
            raise ValueError(f"{self.components} components are invalid for the codec {self.codec} of {self.channels}")
        if (self.step is not None) != rounded:
            raise ValueError("step belongs to the codecs steps and klt, which need it")
        if self.channels * self.height * self.width > LARGEST_MAP:
            raise ValueError(
                f"a map of {self.channels} x {self.height} x {self.width} numbers is larger than {LARGEST_MAP:,}"
            )
        return self

    @property
    def planes(self) -> int:
        """Number of stored planes per row, W."""
        return self.components or self.channels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a decoded map, [C, h, w]."""
        return self.channels, self.height, self.width

    @property
    def places(self) -> int:
        """Number of places of a map."""
        return self.height * self.width


def check_chunks(chunk_rows: int, encodings: Iterable[object]) -> None:
    """Check that a chunk of maps has less than 2 GiB, the most that can be compressed at once.

    Raises:
        ValueError: with the size of the first larger one.
    """
    for encoding in encodings:
        if isinstance(encoding, GridEncoding):
            size = chunk_rows * encoding.planes * encoding.places * _BYTES[encoding.dtype]
            if size >= _LARGEST_CHUNK:
                raise ValueError(f"a chunk of {chunk_rows} maps has {size:,} bytes, and chunks have less than 2 GiB")


class GridRequest(Record):
    """The user's request from which the encoding of a map was planned.

    Attributes:
        encoding: a codec, or "auto": the smallest within `fidelity`.
        fidelity: largest error on held-out maps of the pilot; None for a codec without a plan.
        over_places: whether distributions over the places of a channel are to be kept as well.
        compression: "fast" or "small", the effort of the compressor.
    """

    encoding: Literal["auto"] | GridCodec
    fidelity: Annotated[float, Field(gt=0, lt=1)] | None
    over_places: bool
    compression: Compression = "fast"


class GridFidelity(Record):
    """Fidelity of decoded maps, measured on maps of the pilot that the basis was not fitted to.

    Attributes:
        maps: number of these maps.
        total_variation: mean over the places of the total variation between decoded and true softmax over the
            channels, at T = 1; None unless the output is of kind `classes`.
        over_places: mean over the channels of the total variation between decoded and true softmax over the places, at
            T = 1; None if it was not asked for.
        one_minus_cosine: mean over the places of 1 - cosine between decoded and true vectors; of vectors alone.
        relative_error: sum of squared errors by the sum of squared distances of the true vectors from their mean; of
            vectors and scores.
    """

    maps: Size
    total_variation: float | None = None
    over_places: float | None = None
    one_minus_cosine: float | None = None
    relative_error: float | None = None
