"""Files of ml-dr become caches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.foreign import (
    COUNT,
    PIXELS,
    SPEC,
    VIEWS,
    Calls,
    Images,
    check_same_pixels,
    logits_of,
    ml_dr_of,
    ml_dr_says,
    saved,
    unpacked,
)

from kdcache.cache.inspect.audit import audit
from kdcache.config.transform import Transform
from kdcache.curate.foreign import cache_of_files
from kdcache.data.replay import replay, teacher_view
from kdcache.errors import KdcacheError, MismatchError, UsageError

AUGMENTED = {"rand_augment": {"p": 0.5}, "random_erase": {"p": 0.25}, "mixup": {"p": 0.5}, "cutmix": {"p": 0.5}}


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("steps", [{}, AUGMENTED], ids=["crops", "others, that left all alone"])
def test_ml_drs_crops_and_probabilities_are_the_caches(
    images: Images, tmp_path: Path, compress: bool, steps: dict[str, Any]
) -> None:
    untouched = {(number, 0): {"random_erase": (-1, -1, -1, -1)} for number in range(COUNT)} if steps else {}
    folder = ml_dr_of(images, tmp_path / "reinforced", compress, steps, untouched)
    cache = cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache", spec=SPEC)
    assert cache.manifest.plan.views.transform == PIXELS
    assert audit(cache.path).failure is None
    assert replay(cache, images.samples).rounded == 0
    for view in range(VIEWS):
        seen, found = teacher_view(cache, images.samples, view), logits_of(cache, view).softmax(dim=1)
        for number in range(COUNT):
            check_same_pixels(seen[number].images[0], images.cut(number, view))
            values, classes = unpacked(folder / f"{number}.pth.tar")[1][view]["prob"]
            torch.testing.assert_close(found[number], ml_dr_says(values, classes), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rand_augment", [(3, 0.5)]),
        ("random_erase", (1, 2, 3, 4)),
        ("random_erase", 5),
        ("mixup", 0.3),
        ("cutmix", [0.3, 1, 2, 3, 4]),
    ],
)
def test_what_ml_dr_has_changed_otherwise_is_refused_by_name(
    images: Images, tmp_path: Path, name: str, value: Any, compress: bool
) -> None:
    folder = ml_dr_of(images, tmp_path / "reinforced", compress, AUGMENTED, {(9, 1): {name: value}})
    with pytest.raises(UsageError, match=rf"reinforcement 1 in .*/9\.pth\.tar was changed by {name}"):
        cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache", spec=SPEC)
    assert not (tmp_path / "c.kdcache").exists()


def test_a_config_that_says_nothing_is_named(images: Images, tmp_path: Path) -> None:
    folder = ml_dr_of(images, tmp_path / "reinforced")
    plain: dict[str, Any] = {"random_horizontal_flip": {"p": 0.5}}
    for held, why in (
        ({"reinforce": {"image_augmentation": plain}}, "has the transforms random_horizontal_flip"),
        ({"reinforce": {"image_augmentation": {"random_resized_crop": {}}}}, "has the transforms random_resized_crop"),
        (
            {"reinforce": {"image_augmentation": plain | {"random_resized_crop": {"size": "x"}}}},
            "size must be a number of pixels or",
        ),
        ({"reinforce": {"image_augmentation": [1]}}, "config.pth.tar does not state the augmentation"),
        ([], "config.pth.tar does not state the augmentation"),
        (Calls(), "config.pth.tar cannot be read"),
    ):
        saved(folder / "config.pth.tar", held)
        with pytest.raises(KdcacheError, match=why):
            cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache")
    (folder / "config.pth.tar").unlink()
    with pytest.raises(UsageError, match=r"not a folder of ml-dr files .* config\.pth\.tar"):
        cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache")


@pytest.mark.parametrize("place", [0, 3])
def test_another_transform_than_the_config_states_is_refused(images: Images, tmp_path: Path, place: int) -> None:
    folder = ml_dr_of(images, tmp_path / "reinforced")
    other: Transform = [{name: {**given} for name, given in step.items()} for step in PIXELS]
    ((_, given),) = other[place].items()
    given |= {"size": 9} if place == 0 else {"mean": [0.1, 0.2, 0.9]}
    with pytest.raises(MismatchError, match="differs from the one in the files of ml-dr"):
        cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache", transform=other, spec=SPEC)


def test_crops_behind_something_else_and_other_numbers_of_images_are_refused(images: Images, tmp_path: Path) -> None:
    resized = ml_dr_of(images, tmp_path / "resized", steps={"resize": {"size": 9}})
    with pytest.raises(UsageError, match="only random_resized_crop as the first step"):
        cache_of_files(resized, "ml-dr", images.samples, tmp_path / "c.kdcache")
    folder = ml_dr_of(images, tmp_path / "reinforced")
    shutil.copy(folder / "0.pth.tar", folder / f"{COUNT}.pth.tar")
    with pytest.raises(MismatchError, match="hold nothing out"):
        cache_of_files(folder, "ml-dr", images.samples, tmp_path / "c.kdcache")
