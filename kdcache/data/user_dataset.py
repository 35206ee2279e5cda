"""Data sets from a file of the user, `path/file.py:function`.

The function is called as `function(split, root=None, **args)` for "train", "validation" and "test", more than once; the
root is passed only if the pipeline sets it. It returns a map-style data set of (image, label) pairs, or None for a
split that the set does not have. For "train" it may return a graph, of which masks say what the splits are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Subset

from kdcache.config.schema import DatasetSpec
from kdcache.data.images import ItemImages
from kdcache.data.nodes import is_graph
from kdcache.data.sample_attributes import attributes_of_dataset
from kdcache.data.sample_groups import groups_among
from kdcache.data.samples import HeldOut, Samples, Split, class_names, wrap
from kdcache.errors import UsageError
from kdcache.runtime import user_code
from kdcache.runtime.paths import expand

_SIGNATURE = "function(split, root=None, **args) -> a Dataset of (image, label) pairs, or None for a missing split"


def load_user_split(spec: DatasetSpec, split: Split) -> Dataset[Any] | None:
    """Return what the function of a data set returns for a split.

    Raises:
        UsageError: if the function cannot be loaded or called, raises, or returns no map-style data set and no graph.
    """
    code = user_code.load(spec.name, "data set", _SIGNATURE)
    root = {} if spec.root is None else {"root": str(expand(spec.root))}
    dataset = code(split, **root, **spec.args)
    if dataset is None:
        if split == "train":
            raise code.mistake("returned None for the split 'train', which every data set must have")
        return None
    if split == "train" and is_graph(dataset):
        return dataset  # type: ignore[no-any-return]  # not a Dataset: the caller asks `is_graph`
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise code.mistake(f"returned a {type(dataset).__name__} for the split {split!r}, not a data set with a length")
    if not len(dataset):
        raise code.mistake(f"returned an empty data set for the split {split!r}")
    return dataset  # type: ignore[no-any-return]  # checked above


def user_samples(
    spec: DatasetSpec,
    split: Split,
    dataset: Dataset[Any],
    train: Dataset[Any],
    ids: npt.NDArray[np.int64] | None,
    held_out: HeldOut | None = None,
) -> Samples:
    """Return a split as samples.

    Args:
        spec: the data set.
        split: which part this is.
        dataset: that holds it.
        train: the training split, which says how many classes there are.
        ids: which items of `dataset` belong to the split; None for all.
        held_out: from how many items they were drawn; None if the split is one of its own.
    """
    source: Split = split if ids is None else "train"
    part = dataset if ids is None else Subset(dataset, ids.tolist())
    name = spec.name.rpartition("/")[2]  # as of a teacher from a file: not where it is on this machine
    classes = class_names(train, f"{spec.name} ({split})")
    samples = wrap(part, len(classes), name, split, class_names=classes)
    images = ItemImages(part, len(samples), partial(_load_again, spec, source, ids))
    samples = replace(samples, images=images, held_out=held_out)
    if ids is None:
        return samples
    count, where = len(dataset), f"{name}/{split}"  # type: ignore[arg-type]  # has a length
    attributes = attributes_of_dataset(dataset, count, where)
    kept = groups_among(attributes.groups if split == "train" else None, ids, count, where)
    return replace(
        samples,
        groups=kept.groups,
        notes=kept.notes,
        sample_names=attributes.names_at(ids),
        privacy=attributes.privacy_at(ids),
    )


def _load_again(spec: DatasetSpec, split: Split, ids: npt.NDArray[np.int64] | None) -> Dataset[Any]:
    dataset = load_user_split(spec, split)
    if dataset is None or (ids is not None and len(dataset) <= ids.max()):  # type: ignore[arg-type]  # has a length
        raise UsageError(
            f"{spec.name} returns another number of items for the split {split!r} when it is called again",
            "let it depend on its arguments and its files alone",
        )
    return dataset if ids is None else Subset(dataset, ids.tolist())
