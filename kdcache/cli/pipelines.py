"""`kdcache pipelines`: the recipes that come with kdcache."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from kdcache.cli import output
from kdcache.cli.options import json_option
from kdcache.config.recipes import recipe, recipes
from kdcache.errors import UsageError


@click.group("pipelines")
def pipelines() -> None:
    """Recipes that come with kdcache; commands take their names in place of a PIPELINE file.

    \b
    Example: kdcache pipelines list
    """


@pipelines.command("list")
@json_option
def list_recipes(as_json: bool) -> None:
    """Name every recipe, and what it does.

    \b
    Example: kdcache pipelines list
    """
    from kdcache.config.loader import load_pipeline

    rows = {}
    for name, path in recipes().items():
        read = load_pipeline(path)
        models = [section.model for section in (read.section("teacher"), read.section("student"))]
        rows[name] = [read.dataset.name, *models, read.loss.name, str(read.cache.views)]
    columns = ["data", "teacher", "student", "loss", "views"]
    if as_json:
        output.as_json({name: dict(zip(columns, row, strict=True)) for name, row in rows.items()})
    else:
        output.table("Recipes", ["name", *columns], [[name, *row] for name, row in rows.items()])


@pipelines.command("show")
@click.argument("name")
def show(name: str) -> None:
    """Print the recipe NAME; its first lines are the commands that run it.

    \b
    Example: kdcache pipelines show smoke
    """
    output.result(recipe(name).read_text(encoding="utf-8").rstrip())


@pipelines.command("copy")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path), required=False)
def copy(name: str, file: Path | None) -> None:
    """Copy the recipe NAME to FILE, by default NAME.yaml here, to change it.

    \b
    Example: kdcache pipelines copy image-folder mine.yaml
    """
    source, target = recipe(name), file or Path(f"{name}.yaml")
    if target.exists():
        raise UsageError(f"{target} is there already", "give another file, or remove that one")
    shutil.copyfile(source, target)
    output.result(str(target))
