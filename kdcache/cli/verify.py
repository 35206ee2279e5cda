"""`kdcache verify`: check the integrity of a cache, and that it matches a data set and a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdcache.cli import output
from kdcache.cli.options import (
    PathType,
    cache_argument,
    choose_device,
    device_option,
    digest_option,
    json_option,
    read_any_pipeline,
    set_option,
)
from kdcache.errors import CorruptError, UsageError, counted

if TYPE_CHECKING:
    from kdcache.cache.inspect.audit import Audit


@click.command("verify")
@cache_argument
@click.argument("pipeline", type=PathType(), required=False)
@digest_option
@click.option(
    "--signed-by",
    type=PathType(),
    help="Require a signature by one of the allowed signers in this file, in the format of ssh-keygen.",
)
@click.option(
    "--replay",
    is_flag=True,
    help="Replay the views of PIPELINE's data set and compare their pixels, or its texts and their tokens.",
)
@click.option("--teacher", is_flag=True, help="Run PIPELINE's teacher on some of the rows and compare its logits.")
@click.option(
    "--rows", type=click.IntRange(1), default=512, show_default=True, help="Rows per view that --teacher runs on."
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
    """Check every file and every row of a CACHE; with a PIPELINE, check that they match its data set and teacher.

    Exit codes: 3 not sealed, 4 another cache, signer, data set or teacher, or other pixels, 5 damaged.

    \b
    Example: kdcache verify runs/digits.kdcache
    Example: kdcache verify runs/digits.kdcache digits --replay --teacher
    """
    from kdcache.cache.inspect.audit import audit
    from kdcache.cache.remote.address import source
    from kdcache.cache.remote.mirror import check_pinned, mirror
    from kdcache.cache.remote.signatures import check_signature
    from kdcache.cli import language_models
    from kdcache.config.text import TextPipeline

    if pipeline is None and (replay or teacher or overrides):
        raise UsageError("--replay, --teacher and --set need a pipeline", f"use: kdcache verify {cache} PIPELINE ...")
    # First, so that an error in the pipeline is reported before all files of the cache are read.
    resolved = read_any_pipeline(pipeline, overrides) if pipeline is not None else None
    named = source(cache, digest)
    path = mirror(named, None, None, output.Terminal()).folder if named.is_remote else Path(named.where)
    results: dict[str, Any] = {"signed_by": check_signature(path, signed_by)} if signed_by is not None else {}
    with output.working(f"checking the files and rows of {path}"):
        checked = audit(path)
    check_pinned(path, checked.digest or "none: it is not sealed", named.digest)
    # Of a cache with some of its views, these are compared.
    if resolved is not None and checked.digest is not None and not checked.problems:
        from kdcache.cache import open_cache
        from kdcache.data.datasets import load_split
        from kdcache.data.replay import check_matches_cache
        from kdcache.data.replay import replay as replay_views
        from kdcache.dump.check_teacher import check_identity, compare_outputs, compare_with_teacher
        from kdcache.models.teacher import load_teacher

        opened, progress = open_cache(path), output.Terminal()
        if isinstance(resolved, TextPipeline):
            results |= language_models.verify(opened, resolved, replay, teacher, rows, choose_device(device))
            _finish(checked, results, as_json)
            return
        if teacher and not opened.teacher_seen:
            raise UsageError(
                f"the teacher of {path} was not run by kdcache: {opened.manifest.plan.teacher.precision}",
                "run the command without --teacher",
            )
        samples = load_split(resolved.dataset, "train")
        check_matches_cache(opened, samples, resolved.transform, progress)
        results["dataset"] = {"samples": len(samples)}
        if replay:
            workers = resolved.cache.num_workers
            replayed = replay_views(opened, samples, num_workers=workers, progress=progress)
            results["replay"] = {**replayed._asdict(), "teacher_seen": opened.teacher_seen}
        if teacher:
            model = load_teacher(resolved, progress).model
            chosen = choose_device(device)
            arguments = (opened, model, samples, resolved.cache, rows, chosen, progress)
            if opened.manifest.plan.class_encoding is not None:
                results["teacher"] = [agreement._asdict() for agreement in compare_with_teacher(*arguments)]
            if opened.outputs:
                results["outputs"] = [agreement._asdict() for agreement in compare_outputs(*arguments)]
            found = check_identity(opened, model, samples, resolved.cache, chosen)
            results["identity"] = {
                "weights": opened.manifest.plan.teacher.weights or "the same",
                "relative_difference": None if found is None else found.relative,
            }
    _finish(checked, results, as_json)


def _finish(checked: Audit, results: dict[str, Any], as_json: bool) -> None:
    """Print what was checked, and raise what is wrong with the cache."""
    _report(checked, results, as_json)
    if (failure := checked.failure) is not None:
        if as_json or not checked.problems:
            raise failure
        listed = f"{counted(len(checked.problems), 'problem')}, listed in the report"
        raise CorruptError(f"{checked.path} is damaged: {listed}", failure.fix)


def _report(checked: Audit, results: dict[str, Any], as_json: bool) -> None:
    """Print what was checked, every problem, and the results of the checks against a pipeline."""
    from kdcache.cli import language_models

    problems = checked.problems
    if as_json:
        output.as_json(
            {
                "cache": str(checked.path),
                "ok": checked.failure is None,
                "digest": checked.digest,
                "files": checked.files,
                "rows": checked.rows,
                "problems": [problem._asdict() for problem in problems],
                **results,
            }
        )
        return
    output.facts(
        {
            "cache": str(checked.path),
            "digest": checked.digest or "not sealed",
            **({"signed by": results["signed_by"]} if "signed_by" in results else {}),
            "files": f"{checked.files:,} checked, {counted(len(problems), 'problem') if problems else 'no problems'}",
            "rows": f"{checked.rows:,} checked",
            **(
                {"data set": f"the same {counted(results['dataset']['samples'], 'sample')}"}
                if "dataset" in results
                else {}
            ),
            **(
                {"data set": f"the same {counted(results['text']['sequences'], 'sequence')}, with the same vocabulary"}
                if "text" in results
                else {}
            ),
            **({"replay": _replayed(**results["replay"])} if "replay" in results else {}),
            **({"tokens": _replayed_text(**results["replayed_text"])} if "replayed_text" in results else {}),
            **({"teacher": _recognized(**results["identity"])} if "identity" in results else {}),
            **({"teacher": "the same weights and configuration"} if "language_model" in results else {}),
        }
    )
    if checked.system_files:
        names = ", ".join(checked.system_files[:3]) + (", ..." if len(checked.system_files) > 3 else "")
        output.say(f"note: {counted(len(checked.system_files), 'file')} that the system added, left out: {names}")
    for problem in problems:
        output.result(f"  {problem}")
    if "teacher" in results:
        output.result("")
        _compared(results["teacher"])
    if "language_model" in results:
        output.result("")
        language_models.compared(results["language_model"])
    if "outputs" in results:
        output.result("")
        _compared_outputs(results["outputs"])


def _recognized(weights: str, relative_difference: float | None) -> str:
    by = "it has no weights to compare" if weights == "none" else "the same weights"
    if relative_difference is None:
        return by
    return f"{by}; its outputs of the first batch differ by {relative_difference:.1g} of their size, rounding aside"


def _replayed(checked: int, rounded: int, teacher_seen: bool) -> str:
    by = "the teacher saw" if teacher_seen else "the cache was imported with (its teacher's images are unknown)"
    same = f"{checked:,} images are those that {by}"
    return f"{same}, {rounded:,} of them up to rounding" if rounded else f"{same}, bit for bit"


def _replayed_text(sequences: int, tokens: int) -> str:
    return f"{tokens:,} of {counted(sequences, 'sequence')} are those that the data set gives now"


def _compared(agreements: list[dict[str, Any]]) -> None:
    """Print a table of the agreement with the live teacher, by view and temperature."""
    output.table(
        f"Cached logits against those of the live teacher, {counted(agreements[0]['rows'], 'row')} per view",
        ["view", "T", "total variation", "KL", "same top class", "error of the KD gradient"],
        [
            [
                str(agreement["view"]),
                str(agreement["temperature"]),
                f"{agreement['total_variation']:.5f}",
                f"{agreement['divergence']:.2e}",
                f"{agreement['top1']:.2%}",
                f"{agreement['gradient_error']:.5f}",
            ]
            for agreement in agreements
        ],
    )


def _compared_outputs(agreements: list[dict[str, Any]]) -> None:
    """Print a table of the agreement of other outputs with those of the live teacher, by view."""
    output.table(
        f"Cached outputs against those of the live teacher, {counted(agreements[0]['rows'], 'row')} per view",
        ["view", "output", "measure", "mean"],
        [[str(one["view"]), one["output"], one["measure"], f"{one['value']:.3g}"] for one in agreements],
    )
