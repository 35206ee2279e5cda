"""Run a teacher on its device, in its precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdcache.config.schema import CacheSpec
from kdcache.errors import CorruptError
from kdcache.models.checks import check_logits

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class InferenceModel:
    """A callable from images to logits.

    Args:
        model: the network; moved to the device and put into evaluation mode.
        classes: C, what it must return.
        spec: precision, memory format, and whether to compile.
        device: where it runs.
    """

    def __init__(self, model: nn.Module, classes: int, spec: CacheSpec, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.classes = classes
        self._dtype = _AUTOCAST[spec.precision]
        self._format = torch.channels_last if spec.channels_last else torch.contiguous_format
        model = model.to(self.device).eval()
        if spec.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self._model = torch.compile(model) if spec.compile else model

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return raw logits [B, C] float32 of images [B, channels, H, W], on the teacher's device, asynchronously.

        Raises:
            MismatchError: if the network returns anything but [B, C].
        """
        images = images.to(self.device, non_blocking=True).contiguous(memory_format=self._format)
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            logits = self._model(images)
        return check_logits(logits, len(images), self.classes, "teacher").float()


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
            f"({len(bad)} of the {len(ids)} images that were checked)",
            "check the teacher's weights, its precision and the transform",
        )
