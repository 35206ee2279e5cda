"""Transforms of whole batches, against torchvision's transforms of one image at a time."""

from __future__ import annotations

import hashlib
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from kdcache.config.transform import Transform
from kdcache.data import batched_steps
from kdcache.data.batched_steps import BatchedTransform
from kdcache.data.images import ArrayImages, FileImages, Images, ItemImages
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import UsageError

COUNT = 9
SIZE = (10, 12)
NOISE = torch.randint(0, 256, (COUNT, 3, *SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def samples_of(images: Images) -> Samples:
    return Samples("noise", "train", images, np.zeros(len(images), np.int32), ("a",), [])


def seed_of(seed: int, index: int, view: int) -> int:
    parts = b"".join(part.to_bytes(8, "little") for part in (seed, index, view))
    return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "little")


def one_by_one(steps: list[Any], images: Images, view: int, seed: int = 5) -> Tensor:
    """The images as torchvision makes each from its own seed."""
    transform, made = v2.Compose(steps), []
    with torch.random.fork_rng():
        for index in range(len(images)):
            torch.manual_seed(seed_of(seed, index, view))
            made.append(transform(images.picture(index)).as_subclass(Tensor))
    return torch.stack(made)


def states() -> list[bytes]:
    numpy_state: Any = np.random.get_state()
    return [repr(random.getstate()).encode(), numpy_state[1].tobytes(), torch.get_rng_state().numpy().tobytes()]


class Items(Dataset[Any]):
    """Images in memory as items."""

    def __init__(self, images: list[Any]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], 0


def pictures(kind: str) -> Images:
    if kind == "array":
        return ArrayImages(NOISE)
    if kind == "tensors":
        return ItemImages(Items([*NOISE]), COUNT)
    if kind == "grey":
        return ItemImages(Items([Image.fromarray(image[0].numpy()) for image in NOISE]), COUNT)
    return ItemImages(Items([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in NOISE]), COUNT)


PADDING_MODES = st.sampled_from(["constant", "edge", "reflect", "symmetric"])
CROPS = st.fixed_dictionaries(
    {"size": st.sampled_from([8, [6, 9], [10, 12], [12, 8]])},
    optional={"padding": st.sampled_from([2, [1, 3], [0, 1, 2, 3]]), "padding_mode": PADDING_MODES,
              "fill": st.integers(0, 255)},
).map(lambda arguments: {**arguments, "pad_if_needed": True})  # fmt: skip
P = st.fixed_dictionaries({"p": st.sampled_from([0.0, 0.3, 0.5, 1.0])})
MOVES = st.one_of(
    st.tuples(st.just("RandomCrop"), CROPS),
    st.tuples(st.sampled_from(["RandomHorizontalFlip", "RandomVerticalFlip"]), P),
    st.tuples(st.just("CenterCrop"), st.fixed_dictionaries({"size": st.sampled_from([4, 8, 14])})),
    st.tuples(st.just("Pad"), st.fixed_dictionaries({"padding": st.just(2), "padding_mode": PADDING_MODES})),
)
CHANGES = st.one_of(
    MOVES,
    st.tuples(st.just("RandomInvert"), P),
    st.tuples(st.just("RandomSolarize"), P.map(lambda p: {**p, "threshold": 100})),
    st.tuples(st.just("RandomPosterize"), P.map(lambda p: {**p, "bits": 3})),
    st.tuples(st.just("RandomGrayscale"), P),
    st.tuples(st.just("Resize"), st.just({"size": [9, 7]})),
)
END = [("ToDtype", {"dtype": "float32", "scale": True}), ("Normalize", {"mean": [0.4], "std": [0.3]})]


def can_move_tensors(steps: list[Any]) -> bool:
    """Whether steps do not reflect an image by more than its size, which Pillow can do and tensors cannot."""
    try:
        with torch.random.fork_rng():
            v2.Compose(steps or [v2.Identity()])(NOISE[0])
    except (IndexError, RuntimeError):
        return False
    return True


@settings(deadline=None, max_examples=80)
@given(
    kind=st.sampled_from(["array", "tensors", "rgb", "grey"]),
    before=st.lists(MOVES, max_size=3),
    after=st.lists(CHANGES, max_size=3),
    view=st.integers(0, 10**6),
    chunk=st.sampled_from([1, 700, 2**20]),
)
def test_a_batch_has_the_pixels_of_its_images(
    kind: str, before: list[Any], after: list[Any], view: int, chunk: int
) -> None:
    steps = [*before, ("ToImage", {}), *after, *END]
    transform: Transform = [{name: arguments} for name, arguments in steps]
    built = [
        getattr(v2, name)(**{k: torch.float32 if k == "dtype" else v for k, v in arguments.items()})
        for name, arguments in steps
    ]
    images = pictures(kind)
    try:
        expected = one_by_one(built, images, view)
    except (IndexError, RuntimeError):  # torchvision cannot pad an image by more than its size, but with a constant
        with pytest.raises(UsageError, match="the transform cannot be applied to sample 0"):
            View(samples_of(images), transform, seed=5).batch(range(COUNT), view)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched_steps, "_CHUNK", chunk)
        data = View(samples_of(images), transform, seed=5)
        found = data.batch(range(COUNT), view).images
        assert (data._batched is not None) == can_move_tensors(built[: len(before)])
        assert torch.equal(found, expected)
        assert found.is_contiguous()
        order = [4, 1, 7]
        assert torch.equal(data.batch(order, view).images, expected[order])
    assert torch.equal(NOISE, ArrayImages(NOISE).pixels)


