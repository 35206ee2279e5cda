"""What networks and the teacher say of some images: the maps of classes that a report shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdcache.config.transform import Transform
from kdcache.data.views import View
from kdcache.evaluation.networks import NetworkRef
from kdcache.evaluation.pixel_scorecard import ComparedImages
from kdcache.evaluation.report.map_charts import MapPicture, SaidMap
from kdcache.losses.maps import resized
from kdcache.models.outputs import logits_of

_NORMALIZE = "Normalize"


class PicturedImages:
    """Some images with their label maps, and the teacher's maps if they are of a cache.

    Args:
        view: the images.
        indices: of the images that are shown.
        titles: what each of them is.
        teacher: the teacher's map of each, [H, W] int64; None without a cache.
    """

    def __init__(self, view: View, indices: Sequence[int], titles: Sequence[str], teacher: list[Tensor] | None) -> None:
        self.view, self.indices, self.titles, self._teacher = view, indices, titles, teacher
        unscaled = View(view.samples, _without_normalization(view.transform), view.seed, view.view)
        self._images = [_visible(unscaled.batch([index], view.view).images[0]) for index in indices]
        self._maps = [_map_of(view, index) for index in indices]

    @classmethod
    def of_cache(cls, compared: ComparedImages, count: int) -> PicturedImages:
        """Return some of the images of a cache, as its teacher saw them in view 0."""
        places = evenly_spread(len(compared.indices), count)
        indices = [compared.indices[place] for place in places]
        ids = compared.ids[places]
        logits = compared.cache.teacher(compared.output, placement="stream")(ids)
        sizes = [_size(_map_of(compared.view, index)) for index in indices]
        maps = [_classes(each[None], size) for each, size in zip(logits, sizes, strict=True)]
        where = f"{compared.view.samples.name}/{compared.view.samples.split}"
        return cls(compared.view, indices, [f"{where}, sample {index}" for index in ids.tolist()], maps)

    @classmethod
    def of_test(cls, view: View, count: int) -> PicturedImages:
        """Return some images of the test split."""
        indices = evenly_spread(len(view), count)
        where = f"{view.samples.name}/{view.samples.split}"
        return cls(view, indices, [f"{where}, image {index}" for index in indices], None)

    @torch.inference_mode()
    def said_by(
        self, network: NetworkRef, model: nn.Module, own: View, device: torch.device | str
    ) -> list[Tensor] | None:
        """Return what a network says of each image, [H, W] int64; None if it sees other sections of the images.

        Args:
            network: where the model comes from.
            model: on the device, in evaluation mode.
            own: test images as the network takes them.
            device: of the model.
        """
        view = network.view_for_comparison(self.view) if self._teacher is not None else own
        said = []
        for index, labels in zip(self.indices, self._maps, strict=True):
            batch = view.batch([index], view.view)
            if batch.maps is None or not torch.equal(batch.maps[0], labels):
                return None
            said.append(_classes(logits_of(model(batch.images.to(device))).float().cpu(), _size(labels)))
        return said

    def pictures(self, students: Sequence[tuple[str, list[Tensor]]]) -> list[MapPicture]:
        """Return the images with what some networks say of them: label of the network, and its maps."""
        teacher = [None] * len(self.indices) if self._teacher is None else self._teacher
        return [
            MapPicture(
                self.titles[place],
                self._images[place],
                self._maps[place],
                teacher[place],
                [SaidMap(label, maps[place]) for label, maps in students],
            )
            for place in range(len(self.indices))
        ]


def evenly_spread(total: int, count: int) -> list[int]:
    """Return at most `count` numbers from 0 to `total` - 1, in equal steps."""
    return [place * total // min(count, total) for place in range(min(count, total))]


def _map_of(view: View, index: int) -> Tensor:
    maps = view.batch([index], view.view).maps
    assert maps is not None, "the data set has label maps"  # noqa: S101  # for the types
    return maps[0]


def _size(classes: Tensor) -> tuple[int, int]:
    return classes.shape[0], classes.shape[1]


def _classes(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the classes [H, W] of logits [1, C, h, w], which are enlarged to a size."""
    return resized(logits, size).argmax(dim=1)[0]


def _without_normalization(transform: Transform) -> Transform:
    """Return the steps but for those that shift and scale the channels, which draw nothing."""
    return [step for step in transform if _NORMALIZE not in step]


def _visible(image: Tensor) -> Tensor:
    """Return pixels [channels, H, W] as colors, [3, H, W] uint8.

    Values from 0 to 1 are kept, others scaled from their minimum to their maximum; other numbers of channels than 3
    become gray.
    """
    pixels = image.double().nan_to_num()
    if len(pixels) != 3:
        pixels = pixels.mean(dim=0, keepdim=True).expand(3, -1, -1)
    low, high = min(float(pixels.min()), 0.0), max(float(pixels.max()), 1.0)
    return (255 * (pixels - low) / (high - low)).round().to(torch.uint8)
