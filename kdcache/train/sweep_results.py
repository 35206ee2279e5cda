"""The results of a sweep: of students and combinations, as `sweep.json`, and a picture of the test accuracies."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kdcache.runtime.atomic_write import write_file
from kdcache.train.plots import draw_accuracies

TABLE, PICTURE = "sweep.json", "sweep.png"


@dataclass(frozen=True)
class StudentResult:
    """The result of one student; accuracies in [0, 1].

    Attributes:
        point: name of the combination.
        seed: of its training.
        run: its folder.
        test: test accuracy; None without a test split, or if it failed.
        validation: accuracy of the selected epoch; None without a validation split, or if it failed.
        seconds: duration of training.
        failed: the error, if it failed.
        held_out: loss of the selected epoch on samples that were held out from training; None without any.
    """

    point: str
    seed: int
    run: str
    test: float | None
    validation: float | None
    seconds: float
    failed: str | None = None
    held_out: float | None = None


@dataclass(frozen=True)
class TextStudentResult(StudentResult):
    """The result of a language model: what it says of the sequences that were held out, None without any.

    Attributes:
        perplexity: of the next tokens.
        kl: divergence from the teacher at T = 1, nats; also None for rows of draws.
        agreement: share of positions with the same most probable token as the teacher; None as for `kl`.
    """

    perplexity: float | None = None
    kl: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class PixelStudentResult(StudentResult):
    """The result of a network that says a class of every pixel: `test` and `validation` are mean IoU.

    Attributes:
        pixel_accuracy: share of the pixels of the test split with the right class; None as for `test`.
    """

    pixel_accuracy: float | None = None


class Mean(NamedTuple):
    """A mean over seeds, and the standard deviation (n - 1), 0 for one seed."""

    mean: float
    spread: float


@dataclass(frozen=True)
class SweepSummary:
    """The students of one combination over the seeds; `spread` is the standard deviation (n - 1), 0 for one seed."""

    point: str
    students: list[StudentResult]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies of the students that did not fail."""
        return [student.test for student in self.students if student.test is not None]

    @property
    def mean(self) -> float | None:
        """Mean of the test accuracies; None without any."""
        return statistics.mean(self.accuracies) if self.accuracies else None

    @property
    def spread(self) -> float:
        """Standard deviation of the test accuracies."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    @property
    def validation(self) -> float | None:
        """Mean of the validation accuracies; None without any."""
        return _mean(student.validation for student in self.students)

    @property
    def held_out(self) -> float | None:
        """Mean of the losses on samples that were held out; None without any."""
        return _mean(student.held_out for student in self.students)

    @property
    def is_of_text(self) -> bool:
        """Whether the students are language models."""
        return isinstance(self.students[0], TextStudentResult)

    @property
    def is_of_pixels(self) -> bool:
        """Whether the students say a class of every pixel, and accuracies are mean IoU."""
        return any(isinstance(student, PixelStudentResult) for student in self.students)

    def mean_of(self, measure: str) -> Mean | None:
        """Return the mean over the seeds of a measure of language models, and its standard deviation (n - 1)."""
        known = [value for student in self.students if (value := getattr(student, measure, None)) is not None]
        if not known:
            return None
        return Mean(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0)

    @property
    def seconds(self) -> float:
        """Mean of the training times."""
        return statistics.mean(student.seconds for student in self.students)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def as_record(summaries: Sequence[SweepSummary]) -> dict[str, Any]:
    """Return the content of `sweep.json`: of each combination the mean accuracies, and its students."""
    return {
        "points": [
            {
                "point": summary.point,
                "test_mean": summary.mean,
                "test_spread": summary.spread,
                "validation_mean": summary.validation,
                "held_out_mean": summary.held_out,
                **_of_text(summary),
                "seconds": summary.seconds,
                "students": [asdict(student) for student in summary.students],
            }
            for summary in summaries
        ]
    }


def _of_text(summary: SweepSummary) -> dict[str, float | None]:
    """Return the means of language models, and nothing for other networks."""
    if not summary.is_of_text:
        return {}
    means = {name: summary.mean_of(name) for name in ("perplexity", "kl", "agreement")}
    return {f"{name}_mean": None if mean is None else mean.mean for name, mean in means.items()}


def write_results(summaries: Sequence[SweepSummary], dataset: str, out: Path) -> tuple[Path, Path | None]:
    """Write the table and the picture of a sweep, and return their paths.

    Args:
        summaries: one per combination.
        dataset: name for the title of the picture.
        out: folder of the sweep.

    Returns:
        (`sweep.json`, `sweep.png`); None for the picture if there is no test accuracy to show.
    """
    table, picture = out / TABLE, out / PICTURE
    write_file(table, json.dumps(as_record(summaries), indent=2) + "\n")
    accuracies = {summary.point: summary.accuracies for summary in summaries}
    if not any(accuracies.values()):
        return table, None
    seeds = max(len(summary.students) for summary in summaries)
    title = f"{dataset}, {seeds} {'seed' if seeds == 1 else 'seeds'}"
    measure = "test mIoU, %" if any(summary.is_of_pixels for summary in summaries) else "test accuracy, %"
    draw_accuracies(accuracies, None, title, picture, "student", measure)
    return table, picture
