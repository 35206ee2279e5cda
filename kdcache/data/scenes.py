"""Small street scenes that are drawn by the program, with the class of each pixel: a data set for examples and tests.

Everything is computed in integers, from the streams of `numpy.random.RandomState`, which numpy does not change: images
and label maps are the same on every machine.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kdcache.config.transform import Transform
from kdcache.data.images import ArrayImages
from kdcache.data.label_maps import UNKNOWN, ArrayMaps
from kdcache.data.npz_files import array_transform
from kdcache.data.samples import Samples, Split

HEIGHT, WIDTH = 48, 96

CLASSES = ("road", "sidewalk", "building", "vegetation", "sky", "person", "car", "pole")
_ROAD, _SIDEWALK, _BUILDING, _VEGETATION, _SKY, _PERSON, _CAR, _POLE = range(len(CLASSES))

COUNTS: dict[Split, int] = {"train": 240, "validation": 60, "test": 120}
_FIRST: dict[Split, int] = {"train": 0, "validation": 10_000, "test": 20_000}
"""Seed of the first scene of each split."""

_NOISE = 26
"""Largest change of a color by noise, which is a sum of two uniform numbers."""

_HOOD = 3
"""Rows at the bottom that show the hood of the car with the camera, and are ignored."""

_ROWS, _COLUMNS = np.mgrid[:HEIGHT, :WIDTH]

_MEAN, _STD = (0.43, 0.45, 0.45), (0.23, 0.22, 0.24)

_Color = tuple[int, int, int]


class Scene(NamedTuple):
    """A scene.

    Attributes:
        image: [H, W, 3] uint8.
        classes: [H, W] int64, -1 where it is ignored.
    """

    image: npt.NDArray[np.uint8]
    classes: npt.NDArray[np.int64]


class _Canvas:
    """A picture and its label map, which are painted together.

    Args:
        draw: source of random numbers.
    """

    def __init__(self, draw: np.random.RandomState) -> None:
        self.colors = np.zeros((HEIGHT, WIDTH, 3), np.int64)
        self.classes = np.full((HEIGHT, WIDTH), _SKY)
        self._draw = draw

    def number(self, low: int, high: int) -> int:
        """Return an integer from `low` to `high`, both included."""
        return int(self._draw.randint(low, high + 1))

    def near(self, color: _Color, spread: int) -> _Color:
        """Return a color at most `spread` from another in each channel."""
        red, green, blue = (value + self.number(-spread, spread) for value in color)
        return red, green, blue

    def paint(self, where: npt.NDArray[np.bool_], color: _Color, class_: int | None = None) -> None:
        """Set color and class of some pixels; without a class, that which is there stays."""
        self.colors[where] = color
        if class_ is not None:
            self.classes[where] = class_

    def box(self, top: int, bottom: int, left: int, right: int) -> npt.NDArray[np.bool_]:
        """Return the pixels from `top` to `bottom` and from `left` to `right`, without the last row and column."""
        inside = np.zeros((HEIGHT, WIDTH), np.bool_)
        inside[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
        return inside

    def light(self) -> npt.NDArray[np.uint8]:
        """Return the picture under a light of random strength, with noise."""
        strength = self.number(60, 125)
        noise = self._draw.randint(-_NOISE // 2, _NOISE // 2 + 1, (2, HEIGHT, WIDTH, 3)).sum(axis=0)
        lit: npt.NDArray[np.uint8] = (self.colors * strength // 100 + noise).clip(0, 255).astype(np.uint8)
        return lit


def draw_scene(seed: int) -> Scene:
    """Draw a street: sky, buildings, trees, a road between sidewalks, and cars, persons and poles on them."""
    canvas = _Canvas(np.random.RandomState(seed))
    horizon = canvas.number(16, 22)
    canvas.paint(canvas.box(0, HEIGHT, 0, WIDTH), canvas.near((150, 180, 215), 25), _SKY)
    _buildings(canvas, horizon)
    _trees(canvas, horizon)
    middle, slope = canvas.number(WIDTH // 3, 2 * WIDTH // 3), canvas.number(12, 18)
    _ground(canvas, horizon, middle, slope)
    for _ in range(canvas.number(0, 3)):
        _pole(canvas, horizon)
    # What is further away is painted first.
    for depth in sorted(canvas.number(2, HEIGHT - horizon - 6) for _ in range(canvas.number(1, 4))):
        _car(canvas, horizon + depth, middle, depth * slope // 10)
    for depth in sorted(canvas.number(2, HEIGHT - horizon - 8) for _ in range(canvas.number(0, 4))):
        _person(canvas, horizon + depth, depth)
    hood = (_ROWS >= HEIGHT - _HOOD) & ((_COLUMNS - WIDTH // 2) ** 2 < (WIDTH // 2 - 2 * (HEIGHT - _ROWS)) ** 2)
    canvas.paint(hood, (45, 45, 50), UNKNOWN)
    return Scene(canvas.light(), canvas.classes)


def _buildings(canvas: _Canvas, horizon: int) -> None:
    left = 0
    while left < WIDTH:
        width, top = canvas.number(8, 24), canvas.number(1, horizon - 3)
        if canvas.number(0, 5):
            wall = canvas.near(((150, 120, 100), (120, 120, 125), (160, 150, 130))[canvas.number(0, 2)], 25)
            canvas.paint(canvas.box(top, horizon + 2, left, left + width), wall, _BUILDING)
            panes = canvas.box(top + 2, horizon - 1, left + 1, left + width - 1) & (_ROWS % 4 < 2) & (_COLUMNS % 3 > 0)
            canvas.paint(panes, canvas.near((95, 110, 130), 25))
        left += width


def _trees(canvas: _Canvas, horizon: int) -> None:
    for _ in range(canvas.number(0, 5)):
        column, radius = canvas.number(0, WIDTH), canvas.number(3, 7)
        row = horizon - radius + canvas.number(-1, 2)
        crown = (_ROWS - row) ** 2 + (_COLUMNS - column) ** 2 <= radius**2
        canvas.paint(crown, canvas.near((85, 115, 75), 20), _VEGETATION)
        canvas.paint(crown & ((_ROWS + _COLUMNS) % 3 == 0), canvas.near((65, 95, 60), 15))


def _ground(canvas: _Canvas, horizon: int, middle: int, slope: int) -> None:
    """Paint the sidewalk below the horizon, and on it the road, which becomes wider by `slope` tenths per row."""
    below = horizon < _ROWS
    paving = canvas.near((125, 118, 115), 15)
    canvas.paint(below, paving, _SIDEWALK)
    red, green, blue = paving
    canvas.paint(below & ((_ROWS + _COLUMNS) % 5 == 0), (red - 14, green - 14, blue - 14))
    wide = (_ROWS - horizon) * slope // 10 + 2
    canvas.paint(below & (abs(_COLUMNS - middle) <= wide), canvas.near((105, 105, 110), 15), _ROAD)
    line = below & (abs(_COLUMNS - middle) <= (_ROWS - horizon) // 12) & (_ROWS % 6 < 3)
    canvas.paint(line, (205, 205, 200))


def _pole(canvas: _Canvas, horizon: int) -> None:
    column, foot = canvas.number(2, WIDTH - 3), horizon + canvas.number(2, 12)
    width = 1 + (foot - horizon) // 6
    mast = canvas.box(canvas.number(2, 9), foot, column, column + width)
    canvas.paint(mast & (canvas.classes != _ROAD), canvas.near((100, 100, 105), 20), _POLE)


def _car(canvas: _Canvas, foot: int, middle: int, reach: int) -> None:
    """Paint a car whose wheels are in row `foot`, at most `reach` columns from the middle of the road."""
    height = 3 + (foot - 16) // 3
    left = middle + canvas.number(-reach, max(reach - height, -reach))
    body, top = canvas.near((125, 115, 120), 85), foot - height
    canvas.paint(canvas.box(foot - 1 - height // 2, foot, left, left + 2 * height), body, _CAR)
    cabin = canvas.box(top, foot - height // 2, left + height // 3, left + 2 * height - height // 3)
    canvas.paint(cabin, body, _CAR)
    canvas.paint(
        canvas.box(top + 1, foot - height // 2, left + height // 2, left + 2 * height - height // 2), (70, 80, 95)
    )
    wheels = canvas.box(foot - 1, foot + 1, left + 1, left + 1 + height // 3)
    wheels |= canvas.box(foot - 1, foot + 1, left + 2 * height - 1 - height // 3, left + 2 * height - 1)
    canvas.paint(wheels, (30, 30, 32), _CAR)


def _person(canvas: _Canvas, foot: int, depth: int) -> None:
    height, left = 4 + depth // 2, canvas.number(1, WIDTH - 4)
    width = 1 + height // 5
    canvas.paint(canvas.box(foot - height, foot, left, left + width), canvas.near((115, 95, 100), 75), _PERSON)
    canvas.paint(canvas.box(foot - height // 2, foot, left, left + width), canvas.near((70, 70, 85), 35))
    canvas.paint(canvas.box(foot - height, foot - height + 1 + height // 8, left, left + width), (185, 145, 120))


@cache
def _drawn(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scenes of a split: images [N, 3, H, W] uint8, and classes [N, H, W] int64."""
    scenes = [draw_scene(_FIRST[split] + number) for number in range(COUNTS[split])]
    images = np.stack([scene.image for scene in scenes]).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(np.stack([each.classes for each in scenes]))


def read_scenes(split: Split) -> Samples:
    """Return a split of the scenes."""
    images, classes = _drawn(split)
    transform: Transform = array_transform(_MEAN, _STD)
    labels = np.full(len(images), -1, np.int32)
    return Samples("scenes", split, ArrayImages(images), labels, CLASSES, transform, maps=ArrayMaps(classes))
