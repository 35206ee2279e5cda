"""Costs of a network: parameters, multiply-adds, and latency and throughput on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kdcache.models.graph_teacher import GraphTeacher

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

BATCH = 64
"""Images per batch when throughput is measured."""

MIN_RUN_TIME = 1.0
"""Seconds for which each of latency and throughput is measured, at least."""


def _timer_class() -> type[Timer]:
    """Import torch's timer; it imports the builder of C++ extensions, which warns about CUDA tools without a GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils.benchmark import Timer  # noqa: PLC0415
    finally:
        logger.setLevel(level)
    return Timer


class Speed(NamedTuple):
    """Medians of the measured speed.

    Attributes:
        milliseconds: latency of one image.
        images_per_second: throughput in batches of `BATCH`.
    """

    milliseconds: float
    images_per_second: float


def count_parameters(model: nn.Module) -> int:
    """Return the number of learned values of a network."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode; one of a graph runs in every call, not once."""
    was_training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, GraphTeacher):
                    stack.enter_context(module.recomputing())
            yield
    finally:
        model.train(was_training)


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Run attention as plain matrix products: the counter does not know the fused operations."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def count_multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Return the multiply-adds of one image [1, channels, H, W] on the network's device.

    Convolutions, matrix products and attention are counted, by torch's own counter of floating-point operations, which
    counts two per multiply-add. Element-wise operations, normalization and pooling are not counted.
    """
    counter = FlopCounterMode(display=False)
    with _evaluation_mode(model), torch.no_grad(), _unfused_attention(), counter:
        model(image)
    return counter.get_total_flops() // 2


def measure_speed(model: nn.Module, image: Tensor, min_run_time: float = MIN_RUN_TIME) -> Speed:
    """Measure the forward pass in evaluation mode, without data loading.

    Args:
        model: the network.
        image: [1, channels, H, W] on the network's device.
        min_run_time: seconds for which latency and throughput are each measured, at least.
    """
    batch = image.expand(BATCH, *image.shape[1:]).contiguous()
    with _evaluation_mode(model), torch.inference_mode():
        latency = _median_seconds(model, image, min_run_time)
        return Speed(1000 * latency, BATCH / _median_seconds(model, batch, min_run_time))


def _median_seconds(model: nn.Module, images: Tensor, min_run_time: float) -> float:
    """Return the median seconds per call, with as many threads as torch is set to; the timer warms up by itself."""

    def forward() -> None:
        model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)

    timer = _timer_class()("forward()", globals={"forward": forward}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=min_run_time).median)
