"""Records of how logits become rows: encoding, request, and measured fidelity (docs/FORMAT.md, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

STATISTICS = ("label_log_prob", "logit_mean", "logit_std", "entropy")

TAIL_TEMPERATURES = (1, 2, 4, 8)
"""Temperatures at which the mass of the tail is stored (docs/FORMAT.md, section 4.2)."""

TAIL_STATISTICS = tuple(f"tail_log_mass_t{t}" for t in TAIL_TEMPERATURES)

RANGE_STATISTICS = ("log_prob_max", "log_prob_range")

Size = Annotated[int, Field(ge=0, le=2**62)]

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Record(BaseModel):
    """A part of a plan or a manifest: exact types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other values, which are not validated; names that are not fields raise TypeError."""
        if unknown := set(update or {}) - set(type(self).model_fields):
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        return super().model_copy(update=update, deep=deep)


class Encoding(Record):
    """How logits [C] become a row.

    Attributes:
        num_classes: C.
        top_k: k, number of classes that are stored individually; k = C stores all, in class order without indices.
        tail: representation of the other classes; "none" if k = C.
        rank: R, number of coordinates of a `lowrank` tail; else 0.
        dtype: type of the log-probabilities; uint8 only if k = C.
    """

    num_classes: Annotated[int, Field(ge=2, le=2**31)]
    top_k: Annotated[int, Field(ge=1)]
    tail: Literal["none", "uniform", "lowrank"]
    rank: Annotated[int, Field(ge=0)] = 0
    dtype: Literal["uint8", "float16", "float32"]

    @model_validator(mode="after")
    def _agrees(self) -> Encoding:
        if self.top_k > self.num_classes:
            raise ValueError(f"top_k {self.top_k} is larger than the number of classes, {self.num_classes}")
        if self.dense != (self.tail == "none"):
            raise ValueError("the tail must be 'none' if every class is stored, and only then")
        if (self.rank > 0) != (self.tail == "lowrank") or self.rank > self.num_classes:
            raise ValueError(f"rank {self.rank} is invalid for a {self.tail} tail of {self.num_classes} classes")
        if self.dtype == "uint8" and not self.dense:
            raise ValueError("uint8 needs every class (top_k: all)")
        return self

    @property
    def dense(self) -> bool:
        """Whether every class is stored."""
        return self.top_k == self.num_classes

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the columns of the `statistics` array."""
        if self.dtype == "uint8":
            return STATISTICS + RANGE_STATISTICS
        return STATISTICS if self.dense else STATISTICS + TAIL_STATISTICS


class Request(Record):
    """The user's request from which the encoding was planned; fields as in `config.schema.CacheSpec`."""

    top_k: Annotated[int, Field(ge=1)] | Literal["all", "auto"]
    tail: Literal["uniform", "lowrank"]
    rank: Annotated[int, Field(ge=1)] | None
    fidelity: Annotated[float, Field(gt=0, lt=1)] | None
    dtype: Literal["uint8", "float16", "float32"]
    pilot_rows: Annotated[int, Field(ge=1)]


class Fidelity(Record):
    """Fidelity measured on pilot rows that the basis was not fitted to.

    Attributes:
        rows: number of these rows.
        total_variation: mean total variation between decoded and true softmax, by temperature.
    """

    rows: Size
    total_variation: dict[str, float]
