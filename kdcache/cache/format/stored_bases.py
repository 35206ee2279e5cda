"""The bases of a cache: the tail basis of class logits, and the principal axes of vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.format import zarr_store
from kdcache.cache.format.array_specs import basis_arrays, path_in_store
from kdcache.cache.format.output_codec import Basis
from kdcache.cache.format.output_records import DEFAULT_OUTPUT
from kdcache.cache.format.schema import Plan
from kdcache.cache.format.store_files import check_common
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.vector_rows import VectorBasis
from kdcache.cache.format.verified_files import AGAIN
from kdcache.errors import CorruptError

Bases = Mapping[str, TailBasis | VectorBasis]
"""Basis by name of the output, of the outputs that have one."""


def arrays_of(bases: Bases) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of bases by path in the store."""
    return {
        path_in_store(output, part): tensor.numpy()
        for output, basis in bases.items()
        for part, tensor in _parts(basis).items()
    }


def basis_of_logits(basis: TailBasis | None) -> Bases:
    """Return the bases of a cache whose only basis, if any, is that of the class logits."""
    return {} if basis is None else {DEFAULT_OUTPUT: basis}


def read_bases(cache: Path, plan: Plan) -> dict[str, TailBasis | VectorBasis]:
    """Read the bases of all outputs that have one."""
    bases = {output: read_output_basis(cache, plan, output) for output in plan.output_names}
    return {output: basis for output, basis in bases.items() if basis is not None}


def _parts(basis: TailBasis | VectorBasis) -> dict[str, torch.Tensor]:
    """Return the tensors of a basis by the names of their arrays."""
    if isinstance(basis, VectorBasis):
        return {"axes": basis.axes, "mean": basis.mean}
    return {"tail_basis": basis.basis, "tail_mean": basis.mean, "tail_scale": basis.scale}


def read_basis(cache: Path, plan: Plan) -> TailBasis | None:
    """Read the basis of the tail of the class logits; None if there are no class logits, or their encoding has none."""
    if plan.class_encoding is None:
        return None
    arrays = _read_basis(cache, plan, DEFAULT_OUTPUT)
    return _tail_basis(arrays) if arrays else None


def read_output_basis(cache: Path, plan: Plan, output: str) -> Basis:
    """Read the basis of any output; None if its encoding does not use one."""
    arrays = _read_basis(cache, plan, output)
    if not arrays:
        return None
    return VectorBasis(arrays["axes"], arrays["mean"]) if "axes" in arrays else _tail_basis(arrays)


def _tail_basis(arrays: Mapping[str, torch.Tensor]) -> TailBasis:
    return TailBasis(*(arrays[name] for name in ("tail_basis", "tail_mean", "tail_scale")))


def _read_basis(cache: Path, plan: Plan, output: str) -> dict[str, torch.Tensor]:
    """Read the arrays of a basis by part; empty if the encoding does not use one."""
    expected = {path_in_store(output, part): array for part, array in basis_arrays(plan, output).items()}
    if not expected:
        return {}
    check_common(cache, plan)
    arrays = {name.rpartition("/")[2]: values for name, values in zarr_store.read_arrays(cache, expected).items()}
    scales = arrays.get("tail_scale", np.ones(1))
    if not all(np.isfinite(array).all() for array in arrays.values()) or (scales <= 0).any():
        which = "tail basis" if output == DEFAULT_OUTPUT else f"basis of the output {output}"
        raise CorruptError(f"the {which} of {cache} holds NaN, infinities or a scale that is not positive", AGAIN)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
