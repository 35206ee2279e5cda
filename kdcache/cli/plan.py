"""`kdcache plan`: what a cache would keep and cost, without making it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcache.cli import output
from kdcache.cli.options import choose_device, device_option, json_option, read_pipeline, set_option

if TYPE_CHECKING:
    from kdcache.pilot import Planned


@click.command("plan")
@click.argument("pipeline", type=click.Path(path_type=Path), required=False)
@click.option("--logits", type=click.Path(path_type=Path), help="An npz with `logits` [N, C] and perhaps `labels` [N].")
@click.option("--fidelity", type=float, help="Mean total variation allowed at T = 1, 2, 4.  [default: 0.02 aimed at]")
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
    """Find the cheapest way to keep a teacher's logits: a PIPELINE's teacher, run on a pilot, or an npz of logits.

    \b
    Example: kdcache plan --logits teacher.npz --fidelity 0.01
    """
    from kdcache.dump import plan_for_teacher
    from kdcache.errors import UsageError
    from kdcache.pilot import plan_for_logits

    if pipeline is not None and logits is None:
        resolved = read_pipeline(pipeline, overrides, cache__fidelity=fidelity)
        _print(plan_for_teacher(resolved, choose_device(device), output.Terminal()), as_json)
    elif logits is not None and pipeline is None and not overrides:
        _print(plan_for_logits(logits, fidelity), as_json)
    else:
        raise UsageError(
            "plan takes a pipeline, with --set if you like, or --logits", "kdcache plan PIPELINE, or --logits FILE.npz"
        )


def _print(planned: Planned, as_json: bool) -> None:
    from kdcache.cache.planner import described

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
        output.as_json({"encoding": planned.encoding.model_dump(), "rows": planned.rows, "tried": tried})
        return
    if planned.choice is None:
        output.result(f"every class is kept, in {planned.encoding.dtype}; up to 64 classes that is cheapest, and exact")
        return
    output.table(
        f"Total variation between decoded and true softmax, mean over {planned.choice.held_out:,} held-out rows",
        ["tried", "bytes a row", "T=1", "T=2", "T=4", "T=8", ""],
        [
            [
                described(candidate),
                f"{candidate.bytes_per_row:.1f}",
                *(f"{value:.4f}" for value in candidate.total_variation.values()),
                "chosen" if candidate is planned.choice.chosen else "",
            ]
            for candidate in planned.choice.tried
        ],
    )
    chosen = planned.choice.chosen
    output.result("")
    output.facts(
        {
            "chosen": described(chosen),
            "fidelity": f"{chosen.worst:.4f}, the largest mean total variation at T = 1, 2, 4",
            "size": f"{chosen.bytes_per_row:.1f} bytes a row, "
            f"{planned.gigabytes:.3g} GB for {planned.rows:,} rows, the basis included",
        }
    )
