"""Resume a cache after some images of its data set were replaced: find the shards that must be made again."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdcache.cache.format import zarr_store
from kdcache.cache.format.fingerprints import digest_of
from kdcache.cache.format.schema import Plan
from kdcache.errors import CorruptError


def differs_in_images_alone(before: Plan, now: Plan) -> bool:
    """Return whether two plans differ in the digest of the data set, and in nothing else."""
    dataset = before.dataset.model_copy(update={"digest": now.dataset.digest})
    return before != now and before.model_copy(update={"dataset": dataset}) == now


def affected_shards(
    cache: Path,
    before: Plan,
    labels: npt.NDArray[np.int32],
    keys: npt.NDArray[np.uint64],
    fixed: Set[int] | None,
) -> set[int]:
    """Return the shards, of each view, whose images changed since an unsealed cache was begun.

    Args:
        cache: its folder.
        before: its plan.
        labels: [N] int32, of the data set as it is now.
        keys: [N] uint64, content keys of the data set as it is now.
        fixed: ids of the samples that all rows depend on; None if every row may depend on any image.

    Raises:
        ValueError: if more than the rows of the changed images depends on them; says why.
    """
    try:
        old_labels, old_keys = zarr_store.read_samples(cache, before)
    except CorruptError:
        raise ValueError("its content keys are damaged, so it is not known which images changed") from None
    if digest_of(old_keys, old_labels) != before.dataset.digest:
        raise ValueError("its content keys are not those of its plan, so it is not known which images changed")
    if (relabeled := np.flatnonzero(old_labels != labels)).size:
        raise ValueError(f"{relabeled.size} labels changed, first that of sample {relabeled[0]}")
    changed = np.flatnonzero(old_keys != keys).tolist()
    some = f"{len(changed)} images changed, first sample {changed[0]}"
    if fixed is None:
        raise ValueError(f"{some}; the views mix images, so every row may depend on them")
    if in_pilot := sorted(fixed & set(changed)):
        raise ValueError(f"{some}; sample {in_pilot[0]} is in the pilot, which the encoding of all rows was fitted to")
    return {index // before.shape.shard_rows for index in changed}
