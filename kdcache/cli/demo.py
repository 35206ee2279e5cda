"""`kdcache demo`: the whole way, on real data, in a minute or two."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.cli import output


@click.command("demo")
@click.option("-o", "--out", type=click.Path(path_type=Path), default="kdcache-demo", show_default=True)
def demo(out: Path) -> None:
    """x"""
