"""Records of a cache: the plan that it is written with, and the manifest that seals it (docs/FORMAT.md, section 2).

Both are JSON files that pydantic validates. A manifest's bytes are canonical, so that any changed byte is detected: it
is rejected unless serializing it again gives the same bytes, and its last field is the digest of all others.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from kdcache.cache.format.encoding import Digest, Encoding, Fidelity, Record, Request, Size
from kdcache.cache.format.grid_encoding import check_chunks
from kdcache.cache.format.output_records import DEFAULT_OUTPUT, OutputName, OutputRecord
from kdcache.cache.format.sequence_records import SequencesRecord, check_places
from kdcache.errors import MismatchError

FORMAT_VERSION: Literal[1] = 1
"""docs/FORMAT.md specifies it. Caches of this version stay readable; a change of the format is a new version."""

PLAN, MANIFEST = "plan.json", "manifest.json"

PROBES = "probes.npz"
"""Logits of a few samples by which the teacher of an unsealed cache is recognized; deleted when it is sealed."""

NO_WEIGHTS = f"sha256:{hashlib.sha256(b'').hexdigest()}"
"""The digest of no weights."""

LARGEST_CHUNK = 16_384
"""Rows per chunk at most (docs/FORMAT.md, section 2.1)."""


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


class Lineage(Record):
    """How a cache was derived from others: operation, its arguments, and the root digests of the parents."""

    operation: str
    arguments: dict[str, Any]
    parents: list[Digest]


class NoiseRecord(Record):
    """Noise that was added to the class logits before they were encoded.

    Attributes:
        sigma: standard deviation on each logit, in nats, where the privacy of a sample is 1.
        temperature: by which logits were divided before, where the privacy of a sample is 1.
        key: digest of the secret from which the noise was drawn.
        privacy: digest of the privacy of all samples; None if it is 1.
    """

    sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    key: Digest
    privacy: Annotated[Digest | None, Field(exclude_if=lambda privacy: privacy is None)] = None


class Plan(Record):
    """Everything that is fixed before the first row; a resumed run must have an equal plan."""

    model_config = ConfigDict(serialize_by_alias=True)

    format: Literal["kdcache"] = "kdcache"
    format_version: Literal[1] = FORMAT_VERSION
    teacher: TeacherRecord
    dataset: DatasetRecord
    views: ViewsRecord
    class_request: Request | None = Field(default=None, alias="request", exclude_if=lambda request: request is None)
    """Of the class logits; None in a cache of sequences."""
    class_encoding: Encoding | None = Field(
        default=None, alias="encoding", exclude_if=lambda encoding: encoding is None
    )
    """Of the class logits; None if the cache holds other outputs only."""
    fidelity: Fidelity | None
    shape: Sharding
    batch_size: Annotated[int, Field(ge=1)]
    """Rows per teacher batch; the last bits of the logits may depend on it."""
    versions: dict[str, str]
    licence: str
    notes: str
    lineage: Annotated[Lineage | None, Field(exclude_if=lambda lineage: lineage is None)] = None
    outputs: Annotated[dict[OutputName, OutputRecord] | None, Field(exclude_if=lambda outputs: outputs is None)] = None
    """Further outputs of the teacher, by name, in the order of the names; None for a cache of class logits alone."""
    noise: Annotated[NoiseRecord | None, Field(exclude_if=lambda noise: noise is None)] = None
    sequences: Annotated[SequencesRecord | None, Field(exclude_if=lambda sequences: sequences is None)] = None
    """Of a cache whose samples are sequences of tokens; None for any other."""

    @model_validator(mode="after")
    def _classes_agree(self) -> Plan:
        """Check that class names, encoding and outputs belong together."""
        classes = len(self.dataset.class_names)
        if self.class_encoding is not None and classes != self.class_encoding.num_classes:
            raise ValueError("the number of class names must be the number of classes")
        if self.class_encoding is None and not self.outputs:
            raise ValueError("a cache needs an encoding of class logits or another output")
        for name, output in (self.outputs or {}).items():
            if name == DEFAULT_OUTPUT:
                raise ValueError(
                    f"{DEFAULT_OUTPUT} is the name of the class logits, whose encoding is that of the plan"
                )
            if output.labels == "sample" and output.channels != classes:
                raise ValueError(f"the output {name} has other classes than the data set")
        if self.noise is not None and (self.class_encoding is None or self.outputs):
            raise ValueError("noise is on class logits, and belongs to a cache of these alone")
        if self.outputs is not None and (not self.outputs or list(self.outputs) != sorted(self.outputs)):
            raise ValueError("the outputs are not in the order of their names")
        check_chunks(self.shape.chunk_rows, (output.encoding for output in self.named_outputs.values()))
        return self

    @model_validator(mode="after")
    def _sequences_agree(self) -> Plan:
        """Check that a cache is of samples with one row each, or of sequences with rows at their positions."""
        if (self.sequences is None) == (self.class_request is None):
            raise ValueError("a plan has a request of class logits, or sequences")
        check_places(self.sequences, self.named_outputs)
        if self.sequences is None:
            return self
        if self.class_encoding is not None or self.dataset.class_names:
            raise ValueError("sequences have no class logits and no classes of samples")
        if self.views.count != 1 or self.views.transform:
            raise ValueError("sequences have one view, without a transform")
        if len(self.sequences.rows) != self.shards:
            raise ValueError("the numbers of rows are not those of the shards")
        return self

    @property
    def request(self) -> Request:
        """Request that the encoding of the class logits was planned from.

        Raises:
            MismatchError: if the samples are sequences.
        """
        if self.class_request is None:
            raise MismatchError(
                "the samples of this cache are sequences of tokens, without class logits",
                f"name one of its outputs: {', '.join(self.named_outputs)}",
            )
        return self.class_request

    @property
    def encoding(self) -> Encoding:
        """Encoding of the class logits.

        Raises:
            MismatchError: if the cache holds other outputs only.
        """
        if self.class_encoding is None:
            if self.sequences is not None:
                raise MismatchError(
                    "this cache is of sequences of tokens, and class logits of images are asked for",
                    "give a cache of images, or networks and a pipeline of text",
                )
            raise MismatchError(
                f"this cache holds no class logits; it holds {', '.join(self.named_outputs)}",
                "name one of these outputs (to train on it alone: --set 'loss={logits: false, OUTPUT: {name: mse}}'), "
                "or dump the teacher again with its logits",
            )
        return self.class_encoding

    @property
    def named_outputs(self) -> dict[str, OutputRecord]:
        """Outputs beside the class logits, by name."""
        return self.outputs or {}

    @property
    def output_names(self) -> list[str]:
        """Names of all outputs, the class logits first."""
        return [*([DEFAULT_OUTPUT] if self.class_encoding is not None else []), *self.named_outputs]

    @property
    def shards(self) -> int:
        """Number of shards per view."""
        return -(-self.dataset.samples // self.shape.shard_rows)

    def shard_ids(self, shard: int) -> range:
        """Return the ids of the samples whose rows a shard holds."""
        start = shard * self.shape.shard_rows
        return range(start, min(start + self.shape.shard_rows, self.dataset.samples))


class Summary(Record):
    """Means over the rows of class logits of all views, None without them; the accuracy excludes labels of -1."""

    teacher_accuracy: float | None
    mean_sharpness: float | None
    mean_entropy: float | None
    mean_top_probability: float | None


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
