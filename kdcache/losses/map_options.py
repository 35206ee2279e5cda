"""The losses of outputs that are maps: the options of each, and their names.

To add one, write its function in `maps.py` (or `boundaries.py`), and list it here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Union

from pydantic import Field, field_validator
from torch import Tensor

from kdcache.losses import maps
from kdcache.losses.batch import BatchTotals
from kdcache.losses.boundaries import bpkd
from kdcache.losses.maps import labels_of_places
from kdcache.losses.options import NotNegative, Positive
from kdcache.losses.outputs import OUTPUT_LOSSES, OutputLossOptions

Share = Annotated[float, Field(ge=0, le=1)]

LABELS = "labels"
"""Value of `mask` for the places that have a label."""


class MapLossOptions(OutputLossOptions):
    """The loss of one output that is a map: base class of those below."""

    places: ClassVar[Literal["one", "grid"]] = "grid"

    align: maps.Align = "bilinear"
    """How the teacher's map is brought to the grid of the student: as the teacher enlarges its own."""
    align_corners: bool = False
    """Whether the corners of both grids are at the same place, as the teacher has it; of `bilinear` alone."""

    def on_grid_of(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the teacher's maps [B, C', h, w] interpolated to the grid of the student's, [B, C', H, W]."""
        height, width = student.shape[2:]
        return maps.resized(teacher, (height, width), self.align, self.align_corners)

    def values(
        self,
        student: Tensor,
        teacher: Tensor,
        totals: BatchTotals | None = None,
        group_size: int = 1,
        label_maps: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each sample, [B], before its weight.

        Args:
            student: [B, C, H, W].
            teacher: [B, C, h, w]; [B, C', h, w] for a loss that compares places alone.
            totals: of the batch that the samples are part of; None if they are the whole batch.
            group_size: without effect on maps.
            label_maps: [B, H', W'] int64, -1 where ignored, for a loss that reads them.
            mask: [B, 1, H, W], 0 where a place does not count, for a loss whose `mask` names an output of the student.
        """
        teacher = self.on_grid_of(student, teacher)
        of_grids = ("name", "weight", "align", "align_corners", "mask")
        options = {key: value for key, value in self if key not in of_grids}
        over: maps.Standardize = options.pop("standardize", "none")
        if totals is not None and self.of_sums:
            options["batch_sum"] = totals.sum
        if self.needs_maps:
            options["labels"] = label_maps
        if mask is not None:
            options["mask"] = mask[:, 0] != 0
        elif self.reads_maps and label_maps is not None and not self.needs_maps:
            options["mask"] = labels_of_places(label_maps, (student.shape[2], student.shape[3])) >= 0
        return type(self).compute(maps.standardized(student, over), maps.standardized(teacher, over), **options)


class PlaceLossOptions(MapLossOptions):
    """The loss of a map that is a mean over its places: base class of those below."""

    mask: str | None = Field(default=None, exclude_if=lambda mask: mask is None)
    """The places that count: `labels`, those with a label; or an output of the student (a part of what it returns, or a
    module), [B, h, w], that is 0 or false where a place does not count. None: all places."""

    @property
    def reads_maps(self) -> bool:
        """Whether it needs label maps."""
        return self.mask == LABELS

    @property
    def mask_source(self) -> str | None:
        """The output of the student that says which places count; None without."""
        return None if self.reads_maps else self.mask


class PixelKD(PlaceLossOptions):
    """`pixel_kd`: KL divergence of the classes at each place, times the squared temperature."""

    compute = staticmethod(maps.pixel_kd)
    kinds = ("classes",)
    name: Literal["pixel_kd"]
    tau: Positive = 1.0
    """Temperature."""
    standardize: Literal["none", "channels"] = "none"
    """`channels`: logits of mean 0 and deviation 1 at each place."""


class PixelMSE(PlaceLossOptions):
    """`pixel_mse`: mean squared error at each place."""

    compute = staticmethod(maps.pixel_mse)
    kinds = ("vector", "score")
    name: Literal["pixel_mse"]
    standardize: maps.Standardize = "none"
    """Of mean 0 and deviation 1: the `channels` of each place, or the `places` of each channel."""


class CWD(MapLossOptions):
    """`cwd`: KL divergence of the distributions over the places of each channel."""

    compute = staticmethod(maps.channel_wise)
    kinds = ("classes", "vector")
    needs_level = True
    name: Literal["cwd"]
    tau: Positive = 4.0
    """Temperature."""


class AT(MapLossOptions):
    """`at`: where the features are large."""

    compute = staticmethod(maps.attention_transfer)
    same_width = False
    name: Literal["at"]
    power: Positive = 2.0
    """Exponent of the magnitudes."""


class Theia(MapLossOptions):
    """`theia`: cosine and smooth L1 to standardized features."""

    compute = staticmethod(maps.theia)
    of_sums = True
    name: Literal["theia"]
    cosine_weight: Share = 0.9
    """Share of the cosine."""


class SALT(PlaceLossOptions):
    """`salt`: mean absolute error to latents."""

    compute = staticmethod(maps.masked_latents)
    name: Literal["salt"]
    normalize: bool = False
    """Targets of mean 0 and variance 1 at each place."""


class BPKD(MapLossOptions):
    """`bpkd`: at the boundaries of each class, and away from them."""

    compute = staticmethod(bpkd)
    kinds = ("classes",)
    needs_level = True
    needs_maps = True
    name: Literal["bpkd"]
    tau: Positive = 1.0
    """Temperature."""
    edge_weight: NotNegative = 50.0
    """Of the KL divergence at the boundaries."""
    body_weight: NotNegative = 20.0
    """Of the divergence over places away from them."""
    neighbors: Annotated[int, Field(ge=3, le=255)] = 7
    """Side in pixels of the square within which another class makes a boundary, odd."""

    @field_validator("neighbors")
    @classmethod
    def _is_odd(cls, neighbors: int) -> int:
        if neighbors % 2 == 0:
            raise ValueError(f"{neighbors} is even: the square has a center")
        return neighbors


MAP_LOSSES: dict[str, type[MapLossOptions]] = {
    "pixel_kd": PixelKD,
    "pixel_mse": PixelMSE,
    "cwd": CWD,
    "at": AT,
    "theia": Theia,
    "salt": SALT,
    "bpkd": BPKD,
}

ALL_LOSSES: dict[str, type[OutputLossOptions]] = {**OUTPUT_LOSSES, **MAP_LOSSES}
"""The losses of all outputs beside class logits, by name."""

if TYPE_CHECKING:
    OutputLoss = OutputLossOptions
else:
    OutputLoss = Annotated[Union[tuple(ALL_LOSSES.values())], Field(discriminator="name")]  # noqa: UP007
