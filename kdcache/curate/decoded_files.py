"""Export a cache: its decoded outputs in an npz or npy file, as `dense_logits.py` imports them."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.format import stored_bases, zarr_store
from kdcache.cache.format.output_codec import decode_output
from kdcache.cache.format.vector_rows import EncodedRows
from kdcache.cache.preconditions import check_outside, refuse_sequences
from kdcache.cache.reader import Cache
from kdcache.curate.logit_files import LOGITS, RESERVED
from kdcache.curate.scratch import scratch_file
from kdcache.data.loader import cut_range
from kdcache.dump.outputs import labels_of_output
from kdcache.errors import UsageError

_ROWS_AT_ONCE = 2048


def logits_of_cache(cache: Cache, out: str | Path) -> dict[str, list[int]]:
    """Write the decoded outputs of a cache, float32 [N, ...] or [V, N, ...] for several views, as npz or npy.

    An npz file has the class logits as `logits`, and each other output under its name.

    Returns:
        The shape of each output, by name.

    Raises:
        UsageError: if `out` exists or has another suffix, or is inside a cache, or an npy file would have to hold
            several outputs.
        IncompleteError: if a view is not here.
    """
    out, plan = Path(out), cache.manifest.plan
    refuse_sequences(plan, "decoding to a file", "read the rows with cache.sequences()")
    check_outside(out)
    cache.check_views()
    if out.suffix not in (".npz", ".npy"):
        raise UsageError(f"{out} ends neither in .npz nor in .npy", "give a name with one of these suffixes with -o")
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already", "give another name with -o")
    names = plan.output_names
    if out.suffix == ".npy" and len(names) > 1:
        raise UsageError(f"{cache.path} has {', '.join(names)}, and an npy file one array", "write an npz file with -o")
    if taken := RESERVED.intersection(names):
        raise UsageError(f"the output {min(taken)} has the name of another array of the file", "decode it in Python")
    with scratch_file(out.with_name(f"{out.name}.partial")) as unfinished, unfinished.open("w+b") as file:
        if out.suffix == ".npy":
            _write_output(cache, names[0], file)
        else:
            _write_npz(cache, file)
        file.flush()
        os.fsync(file.fileno())
        unfinished.replace(out)
    return {output: _shape(cache, output) for output in names}


def _write_npz(cache: Cache, file: IO[bytes]) -> None:
    with zipfile.ZipFile(file, "w") as packed:
        for output in cache.manifest.plan.output_names:
            with packed.open(f"{output}.npy", "w", force_zip64=True) as member:
                _write_output(cache, output, member)
        arrays: dict[str, npt.NDArray[Any]] = {
            "labels": cache.labels,
            "sample_keys": cache.sample_keys,
            "seed": np.array(cache.manifest.plan.views.seed),
        }
        for name, values in arrays.items():
            with packed.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


def _shape(cache: Cache, output: str) -> list[int]:
    """Return the shape of a decoded output, [N, ...] or [V, N, ...]."""
    plan = cache.manifest.plan
    row = (cache.num_classes,) if output == LOGITS else plan.named_outputs[output].shape
    views = plan.views.count
    return [*([views] if views > 1 else []), len(cache), *row]


def _write_output(cache: Cache, output: str, file: IO[bytes]) -> None:
    """Write an npy file in parts, with only one part in memory."""
    plan = cache.manifest.plan
    labels, basis = torch.from_numpy(cache.labels.astype(np.int64)), stored_bases.read_bases(cache.path, plan)
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(_shape(cache, output))}
    np.lib.format.write_array_header_2_0(file, header)
    record = None if output == LOGITS else plan.named_outputs[output]
    encoding = plan.encoding if record is None else record.encoding
    reader: zarr_store.RowReader[EncodedRows] = zarr_store.output_reader(cache.path, plan, output)
    for view in range(plan.views.count):
        for chunk in cut_range(range(len(cache)), plan.shape.chunk_rows):
            rows = reader.read(view, chunk)
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                some = rows[start : start + _ROWS_AT_ONCE]
                of_rows = labels[chunk.start + start : chunk.start + start + len(some)]
                truth = of_rows if record is None else labels_of_output(record, of_rows)
                file.write(decode_output(some, truth, encoding, basis.get(output)).numpy().astype("<f4").tobytes())
