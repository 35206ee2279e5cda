"""Run a teacher on its device, in its precision."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kdcache.config.schema import CacheSpec
from kdcache.data.views import View
from kdcache.errors import CorruptError, MismatchError, counted
from kdcache.models.checks import (
    OutputScale,
    check_logits,
    log_probabilities,
    output_scale,
    refuse_underflow,
    refusing,
    set_evaluation_mode,
)

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

_TRIED = 16
"""Number of images on which it is checked whether a teacher returns probabilities."""


class InferenceModel:
    """A callable from images to logits.

    Args:
        model: the network; moved to the device and put into evaluation mode.
        classes: C, what it must return.
        spec: precision, memory format, and whether to compile.
        device: where it runs.

    Attributes:
        scale: of the outputs of the network, from its first batch; None before. If they are probabilities, their
            logarithms are returned.
    """

    def __init__(self, model: nn.Module, classes: int, spec: CacheSpec, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.classes = classes
        self.scale: OutputScale | None = None
        self._dtype = _AUTOCAST[spec.precision]
        self._format = torch.channels_last if spec.channels_last else torch.contiguous_format
        model = model.to(self.device)
        set_evaluation_mode(model)
        if spec.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self._model = torch.compile(model) if spec.compile else model

    @property
    def level(self) -> Literal["unknown"] | None:
        """Level for `TeacherRecord`: "unknown" if the network returns probabilities or their logarithms."""
        return None if self.scale in (None, "logits") else "unknown"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return logits [B, C] float32 of images [B, channels, H, W], on the teacher's device, asynchronously.

        Raises:
            MismatchError: if the network returns anything but [B, C], or probabilities that have underflowed in its
                first batch.
        """
        images = images.to(self.device, non_blocking=True).contiguous(memory_format=self._format)
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            returned = self._model(images)
        outputs = check_logits(returned, len(images), self.classes, "teacher")
        if self.scale is None:
            self.scale = output_scale(outputs)
            if self.scale == "probabilities":
                refuse_underflow(outputs)
        return log_probabilities(outputs) if self.scale == "probabilities" else outputs.float()


def try_teacher(model: nn.Module, view: View, spec: CacheSpec, device: torch.device | str) -> Literal["unknown"] | None:
    """Run a teacher on a few images as the pass will run it, and return the level of its logits for `TeacherRecord`.

    Args:
        model: the network; moved to the device and put into evaluation mode.
        view: of the images.
        spec: precision and memory format.
        device: where it runs.

    Raises:
        MismatchError: if it cannot take the images, does not return [B, C], or returns probabilities from which its
            logits cannot be recovered.
    """
    spec = spec.model_copy(update={"compile": False})
    running = _tried(model, view, spec, device, [0])
    if running.level is not None:
        # One row may be normalized by chance; and in other rows probabilities may have underflowed.
        n_tried = min(_TRIED, len(view))
        running = _tried(model, view, spec, device, [len(view) * index // n_tried for index in range(n_tried)])
    return running.level


def _tried(model: nn.Module, view: View, spec: CacheSpec, device: torch.device | str, ids: list[int]) -> InferenceModel:
    """Run a teacher on some images, and return the model that was run."""
    running = InferenceModel(model, view.samples.num_classes, spec, device)
    images = view.__getitems__(ids).images
    try:
        with refusing(images, "teacher"):
            running(images)
    except MismatchError as error:
        low = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
        if spec.precision != "fp32" or not low or "type" not in error.what:
            raise
        name = str(low.pop()).removeprefix("torch.")
        raise MismatchError(
            f"the teacher's weights are {name}, and cache.precision is fp32: {error.what}",
            f"set cache.precision to {'bf16' if name == 'bfloat16' else 'fp16'}, or convert the model to float32: "
            "return model.float()",
        ) from None
    return running


def described_precision(spec: CacheSpec) -> str:
    """Return what the last bits of the logits depend on besides weights, images and batch size."""
    return " ".join(
        [spec.precision, *(["channels_last"] if spec.channels_last else []), *(["compiled"] if spec.compile else [])]
    )


def refuse_not_finite(finite: Tensor, ids: Tensor) -> None:
    """Refuse logits that are not finite, which cannot be stored.

    Args:
        finite: [B] bool, whether all logits of a row are finite.
        ids: [B] int64, the samples of the rows.

    Raises:
        CorruptError: with the first sample whose logits are not finite.
    """
    bad = (~finite).nonzero().squeeze(1)
    if len(bad):
        raise CorruptError(
            f"the teacher returned NaN or infinite logits for sample {int(ids[bad[0]])} "
            f"({len(bad)} of the {counted(len(ids), 'image')} checked)",
            "check the teacher's weights, its precision and the transform; let it return logits, not probabilities "
            "(Softmax), whose logarithms are infinite if they underflow",
        )
