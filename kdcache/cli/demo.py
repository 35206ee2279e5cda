"""`kdcache demo`: both stages on real data, in about a minute; `--tokens`: of a language model, in some minutes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcache.cli import output
from kdcache.cli.options import PathType, choose_device, device_option, json_option
from kdcache.cli.sweep import results_table

if TYPE_CHECKING:
    from kdcache.demo.digits import Demo


@click.command("demo")
@click.option("--tokens", is_flag=True, help="Of a language model, on texts that come with Python.")
@click.option(
    "-o",
    "--out",
    type=PathType(),
    show_default="kdcache-demo; with --tokens kdcache-token-demo",
    help="Folder to create; must not exist, except with --tokens that of the same demo, which is then resumed.",
)
@click.option("--seeds", type=click.IntRange(min=1), show_default="5; with --tokens 2", help="Students per loss.")
@device_option
@json_option
def demo(tokens: bool, out: Path | None, seeds: int | None, device: str, as_json: bool) -> None:
    """Train a teacher on handwritten digits, run it once, and train students from its cache with several losses.

    The data set comes with kdcache. The folder -o gets the teacher, the cache, the students and a picture.

    With --tokens the teacher is a small language model of a part of Python's reference (pydoc_data.topics), the
    students learn its next-token distributions from a cache, and all are measured on topics that none of them has
    seen. It needs the extra lm: pip install 'kdcache[lm]'.

    \b
    Example: kdcache demo
    Example: kdcache demo --seeds 1 -o quick-demo
    Example: kdcache demo --tokens
    """
    if tokens:
        from kdcache.cli.demo_tokens import token_demo

        token_demo(out or Path("kdcache-token-demo"), seeds or 2, choose_device(device), as_json)
        return
    from kdcache.demo.digits import run_demo

    out = out or Path("kdcache-demo")
    results = run_demo(out, seeds or 5, choose_device(device), output.Terminal())
    if as_json:
        output.as_json(asdict(results))
    else:
        _print(results, out)


def _print(results: Demo, out: Path) -> None:
    """Print the accuracies of the teacher and the students, and what they were trained from."""
    teacher = ["teacher", f"{results.teacher_accuracy:.1%}", "", "", f"{results.teacher_training_seconds:.1f}"]
    seeds = len(results.students[0].accuracies)
    columns, rows = results_table(results.students)
    # Without the validation accuracy: nothing is selected by it here.
    output.table(
        f"Test accuracy on digits, {'one seed' if seeds == 1 else f'mean of {seeds} seeds'}",
        ["", "accuracy", *columns[3:]],
        [teacher, *([f"student, {name}", *cells] for name, _, *cells in rows)],
    )
    output.result("")
    output.facts(
        {
            "labels": f"{results.teacher_labels} for the teacher, {results.student_labels} for each student; "
            f"the cache holds the teacher's logits for {results.rows} images",
            "teacher": f"ran once, {results.stage_one_seconds:.1f} s for the cache; "
            f"accuracy {results.teacher_accuracy_on_cached:.1%} on the cached images",
            "cache": f"{out / 'digits.kdcache'}, {results.cache_bytes:,} bytes, "
            f"{results.cache_bytes / results.rows:.0f} bytes per row",
            "picture": str(out / "demo.png"),
        }
    )
