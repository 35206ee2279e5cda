"""`kdcache demo`: the whole way, on real data, in about a minute."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcache.cli import output
from kdcache.cli.options import choose_device, device_option, json_option

if TYPE_CHECKING:
    from kdcache.demo import Demo


@click.command("demo")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default="kdcache-demo", show_default=True, help="Must not exist."
)
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Students a loss.")
@device_option
@json_option
def demo(out: Path, seeds: int, device: str, as_json: bool) -> None:
    """Train a teacher on handwritten digits, run it once, and train students from its cache with several losses.

    \b
    Example: kdcache demo
    """
    from kdcache.demo import run_demo

    found = run_demo(out, seeds, choose_device(device), output.Terminal())
    if as_json:
        output.as_json(asdict(found))
    else:
        _print(found, out)


def _print(found: Demo, out: Path) -> None:
    seeds = len(found.students[0].accuracies)
    rows = [["teacher", f"{found.teacher_accuracy:.1%}", "", "", f"{found.teacher_training_seconds:.1f}"]]
    for students in found.students:
        low, high = min(students.accuracies), max(students.accuracies)
        rows.append(
            [
                f"student, {students.point}",
                f"{students.mean or 0:.1%}",
                f"{100 * students.spread:.1f}" if seeds > 1 else "",
                f"{low:.1%} to {high:.1%}" if seeds > 1 else "",
                f"{students.seconds:.1f}",
            ]
        )
    output.table(
        f"Test accuracy on digits, {'one seed' if seeds == 1 else f'mean over {seeds} seeds'}",
        ["", "mean", "spread", "range", "training, s"],
        rows,
    )
    output.result("")
    output.facts(
        {
            "labels": f"{found.teacher_labels} for the teacher, {found.student_labels} for each student; "
            f"the cache has the teacher's logits for {found.rows} images",
            "teacher": f"ran once, {found.stage_one_seconds:.1f} s for stage one; "
            f"right on {found.teacher_accuracy_on_cached:.1%} of the cached images",
            "cache": f"{out / 'digits.kdcache'}, {found.cache_bytes:,} bytes, "
            f"{found.cache_bytes / found.rows:.0f} a row",
            "picture": str(out / "demo.png"),
        }
    )
