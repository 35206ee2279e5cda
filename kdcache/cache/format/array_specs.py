"""Specify the arrays of a cache from its plan alone: names, shapes, types, chunks, compression (docs/FORMAT.md, 3).

An array is named by its path in the store: those of the class logits are at its root, those of another output are in
`outputs/NAME`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.fingerprints import SKETCH_PARTS
from kdcache.cache.format.grid_encoding import GridEncoding
from kdcache.cache.format.output_records import DEFAULT_OUTPUT, TOKENS, VectorEncoding
from kdcache.cache.format.recorded_views import BOX, recorded
from kdcache.cache.format.row_axes import Axis, axis_of, sample_axis
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.token_encoding import TokenEncoding

STORE = "data.zarr"
"""Folder of the Zarr store in a cache (docs/FORMAT.md, section 1)."""

_LEVEL, _LEVEL_WITHOUT_MATCHES = 5, 1
"""Level of zstd in blosc, and the one for numbers in which nothing repeats; the writer's choice (section 3)."""

_SMALLEST = 9
"""Level of zstd in blosc that weighs what a match saves against what it costs: some 100 times slower than `_LEVEL`."""

_MAX_TYPESIZE = 255
"""Bytes per element that blosc can shuffle, at most (docs/FORMAT.md, section 3)."""


_OF_MAPS = ("channel", "y", "x")
"""Names of the dimensions of a map."""


