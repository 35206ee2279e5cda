"""What a cache says of itself: the plan it was begun with, and the manifest that seals it.

Both are JSON files read with pydantic. The manifest's bytes are canonical, so that any changed byte is found: it is
refused unless writing it again gives the same bytes, and its last field is the digest of all the others.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FORMAT_VERSION: Literal[1] = 1
"""docs/FORMAT.md specifies it. Caches of this version stay readable; a change of the format is a new version."""

PLAN, MANIFEST = "plan.json", "manifest.json"

LARGEST_CHUNK = 16_384  # rows

STATISTICS = ("label_log_prob", "logit_mean", "logit_std", "entropy")

TAIL_TEMPERATURES = (1, 2, 4, 8)

TAIL_STATISTICS = tuple(f"tail_log_mass_t{t}" for t in TAIL_TEMPERATURES)

RANGE_STATISTICS = ("log_prob_max", "log_prob_range")

Size = Annotated[int, Field(ge=0, le=2**62)]

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Record(BaseModel):
    """A part of a plan or a manifest: exact types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Encoding(Record):
    """How logits [C] become a row.

    Attributes:
        num_classes: C.
        top_k: k, how many classes are kept exactly; k = C keeps all, in class order and without indices.
        tail: what is known of the others; "none" where k = C.
        rank: R, coordinates of a `lowrank` tail; 0 otherwise.
        dtype: type of the log-probabilities; uint8 only where k = C.
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
            raise ValueError("the tail is 'none' exactly where every class is kept")
        if (self.rank > 0) != (self.tail == "lowrank") or self.rank > self.num_classes:
            raise ValueError(f"rank {self.rank} does not go with a {self.tail} tail of {self.num_classes} classes")
        if self.dtype == "uint8" and not self.dense:
            raise ValueError("uint8 needs every class (top_k: all)")
        return self

    @property
    def dense(self) -> bool:
        """Whether every class is kept."""
        return self.top_k == self.num_classes

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the columns of the `statistics` array."""
        if self.dtype == "uint8":
            return STATISTICS + RANGE_STATISTICS
        return STATISTICS if self.dense else STATISTICS + TAIL_STATISTICS


class TeacherRecord(Record):
    """Which network ran.

    Attributes:
        name: as the pipeline has it, without the folder of a file.
        arguments: of its constructor; of an ensemble `members` and `combine`; where the classes of the data set are
            outputs of other numbers, `args`, `outputs` and `classes`.
        code_digest: of the user's file that builds it; None for a network that a library builds.
        weights_digest: over parameters and buffers.
        parameters: their number.
        precision: that it ran in.
        level: "unknown" where only probabilities are known, and so the logits but for a constant of each row.
    """

    name: str
    arguments: dict[str, Any]
    code_digest: Digest | None
    weights_digest: Digest
    parameters: Size
    precision: str
    level: Annotated[Literal["unknown"] | None, Field(exclude_if=lambda level: level is None)] = None


class DatasetRecord(Record):
    """What it ran on, and by what another copy of it can be recognized."""

    name: str
    split: str
    samples: Annotated[int, Field(ge=1, le=2**40)]
    class_names: tuple[str, ...]
    digest: Digest

    @field_validator("class_names", mode="before")
    @classmethod
    def _from_json_list(cls, given: Any) -> Any:
        return tuple(given) if isinstance(given, list) else given


class ViewsRecord(Record):
    """What the teacher saw of every image."""

    count: Annotated[int, Field(ge=1, le=2**20)]
    seed: Size
    transform: list[dict[str, dict[str, Any]]]

    @field_validator("transform", mode="before")
    @classmethod
    def _as_read_back(cls, given: Any) -> Any:
        """What JSON makes of it (a tuple is a list there), so that a plan in memory equals its file."""
        try:
            return json.loads(json.dumps(given, allow_nan=False))
        except TypeError as error:
            raise ValueError(f"it cannot be written as JSON: {error}") from None


class Sharding(Record):
    """How rows are laid out in files.

    Attributes:
        shard_rows: rows of a shard, the unit that is written at once.
        chunk_rows: rows of a chunk, the unit that is compressed at once.
        fingerprint_stride: every so many samples the teacher's input leaves a fingerprint.
    """

    shard_rows: Annotated[int, Field(ge=1, le=2**40)]
    chunk_rows: Annotated[int, Field(ge=1, le=LARGEST_CHUNK)]
    fingerprint_stride: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _whole(self) -> Sharding:
        for name in ("chunk_rows", "fingerprint_stride"):
            if self.shard_rows % getattr(self, name):
                raise ValueError(f"shard_rows is not a multiple of {name}")
        return self


