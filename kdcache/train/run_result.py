"""The result of a training run, in memory and as it is read from a complete run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kdcache.config.schema import StudentSpec, TeacherSpec
from kdcache.data.samples import Samples
from kdcache.errors import CorruptError
from kdcache.models import build_for
from kdcache.models.evaluate import SplitScore
from kdcache.models.pixel_scores import PixelScore
from kdcache.train.loop import AnyEpoch, Epoch, PixelEpoch
from kdcache.train.run_folder import CHECKPOINT


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        model: network with the selected weights.
        best: the selected epoch: the first of the best validation accuracy, or of the best mean intersection over union
            for label maps; the last without a validation split.
        test: score on the test split, evaluated once, by the first process; None without one.
        seconds: duration of training, with validation.
        checkpoint: path of the weights.
    """

    model: nn.Module
    best: AnyEpoch
    test: SplitScore | PixelScore | None
    seconds: float
    checkpoint: Path


def result_of(
    out: Path,
    spec: TeacherSpec | StudentSpec,
    samples: Samples,
    shape: tuple[int, ...],
    metrics: Mapping[str, Any],
) -> RunResult:
    """Return the result of a complete run.

    Raises:
        CorruptError: if its metrics are not those of a run.
        KdcacheError: if its weights cannot be read.
    """
    checkpoint = out / CHECKPOINT
    model = build_for(spec.model_copy(update={"weights": str(checkpoint)}), samples, shape, trained=True)
    try:
        of_pixels = samples.maps is not None
        best: AnyEpoch = (PixelEpoch if of_pixels else Epoch)(**metrics["best"])
        test = (PixelScore if of_pixels else SplitScore)(**metrics["test"]) if metrics["test"] else None
        return RunResult(model, best, test, float(metrics["seconds"]), checkpoint)
    except (TypeError, ValueError, LookupError) as error:
        raise CorruptError(f"cannot read the metrics of {out}: {error}", f"delete {out}, and train again") from error
