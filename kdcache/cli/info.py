"""`kdcache info`: what a cache is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcache.cli import output
from kdcache.cli.options import cache_argument, digest_option, json_option

if TYPE_CHECKING:
    from kdcache.cache import Cache
    from kdcache.cache.format.schema import Fidelity, Manifest


@click.command("info")
@cache_argument
@digest_option
@click.option("--fidelity", is_flag=True, help="Measure every view against its own records, without the teacher.")
@json_option
def info(cache: str | Path, digest: str | None, fidelity: bool, as_json: bool) -> None:
    """Say what a CACHE holds, who made it, and what its teacher is like; every byte is checked on the way.

    Of a URL only the manifest is read, unless --fidelity needs the rows.

    \b
    Example: kdcache info runs/digits.kdcache
    """
    from kdcache.cache import open_cache
    from kdcache.cache.remote.address import source
    from kdcache.cache.remote.mirror import remote_manifest

    found = source(cache, digest)
    if found.is_remote and not fidelity:
        manifest, data = remote_manifest(found)
        _describe(found.where, manifest, _size(manifest) + len(data), manifest.plan.views.count, as_json)
        return
    opened = open_cache(cache, digest=digest, progress=output.Terminal())
    if fidelity:
        _measure(opened, as_json)
    else:
        describe(opened, as_json)


def _measure(cache: Cache, as_json: bool) -> None:
    """Print how near decoded rows are to what was recorded of them."""
    from kdcache.cache.inspect.self_fidelity import measure_itself

    plan = cache.manifest.plan
    measured = measure_itself(cache.path, plan)
    if as_json:
        planned = plan.fidelity.model_dump() if plan.fidelity else None
        output.as_json({"planned": planned, "measured": [found._asdict() for found in measured]})
    elif not measured:
        output.result(f"every class is kept in {plan.encoding.dtype}: nothing is left to estimate")
    else:
        output.table(
            f"Recorded against decoded, mean over {plan.dataset.samples:,} rows a view",
            ["view", "T", "tail's mass", "logsumexp"],
            [[str(f.view), str(f.temperature), f"{f.tail_mass:.5f}", f"{f.logsumexp:.5f}"] for f in measured],
        )


def _fidelity(measured: Fidelity) -> str:
    by_temperature = ", ".join(f"{value:.4f} at T = {t}" for t, value in measured.total_variation.items())
    return f"total variation {by_temperature} (mean over {measured.rows:,} pilot rows)"


def _size(manifest: Manifest) -> int:
    return sum(record.size for record in manifest.files.values())


def describe(cache: Cache, as_json: bool) -> None:
    """Print what the manifest of a cache says."""
    _describe(str(cache.path), cache.manifest, cache.bytes_on_disk, len(cache.views), as_json)


def _describe(where: str, manifest: Manifest, size: int, views: int, as_json: bool) -> None:
    plan = manifest.plan
    rows = plan.views.count * plan.dataset.samples
    per_row = size / rows
    only = f", {views} of them here" if views < plan.views.count else ""
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
    kept = "every class" if plan.encoding.dense else f"top {plan.encoding.top_k}, {plan.encoding.tail} tail"
    if plan.encoding.rank:
        kept += f" of rank {plan.encoding.rank}"
    accuracy = manifest.summary.teacher_accuracy
    output.facts(
        {
            "cache": where,
            "digest": manifest.digest,
            "teacher": f"{plan.teacher.name}, {plan.teacher.parameters:,} parameters, "
            f"{plan.teacher.weights_digest[:19]}..."
            if plan.teacher.parameters
            else f"{plan.teacher.name}, not run by kdcache: its weights are not known",
            "data set": f"{plan.dataset.name}/{plan.dataset.split}, {plan.dataset.samples:,} samples, "
            f"{plan.encoding.num_classes} classes, {plan.dataset.digest[:19]}...",
            "views": f"{plan.views.count}{only}, seed {plan.views.seed}, "
            + (" > ".join(name for step in plan.views.transform for name in step) or "no transform"),
            "kept": f"{kept}, {plan.encoding.dtype} log-probabilities",
            **({"fidelity": _fidelity(plan.fidelity)} if plan.fidelity else {}),
            "size": f"{size:,} bytes, {per_row:.1f} a row, {plan.views.count * plan.shards} shard(s)",
            "accuracy": "no labels" if accuracy is None else f"{accuracy:.2%} on these samples",
            "sharpness": f"{manifest.summary.mean_sharpness:.3f} (mean logsumexp)"
            if plan.teacher.level is None
            else "not known: only probabilities are, and so the logits but for a constant of each row",
            "confidence": f"{manifest.summary.mean_top_probability:.4f} (mean largest probability)",
            "versions": ", ".join(f"{name} {number}" for name, number in plan.versions.items()),
            **({"licence": plan.licence} if plan.licence else {}),
            **({"notes": plan.notes} if plan.notes else {}),
        }
    )
