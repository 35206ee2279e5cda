"""Plan and encode the outputs of a teacher beside its class logits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import encode_finite
from kdcache.cache.format.encoding import Request
from kdcache.cache.format.grid_encoding import GridRequest
from kdcache.cache.format.output_codec import encode_output
from kdcache.cache.format.output_records import MOST_SCORES, OutputRecord, VectorRequest
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.stored_bases import Bases
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.vector_codec import encode_vectors
from kdcache.cache.format.vector_rows import EncodedRows, VectorBasis
from kdcache.cache.grid_planner import plan_grids
from kdcache.cache.planner import encoding_without_pilot, plan_encoding
from kdcache.cache.preconditions import check_same_plan
from kdcache.cache.vector_planner import PlannedVectors, plan_vectors, scores_encoding
from kdcache.config.cache import CacheSpec, OutputSpec
from kdcache.errors import MismatchError, UsageError


class PlannedOutputs(NamedTuple):
    """The outputs of a cache beside its class logits.

    Attributes:
        records: by name; None for a cache of class logits alone.
        bases: of those whose encoding has one, by name.
        sizes: bytes per row on disk, approximately, by name.
    """

    records: dict[str, OutputRecord] | None = None
    bases: Bases = MappingProxyType({})
    sizes: Mapping[str, float] = MappingProxyType({})

    @property
    def bytes_per_row(self) -> float:
        """Bytes per row on disk, approximately, of all of them together."""
        return sum(self.sizes.values())


def plan_outputs(
    spec: CacheSpec,
    pilot: Mapping[str, Tensor],
    labels: Tensor,
    num_classes: int,
    n_rows: int,
    unknown_levels: Collection[str] = (),
) -> PlannedOutputs:
    """Choose the encodings of outputs.

    Args:
        spec: what the cache is to keep.
        pilot: [P, D] float32 of each output, by name; of maps [P', C, h, w], of some of these rows.
        labels: [P] int64, of the pilot.
        num_classes: C, of the data set.
        n_rows: rows of the cache.
        unknown_levels: names of the outputs that are logarithms of probabilities.

    Raises:
        UsageError: if an encoding is not possible, or not within the requested fidelity; names the output.
        MismatchError: if an output with `labels` has another number of classes than the data set.
    """
    records: dict[str, OutputRecord] = {}
    bases: dict[str, TailBasis | VectorBasis] = {}
    sizes: dict[str, float] = {}
    for name, output in spec.outputs.items():
        values = pilot[name]
        if output.labels and values.shape[1] != num_classes:
            raise MismatchError(
                f"the output {name} has {values.shape[1]} classes and the data set {num_classes}, so its labels are "
                "not those of the output",
                f"remove `labels: true` from cache.outputs.{name}",
            )
        try:
            basis: TailBasis | VectorBasis | None
            if output.places == "grid":
                record, basis, bytes_per_row = _planned_maps(output, values, n_rows, name not in unknown_levels)
            elif output.kind == "classes":
                record, basis, bytes_per_row = _planned_classes(output, spec.pilot_rows, values, labels)
            else:
                record, basis, bytes_per_row = _planned_vectors(output, values, n_rows)
        except UsageError as error:
            raise UsageError(f"output {name}: {error.what}", error.fix) from None
        records[name] = record.model_copy(update={"level": "unknown"}) if name in unknown_levels else record
        sizes[name] = bytes_per_row
        if basis is not None:
            bases[name] = basis
    return PlannedOutputs(records or None, bases, sizes)


def _planned_classes(
    output: OutputSpec, pilot_rows: int, values: Tensor, labels: Tensor
) -> tuple[OutputRecord, TailBasis | None, float]:
    """Plan an output of classes as the class logits are planned."""
    request = _request_of(output, pilot_rows)
    if not isinstance(request, Request):
        raise TypeError("an output of classes has the request of class logits")
    encoding, fidelity, basis = encoding_without_pilot(values.shape[1], request), None, None
    truth = labels if output.labels else torch.full_like(labels, -1)
    if encoding is not None:
        bytes_per_row = zarr_store.bytes_per_row(encoding, encode_finite(values, truth, encoding))
    else:
        choice = plan_encoding(values, truth, request)
        encoding, fidelity, basis = choice.chosen.encoding, choice.fidelity, choice.chosen.basis
        bytes_per_row = choice.chosen.bytes_per_row
    record = OutputRecord(
        kind="classes",
        source=output.source,
        pool=output.pool,
        labels="sample" if output.labels else "none",
        request=request,
        encoding=encoding,
        fidelity=fidelity,
    )
    return record, basis, bytes_per_row


def _planned_maps(
    output: OutputSpec, values: Tensor, n_rows: int, level_known: bool
) -> tuple[OutputRecord, VectorBasis | None, float]:
    """Plan an output at places `grid`, of any kind."""
    _check_scores(output, values)
    request = _request_of(output, 0)
    if not isinstance(request, GridRequest):
        raise TypeError("an output of maps has the request of maps")
    planned = plan_grids(values, output.kind, request, n_rows, level_known=level_known)
    record = OutputRecord(
        kind=output.kind,
        places="grid",
        source=output.source,
        request=request,
        encoding=planned.encoding,
        fidelity=planned.fidelity,
        level=None if planned.encoding.level else "unknown",
    )
    return record, planned.basis, planned.bytes_per_row


def _check_scores(output: OutputSpec, values: Tensor) -> None:
    """Raise UsageError if an output of kind `score` has more numbers than scores can have."""
    if output.kind == "score" and values.shape[1] > MOST_SCORES:
        per = "place" if output.places == "grid" else "sample"
        raise UsageError(
            f"there are {values.shape[1]} numbers per {per}, and scores are at most {MOST_SCORES}",
            "keep it as `kind: vector`",
        )


def _planned_vectors(output: OutputSpec, values: Tensor, n_rows: int) -> tuple[OutputRecord, VectorBasis | None, float]:
    """Plan an output of vectors, or of scores, which are stored as they are."""
    _check_scores(output, values)
    request = _request_of(output, 0)
    if not isinstance(request, VectorRequest):
        raise TypeError("an output of vectors has no request of class logits")
    planned: PlannedVectors | None = None
    if output.kind == "vector":
        planned = plan_vectors(values, request, n_rows)
    encoding = scores_encoding(values.shape[1]) if planned is None else planned.encoding
    record = OutputRecord(
        kind=output.kind,
        source=output.source,
        pool=output.pool,
        request=request,
        encoding=encoding,
        fidelity=None if planned is None else planned.fidelity,
    )
    if planned is None:
        return record, None, zarr_store.bytes_per_row(encoding, encode_vectors(values, encoding, None))
    return record, planned.basis, planned.bytes_per_row


def _request_of(output: OutputSpec, pilot_rows: int) -> Request | VectorRequest | GridRequest:
    """Return the part of an output's settings that determines its encoding."""
    if output.places == "grid":
        return GridRequest.model_validate({key: getattr(output, key) for key in GridRequest.model_fields})
    if output.kind == "classes":
        keys = ("top_k", "tail", "rank", "fidelity", "dtype")
        return Request(**{key: getattr(output, key) for key in keys}, pilot_rows=pilot_rows)
    if output.kind == "score":
        return VectorRequest(encoding="float32", fidelity=None)
    return VectorRequest.model_validate({"encoding": output.encoding, "fidelity": output.fidelity})


def check_same_outputs(path: Path, begun: Plan, spec: CacheSpec) -> None:
    """Check that settings name the outputs of a cache that is resumed or extended, planned from the same requests.

    Raises:
        MismatchError: with the outputs or settings that differ.
    """
    if begun.output_names != spec.output_names:
        raise MismatchError(
            f"{path} keeps the outputs {', '.join(begun.output_names)}, and these settings "
            f"{', '.join(spec.output_names)}",
            "use the cache.outputs and cache.logits that it was begun with, or write to another folder",
        )
    for name, output in spec.outputs.items():
        record = begun.named_outputs[name]
        check_same_plan(path, record.request, _request_of(output, spec.pilot_rows), f"outputs.{name}.request")
        now_is = (output.kind, output.source, output.pool, output.labels, output.places)
        was = (record.kind, record.source, record.pool, record.labels == "sample", record.places)
        if now_is != was:
            raise MismatchError(
                f"the output {name} of {path} has kind, source, pool, labels and places {was}, these settings {now_is}",
                "use the settings that it was begun with, or write to another folder",
            )


def labels_of_output(record: OutputRecord, labels: Tensor) -> Tensor:
    """Return the labels [B] int64 that an output is encoded with: those of the samples, or -1."""
    return labels if record.labels == "sample" else torch.full_like(labels, -1)


def encode_outputs(values: Mapping[str, Tensor], labels: Tensor, plan: Plan, bases: Bases) -> dict[str, EncodedRows]:
    """Return the rows of the outputs of a batch.

    Args:
        values: [B, D] float32 of each output, or maps [B, C, h, w], finite, by name.
        labels: [B] int64, of the samples, on the same device.
        plan: of the cache.
        bases: of the outputs, on the same device.

    Raises:
        MismatchError: if an output has another length, or its maps another size, than that of the cache.
    """
    encoded: dict[str, EncodedRows] = {}
    for name, record in plan.named_outputs.items():
        if values[name].shape[1:] != record.shape and record.places == "grid":
            raise MismatchError(
                f"the output {name} of the teacher is {list(values[name].shape)}, and was "
                f"[B, {', '.join(map(str, record.shape))}] when the cache was planned: a map has the same grid for all "
                "images and views",
                "bring all images to one size (`transform`: Resize with both sides, or a crop)",
            )
        if values[name].shape[1:] != record.shape:
            raise MismatchError(
                f"the output {name} of the teacher has {values[name].shape[1]} numbers per image, and "
                f"{record.channels} when the cache was planned",
                "take an output that always has the same length",
            )
        truth = labels_of_output(record, labels)
        encoded[name] = encode_output(values[name], truth, record.encoding, bases.get(name))
    return encoded