@pytest.mark.parametrize("mode", ["reflect", "symmetric"])
def test_pictures_are_padded_by_more_than_their_size_as_torchvision_does(mode: str) -> None:
    small = {"size": 4}, {"size": 14, "padding_mode": mode, "pad_if_needed": True}
    transform: Transform = [{"CenterCrop": small[0]}, {"RandomCrop": small[1]}, {"ToImage": {}}]
    transform.append({"ToDtype": {"dtype": "float32", "scale": True}})
    steps = [v2.CenterCrop(**small[0]), v2.RandomCrop(**small[1]), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    images = pictures("rgb")
    found = View(samples_of(images), transform, seed=5).batch(range(COUNT), 3).images
    assert torch.equal(found, one_by_one(steps, images, 3))


AUGMENT: Transform = [{"RandomCrop": {"size": 8, "pad_if_needed": True}}, {"RandomHorizontalFlip": {}},
                      {"ToImage": {}}, {"ToDtype": {"dtype": "float32", "scale": True}}]  # fmt: skip
AUGMENT_STEPS = [
    v2.RandomCrop(8, pad_if_needed=True),
    v2.RandomHorizontalFlip(),
    v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True),
]


def mixed_pictures(kind: str) -> list[Any]:
    """Images that have to be transformed one at a time."""
    first = Image.fromarray(NOISE[0].permute(1, 2, 0).numpy())
    found: dict[str, list[Any]] = {
        "sizes": [first, Image.fromarray(NOISE[1, :, :9, :9].permute(1, 2, 0).numpy()), first],
        "tensors of two sizes": [NOISE[0], NOISE[1, :, :9, :9], NOISE[2]],
        "two types": [NOISE[0], NOISE[1].float() / 255, NOISE[2]],
        "CMYK": [first.convert("CMYK")] * 3,
        "RGBA": [first.convert("RGBA")] * 3,
        "1-bit": [first.convert("1")] * 3,
    }
    return found[kind]


@pytest.mark.parametrize("kind", ["sizes", "tensors of two sizes", "two types", "CMYK", "RGBA", "1-bit"])
def test_other_images_are_transformed_one_at_a_time(kind: str) -> None:
    images = ItemImages(Items(mixed_pictures(kind)), 3)
    data = View(samples_of(images), AUGMENT, seed=5)
    assert torch.equal(data.batch([0, 1, 2], 3).images, one_by_one(AUGMENT_STEPS, images, 3))
    assert data._batched is None


def test_large_images_are_transformed_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_steps, "_MAX_STACKED", NOISE.numel() - 1)
    data = View(samples_of(pictures("rgb")), AUGMENT, seed=5)
    assert torch.equal(data.batch(range(COUNT), 0).images, one_by_one(AUGMENT_STEPS, pictures("rgb"), 0))
    assert data._batched is None


