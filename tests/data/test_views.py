"""Views: the same seed, sample and view are the same pixels, whoever asks, when, and among which others."""

from __future__ import annotations

import hashlib
import inspect
import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from kdcache.config.transform import Transform
from kdcache.data.images import ArrayImages, FileImages
from kdcache.data.loader import batches, cut_range
from kdcache.data.samples import Samples, wrap
from kdcache.data.seeding import seeded
from kdcache.data.transforms import build_transform, is_random
from kdcache.data.views import View
from kdcache.errors import CorruptError, KdcacheError, UsageError

TO_FLOAT: Transform = [{"ToImage": {}}, {"ToDtype": {"dtype": "float32", "scale": True}}]
AUGMENT: Transform = [
    {"ToImage": {}},
    {"RandomCrop": {"size": 8, "padding": 2}},
    {"RandomHorizontalFlip": {}},
    {"ColorJitter": {"brightness": 0.4, "contrast": 0.4}},
    {"ToDtype": {"dtype": "float32", "scale": True}},
    {"GaussianNoise": {"sigma": 0.05}},
]
COUNT = 24
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (COUNT, 3, 8, 8), np.uint8))


def samples_of(images: Any = None) -> Samples:
    labels = np.arange(COUNT, dtype=np.int32) % 5
    return Samples("noise", "train", images or ArrayImages(PIXELS), labels, tuple("abcde"), [])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """The same pixels in PNG files."""
    folder = tmp_path_factory.mktemp("images")
    for index, image in enumerate(PIXELS):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return samples_of(FileImages([str(folder / f"{index}.png") for index in range(COUNT)]))


# torchvision 0.29 says so of JPEG at its first use, and torch of three workers on a machine with two cores.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding", "ignore:This DataLoader will create 3"
)


def sha256(images: Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


# The same pixels


@settings(deadline=None, max_examples=25)
@given(
    ids=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    view=st.integers(0, 10**6),
)
def test_an_image_of_a_view_depends_on_nothing_but_seed_sample_and_view(ids: list[int], seed: int, view: int) -> None:
    asked = View(samples_of(), AUGMENT, seed, view)
    images, labels, which, mixed, _ = asked.__getitems__(ids)
    assert mixed is None
    assert which.tolist() == ids
    assert labels.tolist() == [i % 5 for i in ids]
    for position, index in enumerate(ids):
        torch.manual_seed(position)  # whatever the caller's generators say
        alone, label, one, *_ = View(samples_of(), AUGMENT, seed, view)[index]
        assert torch.equal(alone[0], images[position])
        assert (label.tolist(), one.tolist()) == ([index % 5], [index])


def test_a_view_is_the_transform_under_a_seeded_generator() -> None:
    transform = v2.Compose(
        [v2.RandomCrop(8, padding=2), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    )
    plain: Transform = [AUGMENT[1], AUGMENT[2], AUGMENT[4]]
    images = View(samples_of(), plain, seed=3, view=7).__getitems__(range(COUNT)).images
    for index in range(COUNT):
        parts = b"".join(part.to_bytes(8, "little") for part in (3, index, 7))
        seed = int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "little")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            assert torch.equal(images[index], transform(PIXELS[index]))


def test_other_views_samples_and_seeds_are_other_pixels() -> None:
    def seen(seed: int, view: int, index: int) -> Tensor:
        same = samples_of(ArrayImages(PIXELS[:1].expand(COUNT, -1, -1, -1)))
        return View(same, AUGMENT, seed, view)[index][0]

    points = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)]
    assert len({sha256(seen(*point)) for point in points}) == len(points)


