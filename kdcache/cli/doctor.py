"""`kdcache doctor`: what this machine has, and whether a pipeline can run here."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.cli import output
from kdcache.cli.options import (
    choose_device,
    decode_images_option,
    device_option,
    json_option,
    read_pipeline,
    set_option,
)
from kdcache.errors import KdcacheError, UsageError


@click.command("doctor")
@click.argument("pipeline", type=click.Path(path_type=Path), required=False)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=".",
    show_default=True,
    help="Where caches and runs are to be written.",
)
@decode_images_option
@set_option
@device_option
@json_option
def doctor(
    pipeline: Path | None, out: Path, decode_images: bool, overrides: tuple[str, ...], device: str, as_json: bool
) -> None:
    """Look at this machine; with a PIPELINE, try its data set, weights, networks and disk.

    What the pipeline would download is downloaded. Exit code 0 where all is well, else that of the first problem.

    \b
    Example: kdcache doctor pipelines/digits.yaml
    """
    from kdcache.doctor import Check, examine_machine, examine_pipeline

    if pipeline is None and overrides:
        raise UsageError("--set needs a pipeline", "kdcache doctor PIPELINE --set KEY=VALUE")
    checks = [*examine_machine(out)]
    try:
        chosen = choose_device(device)
        resolved = read_pipeline(pipeline, overrides) if pipeline is not None else None
    except KdcacheError as mistake:
        checks.append(Check("pipeline", mistake.what, mistake))
    else:
        if resolved is not None:
            checks += examine_pipeline(resolved, out, chosen, output.Terminal(), decode_images)
    problems = [check.problem for check in checks if check.problem is not None]
    if as_json:
        told = [
            {"what": what, "found": result, "fix": problem.fix if problem else None} for what, result, problem in checks
        ]
        output.as_json({"well": not problems, "findings": told})
    else:
        output.facts({what: f"PROBLEM: {result}" if problem else result for what, result, problem in checks})
    if problems:
        raise problems[0]
