"""Named data sets in their usual layouts, each with its splits."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torchvision import datasets as tv

from kdcache.config.schema import COME_WITH_KDCACHE, DatasetSpec
from kdcache.config.section import validated
from kdcache.config.transform import Transform
from kdcache.data.class_folders import list_images
from kdcache.data.images import ArrayImages, FileImages
from kdcache.data.label_maps import ChosenMaps, mask_of
from kdcache.data.nodes import Graph, graph_of, is_graph, read_graph
from kdcache.data.npz_files import array_transform, read_npz
from kdcache.data.sample_groups import groups_among
from kdcache.data.samples import HeldOut, Samples, Split
from kdcache.data.scenes import read_scenes
from kdcache.data.seeding import in_hash_order
from kdcache.data.segmentation_sets import SEGMENTATION_SETS, has_split, read_masked
from kdcache.data.user_dataset import load_user_split, user_samples
from kdcache.errors import UsageError
from kdcache.runtime.package_data import package_data
from kdcache.runtime.paths import READ_PERMISSION, expand
from kdcache.runtime.user_code import is_user_code

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def photograph_transform(
    resize: int = 256,
    crop: int = 224,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    interpolation: str = "bilinear",
) -> Transform:
    """Return the center crop that torchvision's ImageNet weights are evaluated with."""
    return [
        {"Resize": {"size": [resize], "interpolation": interpolation}},
        {"CenterCrop": {"size": crop}},
        {"ToImage": {}},
        *array_transform(mean, std),
    ]


def _root(spec: DatasetSpec) -> Path:
    return Path(f"data/{spec.name}") if spec.root is None else expand(spec.root)


def _lacking(spec: DatasetSpec) -> list[Split]:
    """Return the splits that a set does not have of its own."""
    if spec.name == "graph":
        return _unmasked(read_graph(_root(spec)))
    if is_user_code(spec.name):
        if is_graph(whole := load_user_split(spec, "train")):
            return _unmasked(graph_of(whole))
        return [split for split in SPLITS if split != "train" and load_user_split(spec, split) is None]
    if spec.name in ("imagenet", "image-folder"):
        return [split for split, folder in _folders(spec).items() if folder is None]
    if spec.name in SEGMENTATION_SETS:
        return [split for split in SPLITS if not has_split(spec, _root(spec), split)]
    own: dict[str, tuple[Split, ...]] = {
        **dict.fromkeys(COME_WITH_KDCACHE, SPLITS),
        **dict.fromkeys(("cifar10", "cifar100"), ("train", "test")),
    }
    return [split for split in SPLITS if split not in own.get(spec.name, ("train",))]


def _held_out(count: int, spec: DatasetSpec) -> HeldOut | None:
    """Return the fractions of `count` training images that are held out; None if every split is the set's own."""
    options = {"validation": "validation_fraction", "test": "test_fraction"}
    fractions = {options[split]: getattr(spec, options[split]) for split in _lacking(spec) if split in options}
    return HeldOut(count, fractions) if fractions else None


def _share(
    count: int, split: Split, spec: DatasetSpec, lacking: Sequence[Split] | None = None
) -> npt.NDArray[np.int64]:
    """Return the ids of `split` among `count` training images, from which the `lacking` splits are held out.

    They are drawn in the order of the hashes of the ids, which is the same on every machine and with every version of
    every library, unlike the permutation of a random generator.
    """
    order = in_hash_order(count)
    start = 0
    for name in _lacking(spec) if lacking is None else lacking:
        size = round(count * (spec.validation_fraction if name == "validation" else spec.test_fraction))
        if split == name:
            return np.sort(order[start : start + size])
        start += size
    return np.sort(order[start:])


