"""Records of how the next-token distributions of a language model become rows (docs/FORMAT.md, section 12)."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kdcache.cache.format.encoding import Record

TOKEN_TEMPERATURES = (1.0, 4 / 3, 2.0, 4.0)
"""Temperatures at which the mass outside the head is stored (docs/FORMAT.md, section 12.3)."""

_MASS_NAMES = {1.0: "tail_log_mass_t1", 4 / 3: "tail_log_mass_t4/3", 2.0: "tail_log_mass_t2", 4.0: "tail_log_mass_t4"}

MOST_DRAWS = 255
"""Draws per row at most: their counts are uint8 (docs/FORMAT.md, section 12.2)."""

TokenTail = Literal["lowrank", "ghost", "draws"]


class TokenEncoding(Record):
    """How the distribution of the next token, over V tokens, becomes a row.

    Attributes:
        num_classes: V, number of tokens of the vocabulary.
        top_k: k, number of tokens that are stored individually; 0 for draws.
        tail: representation of the other tokens: "lowrank" (coordinates in a basis), "ghost" (their mass alone), or
            "draws" (the row holds tokens that were drawn from the distribution, and no head).
        rank: R, number of coordinates of a `lowrank` tail; else 0.
        draws: number of draws per row; 0 unless the tail is `draws`.
        dtype: type of the log-probabilities.
        level: whether the logsumexp of the logits is stored.
        temperatures: at which the mass outside the head is known: `TOKEN_TEMPERATURES`, or only 1; of draws the one
            temperature that they were drawn at.
    """

    num_classes: Annotated[int, Field(ge=2, le=2**31)]
    top_k: Annotated[int, Field(ge=0)]
    tail: TokenTail
    rank: Annotated[int, Field(ge=0)] = 0
    draws: Annotated[int, Field(ge=0, le=MOST_DRAWS)] = 0
    dtype: Literal["float16", "float32"]
    level: bool
    temperatures: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]

    @field_validator("temperatures", mode="before")
    @classmethod
    def _from_json_list(cls, given: Any) -> Any:
        return tuple(given) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _agrees(self) -> TokenEncoding:
        is_drawn = self.tail == "draws"
        if self.top_k >= self.num_classes:
            raise ValueError(f"top_k {self.top_k} leaves no tail of {self.num_classes} tokens")
        if (self.top_k == 0) != is_drawn or (self.draws > 0) != is_drawn:
            raise ValueError("rows hold either a head, or draws")
        if (self.rank > 0) != (self.tail == "lowrank") or self.rank > self.num_classes:
            raise ValueError(f"rank {self.rank} is invalid for a {self.tail} tail of {self.num_classes} tokens")
        if is_drawn and (self.level or len(self.temperatures) != 1):
            raise ValueError("draws are of one temperature, and do not know the level")
        if not is_drawn and self.temperatures not in ((1.0,), TOKEN_TEMPERATURES):
            raise ValueError(f"masses are stored at T = 1, or at {json.dumps(TOKEN_TEMPERATURES)}")
        return self

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the columns of the `statistics` array; none of draws."""
        if self.tail == "draws":
            return ()
        entropy = ("entropy",) if len(self.temperatures) > 1 else ()
        return ("label_log_prob", *entropy, *(_MASS_NAMES[t] for t in self.temperatures))


class TokenRequest(Record):
    """What the user asked for; informative.

    Attributes:
        top_k: tokens per row that are stored individually; 0 for draws.
        tail: as in `TokenEncoding`.
        rank: coordinates of a `lowrank` tail; None otherwise.
        step: quantization step of the coordinates, in nats; None without a basis.
        pilot_rows: rows that the basis was fitted to; 0 without one.
    """

    top_k: Annotated[int, Field(ge=0)]
    tail: TokenTail
    rank: Annotated[int, Field(ge=1)] | None
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    pilot_rows: Annotated[int, Field(ge=0)]
