"""Records of the named outputs of a teacher beside its class logits (docs/FORMAT.md, section 11).

A cache without them has no key `outputs` in its plan, and its bytes are those of a cache that never knew of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kdcache.cache.format.encoding import Encoding, Fidelity, Record, Request, Size
from kdcache.cache.format.grid_encoding import GridEncoding, GridFidelity, GridRequest
from kdcache.cache.format.token_encoding import TokenEncoding, TokenRequest

DEFAULT_OUTPUT = "logits"
"""Name of the output whose encoding is that of the plan, and whose arrays are at the root of the store."""

TOKENS = "tokens"
"""Name by which the tokens of sequences are read as outputs are; their arrays are at the root of the store."""

MOST_SCORES = 64
"""Largest number of values of an output of kind `score`."""

OutputName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


class VectorEncoding(Record):
    """How a vector [D], or scores [K], becomes a row.

    Attributes:
        codec: "klt" (principal coordinates, rounded to multiples of one step), "int8" (multiples of a scale per row),
            "float16" or "float32".
        length: D or K, numbers of the decoded vector.
        dtype: type of the stored numbers; int8 or int16 for klt.
        components: R, number of principal coordinates of klt; else 0.
        step: quantization step of klt, in the unit of the vector; else None.
        normalized: whether decoded vectors are divided by their length, since those of the teacher have length 1.
    """

    codec: Literal["klt", "int8", "float16", "float32"]
    length: Annotated[int, Field(ge=1, le=2**24)]
    dtype: Literal["int8", "int16", "float16", "float32"]
    components: Annotated[int, Field(ge=0)] = 0
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    normalized: bool = False

    @model_validator(mode="after")
    def _agrees(self) -> VectorEncoding:
        is_klt = self.codec == "klt"
        if self.dtype not in (("int8", "int16") if is_klt else (self.codec,)):
            raise ValueError(f"dtype {self.dtype} is invalid for the codec {self.codec}")
        if (self.components > 0) != is_klt or self.components > self.length:
            raise ValueError(f"{self.components} components are invalid for the codec {self.codec} of {self.length}")
        if (self.step is not None) != is_klt:
            raise ValueError("step belongs to the codec klt, which needs it")
        return self

    @property
    def shape(self) -> tuple[int]:
        """Shape of the decoded vector, [D] or [K]."""
        return (self.length,)

    @property
    def width(self) -> int:
        """Number of stored numbers per row."""
        return self.components or self.length


class VectorRequest(Record):
    """The user's request from which the encoding of a vector was planned.

    Attributes:
        encoding: a codec, or "auto": the smallest within `fidelity`.
        fidelity: largest mean of 1 - cosine, or relative squared error, on pilot rows; None for a codec without a plan.
    """

    encoding: Literal["auto", "klt", "int8", "float16", "float32"]
    fidelity: Annotated[float, Field(gt=0, lt=1)] | None


class VectorFidelity(Record):
    """Fidelity of decoded vectors, measured on pilot rows that the basis was not fitted to.

    Attributes:
        rows: number of these rows.
        one_minus_cosine: mean of 1 - cosine between decoded and true vectors.
        relative_error: sum of squared errors by the sum of squared distances of the true vectors from their mean.
    """

    rows: Size
    one_minus_cosine: float
    relative_error: float


class OutputRecord(Record):
    """A named output of a teacher.

    Attributes:
        kind: "classes" (C numbers, compared after a softmax), "vector" (D numbers) or "score" (at most 64 plain
            numbers).
        places: of what the output has a row: "one", the whole view of a sample; "grid", a map of it, with numbers at
            every place; "run", each taught position of a sequence.
        source: what the output was in the teacher: part of what it returned, or name of a module.
        pool: how places of the module's output became one row: "none", "mean", or "first".
        labels: whether the labels of the samples are classes of this output: "sample" or "none".
        class_names: of an output of kind `classes` with `labels: none`, if they are known.
        request: what the encoding was planned from.
        encoding: how its numbers become a row.
        fidelity: measured on a pilot; None without one.
        level: "unknown" if class logits are known up to an additive constant per row.
    """

    kind: Literal["classes", "vector", "score"]
    places: Literal["one", "grid", "run"] = "one"
    source: str | int | None
    pool: Literal["none", "mean", "first"] = "none"
    labels: Literal["sample", "none"] = "none"
    class_names: Annotated[tuple[str, ...] | None, Field(exclude_if=lambda names: names is None)] = None
    request: Request | VectorRequest | TokenRequest | GridRequest
    encoding: Encoding | VectorEncoding | TokenEncoding | GridEncoding
    fidelity: Fidelity | VectorFidelity | GridFidelity | None
    level: Annotated[Literal["unknown"] | None, Field(exclude_if=lambda level: level is None)] = None

    @field_validator("class_names", mode="before")
    @classmethod
    def _from_json_list(cls, given: Any) -> Any:
        return tuple(given) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _agrees(self) -> OutputRecord:
        """Check that the parts of an output belong together."""
        is_classes = self.kind == "classes"
        if self.places == "run" or isinstance(self.encoding, TokenEncoding):
            return self._agrees_as_run()
        if self.places == "grid" or isinstance(self.encoding, GridEncoding):
            return self._agrees_as_grid()
        for part, of_classes in ((self.request, Request), (self.encoding, Encoding)):
            if isinstance(part, of_classes) != is_classes:
                raise ValueError(f"an output of kind {self.kind} has no {type(part).__name__}")
        if self.fidelity is not None and isinstance(self.fidelity, Fidelity) != is_classes:
            raise ValueError(f"an output of kind {self.kind} has no {type(self.fidelity).__name__}")
        if self.kind == "score" and (self.channels > MOST_SCORES or self.vector_encoding.codec != "float32"):
            raise ValueError(f"scores are at most {MOST_SCORES} float32 numbers")
        if not is_classes and (self.labels != "none" or self.class_names or self.level):
            raise ValueError(f"labels, class names and level do not belong to an output of kind {self.kind}")
        if self.class_names is not None and len(self.class_names) != self.channels:
            raise ValueError("the number of class names must be the number of classes")
        return self

    def _agrees_as_run(self) -> OutputRecord:
        """Check an output with rows at the positions of a sequence: distributions of the next token."""
        if not isinstance(self.encoding, TokenEncoding) or not isinstance(self.request, TokenRequest):
            raise ValueError("rows of places `run` have the encoding and the request of tokens, and only they")
        if self.kind != "classes" or self.places != "run" or self.fidelity is not None:
            raise ValueError("rows of tokens are of kind `classes` at places `run`, without a fidelity")
        if self.labels != "none" or self.class_names is not None or self.pool != "none":
            raise ValueError("the labels and names of tokens are those of the sequences")
        if self.encoding.tail != "draws" and self.encoding.level != (self.level is None):
            raise ValueError("the level of rows is stored exactly where it is known")
        return self

    def _agrees_as_grid(self) -> OutputRecord:
        """Check an output with a map per sample."""
        if not isinstance(self.encoding, GridEncoding) or not isinstance(self.request, GridRequest):
            raise ValueError("rows of places `grid` have the encoding and the request of maps, and only they")
        if self.places != "grid" or not isinstance(self.fidelity, GridFidelity | None):
            raise ValueError("maps are rows of places `grid`, with a fidelity of their own")
        if self.labels != "none" or self.class_names is not None or self.pool != "none":
            raise ValueError("labels of samples, class names and pooling do not belong to maps")
        if self.encoding.level != (self.level is None) or (self.kind != "classes" and self.level is not None):
            raise ValueError("the level of maps is stored exactly where it is known, and unknown of classes alone")
        if self.encoding.normalized and self.kind != "vector":
            raise ValueError("only vectors are normalized")
        if self.kind == "score" and self.channels > MOST_SCORES:
            raise ValueError(f"scores are at most {MOST_SCORES} numbers")
        return self

    @property
    def channels(self) -> int:
        """Numbers per row, or place of a map, after decoding: C, V, D or K."""
        return self.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a decoded row: [C], [V], [D] or [K]; of a map [C, h, w]."""
        if isinstance(self.encoding, GridEncoding | VectorEncoding):
            return self.encoding.shape
        return (self.encoding.num_classes,)

    @property
    def vector_encoding(self) -> VectorEncoding:
        """The encoding of a vector or of scores."""
        if not isinstance(self.encoding, VectorEncoding):
            raise TypeError("an output of kind classes has no vector encoding")
        return self.encoding

    @property
    def token_encoding(self) -> TokenEncoding:
        """The encoding of rows of tokens."""
        if not isinstance(self.encoding, TokenEncoding):
            raise TypeError("an output with one row per sample has no encoding of tokens")
        return self.encoding
