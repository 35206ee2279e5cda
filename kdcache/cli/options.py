"""Arguments and options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kdcache.pipeline import Pipeline

pipeline_argument = click.argument("pipeline", type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace one value of the pipeline; repeatable."
)
out_option = click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Where to write; must not exist."
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def read_pipeline(path: Path, overrides: tuple[str, ...], loss: str | None = None, **shortcuts: object) -> Pipeline:
    """The pipeline, with `--set` and then the options that are short for one; those that are None were not given."""
    from kdcache.pipeline import load_pipeline

    short = [f"{key.replace('__', '.')}={value}" for key, value in shortcuts.items() if value is not None]
    return load_pipeline(path, [*overrides, *short], loss)


def choose_device(name: str) -> str:
    """The device that `--device` names.

    Raises:
        UsageError: if torch does not know it or this machine has not got it.
    """
    import torch

    from kdcache.errors import UsageError

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # of torchrun: each of its processes has a GPU of its own
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"no device {name!r} here: {first}", "use --device cpu, or leave it to auto") from None
    return name
