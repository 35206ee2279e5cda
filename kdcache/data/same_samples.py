"""Compare the samples of a data set with those of a cache, in order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kdcache.data.images import name_of
from kdcache.data.samples import Samples
from kdcache.errors import MismatchError

_BY_CONTENT = "train on the samples that match: --align, or --allow-missing if the data set lacks some of the cache"


def explain_fractions(
    samples: Samples, keys: npt.NDArray[np.uint64], cached_keys: npt.NDArray[np.uint64]
) -> tuple[str, str]:
    """Return whether a cache was made with other fractions of images held out, and what to set.

    Args:
        samples: the data set.
        keys: [M] uint64, its content keys.
        cached_keys: [N] uint64, those of the cache.

    Returns:
        (what is likely, as the end of a sentence; the fix); empty if the numbers have another cause.
    """
    held_out = samples.held_out
    if held_out is None or len(cached_keys) > held_out.total:
        return "", ""
    # The images are held out in one order: those of the larger fraction include those of the smaller one.
    fewer, more = sorted((keys, cached_keys), key=len)
    if len(fewer) == len(more) or not np.isin(fewer, more).all():
        return "", ""
    options = " and ".join(f"{name} {value:g}" for name, value in held_out.fractions.items())
    then = 1 - len(cached_keys) / held_out.total
    total = " + ".join(held_out.fractions)
    return (
        f": of {held_out.total} images, about {then:.3g} were held out when it was made, here {options}",
        f"set the fractions of the dump, so that {total} is {then:.3g}: --set dataset.{next(iter(held_out.fractions))}="
        "...",
    )


def check_same_samples(
    samples: Samples,
    keys: npt.NDArray[np.uint64],
    cached_keys: npt.NDArray[np.uint64],
    cached_labels: npt.NDArray[np.int32],
) -> None:
    """Check that row i of a cache belongs to sample i of a data set.

    Raises:
        MismatchError: if samples, order or labels differ; the message names the first such sample.
    """
    name = f"{samples.name}/{samples.split}"
    if len(keys) != len(cached_keys):
        cause, remedy = explain_fractions(samples, keys, cached_keys)
        raise MismatchError(
            f"the cache holds {len(cached_keys)} samples, {name} has {len(keys)}{cause}",
            remedy
            or "use the data set and the split that the cache was made from (`kdcache info CACHE` names them), or "
            f"{_BY_CONTENT}",
        )
    differ = np.flatnonzero(keys != cached_keys)
    if len(differ):
        if np.array_equal(np.sort(keys), np.sort(cached_keys)):
            raise MismatchError(
                f"{name} holds the cache's samples in another order, first at sample {differ[0]}",
                "do not shuffle the data set; let the sampler of the DataLoader shuffle; or use --align",
            )
        raise MismatchError(
            f"{len(differ)} of {len(keys)} samples of {name} are not those of the cache, first "
            f"{name_of(samples.images, int(differ[0]))}",
            f"use the data set that the cache was made from, or dump the teacher on this one, or {_BY_CONTENT}",
        )
    differ = np.flatnonzero(samples.labels != cached_labels)
    if len(differ):
        raise MismatchError(
            f"{name_of(samples.images, int(differ[0]))} of {name} has label {samples.labels[differ[0]]}, in the cache "
            f"{cached_labels[differ[0]]} ({len(differ)} labels differ)",
            "use the labels that the cache was made with, or dump the teacher again",
        )