def test_any_view_can_be_requested_in_any_order() -> None:
    data = View(samples_of(), AUGMENT, seed=2, view=0)
    for view in (5, 0, 2):
        expected = View(samples_of(), AUGMENT, seed=2, view=view).__getitems__([3, 1])
        assert torch.equal(data.batch([3, 1], view).images, expected.images)
    assert data.view == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_the_view_index_is_part_of_the_request_to_a_worker(workers: int, files: Samples) -> None:
    data, ids = View(files, AUGMENT, seed=2), [[3, 1], [2]]
    loaders = {view: batches(data, ids, workers, view=view) for view in (4, 1)}
    found = {view: [next(loaders[view]) for _ in ids] for view in (4, 1)}
    for view in (4, 1):
        for batch, cut in zip(found[view], ids, strict=True):
            expected = View(files, AUGMENT, seed=2, view=view).__getitems__(cut)
            assert torch.equal(batch.images, expected.images)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_and_batch_boundaries_do_not_change_batches(workers: int, files: Samples) -> None:
    for samples in (samples_of(), files):
        view = View(samples, AUGMENT, seed=11, view=4)
        whole = view.__getitems__(range(COUNT)).images
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(workers)).tolist()
        cuts = [order[:1], order[1:8], order[8:10], order[10:]]
        found = list(batches(view, cuts, workers))
        assert [batch.ids.tolist() for batch in found] == cuts
        for batch in found:
            assert torch.equal(batch.images, whole[batch.ids])
            assert torch.equal(batch.labels, batch.ids % 5)


def jitter(strength: float) -> Transform:
    return [{"ColorJitter": {"brightness": strength, "contrast": strength, "saturation": strength, "hue": 0.1}}]


# Of the means that ColorJitter takes of these images each is large enough that torch shares it out among its threads.
SIDE = 192
PHOTOS = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (2, 3, SIDE, SIDE), np.uint8))
MANY: dict[str, Transform] = {
    "fixed": [*TO_FLOAT, {"Resize": {"size": [61, 67]}}, {"Normalize": {"mean": [0.4], "std": [0.2]}}],
    "RandAugment": [{"RandAugment": {"magnitude": 12}}, *TO_FLOAT],
    "TrivialAugmentWide": [{"TrivialAugmentWide": {"interpolation": "bilinear"}}, *TO_FLOAT],
    "AugMix": [*TO_FLOAT, {"AugMix": {"severity": 7}}],
    "AutoAugment imagenet": [{"AutoAugment": {"policy": "imagenet"}}, *TO_FLOAT],
    "AutoAugment cifar10": [{"AutoAugment": {"policy": "cifar10"}}, *TO_FLOAT],
    "AutoAugment svhn": [{"AutoAugment": {"policy": "svhn"}}, *TO_FLOAT],
    "RandomResizedCrop": [*TO_FLOAT, {"RandomResizedCrop": {"size": 64, "interpolation": "bicubic"}}],
    "ColorJitter": [*TO_FLOAT, *jitter(0.4)],
    "RandomErasing": [*TO_FLOAT, {"RandomErasing": {"p": 1.0, "value": "random"}}],
    "GaussianBlur": [*TO_FLOAT, {"GaussianBlur": {"kernel_size": 9, "sigma": [0.1, 3.0]}}],
    "GaussianNoise": [*TO_FLOAT, {"GaussianNoise": {}}],
    "ElasticTransform": [*TO_FLOAT, {"ElasticTransform": {"alpha": 40, "sigma": 3.0}}],
    "RandomPerspective": [*TO_FLOAT, {"RandomPerspective": {"p": 1.0}}],
    "RandomAffine": [*TO_FLOAT, {"RandomAffine": {"degrees": 20, "shear": 5, "interpolation": "bilinear"}}],
    "RandomPhotometricDistort": [*TO_FLOAT, {"RandomPhotometricDistort": {"p": 1.0}}],
    "JPEG": [{"JPEG": {"quality": [10, 90]}}, *TO_FLOAT],
    "nested": [
        {"RandomOrder": {"transforms": [{"RandomHorizontalFlip": {}}, {"RandomSolarize": {"threshold": 100}}]}},
        {"RandomChoice": {"transforms": [{"RandAugment": {}}, {"RandomApply": {"transforms": jitter(0.8)}}]}},
        *TO_FLOAT,
    ],
    "MixUp": [*TO_FLOAT, *jitter(0.4), {"MixUp": {"alpha": 0.2}}],
    "CutMix": [{"RandomResizedCrop": {"size": 64}}, *TO_FLOAT, {"CutMix": {"alpha": 1.0}}],
    "MixUp or CutMix": [
        *TO_FLOAT,
        {"RandomHorizontalFlip": {}},
        {"RandomChoice": {"transforms": [{"MixUp": {"alpha": 0.2}}, {"CutMix": {}}], "p": [0.7, 0.3]}},
    ],
}


