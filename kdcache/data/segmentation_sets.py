"""Data sets with a label map per image: folders of images and masks, Pascal VOC, Cityscapes and SBD."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torchvision import datasets as tv

from kdcache.config.schema import DatasetSpec
from kdcache.config.transform import Transform
from kdcache.data.image_files import readable_extensions
from kdcache.data.images import FileImages
from kdcache.data.label_maps import FileMaps, ItemMaps, LabelMaps, MaskValues
from kdcache.data.npz_files import array_transform
from kdcache.data.samples import Split
from kdcache.errors import MismatchError, UsageError, counted
from kdcache.runtime.paths import expand
from kdcache.runtime.system_files import is_system_file

SEGMENTATION_SETS = ("segmentation-folder", "voc", "cityscapes", "sbd")

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_IMAGES = ("images", "image", "imgs", "img", "JPEGImages")
_MASKS = ("masks", "mask", "labels", "annotations", "SegmentationClass")
_SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
_SUFFIXES = ("_mask", "-mask", "_label", "_labels", "_L")
"""Endings of the names of masks, in addition to the name of the image."""

_SHOWN = 5
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MaskedImages(NamedTuple):
    """A split of a data set with label maps.

    Attributes:
        images: in a fixed order.
        maps: one for each.
        class_names: name of each class.
        transform: the default one.
    """

    images: FileImages
    maps: LabelMaps
    class_names: tuple[str, ...]
    transform: Transform


def read_masked(spec: DatasetSpec, root: Path, split: Split) -> MaskedImages | None:
    """Return a split of a data set with label maps, as the set itself divides it; None if it has no such split.

    The labels of the test splits of VOC, Cityscapes and SBD are not public: their validation set is the test split.

    Raises:
        UsageError: if the data set is not at `root`.
        MismatchError: if images and masks do not belong together.
    """
    if spec.name == "segmentation-folder":
        return _folder(spec, root, split)
    if split == "validation":
        return None
    return {"voc": _voc, "cityscapes": _cityscapes, "sbd": _sbd}[spec.name](root, "val" if split == "test" else "train")


def has_split(spec: DatasetSpec, root: Path, split: Split) -> bool:
    """Return whether a data set with label maps has a split of its own, without reading it; see `read_masked`."""
    return _folders_of(root, split) is not None if spec.name == "segmentation-folder" else split != "validation"


def _photographs(resize: int, crop: int) -> Transform:
    return [{"Resize": {"size": [resize]}}, {"CenterCrop": {"size": crop}}, *_as_tensors()]


def _as_tensors() -> Transform:
    return [{"ToImage": {}}, *array_transform(_MEAN, _STD)]


def _of_torchvision(kind: Any, name: str, root: Path, **options: Any) -> Any:
    """Return a data set of torchvision.

    Raises:
        UsageError: if it is not in `root`.
    """
    try:
        return kind(str(root), **options)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{name} is not in {root}: {error}",
            f"put it there as torchvision.datasets.{kind.__name__} has it, or --set dataset.root=FOLDER",
        ) from None


def _voc(root: Path, part: str) -> MaskedImages:
    found = _of_torchvision(tv.VOCSegmentation, "voc", root, image_set=part)
    values = MaskValues(len(VOC_CLASSES))
    return MaskedImages(
        FileImages([*found.images]),
        FileMaps([*found.masks], values, palettes=True),
        VOC_CLASSES,
        _photographs(520, 480),
    )


def _cityscapes(root: Path, part: str) -> MaskedImages:
    found = _of_torchvision(tv.Cityscapes, "cityscapes", root, split=part, target_type="semantic")
    trained = [each for each in found.classes if 0 <= each.train_id < 255]
    table = [-1] * (1 + max(each.id for each in found.classes))
    for each in trained:
        table[each.id] = each.train_id
    names = tuple(each.name for each in sorted(trained, key=lambda each: int(each.train_id)))
    # Its order is that of the file system.
    pairs = sorted(zip(found.images, (target[0] for target in found.targets), strict=True))
    images, masks = ([*column] for column in zip(*pairs, strict=True))
    return MaskedImages(
        FileImages(images), FileMaps(masks, MaskValues(len(names), table=tuple(table))), names, _as_tensors()
    )


def _sbd(root: Path, part: str) -> MaskedImages:
    found = _of_torchvision(tv.SBDataset, "sbd", root, image_set=part, mode="segmentation")
    maps = ItemMaps(found, len(found), MaskValues(len(VOC_CLASSES)))
    return MaskedImages(FileImages([*found.images]), maps, VOC_CLASSES, _photographs(520, 480))


def _folder(spec: DatasetSpec, root: Path, split: Split) -> MaskedImages | None:
    """Return a split of a folder of images and masks."""
    folders = _folders_of(root, split)
    if folders is None:
        if split == "train":
            raise UsageError(
                f"{root} does not hold images and masks" if root.is_dir() else f"folder not found: {root}",
                "put train/images and train/masks there (and if you have them val/ and test/), or images and masks "
                "alone; or --set dataset.root=FOLDER",
            )
        return None
    names = _class_names(spec, root)
    images, masks = _paired(*folders)
    ignored = () if spec.ignore is None else (spec.ignore,)
    return MaskedImages(
        FileImages(images),
        FileMaps(masks, MaskValues(len(names), spec.first_class, ignored), spec.palettes),
        names,
        _as_tensors(),
    )


def _folders_of(root: Path, split: Split) -> tuple[Path, Path] | None:
    """Return the folders of the images and of the masks of a split; None if there are none."""
    for name in _SPLITS[split]:
        for images in _IMAGES:
            for masks in _MASKS:
                for pair in (
                    (root / name / images, root / name / masks),
                    (root / images / name, root / masks / name),
                ):
                    if pair[0].is_dir() and pair[1].is_dir():
                        return pair
    if split != "train":
        return None
    found = ((root / images, root / masks) for images in _IMAGES for masks in _MASKS)
    return next((pair for pair in found if pair[0].is_dir() and pair[1].is_dir()), None)


def _class_names(spec: DatasetSpec, root: Path) -> tuple[str, ...]:
    """Return the names of the classes, from the pipeline or a text file with a line per class.

    Raises:
        UsageError: if there are none.
    """
    given = spec.classes
    if isinstance(given, list):
        return tuple(given)
    path = root / "classes.txt" if given is None else expand(given)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"the names of the classes are not known: {path}: {reason}",
            "write one line per class, in the order of their values in the masks, or --set dataset.classes=[road,sky]",
        ) from None
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise UsageError(f"{path} is empty", "write one line per class")
    return names


def _paired(images: Path, masks: Path) -> tuple[list[str], list[str]]:
    """Return the image files of a folder, by name, and the mask of each.

    Raises:
        UsageError: if there are no images.
        MismatchError: if an image has no mask, or a mask no image; names the first few.
    """
    of_images, of_masks = _files(images), _files(masks)
    if not of_images:
        raise UsageError(
            f"no image was found in {images}", f"put images there; read are {' '.join(sorted(readable_extensions()))}"
        )
    pairs = {name: _mask_of(name, of_masks) for name in of_images}
    lacking = [name for name, mask in pairs.items() if mask is None]
    unused = sorted(of_masks.keys() - {mask for mask in pairs.values() if mask is not None})
    for names, kind, folder, other in ((lacking, "images", images, masks), (unused, "masks", masks, images)):
        if names:
            what = "mask" if kind == "images" else "image"
            raise MismatchError(
                f"{counted(len(names), kind[:-1])} of {folder} {'has' if len(names) == 1 else 'have'} no {what} in "
                f"{other}: {_few(names)}",
                f"give both the same name but for the ending (a mask may also end in "
                f"{', '.join(_SUFFIXES)}), or move the {kind} away",
            )
    return [of_images[name] for name in pairs], [of_masks[mask] for mask in pairs.values() if mask is not None]


def _mask_of(name: str, masks: dict[str, str]) -> str | None:
    return next((name + suffix for suffix in ("", *_SUFFIXES) if name + suffix in masks), None)


def _files(folder: Path) -> dict[str, str]:
    """Return the image files in a folder and those in it, by their path without extension, sorted."""
    extensions = readable_extensions()
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in extensions or path.name.startswith(".") or is_system_file(path.name):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise MismatchError(
                f"{found[name]} and {path} have the same name but for the ending", "rename or remove one of them"
            )
        found[name] = str(path)
    return found


def _few(names: Iterable[str] | Sequence[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
