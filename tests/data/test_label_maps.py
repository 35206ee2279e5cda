"""Data sets with a label map per image: their layouts, how maps are moved with images, and bad masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from kdcache import KdcacheError, Samples, load_split, wrap
from kdcache.config.schema import DatasetSpec
from kdcache.config.transform import Transform
from kdcache.data.datasets import has_label_maps
from kdcache.data.images import ArrayImages
from kdcache.data.label_maps import ItemMaps, MaskValues
from kdcache.data.loader import batches
from kdcache.data.samples import as_samples
from kdcache.data.views import View
from kdcache.runtime.user_code import trust

HEIGHT, WIDTH, CLASSES = 24, 30, 3
FLOATS: Transform = [{"ToImage": {}}, {"ToDtype": {"dtype": "float32", "scale": True}}]
STEPS: dict[str, dict[str, Any]] = {
    "CenterCrop": {"size": 16},
    "ColorJitter": {"brightness": 0.5, "hue": 0.2},
    "ElasticTransform": {"alpha": 20.0},
    "GaussianBlur": {"kernel_size": 3},
    "Pad": {"padding": 3},
    "RandomAffine": {"degrees": 40, "translate": [0.2, 0.2], "scale": [0.7, 1.4]},
    "RandomApply": {"transforms": [{"RandomRotation": {"degrees": 60}}], "p": 0.7},
    "RandomChoice": {"transforms": [{"RandomHorizontalFlip": {"p": 1.0}}, {"RandomVerticalFlip": {"p": 1.0}}]},
    "RandomCrop": {"size": [20, 40], "pad_if_needed": True},
    "RandomEqualize": {},
    "RandomGrayscale": {"p": 0.5},
    "RandomHorizontalFlip": {},
    "RandomPerspective": {"p": 0.8},
    "RandomPosterize": {"bits": 4},
    "RandomResizedCrop": {"size": 18},
    "RandomRotation": {"degrees": 180, "expand": True},
    "RandomVerticalFlip": {},
    "RandomZoomOut": {"p": 0.5},
    "Resize": {"size": [40, 20]},
    "ScaleJitter": {"target_size": [30, 30]},
}
"""Steps of torchvision that are applied to images and masks."""


class Masks(Dataset[Any]):
    """Images whose pixels are 1 + the class of the pixel, so that both can be compared after any move."""

    classes = ("road", "sky", "car")

    def __init__(self, count: int = 4, kind: str = "tensor") -> None:
        generator = np.random.default_rng(7)
        self.maps = generator.integers(0, CLASSES, (count, HEIGHT, WIDTH)).astype(np.uint8)
        self.kind = kind

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        mask = self.maps[index]
        image = np.repeat((mask + 1)[:, :, None], 3, axis=2)
        if self.kind == "PIL":
            return Image.fromarray(image), Image.fromarray(mask)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask).long()


def random_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


class Photographs(Masks):
    """Random pictures with the masks of `Masks`."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return random_image(index), Image.fromarray(self.maps[index])


class Unlabeled(Photographs):
    """The same pictures without masks."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return random_image(index), 0


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("view", range(3))
def test_the_pixels_of_a_view_are_those_without_label_maps(name: str, view: int) -> None:
    transform: Transform = [{name: STEPS[name]}, *FLOATS]
    with_maps = View(as_samples(Photographs()), transform, seed=3)
    alone = View(as_samples(Unlabeled()), transform, seed=3)
    for index in range(2):
        ours, plain = with_maps.batch([index], view), alone.batch([index], view)
        assert torch.equal(ours.images, plain.images)
        assert ours.maps is not None and ours.maps.shape[1:] == ours.images.shape[2:]
        assert plain.maps is None


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    padding=st.integers(0, 9),
    kind=st.sampled_from(["tensor", "PIL"]),
)
def test_every_pixel_of_a_map_moves_with_its_pixel_of_the_image(
    seed: int, size: tuple[int, int], padding: int, kind: str
) -> None:
    transform: Transform = [
        {"RandomCrop": {"size": [*size], "pad_if_needed": True, "padding": padding}},
        {"RandomHorizontalFlip": {}},
        {"RandomVerticalFlip": {}},
        *FLOATS,
    ]
    batch = View(as_samples(Masks(kind=kind)), transform, seed).batch([0, 2], 1)
    assert batch.maps is not None
    # Where the image was padded with 0, the map is ignored; elsewhere its pixel is the class + 1.
    assert torch.equal((batch.images[:, 0] * 255).round().long() - 1, batch.maps)


def test_resized_maps_have_the_nearest_class() -> None:
    dataset = Masks()
    batch = View(as_samples(dataset), [{"Resize": {"size": [12, 15]}}, *FLOATS]).batch([1], 0)
    assert batch.maps is not None
    expected = v2.Resize([12, 15])(tv_tensors.Mask(torch.from_numpy(dataset.maps[1])))
    assert torch.equal(batch.maps[0], expected.as_subclass(Tensor).long())


def test_maps_of_loader_processes_are_those_of_this_one() -> None:
    view = View(as_samples(Photographs(6)), [{"RandomResizedCrop": {"size": 8}}, *FLOATS])
    cuts = [[0, 5], [3]]
    for ours, theirs in zip(batches(view, cuts, 0), batches(view, cuts, 1), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert ours.maps is not None and theirs.maps is not None and torch.equal(ours.maps, theirs.maps)


# Layouts


def write_mask(path: Path, seed: int = 0, first: int = 0) -> npt.NDArray[np.uint8]:
    mask = np.random.default_rng(seed).integers(first, first + CLASSES, (HEIGHT, WIDTH), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return mask


def write_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random_image(seed).save(path)


LAYOUTS = {
    "split/kind": ("{split}/images/{name}.png", "{split}/masks/{name}.png", {"train": "train", "validation": "val"}),
    "kind/split": ("image/{split}/{name}.jpg", "labels/{split}/{name}_L.png", {"train": "train", "test": "test"}),
    "ADE20K": (
        "images/{split}/{name}.jpg",
        "annotations/{split}/{name}.png",
        {"train": "training", "validation": "validation"},
    ),
    "nested": ("train/img/town/{name}.jpg", "train/mask/town/{name}_mask.png", {"train": "train"}),
    "no splits": ("JPEGImages/{name}.jpg", "SegmentationClass/{name}.png", {"train": "train"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_of_images_and_masks_in_usual_layouts(layout: str, tmp_path: Path) -> None:
    images, masks, splits = LAYOUTS[layout]
    first = 1 if layout == "ADE20K" else 0
    written = {}
    for split, folder in splits.items():
        for index in range(10):
            name = f"{split}{index}"
            write_image(tmp_path / images.format(split=folder, name=name), index)
            written[name] = write_mask(tmp_path / masks.format(split=folder, name=name), index, first)
    spec: dict[str, Any] = {"name": "segmentation-folder", "root": str(tmp_path), "classes": list(Masks.classes)}
    spec |= {"first_class": first, "ignore": 0} if first else {}
    for split in ("train", "validation", "test"):
        samples = load_split(spec, split)  # type: ignore[arg-type]  # one of its literals
        assert samples.class_names == Masks.classes and samples.maps is not None
        owner = split if split in splits else "train"
        lacking = 2 - sum(each in splits for each in ("validation", "test"))
        assert len(samples) == (10 if split in splits and split != "train" else 10 - lacking if split == "train" else 1)
        for index in range(len(samples)):
            (name,) = (each for each in written if f"{each}." in samples.images.paths[index])  # type: ignore[attr-defined]
            assert name.startswith(owner)
            assert torch.equal(samples.maps.label_map(index), torch.from_numpy(written[name]).long() - first)


def voc(root: Path) -> list[npt.NDArray[np.uint8]]:
    base, masks = root / "VOCdevkit" / "VOC2012", []
    palette = [channel for index in range(256) for channel in (index, 255 - index, 0)]
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part, names in (("train", ["b", "a"]), ("val", ["c"])):
        (lists / f"{part}.txt").write_text("\n".join(names) + "\n")
        for index, name in enumerate(names):
            write_image(base / "JPEGImages" / f"{name}.jpg", index)
            values = np.random.default_rng(index).integers(0, 21, (HEIGHT, WIDTH), dtype=np.uint8)
            values[0, :] = 255
            mask = Image.frombytes("P", (WIDTH, HEIGHT), values.tobytes())
            mask.putpalette(palette)
            (base / "SegmentationClass").mkdir(exist_ok=True)
            mask.save(base / "SegmentationClass" / f"{name}.png")
            masks.append(values)
    return masks


def test_pascal_voc_is_read_by_its_palette_indices(tmp_path: Path) -> None:
    masks = voc(tmp_path)
    train = load_split("voc", "train", root=tmp_path, validation_fraction=0.0)
    test = load_split("voc", "test", root=tmp_path)
    assert train.num_classes == 21 and len(train) == 2 and len(test) == 1
    for samples, index, values in ((train, 0, masks[0]), (train, 1, masks[1]), (test, 0, masks[2])):
        assert samples.maps is not None
        expected = values.astype(np.int64)
        expected[values == 255] = -1
        assert torch.equal(samples.maps.label_map(index), torch.from_numpy(expected))


def test_cityscapes_has_its_19_classes_in_the_order_of_training(tmp_path: Path) -> None:
    ids = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 34
    for part, city in (("train", "ulm"), ("train", "aachen"), ("val", "bonn")):
        write_image(tmp_path / "leftImg8bit" / part / city / f"{city}_0_leftImg8bit.png")
        target = tmp_path / "gtFine" / part / city / f"{city}_0_gtFine_labelIds.png"
        target.parent.mkdir(parents=True)
        Image.fromarray(ids).save(target)
    train = load_split("cityscapes", "train", root=tmp_path, validation_fraction=0.0)
    assert [Path(path).parent.name for path in train.images.paths] == ["aachen", "ulm"]  # type: ignore[attr-defined]
    assert train.class_names[:3] == ("road", "sidewalk", "building") and len(train.class_names) == 19
    assert train.maps is not None
    found = train.maps.label_map(0)
    # From the table of the data set's own scripts: road 7, building 11, car 26; 0 to 6 are not evaluated.
    for value, label in ((7, 0), (11, 2), (26, 13), (33, 18), (0, -1), (6, -1), (9, -1)):
        assert set(found[torch.from_numpy(ids == value)].tolist()) == {label}
    assert len(load_split("cityscapes", "test", root=tmp_path)) == 1


def test_sbd_is_read_from_its_matlab_files(tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io")
    values = np.random.default_rng(0).integers(0, 21, (HEIGHT, WIDTH), dtype=np.uint8)
    for part, name in (("train", "x"), ("val", "y")):
        (tmp_path / f"{part}.txt").write_text(f"{name}\n")
        write_image(tmp_path / "img" / f"{name}.jpg")
        (tmp_path / "cls").mkdir(exist_ok=True)
        io.savemat(tmp_path / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": values}})
    samples = load_split("sbd", "train", root=tmp_path, validation_fraction=0.0)
    assert samples.maps is not None
    assert torch.equal(samples.maps.label_map(0), torch.from_numpy(values).long())


def test_a_function_of_the_user_returns_images_and_masks(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "class Pairs(torch.utils.data.Dataset):\n"
        "    classes, ignore_index = ['a', 'b'], 9\n"
        "    def __len__(self): return 20\n"
        "    def __getitem__(self, i):\n"
        "        mask = torch.full((4, 5), i % 2)\n"
        "        mask[0, 0] = 9\n"
        "        return torch.full((3, 4, 5), i / 20), mask\n"
        "def make(split): return Pairs() if split == 'train' else None\n"
    )
    samples = load_split(f"{file}:make", "train")
    batch = View(samples, []).batch([0, 1], 0)
    assert len(samples) == 16 and batch.maps is not None and batch.maps.shape == (2, 4, 5)
    assert batch.maps[:, 0, 0].tolist() == [-1, -1] and int(batch.maps.max()) <= 1


def test_content_keys_cover_the_masks() -> None:
    one, other = Masks(), Masks()
    other.maps[2, 5, 5] = (other.maps[2, 5, 5] + 1) % CLASSES
    images = ArrayImages(torch.zeros(4, 3, HEIGHT, WIDTH, dtype=torch.uint8))
    keys = [
        Samples(
            "x", "train", images, np.full(4, -1, np.int32), Masks.classes, [], maps=ItemMaps(each, 4, MaskValues(3))
        ).keys()
        for each in (one, other)
    ]
    assert (keys[0] != keys[1]).tolist() == [False, False, True, False]


def test_keys_of_mask_files_are_made_again_when_a_mask_changes(tmp_path: Path) -> None:
    for index in range(5):
        write_image(tmp_path / "images" / f"{index}.png", index)
        write_mask(tmp_path / "masks" / f"{index}.png", index)
    spec = {"name": "segmentation-folder", "root": str(tmp_path), "classes": ["a", "b", "c"], "test_fraction": 0.0}
    spec["validation_fraction"] = 0.0
    before = load_split(spec, "train").keys()
    assert np.array_equal(load_split(spec, "train").keys(), before)
    write_mask(tmp_path / "masks" / "3.png", 99)
    assert (load_split(spec, "train").keys() != before).tolist() == [False, False, False, True, False]


# Bad masks


def folder_with(root: Path, mask: Any, name: str = "a.png") -> dict[str, Any]:
    write_image(root / "images" / "a.jpg")
    (root / "masks").mkdir(exist_ok=True)
    if isinstance(mask, bytes):
        (root / "masks" / name).write_bytes(mask)
    elif mask is not None:
        mask.save(root / "masks" / name)
    fractions = {"validation_fraction": 0.0, "test_fraction": 0.0}
    return {"name": "segmentation-folder", "root": str(root), "classes": ["a", "b", "c"], **fractions}


def array_mask(fill: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Image.Image:
    values = np.zeros(size, np.uint8)
    values[1, 2] = fill
    return Image.fromarray(values)


BAD: dict[str, tuple[Any, str]] = {
    "color": (random_image(0), "picture of mode RGB, not one channel of class indices"),
    "palette": (random_image(0).quantize(3), "palette image: its values are positions in its palette"),
    "value": (array_mask(7), "has the value 7 at row 1, column 2 (1 such pixels); classes are 0 to 2, ignored is 255"),
    "size": (array_mask(size=(HEIGHT, WIDTH + 1)), f"has {HEIGHT} x {WIDTH} pixels (height x width), and its mask"),
    "damaged": (b"\x89PNG\r\n\x1a\n" + b"0" * 40, "cannot read the mask"),
    "missing": (None, "1 image of"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_mask_is_one_error_that_names_it(kind: str, tmp_path: Path) -> None:
    mask, said = BAD[kind]
    with pytest.raises(KdcacheError) as raised:
        View(load_split(folder_with(tmp_path, mask), "train"), FLOATS).batch([0], 0)
    assert said in raised.value.what
    assert "a.png" in str(raised.value) or "a.jpg" in str(raised.value) or ": a" in raised.value.what


def test_palette_indices_are_classes_if_the_pipeline_says_so(tmp_path: Path) -> None:
    spec = folder_with(tmp_path, random_image(0).quantize(3)) | {"palettes": True}
    samples = load_split(spec, "train")
    assert samples.maps is not None and int(samples.maps.label_map(0).max()) == 2


def test_masks_of_16_bits_and_of_1_bit(tmp_path: Path) -> None:
    values = np.zeros((HEIGHT, WIDTH), np.uint16)
    values[3, 4] = 300
    spec = folder_with(tmp_path, Image.fromarray(values)) | {"classes": [str(each) for each in range(301)]}
    samples = load_split(spec | {"ignore": None}, "train")
    assert samples.maps is not None and samples.maps.label_map(0)[3, 4] == 300
    Image.fromarray(values > 0).save(tmp_path / "masks" / "a.png")
    samples = load_split(spec | {"classes": ["no", "yes"]}, "train")
    assert samples.maps is not None and set(samples.maps.label_map(0).flatten().tolist()) == {0, 1}


def test_a_mask_without_an_image_is_named(tmp_path: Path) -> None:
    spec = folder_with(tmp_path, array_mask())
    array_mask().save(tmp_path / "masks" / "b.png")
    with pytest.raises(KdcacheError, match=r"1 mask of .* has no image in .*: b"):
        load_split(spec, "train")


def test_classes_have_to_be_named(tmp_path: Path) -> None:
    spec = folder_with(tmp_path, array_mask())
    del spec["classes"]
    with pytest.raises(KdcacheError, match=r"the names of the classes are not known: .*classes\.txt"):
        load_split(spec, "train")
    (tmp_path / "classes.txt").write_text("road\nsky\n\n")
    assert load_split(spec, "train").class_names == ("road", "sky")


@pytest.mark.parametrize(
    "step",
    [
        {"AutoAugment": {}},
        {"RandAugment": {}},
        {"TrivialAugmentWide": {}},
        {"AugMix": {}},
        {"FiveCrop": {"size": 8}},
        {"RandomApply": {"transforms": [{"AutoAugment": {}}]}},
        {"MixUp": {"alpha": 0.2}},
        {"CutMix": {"alpha": 1.0}},
    ],
    ids=lambda step: next(iter(step)),
)
def test_steps_that_refuse_masks_are_named(step: dict[str, Any]) -> None:
    with pytest.raises(KdcacheError) as raised:
        View(as_samples(Photographs()), [*FLOATS, step])
    named = [name for name in ("AutoAugment", *step) if name in raised.value.what]
    assert named, raised.value.what


def test_a_step_of_the_user_takes_both_or_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "steps.py"
    file.write_text(
        "def alone(image): return image\n"
        "def both(image, label_map=None):\n"
        "    return image.flip(2) if label_map is None else (image.flip(2), label_map.flip(1))\n"
        "both.takes_maps = True\n"
        "def wrong(image, label_map=None): return image\n"
        "wrong.takes_maps = True\n"
    )
    trust([f"{file}:{name}" for name in ("alone", "both", "wrong")])
    dataset = Masks()
    with pytest.raises(KdcacheError, match="takes images alone, and the data set has label maps"):
        View(as_samples(dataset), [{f"{file}:alone": {}}])
    batch = View(as_samples(dataset), [{f"{file}:both": {}}, *FLOATS]).batch([0], 0)
    assert batch.maps is not None
    assert torch.equal(batch.maps[0], torch.from_numpy(dataset.maps[0]).long().flip(1))
    with pytest.raises(KdcacheError, match="not an image and its label map"):
        View(as_samples(dataset), [{f"{file}:wrong": {}}, *FLOATS]).batch([0], 0)


def test_an_image_that_exif_turns_is_refused(tmp_path: Path) -> None:
    spec = folder_with(tmp_path, array_mask())
    exif = Image.Exif()
    exif[274] = 6
    random_image(0).save(tmp_path / "images" / "a.jpg", exif=exif)
    samples = load_split(spec, "train")
    assert View(samples, FLOATS).batch([0], 0).maps is not None
    with pytest.raises(KdcacheError, match="EXIF orientation, which ExifTranspose applies, and its mask has none"):
        View(samples, [{"ExifTranspose": {}}, *FLOATS]).batch([0], 0)


def test_images_of_varying_size_need_a_crop(tmp_path: Path) -> None:
    spec = folder_with(tmp_path, array_mask())
    Image.new("RGB", (WIDTH * 2, HEIGHT)).save(tmp_path / "images" / "b.png")
    array_mask(size=(HEIGHT, WIDTH * 2)).save(tmp_path / "masks" / "b.png")
    samples = load_split(spec, "train")
    with pytest.raises(KdcacheError, match="images of different sizes"):
        View(samples, FLOATS).batch([0, 1], 0)
    crop: Transform = [{"RandomCrop": {"size": 20}}, *FLOATS]
    maps = View(samples, crop).batch([0, 1], 0).maps
    assert maps is not None and maps.shape == (2, 20, 20)


def test_items_without_a_mask_among_others_are_named() -> None:
    class Holes(Masks):
        def __getitem__(self, index: int) -> tuple[Any, Any]:
            return (super().__getitem__(index)[0], 3) if index == 2 else super().__getitem__(index)

    with pytest.raises(KdcacheError, match="item 2 of the data set is not a pair of an image and a mask"):
        View(as_samples(Holes()), FLOATS).batch([1, 2], 0)


def test_a_data_set_of_masks_says_its_classes() -> None:
    class Nameless(Dataset[Any]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            return Masks()[index]

    with pytest.raises(KdcacheError, match="does not say which classes they have"):
        as_samples(Nameless())
    assert wrap(Nameless(), CLASSES).maps is not None


def test_whether_a_data_set_has_label_maps_is_known_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sets.py"
    file.write_text(
        "import torch\n"
        "class Two(torch.utils.data.Dataset):\n"
        "    classes, read = ('a', 'b'), []\n"
        "    def __init__(self, of_pixels): self.of_pixels = of_pixels\n"
        "    def __len__(self): return 50\n"
        "    def __getitem__(self, i):\n"
        "        assert i == 0, 'only the first is read'\n"
        "        return torch.zeros(3, 4, 5), torch.zeros(4, 5, dtype=torch.int64) if self.of_pixels else 1\n"
        "def pixels(split): return Two(True)\n"
        "def images(split): return Two(False)\n"
    )
    monkeypatch.setattr("kdcache.data.datasets.load_split", None)
    found = {
        name: has_label_maps(DatasetSpec.model_validate({"name": name, "root": root}))
        for name, root in {
            "voc": "nowhere",
            "segmentation-folder": "nowhere",
            "scenes": None,
            "digits": None,
            "image-folder": "nowhere",
            f"{file}:pixels": None,
            f"{file}:images": None,
        }.items()
    }
    assert list(found.values()) == [True, True, True, False, False, True, False]
