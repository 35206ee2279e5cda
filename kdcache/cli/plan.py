"""`kdcache plan`: find an encoding for the logits of a teacher, with its size and fidelity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcache.cli import output
from kdcache.cli.options import PathType, choose_device, device_option, json_option, read_pipeline, set_option

if TYPE_CHECKING:
    from kdcache.cache.planner import Choice
    from kdcache.dump.estimate import Estimate


@click.command("plan")
@click.argument("pipeline", type=PathType(), required=False)
@click.option("--logits", type=PathType(), help="An npz file with `logits` [N, C] and optionally `labels` [N].")
@click.option("--fidelity", type=float, help="Largest mean total variation at T = 1, 2, 4.  [default: the target 0.02]")
@set_option
@device_option
@json_option
def plan(
    pipeline: Path | None,
    logits: Path | None,
    fidelity: float | None,
    overrides: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Print the smallest encoding within a fidelity, for the teacher of a PIPELINE or for logits in a file.

    The teacher is run on a pilot, a few thousand of its training images. No cache is written.

    \b
    Example: kdcache plan digits
    Example: kdcache plan --logits logits.npz --fidelity 0.01
    """
    from kdcache.dump.estimate import estimate, estimate_from_logits
    from kdcache.errors import UsageError
    from kdcache.models.teacher import load_teacher

    if pipeline is not None and logits is None:
        resolved = read_pipeline(pipeline, overrides, cache__fidelity=fidelity)
        progress = output.Terminal()
        loaded = load_teacher(resolved, progress)
        describe(estimate(loaded, resolved.cache, choose_device(device), progress), as_json)
    elif logits is not None and pipeline is None and not overrides:
        describe(estimate_from_logits(logits, fidelity), as_json)
    else:
        raise UsageError(
            "plan takes a pipeline, optionally with --set, or --logits",
            "use: kdcache plan PIPELINE, or: kdcache plan --logits FILE.npz",
        )


def describe(planned: Estimate, as_json: bool) -> None:
    """Print the chosen encoding, its size and time, and the other encodings that were tried."""
    from kdcache.cache.inspect.outputs import described_outputs
    from kdcache.cache.planner import FEW_CLASSES, described
    from kdcache.errors import counted

    tried = [
        {
            **candidate.encoding.model_dump(exclude={"num_classes"}),
            "step": candidate.step,
            "bytes_per_row": round(candidate.bytes_per_row, 2),
            "total_variation": {str(t): value for t, value in candidate.total_variation.items()},
            "chosen": planned.choice is not None and candidate is planned.choice.chosen,
        }
        for candidate in (planned.choice.tried if planned.choice else [])
    ]
    if as_json:
        output.as_json(
            {
                "encoding": None if planned.encoding is None else planned.encoding.model_dump(),
                "outputs": {
                    name: {**record.model_dump(), "bytes_per_row": round(planned.output_sizes[name], 2)}
                    for name, record in (planned.outputs or {}).items()
                },
                "rows": planned.rows,
                "bytes_per_row": planned.bytes_per_row,
                "bytes": round(planned.bytes),
                "bytes_besides_rows": planned.besides_rows,
                "rows_per_second": planned.rows_per_second,
                "tried": tried,
            }
        )
        return
    facts = {}
    if planned.encoding is not None and planned.choice is None:
        few = planned.encoding.num_classes <= FEW_CLASSES
        reason = f"; with at most {FEW_CLASSES} classes this is the smallest encoding" if few else ""
        facts["chosen"] = f"every class, as {planned.encoding.dtype}{reason}"
    elif planned.choice is not None:
        _table(planned.choice)
        chosen = planned.choice.chosen
        facts["chosen"] = described(chosen)
        facts["fidelity"] = f"{chosen.worst:.4f}, the largest mean total variation at T = 1, 2, 4"
    facts |= described_outputs(planned.outputs, planned.output_sizes)
    what = "logits" if planned.outputs is None else "outputs"
    if planned.bytes_per_row is not None:
        facts["size"] = (
            f"{planned.bytes_per_row:.1f} bytes per row, {size(planned.bytes)} for {counted(planned.rows, 'row')}, "
            f"of {what} alone"
        )
        if planned.besides_rows:
            facts["size"] = (
                f"{size(planned.bytes)} for {counted(planned.rows, 'row')}, "
                f"{planned.bytes / planned.rows:.1f} bytes per row: {planned.bytes_per_row:.1f} of {what}, the rest of "
                "keys, labels, checksums and metadata"
            )
    if planned.rows_per_second is not None:
        seconds = planned.rows / planned.rows_per_second
        facts["time"] = f"about {duration(seconds)}, {planned.rows_per_second:,.0f} rows/s on this device"
    output.facts(facts)


def size(count: float) -> str:
    """Return a number of bytes with its unit."""
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    """Return a time with its unit."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _table(choice: Choice) -> None:
    """Print the encodings that were tried."""
    from kdcache.cache.planner import described

    output.table(
        f"Total variation between decoded and true softmax, mean over {choice.held_out:,} held-out rows",
        ["encoding", "bytes per row", "T=1", "T=2", "T=4", "T=8", ""],
        [
            [
                described(candidate),
                f"{candidate.bytes_per_row:.1f}",
                *(f"{value:.4f}" for value in candidate.total_variation.values()),
                "chosen" if candidate is choice.chosen else "",
            ]
            for candidate in choice.tried
        ],
    )
    output.result("")
