"""Records of a cache: the plan that it is written with, and the manifest that seals it (docs/FORMAT.md, section 2).

Both are JSON files that pydantic validates. A manifest's bytes are canonical, so that any changed byte is detected: it
is rejected unless serializing it again gives the same bytes, and its last field is the digest of all others.
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

PROBES = "probes.npz"
"""Logits of a few samples by which the teacher of an unsealed cache is recognized; deleted when it is sealed."""

NO_WEIGHTS = f"sha256:{hashlib.sha256(b'').hexdigest()}"
"""The digest of no weights."""

LARGEST_CHUNK = 16_384
"""Rows per chunk at most (docs/FORMAT.md, section 2.1)."""

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


class TeacherRecord(Record):
    """The teacher network.

    Attributes:
        name: as the pipeline has it, without the folder of a file.
        arguments: of its constructor; of an ensemble `members` and `combine`; where the classes of the data set are
            outputs of other numbers, `args`, `outputs` and `classes`; with `output` or `prune` these beside `args`.
        code_digest: of the user's file that builds it and the user's modules that it imports; None for a network that
            a library builds.
        weights_digest: over parameters and buffers.
        parameters: number of parameters.
        precision: numeric precision of its forward pass.
        level: "unknown" if only probabilities are known, so logits up to an additive constant per row.
        weights: "none" if kdcache ran a network without parameters and buffers, or an ensemble with such a member:
            `weights_digest` then does not distinguish it from others.
    """

    name: str
    arguments: dict[str, Any]
    code_digest: Digest | None
    weights_digest: Digest
    parameters: Size
    precision: str
    level: Annotated[Literal["unknown"] | None, Field(exclude_if=lambda level: level is None)] = None
    weights: Annotated[Literal["none"] | None, Field(exclude_if=lambda weights: weights is None)] = None

    @property
    def was_run(self) -> bool:
        """Whether kdcache ran this teacher; if not, only a file of its logits is known."""
        return self.weights_digest != NO_WEIGHTS or self.weights == "none"


class DatasetRecord(Record):
    """The dataset, with a digest that identifies other copies of it."""

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
    """The views of every image that the teacher saw."""

    count: Annotated[int, Field(ge=1, le=2**20)]
    seed: Size
    transform: list[dict[str, dict[str, Any]]]

    @field_validator("transform", mode="before")
    @classmethod
    def _as_read_back(cls, given: Any) -> Any:
        """Convert to what JSON reads back (lists for tuples), so that a plan in memory equals its file."""
        try:
            return json.loads(json.dumps(given, allow_nan=False))
        except TypeError as error:
            raise ValueError(f"it cannot be written as JSON: {error}") from None


class Sharding(Record):
    """The division of rows into files and chunks.

    Attributes:
        shard_rows: rows per shard, the unit of writing.
        chunk_rows: rows per chunk, the unit of compression.
        fingerprint_stride: distance in samples of those whose input is fingerprinted.
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


class Lineage(Record):
    """How a cache was derived from others: operation, its arguments, and the root digests of the parents."""

    operation: str
    arguments: dict[str, Any]
    parents: list[Digest]


class Plan(Record):
    """Everything that is fixed before the first row; a resumed run must have an equal plan."""

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
    """Rows per teacher batch; the last bits of the logits may depend on it."""
    versions: dict[str, str]
    licence: str
    notes: str
    lineage: Annotated[Lineage | None, Field(exclude_if=lambda lineage: lineage is None)] = None

    @model_validator(mode="after")
    def _classes_agree(self) -> Plan:
        if len(self.dataset.class_names) != self.encoding.num_classes:
            raise ValueError("the number of class names must be the number of classes")
        return self

    @property
    def shards(self) -> int:
        """Number of shards per view."""
        return -(-self.dataset.samples // self.shape.shard_rows)

    def shard_ids(self, shard: int) -> range:
        """Return the ids of the samples whose rows a shard holds."""
        start = shard * self.shape.shard_rows
        return range(start, min(start + self.shape.shard_rows, self.dataset.samples))


class Summary(Record):
    """Means over the rows of all views; the accuracy excludes labels of -1."""

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
    """A sealed cache: plan, summary, the record of every file, and the root digest over all of these."""

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
    """Return the file name of a shard's commit marker, relative to the cache."""
    return f"commits/{view}/{shard}.json"


def canonical(record: Record) -> bytes:
    """Serialize a record: indented JSON, keys in the order of the schema, files by name."""
    if isinstance(record, Manifest) and record.files:
        # Python writes indented JSON slowly, and a cache may have tens of thousands of files.
        rest = _json(record.model_copy(update={"files": {}})).split('\n "files": {},\n')
        files = ",\n".join(
            f'  {json.dumps(name, ensure_ascii=False)}: {{\n   "size": {of.size},\n   "sha256": "{of.sha256}"\n  }}'
            for name, of in record.files.items()
        )
        return f'{rest[0]}\n "files": {{\n{files}\n }},\n{rest[1]}\n'.encode()
    return f"{_json(record)}\n".encode()


def _json(record: Record) -> str:
    return json.dumps(record.model_dump(), indent=1, ensure_ascii=False, allow_nan=False)


def seal(plan: Plan, summary: Summary, files: dict[str, FileRecord]) -> Manifest:
    """Return the manifest of a complete cache, with its root digest."""
    files = dict(sorted(files.items()))
    unsealed = Manifest(plan=plan, summary=summary, files=files, digest="sha256:" + "0" * 64)
    return unsealed.model_copy(update={"digest": root_digest(unsealed)})


def root_digest(manifest: Manifest, written: bytes | None = None) -> str:
    """Return the sha256 of the canonical manifest with 64 zeros in place of its digest.

    Args:
        manifest: of a cache.
        written: its canonical bytes, if they are at hand.
    """
    written = canonical(manifest) if written is None else written
    start = written.rindex(manifest.digest.encode())  # the digest is the last key
    zeroed = written[:start] + b"sha256:" + b"0" * 64 + written[start + len(manifest.digest) :]
    return f"sha256:{hashlib.sha256(zeroed).hexdigest()}"
