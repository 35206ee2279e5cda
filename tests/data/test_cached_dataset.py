"""The data set that a cached teacher saw, item by item, in a DataLoader of other people's loops."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kdcache import Cache, CachedDataset, Samples, dump_teacher
from kdcache.config.cache import CacheSpec
from kdcache.data.images import ArrayImages
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError

SPEC = CacheSpec(views=3, seed=5, dtype="float32")


class Pairs(Dataset[Any]):
    """What people have: images and labels, one pair at a time."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.samples.images.picture(index), int(self.samples.labels[index])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Three views of 37 images."""
    out = tmp_path_factory.mktemp("cached") / "tiny.kdcache"
    return dump_teacher(TinyTeacher(), tiny_samples(), out, transform=FLIP, spec=SPEC)


def loaded(data: CachedDataset, **options: Any) -> list[list[Tensor]]:
    return list(DataLoader(data, batch_size=8, **options))


@pytest.mark.parametrize("kind", ["samples", "pairs"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_has_the_images_that_the_teacher_saw_and_indexes_its_logits(
    kind: str, workers: int, cache: Cache, samples: Samples
) -> None:
    data = CachedDataset(samples if kind == "samples" else Pairs(samples), cache)
    teacher, live = cache.teacher(), TinyTeacher()
    assert len(data) == 37
    for epoch in range(4):
        data.set_epoch(epoch)
        generator = torch.Generator().manual_seed(epoch)
        seen = []
        for images, labels, ids, views in loaded(data, shuffle=True, generator=generator, num_workers=workers):
            assert [part.dtype for part in (images, labels, ids, views)] == [torch.float32, *[torch.int64] * 3]
            assert views.tolist() == [epoch % 3] * len(ids)
            expected = View(samples, FLIP, SPEC.seed, epoch % 3).__getitems__(ids.tolist())
            assert torch.equal(images, expected.images)
            assert labels.tolist() == samples.labels[ids].tolist()
            torch.testing.assert_close(teacher(ids, views), live(images))
            seen += ids.tolist()
        assert sorted(seen) == list(range(37))
        assert seen != sorted(seen)


def test_one_item_is_the_same_as_in_a_batch(cache: Cache, samples: Samples) -> None:
    data = CachedDataset(samples, cache)
    data.set_view(2)
    (images, labels, ids, views), *_ = loaded(data)
    image, *rest = data[3]
    assert torch.equal(image, images[3])
    assert rest == [int(labels[3]), int(ids[3]), int(views[3])] == [0, 3, 2]
    assert data[-1][2] == 36
    with pytest.raises(IndexError):
        data[37]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_set_view_takes_effect_in_persistent_workers(context: str, cache: Cache, samples: Samples) -> None:
    data = CachedDataset(samples, cache)
    workers = multiprocessing.get_context(context)
    loader = DataLoader(data, batch_size=8, num_workers=1, persistent_workers=True, multiprocessing_context=workers)
    for epoch in range(3):
        data.set_epoch(epoch)
        for images, _, ids, views in loader:
            assert set(views.tolist()) == {epoch}
            assert torch.equal(images, View(samples, FLIP, SPEC.seed, epoch).__getitems__(ids.tolist()).images)


def test_a_cache_without_random_steps_is_given_whole_batches(tmp_path: Path, samples: Samples) -> None:
    cache = dump_teacher(TinyTeacher(), samples, tmp_path / "clean.kdcache")
    data = CachedDataset(samples, cache)
    data.set_epoch(5)
    (images, _, ids, views), *_ = loaded(data)
    assert torch.equal(images, View(samples, []).__getitems__(range(8)).images)
    assert (ids.tolist(), views.tolist()) == (list(range(8)), [0] * 8)


def test_the_teacher_takes_a_view_per_sample(cache: Cache, samples: Samples) -> None:
    teacher, live = cache.teacher(), TinyTeacher()
    ids, views = torch.tensor([7, 0, 7, 36, 7]), torch.tensor([2, 0, 1, 1, 0])
    pairs = zip(ids.tolist(), views.tolist(), strict=True)
    seen = [View(samples, FLIP, SPEC.seed, view)[sample].images for sample, view in pairs]
    torch.testing.assert_close(teacher(ids, views), live(torch.cat(seen)))
    assert teacher(ids[:0], views[:0]).shape == (0, 10)
    for wrong in (views[:3], views[:, None], views.bool(), views.float(), torch.tensor(1)):
        with pytest.raises(UsageError, match="views are"):
            teacher(ids, wrong)
    with pytest.raises(UsageError, match="no view 3"):
        teacher(ids, views + 1)


def other_order(samples: Samples) -> Samples:
    assert isinstance(samples.images, ArrayImages)
    turned = ArrayImages(samples.images.pixels.flip(0))
    return Samples("tiny", "train", turned, samples.labels[::-1].copy(), samples.class_names, [])


@pytest.mark.parametrize("wrapped", [False, True])
def test_another_data_set_is_refused(wrapped: bool, cache: Cache, samples: Samples) -> None:
    labels = samples.labels.tolist()
    wrong = {
        "holds 37 samples, tiny/train has 36": tiny_samples(36),
        "in another order, first at sample 0": other_order(samples),
        "sample 5 of tiny/train has label 7, in the cache 6": tiny_samples(labels=[*labels[:5], 7, *labels[6:]]),
    }
    for message, others in wrong.items():
        with pytest.raises(MismatchError, match=message):
            CachedDataset(Pairs(others) if wrapped else others, cache)
    with pytest.raises(MismatchError, match="classes"):
        CachedDataset(tiny_samples(num_classes=11), cache)
    with pytest.raises(MismatchError, match="label out of range"):
        CachedDataset(Pairs(tiny_samples(num_classes=11)), cache)


def test_a_data_set_with_its_own_preprocessing_is_refused(cache: Cache, samples: Samples) -> None:
    assert isinstance(samples.images, ArrayImages)
    shifted = TensorDataset(samples.images.pixels + 1, torch.from_numpy(samples.labels))
    with pytest.raises(MismatchError, match="37 of 37 samples of tiny/train are not those of the cache"):
        CachedDataset(shifted, cache)


def test_pixels_that_another_library_would_make_are_refused(
    cache: Cache, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = View._apply
    monkeypatch.setattr(View, "_apply", lambda *given: made(*given) + 0.5)
    with pytest.raises(MismatchError, match="is not what the teacher"):
        CachedDataset(samples, cache)


def test_mixed_and_missing_views_are_refused(tmp_path: Path, cache: Cache, samples: Samples) -> None:
    mixed = dump_teacher(
        TinyTeacher(), samples, tmp_path / "mixed.kdcache", transform=[*FLIP, {"MixUp": {"alpha": 0.2}}], spec=SPEC
    )
    with pytest.raises(UsageError, match="mix two images"):
        CachedDataset(samples, mixed)
    data = CachedDataset(samples, cache)
    for view in (-1, 3):
        with pytest.raises(UsageError, match=f"no view {view}"):
            data.set_view(view)
    assert data.view == 0