def views_of_photos() -> dict[str, View]:
    photos = Samples("photos", "train", ArrayImages(PHOTOS), np.zeros(len(PHOTOS), np.int32), ("a",), [])
    return {name: View(photos, transform, seed=11, view=4) for name, transform in MANY.items()}


class Digests(Dataset[tuple[str, str, int]]):
    """The digest of each image, and of which it is."""

    def __init__(self) -> None:
        self.views = views_of_photos()
        self.which = [(name, index) for name in self.views for index in range(len(PHOTOS))]

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, number: int) -> tuple[str, str, int]:
        name, index = self.which[number]
        return sha256(self.views[name][index].images), name, index


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digests() -> dict[tuple[str, int], str]:
    """Of the images of MANY, as one thread makes them one by one."""
    with threads(1):
        return {(name, index): digest for digest, name, index in (Digests()[n] for n in range(len(Digests())))}


@pytest.mark.parametrize("name", MANY)
def test_threads_and_the_order_of_a_batch_do_not_change_pixels(name: str, digests: dict[tuple[str, int], str]) -> None:
    before = states()
    with threads(2):
        images = views_of_photos()[name].__getitems__([1, 0, 1]).images
    assert states() == before
    assert [sha256(image) for image in images] == [digests[name, index] for index in (1, 0, 1)]


@pytest.mark.parametrize(("workers", "start"), [(1, "fork"), (3, "fork"), (1, "spawn")])
def test_views_are_the_same_in_worker_processes(workers: int, start: str, digests: dict[tuple[str, int], str]) -> None:
    loader = DataLoader(Digests(), batch_size=None, shuffle=True, num_workers=workers, multiprocessing_context=start)
    assert {(name, index): digest for digest, name, index in loader} == digests


SCRIPT = """
import hashlib, pickle, random, sys, torch
random.seed(9), torch.manual_seed(9), torch.set_num_threads(3)
for name, view in pickle.loads(sys.stdin.buffer.read()).items():
    for index in reversed(range(len(view))):
        print(name, index, hashlib.sha256(view[index].images.numpy().tobytes()).hexdigest(), sep=",")
"""


def test_views_are_the_same_in_another_interpreter(digests: dict[tuple[str, int], str]) -> None:
    said = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=pickle.dumps(views_of_photos()), capture_output=True, check=True
    ).stdout.decode()
    found = [line.split(",") for line in said.splitlines()]
    assert {(name, int(index)): digest for name, index, digest in found} == digests


def test_the_pixels_of_a_view_match_a_recorded_digest() -> None:
    # Only what is exact on every machine: whole-pixel moves of 8-bit images. A change here breaks every cache there is.
    exact: Transform = [*AUGMENT[:3], AUGMENT[4]]
    pixels = View(samples_of(), exact, seed=1, view=2).__getitems__(range(COUNT)).images
    assert (
        hashlib.sha256((pixels * 255).round().to(torch.uint8).numpy().tobytes()).hexdigest()[:16] == "72018efa27635c34"
    )


@pytest.mark.parametrize(
    "transform",
    [
        [],
        [{"Resize": {"size": [5, 7]}}],
        [{"Resize": {"size": [12], "interpolation": "bicubic"}}, {"CenterCrop": {"size": 10}}],
        [{"Pad": {"padding": 2}}, {"Grayscale": {"num_output_channels": 3}}],
        [{"ToPILImage": {}}, {"Resize": {"size": [5, 7]}}, {"ToImage": {}}],
    ],
    ids=lambda steps: "+".join(name for step in steps for name in step) or "none",
)
def test_a_fixed_transform_of_a_batch_is_that_of_each_image(transform: Transform) -> None:
    whole: Transform = [*transform, TO_FLOAT[1], {"Normalize": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}}]
    ids = [3, 3, 0, 17]
    images = View(samples_of(), whole).__getitems__(ids).images
    each = torch.stack([build_transform(whole)(PIXELS[index]) for index in ids])
    assert torch.equal(images, each)
    by_one = torch.cat([View(samples_of(), whole)[index][0] for index in ids])
    assert torch.equal(images, by_one)