@pytest.mark.parametrize(
    "step",
    [
        {"ColorJitter": {"hue": 0.1}},
        {"RandomResizedCrop": {"size": 8}},
        {"RandomErasing": {}},
        {"RandomChoice": {"transforms": [{"RandomHorizontalFlip": {}}]}},
    ],
    ids=lambda step: next(iter(step)),
)
def test_steps_that_draw_more_are_applied_to_one_image_at_a_time(step: dict[str, Any]) -> None:
    assert View(samples_of(pictures("array")), [*AUGMENT, step])._batched is None


def test_steps_that_treat_pictures_otherwise_than_tensors_get_pictures() -> None:
    resized = [{"Resize": {"size": [5, 5]}}, *AUGMENT[2:]]
    data = View(samples_of(pictures("rgb")), resized)
    steps = [v2.Resize([5, 5]), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    assert torch.equal(data.batch(range(COUNT), 0).images, one_by_one(steps, pictures("rgb"), 0))
    assert isinstance(View(samples_of(pictures("array")), resized)._batched, BatchedTransform)


def test_the_generators_of_the_caller_are_left_alone(tmp_path: Path) -> None:
    Image.fromarray(NOISE[0].permute(1, 2, 0).numpy()).save(tmp_path / "0.png")
    more: list[Transform] = [[], [{"RandomErasing": {}}], [{"MixUp": {}}]]
    for images in (pictures("array"), FileImages([str(tmp_path / "0.png")])):
        for steps in more:
            torch.manual_seed(3)
            before = states()
            View(samples_of(images), [*AUGMENT, *steps]).batch([0, 0], 1)
            assert states() == before


def test_a_view_that_was_used_can_be_sent_to_another_process() -> None:
    data = View(samples_of(pictures("array")), AUGMENT, seed=5)
    before = data.batch(range(COUNT), 3).images
    sent = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert torch.equal(sent.batch(range(COUNT), 3).images, before)


def test_the_data_set_is_not_modified() -> None:
    pixels = NOISE.clone()
    View(samples_of(ArrayImages(pixels)), [{"RandomInvert": {"p": 1.0}}, *AUGMENT[2:]]).batch(range(COUNT), 0)
    View(samples_of(ItemImages(Items([*pixels]), COUNT)), [{"RandomInvert": {"p": 1.0}}, *AUGMENT[2:]]).batch([0], 0)
    assert torch.equal(pixels, NOISE)


def test_a_view_of_float_images_without_steps_is_the_data() -> None:
    samples = tiny_samples(6)
    assert isinstance(samples.images, ArrayImages)
    assert torch.equal(View(samples, []).batch([3, 1], 0).images, samples.images.pixels[[3, 1]])


# Pixels of kdcache before transforms were applied to batches, SHA-256 of the float32 values of view 2 under seed 9.
RECORDED: dict[str, tuple[Transform, str]] = {
    "crop and flip": ([AUGMENT[0], AUGMENT[1]], "5749fc4e3adb4738"),
    "grey and invert": (
        [{"RandomGrayscale": {"p": 0.4}}, {"RandomInvert": {}}, {"RandomVerticalFlip": {}}],
        "a09da386dde40b29",
    ),
    "erasing": (
        [{"RandomCrop": {"size": 10, "padding": 2, "padding_mode": "reflect"}}, {"RandomErasing": {}}],
        "3c6cd105d7c7ad88",
    ),
    "jitter": ([{"ColorJitter": {"brightness": 0.3}}, {"RandomHorizontalFlip": {}}], "d4efb3f965f5b066"),
    "TrivialAugment": ([{"TrivialAugmentWide": {}}, {"RandomCrop": {"size": 7}}], "555f17f7a36e4f28"),
}


def recorded_view(name: str) -> str:
    steps = [*RECORDED[name][0], {"ToDtype": {"dtype": "float32", "scale": True}}]
    images = View(samples_of(ArrayImages(NOISE)), steps, seed=9).batch(range(COUNT), 2).images
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", RECORDED)
def test_the_pixels_of_views_have_not_changed(name: str) -> None:
    assert recorded_view(name) == RECORDED[name][1]