class Array(NamedTuple):
    """Storage layout of an array.

    Attributes:
        shape: extent per dimension.
        chunks: extent of a chunk, the unit of compression.
        shards: extent of a shard, which is one file of chunks.
        dtype: name of the data type.
        names: names of the dimensions.
        typesize: bytes per element that blosc shuffles before it compresses with zstd; None for plain zstd.
        columns: names of the columns, stored as an attribute; None without.
        level: of zstd in blosc.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...]
    dtype: str
    names: tuple[str, ...]
    typesize: int | None = None
    columns: tuple[str, ...] | None = None
    level: int = _LEVEL


class Part(NamedTuple):
    """What one array holds of a row: shape `width` and data type; the level of its compression, names of dimensions."""

    width: tuple[int, ...]
    dtype: str
    level: int = _LEVEL
    names: tuple[str, ...] = ("column",)

    @property
    def typesize(self) -> int:
        """Return bytes per element for blosc's shuffle: a number, or a whole row of single bytes.

        Storing columns first, by a transposition, compresses no better than this and is many times slower to read.
        """
        size, row = np.dtype(self.dtype).itemsize, math.prod(self.width)
        return size if size > 1 or row > _MAX_TYPESIZE else row


AnyEncoding = Encoding | VectorEncoding | TokenEncoding | GridEncoding
"""How an output becomes rows."""


def output_encoding(plan: Plan, output: str) -> AnyEncoding:
    """Return the encoding of an output; raises MismatchError for class logits that the cache does not have."""
    return plan.encoding if output == DEFAULT_OUTPUT else plan.named_outputs[output].encoding


def classes_of(plan: Plan, output: str) -> int:
    """Return the number that classes of an output, or tokens, are below; 0 of vectors."""
    if output == TOKENS and plan.sequences is not None:
        return plan.sequences.vocabulary.size
    encoding = output_encoding(plan, output)
    return 0 if isinstance(encoding, VectorEncoding | GridEncoding) else encoding.num_classes


def labels_of(plan: Plan, output: str, labels: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """Return the labels [N] that the rows of an output were encoded with: -1 if they are classes of another output."""
    if output == DEFAULT_OUTPUT or plan.named_outputs[output].labels == "sample":
        return labels.astype(np.int64)
    return np.full(len(labels), -1, np.int64)


def index_type(num_classes: int) -> str:
    """Return the smallest unsigned type for indices of classes, or ids of tokens."""
    return "uint8" if num_classes <= 2**8 else "uint16" if num_classes <= 2**16 else "uint32"


def row_parts(encoding: AnyEncoding) -> dict[str, Part]:
    """Return the arrays that hold rows, by name."""
    if isinstance(encoding, VectorEncoding):
        # In rounded coordinates zstd finds matches that cost more than they save: up to 4% of the bytes.
        level = _LEVEL_WITHOUT_MATCHES if encoding.codec == "klt" and encoding.dtype == "int8" else _LEVEL
        values = {"values": Part((encoding.width,), encoding.dtype, level)}
        return values | ({"scale": Part((), "float32")} if encoding.codec == "int8" else {})
    if isinstance(encoding, GridEncoding):
        # Matches save 5 to 13% of the bytes below 2.6 bits per number, as is usual, and cost up to 5% above.
        level = _SMALLEST if encoding.compression == "small" else _LEVEL
        return {"values": Part((encoding.planes, *encoding.shape[1:]), encoding.dtype, level, _OF_MAPS)}
    if isinstance(encoding, TokenEncoding):
        return _token_row_parts(encoding)
    parts = {
        "log_probs": Part((encoding.top_k,), encoding.dtype),
        "indices": Part((encoding.top_k,), index_type(encoding.num_classes)),
        "logsumexp": Part((), "float32"),
        "statistics": Part((len(encoding.statistics),), "float16"),
        "tail": Part((encoding.rank,), "int8"),
    }
    if encoding.dense:
        del parts["indices"]
    if not encoding.rank:
        del parts["tail"]
    return parts


def _token_row_parts(encoding: TokenEncoding) -> dict[str, Part]:
    """Return the arrays that hold rows of tokens, by name."""
    of_ids = index_type(encoding.num_classes)
    if encoding.tail == "draws":
        return {"draws": Part((encoding.draws,), of_ids), "counts": Part((encoding.draws,), "uint8")}
    parts = {
        "log_probs": Part((encoding.top_k,), encoding.dtype),
        "indices": Part((encoding.top_k,), of_ids),
        "logsumexp": Part((), "float32"),
        "statistics": Part((len(encoding.statistics),), "float16"),
        "tail": Part((encoding.rank,), "int8"),
    }
    if not encoding.level:
        del parts["logsumexp"]
    if not encoding.rank:
        del parts["tail"]
    return parts


def token_parts(plan: Plan) -> dict[str, Part]:
    """Return the arrays that hold the tokens of sequences, by name; empty without sequences."""
    if plan.sequences is None:
        return {}
    return {"tokens": Part((), index_type(plan.sequences.vocabulary.size)), "taught": Part((), "uint8")}


def raw_bytes(encoding: AnyEncoding) -> int:
    """Return bytes per row before compression."""
    return _bytes_of(row_parts(encoding))


def _bytes_of(parts: Mapping[str, Part]) -> int:
    return sum(math.prod(part.width) * np.dtype(part.dtype).itemsize for part in parts.values())


def raw_bytes_of_all_outputs(plan: Plan) -> int:
    """Return bytes per view and row of all outputs before compression."""
    return sum(raw_bytes(output_encoding(plan, output)) for output in plan.output_names)


def raw_bytes_of_shard(plan: Plan) -> int:
    """Return the bytes of the rows of all outputs, and the tokens, of the largest shard of a view, uncompressed."""
    per_row, of = raw_bytes_of_all_outputs(plan), plan.sequences
    if of is None:
        return per_row * plan.shape.shard_rows
    return per_row * of.row_capacity + _bytes_of(token_parts(plan)) * of.token_capacity


def path_in_store(output: str, part: str) -> str:
    """Return the path of an array of an output."""
    return part if output in (DEFAULT_OUTPUT, TOKENS) else f"outputs/{output}/{part}"


def row_arrays(plan: Plan, output: str) -> dict[str, Array]:
    """Return the layout of the arrays that hold the rows of an output, [V, N, ...], by part of a row.

    The tokens of sequences are read and written as the output `TOKENS`.
    """
    axis = axis_of(plan, output)
    if output == TOKENS:
        return {name: _of_rows(plan, axis, part) for name, part in token_parts(plan).items()}
    encoding = output_encoding(plan, output)
    statistics = None if isinstance(encoding, VectorEncoding | GridEncoding) else encoding.statistics
    return {
        name: _of_rows(plan, axis, part, statistics if name == "statistics" else None)
        for name, part in row_parts(encoding).items()
    }


def row_names(plan: Plan) -> list[str]:
    """Return the names under which rows are stored: those of the outputs, and `TOKENS` of sequences."""
    return [*plan.output_names, *([TOKENS] if plan.sequences is not None else [])]


def arrays_of_all_outputs(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays that hold rows of any output, and tokens, by path in the store."""
    return {
        path_in_store(output, part): array
        for output in row_names(plan)
        for part, array in row_arrays(plan, output).items()
    }


