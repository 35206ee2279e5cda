"""Estimate what a cache takes on the disk besides its rows, which in a small cache may be more than these."""

from __future__ import annotations

import math
import zlib

import numpy as np
import numpy.typing as npt

from kdcache.cache.format import array_specs, store_files, zarr_store
from kdcache.cache.format.fingerprints import SKETCH_PARTS
from kdcache.cache.format.schema import Commit, FileRecord, Plan, Summary, canonical, commit_file, seal

_KEY_BYTES, _FINGERPRINT_BYTES = 8, 4 + 4 * SKETCH_PARTS
"""Bytes per content key, and per fingerprint with its sketch: both are incompressible."""

_INDEX_ENTRY, _CHECKSUM = 16, 4
"""Bytes of a shard's index per chunk, and of each checksum (docs/FORMAT.md, sections 3 and 10.1)."""

_COMPRESSOR = 24
"""Bytes that a compressed chunk takes besides its data, with its checksum."""

_ANY_FILE = FileRecord(size=10_000, sha256="0" * 64)
"""What the manifest says of a file, for the length of it."""


def bytes_besides_rows(plan: Plan, labels: npt.NDArray[np.int32]) -> int:
    """Return approximately the bytes of a cache besides its compressed rows.

    These are labels and content keys, the basis, fingerprints, chunk indexes, metadata, commit markers and manifest.

    Args:
        plan: of the cache.
        labels: [N] int32.
    """
    per_sample = _KEY_BYTES * len(labels) + len(zlib.compress(labels.astype("<i4").tobytes(), 1))
    n_fingerprints = -(-plan.dataset.samples // plan.shape.fingerprint_stride)
    bases = array_specs.bases_of_all_outputs(plan).values()
    basis = sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in bases)
    files = dict.fromkeys(store_files.common_files(plan), _ANY_FILE)
    indexes = markers = 0
    for view in range(plan.views.count):
        for shard in range(plan.shards):
            of_shard = dict.fromkeys(store_files.shard_files(plan, view, shard), _ANY_FILE)
            files |= {**of_shard, commit_file(view, shard): _ANY_FILE}
            if not markers:
                markers = len(canonical(Commit(files=of_shard))) * plan.views.count * plan.shards
    for name, array in (array_specs.shard_arrays(plan) | array_specs.common_arrays(plan)).items():
        chunks = math.prod(array.shards) // math.prod(array.chunks)
        n_files = plan.shards * (plan.views.count if name in array_specs.shard_arrays(plan) else 1)
        used = min(chunks, -(-plan.dataset.samples // max(array.chunks[min(1, len(array.chunks) - 1)], 1)))
        indexes += n_files * (_INDEX_ENTRY * chunks + _CHECKSUM + _COMPRESSOR * used)
    nothing = Summary(teacher_accuracy=0.5, mean_sharpness=1.5, mean_entropy=1.5, mean_top_probability=0.5)
    manifest = len(canonical(seal(plan, nothing, files)))
    fingerprints = _FINGERPRINT_BYTES * n_fingerprints * plan.views.count
    return per_sample + fingerprints + basis + indexes + markers + manifest + zarr_store.metadata_bytes(plan)
