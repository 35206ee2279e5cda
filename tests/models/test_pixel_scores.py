"""Scores of networks that say a class of every pixel, against counts over single pixels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from kdcache import KdcacheError, build_model, evaluate
from kdcache.data.samples import as_samples
from kdcache.losses.maps import resized
from kdcache.models import pixel_scores
from kdcache.models.evaluate import Sums, total_of
from kdcache.models.pixel_scores import PixelScore, pixel_sums

CLASSES = 4


class Stripes(Dataset[tuple[Tensor, Tensor]]):
    """Random images with random label maps, of which the first row is ignored."""

    classes = ("a", "b", "c", "d")

    def __init__(self, count: int = 5) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(count, 3, 12, 16, generator=generator)
        self.maps = torch.randint(0, 3, (count, 12, 16), generator=generator)  # d is nowhere
        self.maps[:, 0] = 255

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= len(self):
            raise IndexError(index)
        return self.images[index], self.maps[index]


def counted_score(logits: Tensor, maps: Tensor) -> tuple[float, float, list[float | None]]:
    """Accuracy, loss and IoU, pixel by pixel."""
    enlarged = F.interpolate(logits.double(), maps.shape[1:], mode="bilinear")
    right = total = 0
    nats = 0.0
    both, either = [0] * CLASSES, [0] * CLASSES
    for b, row, column in (maps >= 0).nonzero().tolist():
        scores, truth = enlarged[b, :, row, column], int(maps[b, row, column])
        guess = int(scores.argmax())
        right, total = right + (guess == truth), total + 1
        nats -= float(scores.log_softmax(0)[truth])
        for label in {guess, truth}:
            either[label] += 1
        both[truth] += guess == truth
    return right / total, nats / total, [one / of if of else None for one, of in zip(both, either, strict=True)]


@given(seed=st.integers(0, 1000), size=st.sampled_from([(3, 4), (12, 16), (5, 5)]))
def test_scores_are_those_of_single_pixels(seed: int, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, CLASSES, *size, generator=generator)
    logits[:, 3] = -50  # never predicted
    maps = torch.randint(-1, 3, (3, 12, 16), generator=generator)
    whole = pixel_sums(logits, maps)
    parts = total_of([Sums(0, 0.0, 0), *(pixel_sums(logits[i : i + 1], maps[i : i + 1]) for i in range(3))])
    accuracy, loss, iou = counted_score(logits, maps)
    for sums in (whole, parts):
        found = sums.score(as_samples(Stripes()))
        assert isinstance(found, PixelScore)
        assert found.accuracy == pytest.approx(accuracy) and found.loss == pytest.approx(loss, rel=1e-5)
        assert list(found.iou) == pytest.approx(iou) and found.iou[3] is None
        assert found.mean_iou == pytest.approx(sum(each for each in iou if each is not None) / 3)


def test_a_few_images_are_enlarged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, maps = torch.randn(5, CLASSES, 3, 4, generator=generator), torch.randint(-1, 4, (5, 12, 16))
    whole, enlarged = pixel_sums(logits, maps), []

    def recorded(values: Tensor, size: tuple[int, int]) -> Tensor:
        enlarged.append(len(values))
        return resized(values, size)

    monkeypatch.setattr(pixel_scores, "resized", recorded)
    monkeypatch.setattr(pixel_scores, "_NUMBERS_AT_ONCE", 2 * CLASSES * 12 * 16 + 1)
    parts = pixel_sums(logits, maps)
    assert enlarged == [2, 2, 1]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def test_a_network_is_evaluated_on_pixels() -> None:
    torch.manual_seed(0)
    network = build_model({"model": "small:fcn", "args": {"width": 4}}, CLASSES, (3, 12, 16)).eval()
    data = Stripes()
    found = evaluate(network, data, batch_size=2)
    with torch.no_grad():
        accuracy, loss, _ = counted_score(network(data.images), torch.where(data.maps == 255, -1, data.maps))
    assert isinstance(found, PixelScore)
    assert found.accuracy == pytest.approx(accuracy) and found.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"])
def test_segmentation_networks_of_torchvision_say_a_class_per_pixel(name: str) -> None:
    network = build_model(f"torchvision:{name}", 5, (3, 32, 48)).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 32, 48)).shape == (1, 5, 32, 48)


class Pooled(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def test_a_classifier_of_whole_images_is_refused() -> None:
    with pytest.raises(KdcacheError, match=r"returned \[5, 3\] for label maps \[5, 12, 16\]"):
        evaluate(Pooled(), Stripes())