class Request(Record):
    """What the user asked for, from which the encoding was planned; the words are those of `pipeline.CacheSpec`."""

    top_k: Annotated[int, Field(ge=1)] | Literal["all", "auto"]
    tail: Literal["uniform", "lowrank"]
    rank: Annotated[int, Field(ge=1)] | None
    fidelity: Annotated[float, Field(gt=0, lt=1)] | None
    dtype: Literal["uint8", "float16", "float32"]
    pilot_rows: Annotated[int, Field(ge=1)]


class Fidelity(Record):
    """What was measured on pilot rows that the basis was not fitted to.

    Attributes:
        rows: how many.
        total_variation: mean total variation between decoded and true softmax, by temperature.
    """

    rows: Size
    total_variation: dict[str, float]


class Lineage(Record):
    """What a cache was made from, if not from a teacher: how, with what arguments, and its parents' root digests."""

    operation: str
    arguments: dict[str, Any]
    parents: list[Digest]


class Plan(Record):
    """Everything that is settled before the first row: a run that goes on must agree with all of it."""

    format: Literal["kdcache"] = "kdcache"
    format_version: Literal[1] = FORMAT_VERSION
    teacher: TeacherRecord
    dataset: DatasetRecord
    views: ViewsRecord
    request: Request
    encoding: Encoding
    fidelity: Fidelity | None
    shape: Sharding
    batch_size: Annotated[int, Field(ge=1)]
    """Rows of a teacher batch: with another one the last bits of the logits may differ."""
    versions: dict[str, str]
    licence: str
    notes: str
    lineage: Annotated[Lineage | None, Field(exclude_if=lambda lineage: lineage is None)] = None

    @model_validator(mode="after")
    def _classes_agree(self) -> Plan:
        if len(self.dataset.class_names) != self.encoding.num_classes:
            raise ValueError("as many class names as classes are needed")
        return self

    @property
    def shards(self) -> int:
        """Number of shards of a view."""
        return -(-self.dataset.samples // self.shape.shard_rows)

    def shard_ids(self, shard: int) -> range:
        """The sample ids whose rows a shard holds."""
        start = shard * self.shape.shard_rows
        return range(start, min(start + self.shape.shard_rows, self.dataset.samples))


class Summary(Record):
    """What the rows say, over all views; labels of -1 do not count towards the accuracy."""

    teacher_accuracy: float | None
    mean_sharpness: float
    mean_entropy: float
    mean_top_probability: float


class FileRecord(Record):
    """Size and digest of one file."""

    size: Size
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Commit(Record):
    """The marker of a written shard: its files, relative to the cache."""

    files: dict[str, FileRecord]


class Manifest(Record):
    """A sealed cache: the plan, what came of it, every file of it, and the root digest over all of that."""

    plan: Plan
    summary: Summary
    files: dict[str, FileRecord]
    digest: Digest

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name:
                raise ValueError(f"the file name {name!r} does not stay inside the cache")
        if list(files) != sorted(files):
            raise ValueError("the files are not in the order of their names")
        return files


def commit_file(view: int, shard: int) -> str:
    """The marker of a shard, relative to the cache."""
    return f"commits/{view}/{shard}.json"


def canonical(record: Record) -> bytes:
    """The bytes of a record's file: JSON, indented, keys in the order of the schema, files by name."""
    return (json.dumps(record.model_dump(), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def seal(plan: Plan, summary: Summary, files: dict[str, FileRecord]) -> Manifest:
    """The manifest of a complete cache, with its root digest."""
    files = dict(sorted(files.items()))
    unsealed = Manifest(plan=plan, summary=summary, files=files, digest="sha256:" + "0" * 64)
    return unsealed.model_copy(update={"digest": root_digest(unsealed)})


def root_digest(manifest: Manifest) -> str:
    """sha256 of the canonical manifest with 64 zeros where its digest stands."""
    zeroed = manifest.model_copy(update={"digest": "sha256:" + "0" * 64})
    return f"sha256:{hashlib.sha256(canonical(zeroed)).hexdigest()}"