def test_files_arrays_and_wrapped_data_sets_show_the_same_pixels(files: Samples) -> None:
    pairs: Any = [(image.permute(1, 2, 0).numpy(), 0) for image in PIXELS]
    for transform in (TO_FLOAT, AUGMENT):
        images = View(samples_of(), transform, seed=1).__getitems__([4, 9]).images
        for samples in (files, wrap(pairs, 1)):
            others = View(samples, transform, seed=1).__getitems__([4, 9]).images
            assert torch.equal(images, others)


# The caller's own things are left alone


def states() -> list[bytes]:
    return [
        repr(random.getstate()).encode(),
        np.random.get_state(legacy=True)[1].tobytes(),  # type: ignore[index]  # a tuple, as asked
        torch.get_rng_state().numpy().tobytes(),
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_generators_of_the_caller_are_not_disturbed(workers: int) -> None:
    before = states()
    mixings: list[Transform] = [[], [{"MixUp": {}}], [{"CutMix": {}}]]
    for mixing in mixings:
        view = View(samples_of(), [*AUGMENT, *mixing])
        view.__getitems__([0, 1])
        list(batches(view, [[1, 2], [3]], workers))
        assert states() == before
    with pytest.raises(ZeroDivisionError), seeded(1, 2):
        assert states() != before
        raise ZeroDivisionError
    assert states() == before


def test_the_generators_of_a_gpu_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(_: int) -> None:
        raise AssertionError("a GPU's generator was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched)
    with pytest.raises(AssertionError, match="was seeded"):
        torch.manual_seed(0)  # as torch itself does
    View(samples_of(), [*AUGMENT, {"MixUp": {}}]).__getitems__([0, 1])


def test_an_error_restores_threads_and_generators() -> None:
    before = states()
    with threads(2), pytest.raises(UsageError, match="cannot be applied to sample 1"):
        View(samples_of(), [*AUGMENT, {"RandomCrop": {"size": 9}}])[1]
    assert states() == before


def test_seeded_draws_depend_on_the_parts_alone() -> None:
    def draws(*parts: int) -> tuple[float, float, float]:
        with seeded(*parts):
            return random.gauss(), float(np.random.random()), float(torch.rand(()))

    assert draws(1, 2) == draws(1, 2)
    seen = [draws(*parts) for parts in [(1, 2), (2, 1), (1, 3), (0, 2), (1, 2, 0)]]
    assert all(len(set(column)) == len(seen) for column in zip(*seen, strict=True))


@pytest.mark.parametrize(
    "transform",
    [[{"RandomErasing": {"p": 1.0, "inplace": True}}], [{"Normalize": {"mean": [1], "std": [2], "inplace": True}}]],
)
def test_a_transform_that_works_in_place_leaves_the_data_set_as_it_was(transform: Transform) -> None:
    pixels = torch.rand(COUNT, 1, 8, 8)
    kept = pixels.clone()
    wrapped: Any = [(image, 0) for image in pixels]
    for samples in (samples_of(ArrayImages(pixels)), wrap(wrapped, 1)):
        view = View(samples, transform)
        first = view.__getitems__([2, 5])[0]
        assert torch.equal(view.__getitems__([2, 5])[0], first)
        assert not torch.equal(first, kept[[2, 5]])
        assert torch.equal(pixels, kept)


def test_labels_may_be_replaced() -> None:
    hidden = torch.full((COUNT,), -1)
    hidden[3] = 2
    assert View(samples_of(), TO_FLOAT, labels=hidden).__getitems__([2, 3]).labels.tolist() == [-1, 2]


@settings(deadline=None)
@given(start=st.integers(0, 50), length=st.integers(0, 50), size=st.integers(1, 20))
def test_all_batches_but_the_last_are_full(start: int, length: int, size: int) -> None:
    cuts = cut_range(range(start, start + length), size)
    assert [i for cut in cuts for i in cut] == list(range(start, start + length))
    assert all(len(cut) == size for cut in cuts[:-1])
    assert all(0 < len(cut) <= size for cut in cuts)


# What draws at random

PHOTO = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 16, 16), np.uint8))
FLOATS = PHOTO / 255
BOXES = {
    "image": tv_tensors.Image(PHOTO),
    "boxes": tv_tensors.BoundingBoxes([[1, 1, 9, 9]], format="XYXY", canvas_size=(16, 16)),
    "points": tv_tensors.KeyPoints([[1, 1]], canvas_size=(16, 16)),
    "labels": torch.tensor([1]),
}
BATCH = (torch.rand(4, 3, 8, 8), torch.arange(4))

