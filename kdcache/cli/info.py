"""`kdcache info`: print the manifest of a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcache.cli import output
from kdcache.cli.options import cache_argument, digest_option, json_option
from kdcache.errors import counted

if TYPE_CHECKING:
    from kdcache.cache import Cache
    from kdcache.cache.format.encoding import Encoding, Fidelity
    from kdcache.cache.format.schema import Manifest, Summary, TeacherRecord


@click.command("info")
@cache_argument
@digest_option
@click.option(
    "--fidelity", is_flag=True, help="Compare decoded rows with the statistics stored beside them; needs no teacher."
)
@json_option
def info(cache: str | Path, digest: str | None, fidelity: bool, as_json: bool) -> None:
    """Print the teacher, data set, encoding and size of a CACHE, a folder or a URL.

    All files of a folder are checked against the digest. Only the manifest of a URL is read, unless --fidelity is set.

    \b
    Example: kdcache info runs/digits.kdcache
    Example: kdcache info runs/digits.kdcache --fidelity
    """
    from kdcache.cache import open_cache
    from kdcache.cache.remote.address import source
    from kdcache.cache.remote.mirror import remote_manifest

    named = source(cache, digest)
    if named.is_remote and not fidelity:
        manifest, content = remote_manifest(named)
        _describe(named.where, manifest, _size(manifest) + len(content), manifest.plan.views.count, as_json)
        return
    opened = open_cache(cache, digest=digest, progress=output.Terminal())
    if fidelity:
        opened.check_files(output.Terminal())
        _measure(opened, as_json)
    else:
        describe(opened, as_json)


def _measure(cache: Cache, as_json: bool) -> None:
    """Print the differences between decoded rows and the statistics that were recorded of them."""
    from kdcache.cache.inspect.self_fidelity import measure_itself

    plan = cache.manifest.plan
    with output.working(f"decoding the rows of {cache.path}"):
        measured = measure_itself(cache)
    if as_json:
        planned = plan.fidelity.model_dump() if plan.fidelity else None
        output.as_json({"planned": planned, "measured": [one._asdict() for one in measured]})
    elif not measured:
        output.result(f"every class is stored as {plan.encoding.dtype}: there is no tail to estimate")
    else:
        output.table(
            f"Mean |decoded - recorded| over {counted(plan.dataset.samples, 'row')} per view",
            ["view", "T", "tail mass", "logsumexp, nats"],
            [[str(f.view), str(f.temperature), f"{f.tail_mass:.5f}", f"{f.logsumexp:.5f}"] for f in measured],
        )


def _teacher(teacher: TeacherRecord) -> str:
    if not teacher.was_run:
        return f"{teacher.name}, not run by kdcache: its weights are unknown"
    if teacher.weights == "none":
        return f"{teacher.name}, without weights: recognized by its logits alone"
    return f"{teacher.name}, {teacher.parameters:,} parameters, {teacher.weights_digest[:19]}..."


def _fidelity(measured: Fidelity) -> str:
    by_temperature = ", ".join(f"{value:.4f} at T = {t}" for t, value in measured.total_variation.items())
    return f"total variation {by_temperature} (mean over {counted(measured.rows, 'pilot row')})"


def _size(manifest: Manifest) -> int:
    return sum(record.size for record in manifest.files.values())


def describe(cache: Cache, as_json: bool, where: Path | None = None) -> None:
    """Print the manifest of an open cache, with its path as the user wrote it, if given."""
    unlabeled = bool((cache.labels < 0).any())
    _describe(str(where or cache.path), cache.manifest, cache.bytes_on_disk, len(cache.views), as_json, unlabeled)


def _stored(encoding: Encoding) -> str:
    head = "top class" if encoding.top_k == 1 else f"top {encoding.top_k} classes"
    stored = "every class" if encoding.dense else f"{head}, {encoding.tail} tail"
    rank = f" of rank {encoding.rank}" if encoding.rank else ""
    return f"{stored}{rank}, {encoding.dtype} log-probabilities"


def _of_logits(summary: Summary, teacher: TeacherRecord, unlabeled: bool) -> dict[str, str]:
    accuracy = summary.teacher_accuracy
    which = "those of these samples that have a label" if unlabeled else "these samples"
    return {
        "accuracy": "no labels" if accuracy is None else f"{accuracy:.2%} on {which}",
        "sharpness": f"{summary.mean_sharpness:.3f} (mean logsumexp)"
        if teacher.level is None
        else "unknown: the logits are known up to an additive constant per sample",
        "confidence": f"{summary.mean_top_probability:.4f} (mean largest probability)",
    }


def _describe(where: str, manifest: Manifest, size: int, views: int, as_json: bool, unlabeled: bool = False) -> None:
    """Print a manifest.

    Args:
        where: folder or URL of the cache.
        manifest: of the cache.
        size: of all its files, in bytes.
        views: how many views are present.
        as_json: for programs.
        unlabeled: whether some samples have no label, if that is known.
    """
    from kdcache.cache.format.row_axes import axis_of
    from kdcache.cache.inspect.noise import described_noise
    from kdcache.cache.inspect.outputs import described_outputs, described_sequences

    plan = manifest.plan
    rows = axis_of(plan, plan.output_names[0]).rows
    per_row = size / (plan.views.count * rows)
    if as_json:
        output.as_json(
            {
                "path": where,
                "bytes": size,
                "bytes_per_row": round(per_row, 2),
                **manifest.model_dump(exclude={"files"}),
            }
        )
        return
    summary, classes = manifest.summary, len(plan.dataset.class_names)
    present = f", {views} of them present" if views < plan.views.count else ""
    transform = " > ".join(name for step in plan.views.transform for name in step) or "no transform"
    shards = plan.views.count * plan.shards
    of_classes = f"{classes} classes" if classes else "no classes"
    what = f"{plan.dataset.samples:,} samples, {of_classes}"
    if plan.sequences is not None:
        what = counted(plan.dataset.samples, "sequence")
    output.facts(
        {
            "cache": where,
            "digest": manifest.digest,
            "teacher": _teacher(plan.teacher),
            "data set": f"{plan.dataset.name}/{plan.dataset.split}, {what}, {plan.dataset.digest[:19]}...",
            **(
                {"views": f"{plan.views.count}{present}, seed {plan.views.seed}, {transform}"}
                if plan.sequences is None
                else described_sequences(plan.sequences)
            ),
            **({"encoding": _stored(plan.class_encoding)} if plan.class_encoding else {}),
            **({"fidelity": _fidelity(plan.fidelity)} if plan.fidelity else {}),
            **described_outputs(plan.outputs),
            **described_noise(plan.noise),
            "size": f"{size:,} bytes, {per_row:.1f} bytes per row, {counted(shards, 'shard')}",
            **(_of_logits(summary, plan.teacher, unlabeled) if plan.class_encoding else {}),
            "versions": ", ".join(f"{name} {version}" for name, version in plan.versions.items()),
            **({"license": plan.licence} if plan.licence else {}),
            **({"notes": plan.notes} if plan.notes else {}),
        }
    )
