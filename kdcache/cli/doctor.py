"""`kdcache doctor`: check this machine, and whether a pipeline can run on it."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.cli import output
from kdcache.cli.options import (
    PathType,
    choose_device,
    decode_images_option,
    device_option,
    json_option,
    read_any_pipeline,
    set_option,
)
from kdcache.errors import KdcacheError, UsageError


@click.command("doctor")
@click.argument("pipeline", type=PathType(), required=False)
@click.option(
    "-o",
    "--out",
    type=PathType(),
    default=".",
    show_default=True,
    help="Folder where caches and runs will be written.",
)
@decode_images_option
@set_option
@device_option
@json_option
def doctor(
    pipeline: Path | None, out: Path, decode_images: bool, overrides: tuple[str, ...], device: str, as_json: bool
) -> None:
    """Check this machine; with a PIPELINE of images or text, check its data set, weights, networks and disk space too.

    Files that the pipeline would download are downloaded; no run or cache is written. The exit code is 0 if there is no
    problem, else that of the first problem.

    \b
    Example: kdcache doctor
    Example: kdcache doctor digits
    """
    from kdcache.config.text import TextPipeline
    from kdcache.doctor import Check, examine_machine, examine_pipeline

    if pipeline is None and overrides:
        raise UsageError("--set needs a pipeline", "use: kdcache doctor PIPELINE --set KEY=VALUE")
    checks = [*examine_machine(out)]
    try:
        chosen = choose_device(device)
        resolved = read_any_pipeline(pipeline, overrides) if pipeline is not None else None
    except KdcacheError as error:
        checks.append(Check("pipeline", error.what, error))
    else:
        if isinstance(resolved, TextPipeline):
            from kdcache.doctor_text import examine_text_pipeline

            checks += examine_text_pipeline(resolved, out, chosen, output.Terminal())
        elif resolved is not None:
            checks += examine_pipeline(resolved, out, chosen, output.Terminal(), decode_images)
    problems = [problem for _, _, problem in checks if problem is not None]
    if as_json:
        listed = [
            {"name": name, "result": result, "fix": problem.fix if problem else None}
            for name, result, problem in checks
        ]
        output.as_json({"ok": not problems, "checks": listed})
    else:
        output.facts({name: f"PROBLEM: {result}" if problem else result for name, result, problem in checks})
    if problems:
        raise problems[0]
