"""More views, or more samples, for a sealed cache: a new one that takes over the shards that are already made.

With more views it is to the byte the cache that would have been made with all of them at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kdcache.cache.format.schema import Plan
from kdcache.cache.preconditions import check_same_plan
from kdcache.cache.reader import Cache
from kdcache.data.mixing import split_mixing
from kdcache.errors import MismatchError


def check_extends(old: Cache, plan: Plan, keys: npt.NDArray[np.uint64], labels: npt.NDArray[np.int32]) -> None:
    """That a cache of a plan is another one and more.

    Args:
        old: the sealed cache.
        plan: of the larger one.
        keys: [N] uint64, content keys of its samples.
        labels: [N] int32.

    Raises:
        MismatchError: if anything but the number of views or samples differs, or there is nothing more.
    """
    then = old.manifest.plan
    dataset = plan.dataset.model_copy(update={"samples": then.dataset.samples, "digest": then.dataset.digest})
    views = plan.views.model_copy(update={"count": then.views.count})
    check_same_plan(old.path, then, plan.model_copy(update={"dataset": dataset, "views": views}))
    had, have = (then.dataset.samples, then.views.count), (plan.dataset.samples, plan.views.count)
    if have == had or have[0] < had[0] or have[1] < had[1]:
        raise MismatchError(
            f"{old.path} has {had[1]} views of {had[0]} samples; {have[1]} of {have[0]} are asked for",
            "ask for more views (cache.views), or give the data set with more samples behind those that it had",
        )
    if have[0] != had[0] and split_mixing(plan.views.transform)[1]:
        raise MismatchError(
            f"with more samples than the {had[0]} of {old.path}, every image would be mixed with another one",
            "extend it by views alone, or dump the larger data set anew",
        )
    same = (keys[: len(old)] == old.sample_keys) & (labels[: len(old)] == old.labels)
    if not same.all():
        raise MismatchError(
            f"sample {int(np.argmin(same))} is not the one that {old.path} has there, or has another label",
            "put new samples behind those that the cache was made from, in the same order",
        )
