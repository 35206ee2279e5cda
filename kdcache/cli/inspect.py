"""`kdcache summarize`, `kdcache diff` and `kdcache card`: statistics over the rows of caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcache.cli import output
from kdcache.cli.options import CacheName, PathType, cache_argument, json_option, scheduler_option
from kdcache.errors import counted

if TYPE_CHECKING:
    from kdcache.cache.inspect.diff import Difference, LogitAgreement
    from kdcache.cache.inspect.output_statistics import OutputDifference, OutputStatistics
    from kdcache.cache.inspect.summary import Census, OfSample

_worst_option = click.option(
    "--worst", type=click.IntRange(min=0), default=10, show_default=True, help="Number of samples to list."
)


@click.command("summarize")
@cache_argument
@_worst_option
@click.option(
    "--threshold", type=click.FloatRange(min=0), default=3.0, show_default=True,
    help="List a label as suspect if another class is more probable by so many nats.",
)  # fmt: skip
@scheduler_option
@json_option
def summarize(cache: str | Path, worst: int, threshold: float, scheduler: str, as_json: bool) -> None:
    """Print statistics of the rows of a CACHE: by class, sharpness, hardest samples, likely label errors.

    Reads every row of the cache, a folder or a URL; needs no images. With --json also the histograms.

    \b
    Example: kdcache summarize runs/digits.kdcache --worst 20
    """
    from kdcache.cache import open_cache
    from kdcache.cache.inspect.output_statistics import output_statistics
    from kdcache.cache.inspect.summary import take_census

    opened = open_cache(cache, progress=output.Terminal())
    opened.check_files(output.Terminal())
    with output.working(f"reading the rows of {cache}"):
        has_logits = opened.manifest.plan.class_encoding is not None
        census = take_census(opened, worst, threshold, scheduler) if has_logits else None
        outputs = output_statistics(opened, scheduler)
    if as_json:
        lists = ("classes", "hardest", "suspects")
        named = {name: [one._asdict() for one in getattr(census, name)] for name in lists} if census else {}
        of_outputs = {"outputs": [one._asdict() for one in outputs]} if outputs else {}
        of_logits = asdict(census) if census else {}
        output.as_json({"cache": str(cache), "digest": opened.manifest.digest, **of_logits, **named, **of_outputs})
        return
    if census is not None:
        _print(census)
    if census is not None and outputs:
        output.result("")
    if outputs:
        _print_outputs(outputs)


def _print_outputs(outputs: list[OutputStatistics]) -> None:
    """Print a table of the outputs beside class logits."""
    output.table(
        "Other outputs: deviation is the root of the mean squared distance from the mean row",
        ["output", "kind", "rows", "numbers", "smallest", "largest", "mean length", "deviation"],
        [
            [one.output, one.kind, f"{one.rows:,}", f"{one.length:,}"]
            + [f"{value:.4g}" for value in (one.smallest, one.largest, one.mean_norm, one.deviation)]
            for one in outputs
        ],
    )


def _print(census: Census) -> None:
    """Print the tables of a census."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    output.table(
        f"{counted(census.rows, 'row')}, by label",
        ["class", "samples", "accuracy", "confidence", "sharpness"],
        [
            [one.name, f"{one.samples:,}", number(one.accuracy, ".2%"), number(one.confidence, ".4f"),
             number(one.sharpness, ".3f")]
            for one in census.classes
        ],
    )  # fmt: skip
    output.result("")
    quantiles = ", ".join(f"{share:.0%}: {value:.2f}" for share, value in census.quantiles.items())
    output.facts({"sharpness": f"quantiles of the logsumexp: {quantiles}"})
    output.result("")
    _samples("Hardest samples: lowest log-probability of the label", census.hardest)
    if census.hardest and census.suspects:
        output.result("")
    _samples(
        f"Likely label errors: {counted(census.suspected, 'sample')} with another class more probable than the label "
        f"by {census.threshold:g} nats or more",
        census.suspects,
    )


def _samples(title: str, samples: list[OfSample]) -> None:
    if samples:
        columns = ["sample", "content key", "label", "teacher's class", "log p(label)", "margin, nats"]
        rows = [
            [str(one.id), one.key, one.label, one.top, f"{one.label_log_prob:.2f}", f"{one.margin:.2f}"]
            for one in samples
        ]
        output.table(title, columns, rows)