# An example of every transform of torchvision: its arguments, and what it is given if not PHOTO.
EXAMPLES: dict[str, tuple[Any, ...]] = {
    "AugMix": ({},),
    "AutoAugment": ({},),
    "CenterCrop": ({"size": 8},),
    "ClampBoundingBoxes": ({}, BOXES),
    "ClampKeyPoints": ({}, BOXES),
    "ColorJitter": ({"brightness": 0.4},),
    "ConvertBoundingBoxFormat": ({"format": "XYWH"}, BOXES),
    "ConvertImageDtype": ({},),
    "CutMix": ({"num_classes": 4}, BATCH),
    "ElasticTransform": ({"sigma": 1.0},),
    "FiveCrop": ({"size": 8},),
    "GaussianBlur": ({"kernel_size": 3},),
    "GaussianNoise": ({}, FLOATS),
    "Grayscale": ({},),
    "Identity": ({},),
    "JPEG": ({"quality": [10, 90]},),
    "LinearTransformation": (
        {"transformation_matrix": torch.eye(768), "mean_vector": torch.zeros(768)},
        FLOATS,
    ),
    "MixUp": ({"num_classes": 4}, BATCH),
    "Normalize": ({"mean": [0.5], "std": [0.5]}, FLOATS),
    "PILToTensor": ({}, Image.new("RGB", (8, 8))),
    "Pad": ({"padding": 1},),
    "RGB": ({},),
    "RandAugment": ({},),
    "RandomAdjustSharpness": ({"sharpness_factor": 2},),
    "RandomAffine": ({"degrees": 10},),
    "RandomApply": ({"transforms": [v2.Identity()]},),
    "RandomAutocontrast": ({},),
    "RandomChannelPermutation": ({},),
    "RandomChoice": ({"transforms": [v2.Identity(), v2.RGB()]},),
    "RandomCrop": ({"size": 8},),
    "RandomEqualize": ({},),
    "RandomErasing": ({},),
    "RandomGrayscale": ({},),
    "RandomHorizontalFlip": ({},),
    "RandomInvert": ({},),
    "RandomIoUCrop": ({}, BOXES),
    "RandomOrder": ({"transforms": [v2.Identity(), v2.RGB()]},),
    "RandomPerspective": ({},),
    "RandomPhotometricDistort": ({},),
    "RandomPosterize": ({"bits": 4},),
    "RandomResize": ({"min_size": 8, "max_size": 20},),
    "RandomResizedCrop": ({"size": 8},),
    "RandomRotation": ({"degrees": 10},),
    "RandomShortestSize": ({"min_size": [8, 9, 10]},),
    "RandomSolarize": ({"threshold": 100},),
    "RandomVerticalFlip": ({},),
    "RandomZoomOut": ({},),
    "Resize": ({"size": [8]},),
    "SanitizeBoundingBoxes": ({}, BOXES),
    "SanitizeKeyPoints": ({}, BOXES),
    "ScaleJitter": ({"target_size": [16, 16], "scale_range": [0.8, 1.5]},),
    "SetClampingMode": ({"clamping_mode": "hard"}, BOXES),
    "TenCrop": ({"size": 8},),
    "ToDtype": ({"dtype": torch.float32},),
    "ToImage": ({},),
    "ToPILImage": ({},),
    "ToPureTensor": ({},),
    "ToTensor": ({}, Image.new("RGB", (8, 8))),
    "TrivialAugmentWide": ({},),
    "UniformTemporalSubsample": ({"num_samples": 2}, torch.zeros(4, 3, 8, 8)),
}
# A frame for others, a base class, and what takes a Python function: none can be said in a pipeline file on its own.
FRAMES = {"Compose", "Transform", "Lambda"}


