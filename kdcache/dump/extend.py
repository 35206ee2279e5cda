"""Extend a sealed cache by views or samples: a new cache takes over the shards that exist already.

With more views it is, byte for byte, the cache that would have been made with all views at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kdcache.cache.format.schema import Plan
from kdcache.cache.preconditions import check_same_plan
from kdcache.cache.reader import Cache
from kdcache.data.mixing import split_mixing
from kdcache.data.samples import Samples
from kdcache.dump.noise import privacy_digest
from kdcache.errors import MismatchError, counted


def check_extends(old: Cache, plan: Plan, keys: npt.NDArray[np.uint64], samples: Samples) -> None:
    """Check that a cache of a plan extends another one.

    Args:
        old: the sealed cache.
        plan: of the larger one.
        keys: [N] uint64, content keys of its samples.
        samples: with their labels and privacy.

    Raises:
        MismatchError: if anything but the number of views or samples differs, or neither is larger.
        IncompleteError: if a view of the sealed cache is not here.
    """
    before = old.manifest.plan
    old.check_views()
    dataset = plan.dataset.model_copy(update={"samples": before.dataset.samples, "digest": before.dataset.digest})
    views = plan.views.model_copy(update={"count": before.views.count})
    noise = plan.noise
    if noise is not None:
        noise = noise.model_copy(update={"privacy": privacy_digest(samples, before.dataset.samples)})
    check_same_plan(old.path, before, plan.model_copy(update={"dataset": dataset, "views": views, "noise": noise}))
    n_samples, n_views = before.dataset.samples, before.views.count
    more_samples, more_views = plan.dataset.samples, plan.views.count
    if (more_samples, more_views) == (n_samples, n_views) or more_samples < n_samples or more_views < n_views:
        raise MismatchError(
            f"{old.path} has {counted(n_views, 'view')} of {counted(n_samples, 'sample')}; "
            f"{more_views} of {more_samples} are requested",
            "request more views (cache.views), or append samples to those that the data set had",
        )
    if more_samples != n_samples and split_mixing(plan.views.transform)[1]:
        raise MismatchError(
            f"with more samples than the {n_samples} of {old.path}, images would be mixed with other ones than before",
            "extend it by views only, or make a new cache of the larger data set that does not extend it",
        )
    same = (keys[: len(old)] == old.sample_keys) & (samples.labels[: len(old)] == old.labels)
    if not same.all():
        raise MismatchError(
            f"sample {int(np.argmin(same))} is not the one that {old.path} has there, or has another label",
            "append new samples to those that the cache was made from, in the same order",
        )
