"""What a network costs: parameters, multiply-adds, and time on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BATCH = 64
"""Images at once, where speed is measured."""

_WARM_UP, _LONG = 0.5, 1.0
_FEWEST = 3


class Speed(NamedTuple):
    """Medians: of one image, in milliseconds; of a batch of `BATCH`, in images a second."""

    milliseconds: float
    images_per_second: float


def parameters(model: nn.Module) -> int:
    """How many numbers a network learned."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as the products of matrices that it is: the counter does not know the operations it is fused into."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Multiplications, each with its addition, of one image [1, channels, H, W] on the network's device.

    Counted are convolutions, products of matrices and attention, by torch's own counter of floating-point operations,
    which has two for each; not what is done to each element alone, normalization and pooling.
    """
    counter = FlopCounterMode(display=False)
    with _evaluating(model), torch.no_grad(), _plain_attention(), counter:
        model(image)
    return counter.get_total_flops() // 2


def speed(model: nn.Module, image: Tensor) -> Speed:
    """How fast a network is in evaluation mode, on images like [1, channels, H, W] on its device, loading apart."""
    batch = image.expand(BATCH, -1, -1, -1).contiguous()
    with _evaluating(model), torch.inference_mode():
        return Speed(1000 * _median_seconds(model, image), BATCH / _median_seconds(model, batch))


def _median_seconds(model: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Of several calls, after some that are not counted: the first ones choose kernels and fetch memory."""
    _timed(model, images, 1, _WARM_UP)
    return statistics.median(_timed(model, images, _FEWEST, _LONG))


def _timed(model: Callable[[Tensor], Tensor], images: Tensor, fewest: int, long: float) -> list[float]:
    """The seconds of each call: as many as fit into `long`, and `fewest` at least."""
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < fewest or time.perf_counter() - start < long:
        began = time.perf_counter()
        model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        taken.append(time.perf_counter() - began)
    return taken