def classes_of_torchvision() -> dict[str, type[v2.Transform]]:
    found = {name: getattr(v2, name) for name in dir(v2)}
    return {name: kind for name, kind in found.items() if inspect.isclass(kind) and issubclass(kind, v2.Transform)}


@pytest.mark.parametrize("name", sorted(classes_of_torchvision().keys() - FRAMES))
def test_every_transform_of_torchvision_is_classified_as_random_or_fixed(name: str) -> None:
    assert name in EXAMPLES, f"torchvision has a new transform: give an example of {name}"
    arguments, *given = EXAMPLES[name]
    before = states()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are deprecated
        transform = classes_of_torchvision()[name](**arguments)
        for _ in range(3):
            transform(*(given or [PHOTO]))
    assert is_random([{"ToImage": {}}, {name: {}}]) == (states() != before)
    assert states()[:2] == before[:2], f"{name} draws from the generator of Python or NumPy"


def test_unknown_transforms_are_seeded() -> None:
    assert not is_random([])
    for name in [*FRAMES, "TransformOfNextYear"]:
        assert is_random([{name: {}}])


# What YAML can say


def test_names_stand_for_torch_types_enumerations_and_transforms_inside_others() -> None:
    built = build_transform(
        [
            {"RandomApply": {"transforms": [{"ColorJitter": {"hue": 0.1}}, {"RandomGrayscale": {"p": 1.0}}], "p": 1.0}},
            {"AutoAugment": {"policy": "cifar10", "interpolation": "bilinear"}},
            {"Resize": {"size": [4, 4], "interpolation": "nearest-exact"}},
            {"ToDtype": {"dtype": "float64", "scale": True}},
        ]
    )
    pixels = built(PHOTO)
    assert pixels.dtype == torch.float64
    assert pixels.shape == (3, 4, 4)
    assert build_transform([])(PHOTO) is PHOTO


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ([{"Blur": {}}], "torchvision.transforms.v2 has no transform 'Blur'"),
        ([{"functional": {}}], "has no transform 'functional'"),
        ([{"__name__": {}}], "has no transform '__name__'"),
        ([{"RandomApply": {"transforms": [{1: {}}]}}], "has no transform 1"),
        ([{"InterpolationMode": {}}], "has no transform 'InterpolationMode'"),
        ([{"Resize": {"sise": 3}}], "transform Resize: .*unexpected keyword argument 'sise'"),
        ([{"Resize": {}}], "transform Resize: .*missing .*'size'"),
        ([{"RandomHorizontalFlip": {"p": 3}}], "transform RandomHorizontalFlip: "),
        ([{"ToDtype": {"dtype": "float33"}}], "transform ToDtype: dtype 'float33' is not a torch type"),
        ([{"ToDtype": {"dtype": "nn"}}], "dtype 'nn' is not a torch type"),
        ([{"Resize": {"size": 3, "interpolation": "cubic"}}], "transform Resize: 'cubic' is not a valid Interpolation"),
        ([{"AutoAugment": {"policy": "mnist"}}], "transform AutoAugment: 'mnist' is not a valid AutoAugmentPolicy"),
        ([{"Resize": {"size": 3}, "ToImage": {}}], "step {.*} of a transform is not one name"),
        ([{}], "step {} of a transform is not one name"),
        ([{"RandomApply": {"transforms": ["RGB"]}}], "step 'RGB' of a transform is not one name"),
        ([{"RandomApply": {"transforms": [{"RGB": None}]}}], "step {'RGB': None} of a transform is not one name"),
        ([{"RandomApply": {"transforms": [{"Blur": {}}]}}], "has no transform 'Blur'"),
    ],
)
def test_an_invalid_transform_is_refused(transform: Transform, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        build_transform(transform)
    assert caught.value.exit_code == 2
    assert caught.value.fix


@pytest.mark.parametrize("code", ["__import__('pathlib').Path('evaluated').touch()", "os.system", "torch.load"])
@pytest.mark.parametrize(
    "place",
    [
        lambda code: [{code: {}}],
        lambda code: [{"RandomApply": {"transforms": [{code: {}}]}}],
        lambda code: [{"Lambda": {"lambd": code}}],
        lambda code: [{"ToDtype": {"dtype": code}}],
        lambda code: [{"Resize": {"size": 3, "interpolation": code}}],
        lambda code: [{"AutoAugment": {"policy": code}}],
        lambda code: [{"RandomChoice": {"transforms": code}}],
        lambda code: [{"MixUp": {"labels_getter": code}}],
        lambda code: [*TO_FLOAT, {"CutMix": {"alpha": code}}],
        lambda code: [*TO_FLOAT, {"Normalize": {"mean": [code], "std": [1.0]}}],
    ],
)
def test_nothing_of_a_transform_is_evaluated(
    place: Callable[[str], Transform], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        View(samples_of(), place(code)).__getitems__([0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ([], "returns torch.uint8 images"),
        ([{"ToDtype": {"dtype": "uint8"}}], "returns torch.uint8 images"),
        (
            [{"FiveCrop": {"size": 4}}, TO_FLOAT[1]],
            "cannot be applied to sample 2 of noise/train: ToDtype is given a tuple",
        ),
        ([{"FiveCrop": {"size": 4}}], "returns tuple images"),
        ([{"ToPILImage": {}}], "returns Image images"),
        ([{"Normalize": {"mean": [0.5], "std": [0.5]}}], "cannot be applied to sample 2 of noise/train: .*float"),
        (
            [{"RandomCrop": {"size": 9}}, TO_FLOAT[1]],
            r"cannot be applied to sample 2 of noise/train: .*\(9, 9\) .*\(8, 8\)",
        ),
        (
            [{"UniformTemporalSubsample": {"num_samples": 2}}, TO_FLOAT[1]],
            "cannot be applied to sample 2 of noise/train",
        ),
        ([{"Transform": {}}], "cannot be applied to sample 2 of noise/train"),
        (
            [{"RandomResize": {"min_size": 4, "max_size": 40}}, TO_FLOAT[1]],
            r"different sizes: \[3, \d+, \d+\] and \[3,",
        ),
    ],
)
def test_a_transform_that_does_not_fit_the_images_is_refused(transform: Transform, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        View(samples_of(), transform).__getitems__([2, 3, 4])
    assert caught.value.fix


def test_images_of_different_sizes_need_a_resize(tmp_path: Path) -> None:
    for index, side in enumerate((6, 9)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{index}.png")
    images = FileImages([str(tmp_path / f"{index}.png") for index in range(2)])
    samples = Samples("mine", "test", images, np.zeros(2, np.int32), ("a",), [])
    with pytest.raises(UsageError, match=r"different sizes: \[3, 6, 6\] and \[3, 9, 9\]") as caught:
        View(samples, TO_FLOAT).__getitems__([0, 1])
    assert "Resize" in caught.value.fix
    assert View(samples, [{"Resize": {"size": [6, 6]}}, *TO_FLOAT]).__getitems__([0, 1])[0].shape == (2, 3, 6, 6)


# Mistakes in a worker process


def failure(view: View, cuts: Sequence[list[int]], workers: int) -> KdcacheError:
    with pytest.raises(KdcacheError) as caught:
        list(batches(view, cuts, workers))
    return caught.value


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_has_the_same_message(workers: int, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = samples_of(FileImages([str(tmp_path / "broken.png")] * COUNT))
    error = failure(View(broken, TO_FLOAT), [[0, 1], [2]], workers)
    assert type(error) is CorruptError
    assert error.what.startswith(f"cannot read the image {tmp_path}/broken.png")
    assert error.fix == "replace or remove it"
    error = failure(View(samples_of(), []), [[0, 1], [2]], workers)
    assert type(error) is UsageError
    assert error.what == "the transform returns torch.uint8 images"