def _digits(spec: DatasetSpec, split: Split) -> Samples:
    with gzip.open(package_data("data/digits/digits.csv.gz"), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    rows = {"train": slice(0, 1000), "validation": slice(1000, 1297), "test": slice(1297, 1797)}[split]
    # 17 levels, scaled to the range of 8-bit images.
    pixels = torch.from_numpy((table[rows, :64] * 15).astype(np.uint8)).reshape(-1, 1, 8, 8)
    labels = table[rows, 64].astype(np.int32)
    return Samples(
        "digits", split, ArrayImages(pixels), labels, tuple("0123456789"), array_transform([0.2869], [0.3531])
    )


def _cifar(spec: DatasetSpec, split: Split) -> Samples:
    """Return a split of CIFAR-10 or CIFAR-100, downloaded if needed."""
    root = _root(spec)
    kind, archive = {
        "cifar10": (tv.CIFAR10, "cifar-10-python.tar.gz"),
        "cifar100": (tv.CIFAR100, "cifar-100-python.tar.gz"),
    }[spec.name]
    try:
        raw = kind(str(root), train=split != "test", download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise UsageError(
            f"{spec.name} is not in {root} and cannot be downloaded: {error}",
            f"put {archive} (from https://www.cs.toronto.edu/~kriz/cifar.html) or its unpacked folder into {root}, "
            "or give the folder that has it: --set dataset.root=FOLDER",
        ) from None
    ids = _share(len(raw.targets), split, spec) if split != "test" else np.arange(len(raw.targets))
    pixels = torch.from_numpy(raw.data[ids]).permute(0, 3, 1, 2).contiguous()
    mean, std = {
        "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    }[spec.name]
    labels = np.array(raw.targets, np.int32)[ids]
    return Samples(
        spec.name,
        split,
        ArrayImages(pixels),
        labels,
        tuple(raw.classes),
        array_transform(mean, std),
        held_out=None if split == "test" else _held_out(len(raw.targets), spec),
    )


_FOLDER_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("val", "validation", "valid"),
    "test": ("test",),
}


def _folders(spec: DatasetSpec) -> dict[Split, Path | None]:
    """Return the folder of each split of a data set of class folders."""
    root = _root(spec)
    try:
        folders: dict[Split, Path | None] = {
            s: next((root / n for n in names if (root / n).is_dir()), None) for s, names in _FOLDER_NAMES.items()
        }
    except PermissionError:
        raise UsageError(f"no permission to read the folder {root}", READ_PERMISSION) from None
    if spec.name == "imagenet":
        # The labels of ImageNet's test set are not public: its validation set is used as the test set.
        folders = {"train": folders["train"], "validation": None, "test": folders["validation"]}
    if folders["train"] is None or (spec.name == "imagenet" and folders["test"] is None):
        needed = "train/ and val/" if spec.name == "imagenet" else "train/ (and if you have them val/ and test/)"
        raise UsageError(
            f"{root} does not hold {spec.name}" if root.is_dir() else f"folder not found: {root}",
            f"put {needed} there, each with one folder of images per class, or --set dataset.root=FOLDER",
        )
    return folders


def _folder(spec: DatasetSpec, split: Split) -> Samples:
    """Return a split of a data set with one folder of images per class."""
    folders = _folders(spec)
    train = folders["train"]
    assert train is not None, "checked by _folders"  # noqa: S101  # for the types
    listed = list_images(folders[split] or train, train)
    own = folders[split] is not None and split != "train"
    ids = np.arange(len(listed.paths)) if own else _share(len(listed.paths), split, spec)
    return Samples(
        spec.name,
        split,
        FileImages([listed.paths[i] for i in ids]),
        np.array(listed.labels, np.int32)[ids],
        listed.classes,
        photograph_transform(),
        notes=listed.notes,
        held_out=None if own else _held_out(len(listed.paths), spec),
    )


def _segmentation(spec: DatasetSpec, split: Split) -> Samples:
    """Return a split of a data set with label maps."""
    own = read_masked(spec, _root(spec), split)
    found = own or read_masked(spec, _root(spec), "train")
    assert found is not None, "it has a training split"  # noqa: S101  # for the types
    count = len(found.images)
    ids = np.arange(count) if own is not None and split != "train" else _share(count, split, spec)
    return Samples(
        spec.name,
        split,
        FileImages([found.images.paths[index] for index in ids]),
        np.full(len(ids), -1, np.int32),
        found.class_names,
        found.transform,
        held_out=None if own is not None and split != "train" else _held_out(count, spec),
        maps=ChosenMaps(found.maps, ids),
    )


def _npz(spec: DatasetSpec, split: Split) -> Samples:
    """Return a split of an npz file of images, or of tensors of any shape."""
    path = _root(spec)
    stored = read_npz(path)
    ids = _share(len(stored.labels), split, spec)
    kept = groups_among(stored.attributes.groups if split == "train" else None, ids, len(stored.labels), str(path))
    return Samples(
        path.stem,
        split,
        ArrayImages(stored.samples[torch.from_numpy(ids)].contiguous()),
        stored.labels[ids],
        stored.class_names,
        stored.transform,
        notes=kept.notes,
        held_out=_held_out(len(stored.labels), spec),
        groups=kept.groups,
        sample_names=stored.attributes.names_at(ids),
        privacy=stored.attributes.privacy_at(ids),
    )


def _graph(spec: DatasetSpec, split: Split) -> Samples:
    """Return a split of the graph in an npz file."""
    return _nodes(read_graph(_root(spec)), split, spec)


def _unmasked(graph: Graph) -> list[Split]:
    return [split for split in SPLITS if split != "train" and split not in graph.masks]


def _nodes(graph: Graph, split: Split, spec: DatasetSpec) -> Samples:
    """Return a split of a graph; splits without a mask are held out of the labels of the training nodes."""
    lacking = _unmasked(graph)
    if split != "train" and split not in lacking:
        return graph.split(split, graph.masks[split].nonzero().squeeze(1))
    labeled = graph.labeled
    return graph.split(split, labeled[torch.from_numpy(_share(len(labeled), split, spec, lacking))])


def _user(spec: DatasetSpec, split: Split) -> Samples:
    train = load_user_split(spec, "train")
    if is_graph(train):
        return _nodes(graph_of(train, spec.name.rpartition("/")[2]), split, spec)
    dataset = train if split == "train" else load_user_split(spec, split)
    assert train is not None, "checked by load_user_split"  # noqa: S101  # for the types
    if split != "train" and dataset is not None:
        return user_samples(spec, split, dataset, train, None)
    ids = _share(len(train), split, spec)  # type: ignore[arg-type]  # torch leaves __len__ to the subclass
    return user_samples(spec, split, train, train, ids, _held_out(len(train), spec))  # type: ignore[arg-type]


def _spec_of(dataset: str | Mapping[str, Any] | DatasetSpec, given: Mapping[str, Any]) -> DatasetSpec:
    """Return the `dataset` section that a name or mapping and further options stand for."""
    if isinstance(dataset, DatasetSpec):
        return dataset.model_copy(update=given)
    named = {"name": dataset} if isinstance(dataset, str) else dict(dataset)
    return validated(DatasetSpec, {**named, **given}, "the data set")


_READERS: dict[str, Callable[[DatasetSpec, Split], Samples]] = {
    "digits": _digits,
    "scenes": lambda _, split: read_scenes(split),
    "cifar10": _cifar,
    "cifar100": _cifar,
    "imagenet": _folder,
    "image-folder": _folder,
    "npz": _npz,
    "graph": _graph,
    **dict.fromkeys(SEGMENTATION_SETS, _segmentation),
}


def load_split(
    dataset: str | Mapping[str, Any] | DatasetSpec,
    split: Split,
    *,
    root: str | Path | None = None,
    validation_fraction: float | None = None,
    test_fraction: float | None = None,
    args: Mapping[str, Any] | None = None,
) -> Samples:
    """Return one split of a named data set, such as `kdcache.load_split("digits", "train")`.

    Args:
        dataset: `digits`, `cifar10`, `cifar100`, `imagenet`, `image-folder`, `npz`, `graph`, `segmentation-folder`,
            `voc`, `cityscapes`, `sbd`, `scenes` or `path/file.py:function`; or a mapping with the keys of the `dataset`
            section of a pipeline file.
        split: "train", "validation" or "test".
        root: folder of the data set, or for `npz` and `graph` the file; `data/NAME` if not given.
        validation_fraction: fraction of the training images held out if the set has no validation split; 0.1 if not
            given.
        test_fraction: fraction held out if the set has no test split; 0.1 if not given.
        args: keyword arguments of the function, if `dataset` is `path/file.py:function`.

    Raises:
        UsageError: for a name, a split or an option that is not known.
        KdcacheError: if the data is not found or cannot be read; the message says what to put where.
    """
    given = {"root": root and str(root), "validation_fraction": validation_fraction, "test_fraction": test_fraction}
    given["args"] = None if args is None else dict(args)  # type: ignore[assignment]  # each key has a type of its own
    spec = _spec_of(dataset, {key: value for key, value in given.items() if value is not None})
    if split not in SPLITS:
        raise UsageError(f"there is no split {split!r}", f"use one of {', '.join(SPLITS)}")
    return (_user if is_user_code(spec.name) else _READERS[spec.name])(spec, split)


def has_label_maps(spec: DatasetSpec) -> bool:
    """Return whether a data set has a class per pixel, without reading it; of a user's, one item is read."""
    if not is_user_code(spec.name):
        return spec.name in (*SEGMENTATION_SETS, "scenes")
    dataset = load_user_split(spec, "train")
    return dataset is not None and not is_graph(dataset) and mask_of(dataset[0]) is not None


def load_held_out(spec: DatasetSpec, split: Literal["validation", "test"]) -> Samples | None:
    """Return the validation or the test split; None if the set has none and its fraction is 0."""
    fraction = spec.validation_fraction if split == "validation" else spec.test_fraction
    return None if fraction == 0 and split in _lacking(spec) else load_split(spec, split)
