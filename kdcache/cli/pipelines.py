"""`kdcache pipelines`: list, print and copy the recipes that come with kdcache."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from kdcache.cli import output
from kdcache.cli.options import PathType, json_option
from kdcache.config.recipes import recipe, recipes
from kdcache.errors import UsageError


@click.group("pipelines")
def pipelines() -> None:
    """List, print or copy the recipes: pipeline files that come with kdcache.

    Every command takes the name of a recipe in place of a PIPELINE file.

    \b
    Example: kdcache pipelines list
    """


@pipelines.command("list")
@json_option
def list_recipes(as_json: bool) -> None:
    """List every recipe with its data set, networks and loss.

    \b
    Example: kdcache pipelines list
    """
    from kdcache.config.loader import load_pipeline

    rows = {}
    for name, path in recipes().items():
        pipeline = load_pipeline(path)
        models = [section.model for section in (pipeline.section("teacher"), pipeline.section("student"))]
        rows[name] = [pipeline.dataset.name, *models, pipeline.loss.title, str(pipeline.cache.views)]
    columns = ["dataset", "teacher", "student", "loss", "views"]
    if as_json:
        output.as_json({name: dict(zip(columns, row, strict=True)) for name, row in rows.items()})
    else:
        output.table("Recipes", ["name", *columns], [[name, *row] for name, row in rows.items()])


@pipelines.command("show")
@click.argument("name")
def show(name: str) -> None:
    """Print the recipe NAME; its first lines are the commands to run it.

    \b
    Example: kdcache pipelines show smoke
    """
    output.result(recipe(name).read_text(encoding="utf-8").rstrip())


@pipelines.command("copy")
@click.argument("name")
@click.argument("file", type=PathType(), required=False)
def copy(name: str, file: Path | None) -> None:
    """Copy the recipe NAME to FILE, by default NAME.yaml in this folder.

    \b
    Example: kdcache pipelines copy image-folder mine.yaml
    """
    source, target = recipe(name), file or Path(f"{name}.yaml")
    if target.exists():
        raise UsageError(f"{target} already exists", "use another name, or remove that file")
    shutil.copyfile(source, target)
    output.result(str(target))
