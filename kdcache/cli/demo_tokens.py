"""What `kdcache demo --tokens` prints."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cli import output
from kdcache.errors import counted

if TYPE_CHECKING:
    from kdcache.demo.tokens import TokenDemo


def token_demo(out: Path, seeds: int, device: str, as_json: bool) -> None:
    """Run the demo of language models, and print its results."""
    from kdcache.demo.tokens import as_record, run_token_demo

    results = run_token_demo(out, seeds, device, output.Terminal())
    if as_json:
        output.as_json(as_record(results))
    else:
        _print(results, out)


def _print(results: TokenDemo, out: Path) -> None:
    """Print the measures of teacher and students on held-out text, and what each student learns from."""
    from kdcache.demo.tokens import CACHE, LOSSES, PICTURE, PIPELINE

    rows = [["teacher", "", f"{results.teacher_perplexity:.1f}", "", "", f"{results.teacher_training_seconds:.1f}"]]
    for name in LOSSES:
        students = [student for student in results.students if student.student == name]
        stored = results.bytes_per_token.get(name)
        rows.append(
            [
                f"student, {name}",
                "" if stored is None else f"{stored:.0f}",
                mean_and_spread([student.perplexity for student in students], ".1f"),
                mean_and_spread([student.kl for student in students], ".3f"),
                mean_and_spread([student.agreement for student in students], ".1%"),
                f"{statistics.mean(student.seconds for student in students):.1f}",
            ]
        )
    seeds = len(results.students) // len(LOSSES)
    of_seeds = "one seed" if seeds == 1 else f"mean ± standard deviation of {seeds} seeds"
    columns = ["", "bytes per token", "perplexity", "KL to the teacher", "agreement", "training, s"]
    output.table(f"Next tokens of {counted(len(results.held_out_topics), 'held-out topic')}, {of_seeds}", columns, rows)
    output.result("")
    output.facts(
        {
            "ce": "learns the next token of the text alone",
            "kd-live": f"learns all {results.vocabulary:,} probabilities of the teacher, which runs in every step",
            "kd-renormalized": f"the top {results.top_k}, renormalized, as many tools store them; for comparison",
            "kd-ghost": f"the top {results.top_k} and the mass of all other tokens (loss.tail: student)",
            "kd-lowrank": f"the same, and the shape of the tail in {results.rank} coordinates; the default",
            "bytes": "on the disk, of what the student reads of the teacher",
            "KL": "mean over positions at T = 1, nats, of all tokens, from the live teacher",
            "agreement": "share of positions with the same most probable token as the teacher",
        }
    )
    output.result("")
    output.facts(
        {
            "texts": f"{counted(results.topics, 'topic')} of Python's reference with {results.positions:,} positions, "
            f"for teacher and students; held out are {results.held_out_positions:,} of other topics",
            "networks": f"{results.teacher_parameters:,} parameters of the teacher, "
            f"{results.student_parameters:,} of each student; all see the same tokens, in one order per seed",
            "cache": f"{out / CACHE}, {results.cache_bytes:,} bytes, "
            f"{results.cache_bytes / results.positions:.0f} bytes per token; the teacher ran once, "
            f"{results.stage_one_seconds:.1f} s",
            "pipeline": str(out / PIPELINE),
            "picture": str(out / PICTURE),
        }
    )


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """Return the mean of the seeds, and with several their standard deviation (n - 1)."""
    mean = f"{statistics.mean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean
