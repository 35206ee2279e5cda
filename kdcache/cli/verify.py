"""`kdcache verify`: whether a cache is whole, and whether it belongs to a data set and a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdcache.cli import output
from kdcache.cli.options import (
    cache_argument,
    choose_device,
    device_option,
    digest_option,
    json_option,
    read_pipeline,
    set_option,
)
from kdcache.errors import UsageError

if TYPE_CHECKING:
    from kdcache.cache.inspect.audit import Audit


@click.command("verify")
@cache_argument
@click.argument("pipeline", type=click.Path(path_type=Path), required=False)
@digest_option
@click.option(
    "--signed-by",
    type=click.Path(path_type=Path),
    help="A file of allowed signers, as ssh-keygen reads it; one must have signed.",
)
@click.option("--replay", is_flag=True, help="Make the views of PIPELINE's data set anew and compare their pixels.")
@click.option("--teacher", is_flag=True, help="Run PIPELINE's teacher again on a sample of rows.")
@click.option(
    "--rows", type=click.IntRange(1), default=512, show_default=True, help="How many rows a view --teacher runs on."
)
@set_option
@device_option
@json_option
def verify(
    cache: str | Path,
    pipeline: Path | None,
    digest: str | None,
    signed_by: Path | None,
    replay: bool,
    teacher: bool,
    rows: int,
    overrides: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Read every file and every row of a CACHE; with a PIPELINE, hold it against that data set and teacher too.

    \b
    Example: kdcache verify runs/digits.kdcache pipelines/digits.yaml --replay
    Exit codes: 3 not sealed, 4 another cache, signer, data set or teacher, or other pixels, 5 damaged.
    """
    from kdcache.cache.inspect.audit import audit
    from kdcache.cache.remote.address import source
    from kdcache.cache.remote.mirror import check_pinned, mirror
    from kdcache.cache.remote.signatures import check_signature

    if pipeline is None and (replay or teacher or overrides):
        raise UsageError("--replay, --teacher and --set need a pipeline", f"kdcache verify {cache} PIPELINE ...")
    # What cannot be read as a pipeline is said before all files of the cache are read.
    resolved = read_pipeline(pipeline, overrides) if pipeline is not None else None
    named = source(cache, digest)
    path = mirror(named, None, None, output.Terminal()).folder if named.is_remote else Path(named.where)
    found: dict[str, Any] = {"signed_by": check_signature(path, signed_by)} if signed_by is not None else {}
    checked = audit(path)
    check_pinned(path, checked.digest or "none, it is not sealed", named.digest)
    if resolved is not None and checked.failure is None:
        from kdcache.cache import open_cache
        from kdcache.data.datasets import load_split
        from kdcache.data.replay import check_data
        from kdcache.data.replay import replay as replay_views
        from kdcache.dump.check_teacher import compare_with_teacher
        from kdcache.models.teacher import load_teacher

        opened, progress = open_cache(path), output.Terminal()
        if teacher and not opened.teacher_seen:
            raise UsageError(
                f"nothing is known of the teacher of {path} but what it said: {opened.manifest.plan.teacher.precision}",
                "leave --teacher out",
            )
        samples = load_split(resolved.dataset, "train")
        check_data(opened, samples, resolved.transform, progress)
        found["dataset"] = {"samples": len(samples)}
        if replay:
            workers = resolved.cache.num_workers
            replayed = replay_views(opened, samples, workers=workers, progress=progress)
            found["replay"] = {**replayed._asdict(), "teacher_seen": opened.teacher_seen}
        if teacher:
            model = load_teacher(resolved, progress).model
            on = choose_device(device)
            found["teacher"] = [
                one._asdict()
                for one in compare_with_teacher(opened, model, samples, resolved.cache, rows, on, progress)
            ]
    _report(checked, found, as_json)
    if checked.failure is not None:
        raise checked.failure


def _report(checked: Audit, found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.as_json(
            {
                "cache": str(checked.path),
                "whole": checked.failure is None,
                "digest": checked.digest,
                "files": checked.files,
                "rows": checked.rows,
                "findings": [finding._asdict() for finding in checked.findings],
                **found,
            }
        )
        return
    output.facts(
        {
            "cache": str(checked.path),
            "digest": checked.digest or "not sealed",
            **({"signed by": found["signed_by"]} if "signed_by" in found else {}),
            "files": f"{checked.files:,} read, {_count(len(checked.findings), 'finding')}",
            "rows": f"{checked.rows:,} looked at",
            **({"data set": f"the same {found['dataset']['samples']:,} samples"} if "dataset" in found else {}),
            **({"replay": _replayed(**found["replay"])} if "replay" in found else {}),
        }
    )
    for finding in checked.findings:
        output.result(f"  {finding}")
    if "teacher" in found:
        _compared(found["teacher"])


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _replayed(checked: int, rounded: int, teacher_seen: bool) -> str:
    saw = "the teacher saw" if teacher_seen else "the cache was converted with (what its teacher saw is not known)"
    same = f"{checked:,} images are what {saw}"
    return f"{same}, {rounded:,} of them but for rounding" if rounded else f"{same}, to the bit"


def _compared(found: list[dict[str, Any]]) -> None:
    output.table(
        f"Cached logits against the live teacher's, {found[0]['rows']:,} rows a view",
        ["view", "T", "total variation", "KL", "same class", "error of the KD gradient"],
        [
            [
                str(one["view"]),
                str(one["temperature"]),
                f"{one['total_variation']:.5f}",
                f"{one['divergence']:.2e}",
                f"{one['top1']:.2%}",
                f"{one['gradient_error']:.5f}",
            ]
            for one in found
        ],
    )
