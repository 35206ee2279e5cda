"""Call the command line in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from helpers.paths import ROOT
from kdcache.cli import main

RECIPE = str(ROOT / "pipelines" / "digits.yaml")


def kdcache(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ok(*arguments: object) -> str:
    done = kdcache(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(code: int, *arguments: object) -> str:
    """Return the message of an error, after checking that it has a fix and no traceback, and stdout is empty."""
    done = kdcache(*arguments)
    assert done.exit_code == code, (done.exit_code, done.output)
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""
    assert "error: " in done.stderr
    assert "fix: " in done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def npz_recipe(folder: Path, **arrays: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Path:
    """Write a pipeline of images and labels in an npz file."""
    rng = np.random.default_rng(0)
    given = {"images": rng.integers(0, 255, (60, 8, 8), np.uint8), "labels": np.arange(60) % 3, **arrays}
    np.savez(folder / "mine.npz", **given)  # type: ignore[arg-type]  # numpy's stub takes the names for its flags
    recipe = folder / "mine.yaml"
    recipe.write_text(
        f"dataset: {{name: npz, root: {folder / 'mine.npz'}}}\n"
        f"teacher: {{model: 'small:mlp', train: {{epochs: 1}}, weights: {folder / 't' / 'model.safetensors'}}}\n"
        "student: {model: 'small:mlp', train: {epochs: 1}}\n"
    )
    return recipe