@click.command("diff")
@click.argument("first", type=CacheName())
@click.argument("second", type=CacheName())
@_worst_option
@scheduler_option
@json_option
def diff(first: str | Path, second: str | Path, worst: int, scheduler: str, as_json: bool) -> None:
    """Print the differences between two caches: their manifests, and the logits and outputs of the same samples.

    \b
    Example: kdcache diff runs/digits.kdcache runs/other.kdcache
    """
    from kdcache.cache import open_cache
    from kdcache.cache.inspect.diff import compare

    progress = output.Terminal()
    one, other = (open_cache(path, progress=progress) for path in (first, second))
    one.check_files(progress)
    other.check_files(progress)
    with output.working("comparing the rows"):
        difference = compare(one, other, worst, scheduler)
    if as_json:
        output.as_json(_as_json(difference))
    else:
        _print_difference(difference)


def _print_difference(difference: Difference) -> None:
    """Print the keys of the manifests that differ, and tables of how far the rows do."""
    if difference.manifest:
        output.result("manifest (first -> second):")
    for key, one, other in difference.manifest:
        output.result(f"  {key}: {one} -> {other}")
    if not difference.manifest:
        output.result("the manifests are the same")
    output.result("")
    agreement = difference.agreement
    if agreement is None:
        output.result(f"logits are not compared: {difference.why_not}")
    else:
        _print_agreement(agreement)
    if difference.outputs:
        output.result("")
        _print_output_differences(difference.outputs)


def _print_output_differences(outputs: Sequence[OutputDifference]) -> None:
    """Print a table of the outputs beside class logits."""
    output.table(
        "Other outputs",
        ["output", "rows", "1 - cosine", "relative squared error", "largest difference"],
        [
            [
                one.output,
                f"{one.rows:,}",
                f"{one.one_minus_cosine:.3g}",
                f"{one.relative_error:.3g}",
                f"{one.largest:.3g}",
            ]
            for one in outputs
            if one.why_not is None
        ],
    )
    for one in outputs:
        if one.why_not is not None:
            output.result(f"the output {one.output} is not compared: {one.why_not}")


def _print_agreement(agreement: LogitAgreement) -> None:
    """Print tables of how far the logits of two caches differ."""
    output.facts({"rows": f"{agreement.rows:,} compared", "same top class": f"{agreement.same_class:.2%}"})
    output.result("")
    shares = agreement.variations[0].quantiles
    output.table(
        "Total variation between the softmax of the two caches",
        ["T", "mean", *(f"quantile {share:.0%}" for share in shares)],
        [
            [str(one.temperature), f"{one.mean:.4f}", *(f"{value:.3f}" for value in one.quantiles.values())]
            for one in agreement.variations
        ],
    )
    if agreement.worst:
        output.result("")
        output.table(
            "Rows with the largest total variation at T = 1",
            ["sample", "view", "content key", "top class, first", "second", "total variation"],
            [
                [str(row.id), str(row.view), row.key, *row.classes, f"{row.total_variation:.4f}"]
                for row in agreement.worst
            ],
        )


def _as_json(difference: Difference) -> dict[str, object]:
    """Return the differences as JSON has them."""
    agreement = difference.agreement
    rows: dict[str, object] | None = None
    if agreement is not None:
        variations = [one._asdict() for one in agreement.variations]
        worst = [row._asdict() for row in agreement.worst]
        rows = {**agreement._asdict(), "variations": variations, "worst": worst}
    manifest = [{"key": key, "first": one, "second": other} for key, one, other in difference.manifest]
    of_outputs = {"outputs": [one._asdict() for one in difference.outputs]} if difference.outputs else {}
    return {"manifest": manifest, "rows": rows, "why_not": difference.why_not, **of_outputs}


@click.command("card")
@click.argument("cache", type=PathType())
@scheduler_option
@json_option
def card(cache: Path, scheduler: str, as_json: bool) -> None:
    """Write the card of a CACHE, README.md and card.png in its folder, again.

    Notes between the two marks in README.md are kept. No digest covers the card.

    \b
    Example: kdcache card runs/digits.kdcache
    """
    from kdcache.cache import open_cache
    from kdcache.cache.inspect.card import write_card

    opened = open_cache(cache, progress=output.Terminal())
    opened.check_files(output.Terminal())
    with output.working(f"reading the rows of {cache}"):
        text, picture = write_card(opened, scheduler=scheduler)
    if as_json:
        drawn = None if picture is None else str(picture)
        output.as_json({"cache": str(cache), "card": str(text), "picture": drawn})
    else:
        output.facts({"card": str(text), **({} if picture is None else {"picture": str(picture)})})
