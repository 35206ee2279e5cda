"""What the rows of caches say: `kdcache summarize`, `kdcache diff` and `kdcache card`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcache.cli import output
from kdcache.cli.options import CacheName, cache_argument, json_option, scheduler_option

if TYPE_CHECKING:
    from kdcache.cache import Cache
    from kdcache.cache.inspect.diff import Difference
    from kdcache.cache.inspect.summary import Census, OfSample

_worst_option = click.option(
    "--worst", type=click.IntRange(min=0), default=10, show_default=True, help="How many are named."
)


@click.command("summarize")
@cache_argument
@_worst_option
@click.option(
    "--threshold", type=click.FloatRange(min=0), default=3.0, show_default=True,
    help="Nats by which another class must be more probable than the label, to suspect the label.",
)  # fmt: skip
@scheduler_option
@json_option
def summarize(cache: str | Path, worst: int, threshold: float, scheduler: str, as_json: bool) -> None:
    """Count the rows of a CACHE: its classes, how sharp the teacher is, the hardest samples, and likely wrong labels.

    \b
    Example: kdcache summarize runs/digits.kdcache --worst 20
    """
    from kdcache.cache import open_cache
    from kdcache.cache.inspect.summary import take_census

    opened = open_cache(cache)
    census = take_census(opened, worst, threshold, scheduler)
    if as_json:
        named = {name: [one._asdict() for one in getattr(census, name)] for name in ("classes", "hardest", "suspects")}
        output.as_json({"cache": str(cache), "digest": opened.manifest.digest, **asdict(census), **named})
    else:
        _print(census)


def _print(census: Census) -> None:
    def figure(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    output.table(
        f"{census.rows:,} rows, by label",
        ["class", "samples", "accuracy", "confidence", "sharpness"],
        [
            [one.name, f"{one.samples:,}", figure(one.accuracy, ".2%"), figure(one.confidence, ".4f"),
             figure(one.sharpness, ".3f")]
            for one in census.classes
        ],
    )  # fmt: skip
    output.result("")
    sharp = ", ".join(f"{share:.0%} {value:.2f}" for share, value in census.quantiles.items())
    output.facts({"sharpness": f"logsumexp, quantiles: {sharp}"})
    output.result("")
    _samples("Hardest samples: the label's log-probability is lowest", census.hardest)
    _samples(
        f"Labels that may be wrong: {census.suspected:,} samples with another class more probable by "
        f"{census.threshold:g} nats or more",
        census.suspects,
    )


def _samples(title: str, found: list[OfSample]) -> None:
    if found:
        columns = ["sample", "content key", "label", "teacher's class", "log p(label)", "margin, nats"]
        lines = [
            [str(one.id), one.key, one.label, one.top, f"{one.label_log_prob:.2f}", f"{one.margin:.2f}"]
            for one in found
        ]
        output.table(title, columns, lines)


@click.command("diff")
@click.argument("first", type=CacheName())
@click.argument("second", type=CacheName())
@_worst_option
@scheduler_option
@json_option
def diff(first: str | Path, second: str | Path, worst: int, scheduler: str, as_json: bool) -> None:
    """Say what differs between two caches: their manifests, and, of the same samples, what their teachers say.

    \b
    Example: kdcache diff runs/digits.kdcache runs/other.kdcache
    """
    from kdcache.cache import open_cache
    from kdcache.cache.inspect.diff import compare

    found = compare(open_cache(first), open_cache(second), worst, scheduler)
    if as_json:
        output.as_json(_as_json(found))
        return
    for key, one, other in found.manifest:
        output.result(f"{key}: {one}, {other}")
    if not found.manifest:
        output.result("the manifests are the same")
    output.result("")
    agreement = found.agreement
    if agreement is None:
        output.result(f"rows are not compared: {found.why_not}")
        return
    output.facts({"rows": f"{agreement.rows:,}", "same class": f"{agreement.same_class:.2%}"})
    shares = agreement.variations[0].quantiles
    output.table(
        "Total variation between the teachers",
        ["T", "mean", *(f"{share:.0%} below" for share in shares)],
        [
            [str(one.temperature), f"{one.mean:.4f}", *(f"{value:.3f}" for value in one.quantiles.values())]
            for one in agreement.variations
        ],
    )
    if agreement.worst:
        output.table(
            "Rows with the largest, at T = 1",
            ["sample", "view", "content key", "first", "second", "total variation"],
            [
                [str(row.id), str(row.view), row.key, *row.classes, f"{row.total_variation:.4f}"]
                for row in agreement.worst
            ],
        )


def _as_json(found: Difference) -> dict[str, object]:
    agreement = found.agreement
    rows: dict[str, object] | None = None
    if agreement is not None:
        variations = [one._asdict() for one in agreement.variations]
        worst = [row._asdict() for row in agreement.worst]
        rows = {**agreement._asdict(), "variations": variations, "worst": worst}
    manifest = [{"key": key, "first": one, "second": other} for key, one, other in found.manifest]
    return {"manifest": manifest, "rows": rows, "why_not": found.why_not}


@click.command("card")
@click.argument("cache", type=click.Path(path_type=Path))
@scheduler_option
@json_option
def card(cache: Path, scheduler: str, as_json: bool) -> None:
    """Write README.md of a CACHE, its card for people, and card.png anew; notes between the marks in it are kept.

    \b
    Example: kdcache card runs/digits.kdcache
    """
    from kdcache.cache import open_cache

    opened = open_cache(cache)
    written = draw_card(opened, scheduler)
    if as_json:
        output.as_json({"cache": str(cache), "card": str(written[0]), "picture": str(written[1])})
    else:
        output.facts({"card": str(written[0]), "picture": str(written[1])})


def draw_card(cache: Cache, scheduler: str = "threads") -> tuple[Path, Path]:
    """Write the picture of a cache, and the card that shows it: (card, picture)."""
    from kdcache.cache.inspect.card import PICTURE, write_card
    from kdcache.cache.inspect.card_plot import draw_census
    from kdcache.cache.inspect.summary import take_census

    census = take_census(cache, 0, scheduler=scheduler)
    picture = cache.path / PICTURE
    draw_census(census.sharpness, census.confidence, picture)
    return write_card(cache), picture