def _of_rows(plan: Plan, axis: Axis, part: Part, columns: tuple[str, ...] | None = None) -> Array:
    """Return the layout of an array with one entry per view and place of an axis, [V, N, ...]."""
    return Array(
        shape=(plan.views.count, axis.extent, *part.width),
        chunks=(1, axis.chunk, *part.width),
        shards=(1, axis.shard, *part.width),
        dtype=part.dtype,
        names=("view", axis.name, *part.names[: len(part.width)]),
        typesize=part.typesize,
        columns=columns,
        level=part.level,
    )


def recorded_arrays(plan: Plan) -> dict[str, Array]:
    """Return the array of recorded boxes or seeds, for views that do not follow from (seed, sample, view)."""
    parts = {"crops": Part((BOX,), "float32"), "seeds": Part((), "int32")}
    axis, kept = sample_axis(plan), recorded(plan.views.transform)
    return {name: _of_rows(plan, axis, part) for name, part in parts.items() if name == kept}


def input_arrays(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays of fingerprints, [V, M, ...]: one chunk per shard of rows.

    Sequences have none: their tokens are stored.
    """
    if plan.sequences is not None:
        return {}
    stride = plan.shape.fingerprint_stride
    count, per_shard = -(-plan.dataset.samples // stride), plan.shape.shard_rows // stride
    return {
        name: Array(
            shape=(plan.views.count, count, *width),
            chunks=(1, per_shard, *width),
            shards=(1, per_shard, *width),
            dtype=dtype,
            names=("view", "fingerprint", *("part" for _ in width)),
        )
        for name, width, dtype in (("fingerprints", (), "uint32"), ("sketches", (SKETCH_PARTS,), "float32"))
    }


def shard_arrays(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays that are written shard by shard."""
    return arrays_of_all_outputs(plan) | input_arrays(plan) | recorded_arrays(plan)


def basis_arrays(plan: Plan, output: str) -> dict[str, Array]:
    """Return the layout of the arrays of the basis of an output, one chunk each, by part; empty without a basis."""
    encoding = output_encoding(plan, output)
    shapes: dict[str, tuple[tuple[int, ...], str, tuple[str, ...]]] = {}
    if isinstance(encoding, VectorEncoding | GridEncoding):
        rank = encoding.components
        length = encoding.length if isinstance(encoding, VectorEncoding) else encoding.channels
        shapes = {
            "axes": ((rank, length), "float32", ("component", "column")),
            "mean": ((length,), "float32", ("column",)),
        }
    else:
        rank, classes = encoding.rank, encoding.num_classes
        shapes = {
            "tail_basis": ((rank, classes), "float16", ("component", "class")),
            "tail_mean": ((classes,), "float32", ("class",)),
            "tail_scale": ((rank,), "float32", ("component",)),
        }
    return {
        name: Array(shape=shape, chunks=shape, shards=shape, dtype=dtype, names=names)
        for name, (shape, dtype, names) in shapes.items()
        if rank
    }


def bases_of_all_outputs(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays of the bases of all outputs, by path in the store."""
    return {
        path_in_store(output, part): array
        for output in plan.output_names
        for part, array in basis_arrays(plan, output).items()
    }


def sample_arrays(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays with one value per sample, [N]."""
    counts = () if plan.sequences is None else (("token_count", "uint32"), ("row_count", "uint32"))
    return {
        name: Array(
            shape=(plan.dataset.samples,),
            chunks=(plan.shape.chunk_rows,),
            shards=(plan.shape.shard_rows,),
            dtype=dtype,
            names=("sample",),
        )
        for name, dtype in (("labels", "int32"), ("sample_keys", "uint64"), *counts)
    }


def vocabulary_arrays(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays of the tokens of a vocabulary, one chunk each; empty if they are not known."""
    if plan.sequences is None or plan.sequences.vocabulary.digest is None:
        return {}
    of = plan.sequences.vocabulary
    return {
        name: Array(shape=shape, chunks=shape, shards=shape, dtype=dtype, names=names)
        for name, shape, dtype, names in (
            ("vocabulary", (of.bytes,), "uint8", ("byte",)),
            ("vocabulary_length", (of.size,), "uint32", ("token",)),
        )
    }


def whole_arrays(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays that are one chunk: bases and the vocabulary, by path in the store."""
    return bases_of_all_outputs(plan) | vocabulary_arrays(plan)


def common_arrays(plan: Plan) -> dict[str, Array]:
    """Return the layout of the arrays that are written when the store is created."""
    return sample_arrays(plan) | whole_arrays(plan)


def chunk_bytes(array: Array) -> int:
    """Return bytes per chunk before compression."""
    return math.prod(array.chunks) * np.dtype(array.dtype).itemsize
