"""`kdcache report`: compare finished runs on an HTML page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcache.cli import output
from kdcache.cli.options import (
    CacheName,
    PathType,
    canaries_option,
    choose_device,
    device_option,
    json_option,
    read_canaries,
    references_option,
)
from kdcache.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdcache.cache import Cache
    from kdcache.evaluation.report.collect import ReportData
    from kdcache.evaluation.report.pixels import PixelReportData
    from kdcache.evaluation.report.text import TextReportData


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=PathType(), metavar="RUN...")
@click.option("-o", "--out", required=True, type=PathType(), help="The HTML file; must not exist.")
@click.option(
    "--cache", "cache_name", type=CacheName(), help="Cache of the teacher; without one, its sections are left out."
)
@click.option(
    "--rows",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Number of cached images to run the networks on.",
)
@click.option(
    "--results",
    type=PathType(exists=True, dir_okay=False),
    help="A Markdown table as in docs/RESULTS.md; the accuracies of its recipes are written to its last column.",
)
@click.option("--png", is_flag=True, help="Write the pictures as PNG too, to a folder beside the file.")
@canaries_option
@references_option
@device_option
@json_option
def report(
    runs: tuple[Path, ...],
    out: Path,
    cache_name: str | Path | None,
    rows: int,
    results: Path | None,
    png: bool,
    canaries: str | None,
    references: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Write an HTML page that compares RUNs: folders of train-student or train-teacher, or a whole sweep.

    The page has a table over seeds, learning curves, temperatures, accuracy by class and calibration; with the cache of
    the teacher also sharpness, the effect of KA, disagreements of student and teacher, the hardest samples, and the
    teacher passes saved. Of language models it has tables over seeds and on the sequences of the cache, and learning
    curves. Of segmentation it has mean IoU over seeds and by class, learning curves, the agreement with the teacher,
    and pictures of the maps. It loads nothing from the network.

    \b
    Example: kdcache report runs/sweep runs/digits-student --cache runs/digits.kdcache -o runs/report.html
    """
    from kdcache.cache import open_cache
    from kdcache.evaluation.exposure import measure_exposure
    from kdcache.evaluation.pixel_runs import all_of_pixels
    from kdcache.evaluation.published_results import fill_results, read_results, write_results
    from kdcache.evaluation.report.collect import collect
    from kdcache.evaluation.report.files import check_files, write_files
    from kdcache.evaluation.report.sections import write_report
    from kdcache.evaluation.runs import find_runs
    from kdcache.evaluation.text_runs import divided_by_kind

    check_files(out, png)
    named = read_canaries(canaries, references)
    chosen, progress = choose_device(device), output.Terminal()
    cache = open_cache(cache_name, views=1, progress=progress) if cache_name is not None else None
    folders, unfinished = find_runs(runs)
    if text := divided_by_kind(folders)[0]:
        _refuse(canaries or references, results, "networks of images, and these are language models")
        _report_kind(True, text, unfinished, cache, out, rows, png, chosen, as_json)
        return
    if all_of_pixels(folders):
        _refuse(canaries or references, results, "networks with a class per image, and these have one per pixel")
        _report_kind(False, folders, unfinished, cache, out, rows, png, chosen, as_json)
        return
    data = collect(runs, cache, rows=rows, device=chosen, progress=progress)
    if named is not None:
        networks = [run.network_ref for run in data.runs]
        data = replace(data, exposures=measure_exposure(networks, named, cache, device=chosen, progress=progress))
    filled = fill_results(read_results(results), data.runs) if results is not None else None
    write_files(write_report(data), out, png)
    if results is not None and filled is not None:
        write_results(results, filled[0])
    further = {"results": f"{results}: {', '.join(filled[1])}"} if filled is not None else None
    _print_written(data, out, png, as_json, further)


def _refuse(canaries: str | None, results: Path | None, what: str) -> None:
    """Refuse options that are for other networks.

    Args:
        canaries: value of the option.
        results: value of the option.
        what: of which networks the options are, and what these are.

    Raises:
        UsageError: if one is given.
    """
    for option, given in {"--canaries": canaries, "--results": results}.items():
        if given is not None:
            raise UsageError(f"{option} is for {what}", f"leave out {option}")


def _report_kind(
    of_text: bool,
    folders: Sequence[Path],
    unfinished: Sequence[Path],
    cache: Cache | None,
    out: Path,
    rows: int,
    png: bool,
    device: str,
    as_json: bool,
) -> None:
    """Write the page of language models, or of networks that say a class of every pixel, and print where it is."""
    from kdcache.evaluation.report.files import write_files
    from kdcache.evaluation.report.pixels import collect_pixels, write_pixel_report
    from kdcache.evaluation.report.text import collect_text, write_text_report

    progress = output.Terminal()
    left_out = [f"{folder} is not finished and is left out." for folder in unfinished]
    data: TextReportData | PixelReportData
    if of_text:
        text = collect_text(folders, cache, rows=rows, device=device, progress=progress)
        data = text = replace(text, notes=[*left_out, *text.notes])
        page = write_text_report(text)
    else:
        pixels = collect_pixels(folders, cache, rows=rows, device=device, progress=progress)
        data = pixels = replace(pixels, notes=[*left_out, *pixels.notes])
        page = write_pixel_report(pixels)
    write_files(page, out, png)
    _print_written(data, out, png, as_json)


def _print_written(
    data: ReportData | TextReportData | PixelReportData,
    out: Path,
    png: bool,
    as_json: bool,
    further: dict[str, str] | None = None,
) -> None:
    """Print where a page is, and what was left out of it."""
    from kdcache.errors import counted
    from kdcache.evaluation.report.files import pictures_folder

    pictures = str(pictures_folder(out)) if png else None
    if as_json:
        output.as_json({"report": str(out), "pictures": pictures, **data.as_record()})
        return
    for note in data.notes:
        output.say(f"note: {note}")
    output.facts(
        {
            "report": f"{out}, {out.stat().st_size:,} bytes",
            "runs": f"{len(data.runs)} in {counted(len(data.groups), 'group')}",
            **({"pictures": pictures} if pictures is not None else {}),
            **(further or {}),
        }
    )
