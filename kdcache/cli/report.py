"""`kdcache report`: finished runs beside one another, on a page."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.cli import output
from kdcache.cli.options import CacheName, choose_device, device_option, json_option
from kdcache.errors import UsageError


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The HTML file; must not exist.")
@click.option("--cache", "cache_name", type=CacheName(), help="The teacher's: what needs it is left out without.")
@click.option(
    "--rows",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="How many cached images the networks are shown.",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A table such as docs/RESULTS.md: the accuracies of its recipes go into its last column.",
)
@click.option("--png", is_flag=True, help="The pictures as PNG too, in a folder beside the file.")
@device_option
@json_option
def report(
    runs: tuple[Path, ...],
    out: Path,
    cache_name: str | Path | None,
    rows: int,
    results: Path | None,
    png: bool,
    device: str,
    as_json: bool,
) -> None:
    """Draw up one HTML page about RUNs: folders of train-student or train-teacher, or a whole sweep.

    A table over seeds, learning curves, temperatures, accuracy by class, calibration; with the teacher's cache also
    sharpness, what KA changes, where student and teacher disagree, the hardest samples, and what one pass has saved.
    The page needs no network.

    \b
    Example: kdcache report runs/sweep runs/digits-student --cache runs/digits.kdcache -o runs/report.html
    """
    from kdcache.cache import open_cache
    from kdcache.evaluation.published_results import fill_results, read_results, write_results
    from kdcache.evaluation.report.collect import collect
    from kdcache.evaluation.report.sections import save_report, write_report
    from kdcache.train.run_folder import check_free

    folder = out.with_name(f"{out.stem}-pictures")
    check_free(out)
    if png:
        check_free(folder)
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}", "make it, or give another file with -o")
    on, progress = choose_device(device), output.Terminal()
    cache = open_cache(cache_name, views=1, progress=progress) if cache_name is not None else None
    found = collect(runs, cache, rows=rows, device=on, progress=progress)
    table = fill_results(read_results(results), found.runs) if results is not None else None
    save_report(write_report(found), out, folder if png else None)
    if results is not None and table is not None:
        write_results(results, table[0])
    if as_json:
        output.as_json({"report": str(out), "pictures": str(folder) if png else None, **found.as_record()})
        return
    for note in found.notes:
        output.say(f"note: {note}")
    output.facts(
        {
            "report": f"{out}, {out.stat().st_size:,} bytes",
            "runs": f"{len(found.runs)} in {len(found.groups)} groups",
            **({"pictures": str(folder)} if png else {}),
            **({"results": f"{results}: {', '.join(table[1])}"} if table is not None else {}),
        }
    )
