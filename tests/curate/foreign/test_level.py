"""Losses that need the level of the logits, and caches of which it is unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.foreign import (
    CLASSES,
    Images,
    from_fkd,
    kdcache,
)

from kdcache.losses import Loss, distillation_loss
from kdcache.losses.batch import batch_totals
from kdcache.losses.presets import PARTS

LOSSES: list[dict[str, Any]] = [
    *({"name": name} for name in ["ce", *PARTS, "zscore+dtkd", "zscore+mse", "dtkd+dkd", "ka+dtd", "dtkd+mse"]),
    *({"name": name, "temperature": {"center": True}} for name in ("dtkd", "dtkd+mse", "dtkd+dist")),
]


@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_what_needs_the_level_is_what_changes_with_it(settings: dict[str, Any]) -> None:
    if settings["name"] == "truncated":
        settings = settings | {"adjustment": {"top": 5}}
    loss = Loss.model_validate(settings)
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(16, CLASSES, generator=random, dtype=torch.float64) * 3 for _ in "vu")
    labels, theta = torch.arange(16) % CLASSES, torch.ones(1, dtype=torch.float64)
    level = torch.linspace(-5, 5, 16, dtype=torch.float64).unsqueeze(1)
    ring = torch.stack([torch.arange(16), (torch.arange(16) + 1) % 16])
    whole = batch_totals(labels, dtype=torch.float64)._replace(edges=ring)
    one, two = (
        distillation_loss(student, logits, labels, loss, 20, theta=theta, whole=whole).total
        for logits in (teacher, teacher + level)
    )
    changes = bool((one - two).abs() > 1e-6 * one.abs())
    assert changes == (loss.needs_level is not None)


def test_losses_that_need_the_level_are_refused_and_centered_ones_train(images: Images, tmp_path: Path) -> None:
    cache = from_fkd(images, tmp_path)
    pipeline = images.write("fraction")
    for name, what in (("dtkd", "temperature dtkd"), ("dtd", "dtd_flsw"), ("mse", "divergence mse")):
        done = kdcache("train-student", pipeline, "--cache", cache.path, "-o", tmp_path / "no", "--loss", name)
        assert done.exit_code == 2
        assert "only its probabilities were imported" in done.stderr
        assert what in done.stderr
        assert not (tmp_path / "no").exists()
    centered = ["--loss", "dtkd", "--set", "loss.temperature.center=true"]
    for number, loss in enumerate(
        (["--loss", "zscore+ka"], centered, ["--loss", "truncated", "--set", "loss.adjustment.top=5"])
    ):
        done = kdcache("train-student", pipeline, "--cache", cache.path, "-o", tmp_path / f"run{number}", *loss)
        assert done.exit_code == 0, done.output
