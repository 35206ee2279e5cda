"""The files of a report: the HTML page, and its pictures as PNG."""

from __future__ import annotations

import shutil
from pathlib import Path

from kdcache.errors import UsageError
from kdcache.evaluation.report.charts import save_png
from kdcache.evaluation.report.sections import Report
from kdcache.runtime.atomic_write import write_file
from kdcache.train.run_folder import check_free


def pictures_folder(page: Path) -> Path:
    """Return the folder beside a page for its pictures."""
    return page.with_name(f"{page.stem}-pictures")


def check_files(page: Path, png: bool) -> None:
    """Check that a report can be written.

    Args:
        page: path of the HTML file.
        png: whether the pictures are written as PNG too.

    Raises:
        UsageError: if a file or folder of that name exists, or the parent folder does not.
    """
    check_free(page)
    if png:
        check_free(pictures_folder(page))
    if not page.parent.is_dir():
        raise UsageError(f"the folder {page.parent} does not exist", "create it, or use another path with -o")


def write_files(report: Report, page: Path, png: bool) -> None:
    """Write the page atomically, after its pictures as PNG if `png` is set; after an error, neither is left."""
    if not png:
        write_file(page, report.html)
        return
    folder = pictures_folder(page)
    try:
        folder.mkdir()
        for chart in report.charts:
            save_png(chart, folder)
        write_file(page, report.html)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
