"""A tiny pipeline whose student draws from every random generator, and may do anything in a chosen step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result

from kdcache.cli import main

EPOCHS, STEPS = 3, 5  # of 84 images in batches of 20

CODE = """
import os, random, numpy, torch
from torch import nn
from torch.nn import functional as F

class Teacher(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.register_buffer("weight", torch.randn(16, num_classes, generator=torch.Generator().manual_seed(1)))

    def forward(self, images):
        return images.flatten(1) @ self.weight

class Student(nn.Module):
    # Draws from every generator there is.
    def __init__(self, num_classes, width=12, changes_images=False, fails_at=-1):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.ReLU())
        self.classifier = nn.Linear(width, num_classes)
        self.changes_images, self.fails_at, self.steps = changes_images, fails_at, 0
        random.seed(1)
        numpy.random.seed(1)

    def forward(self, images):
        if self.changes_images:
            images.mul_(0.5).sub_(1)
        logits = self.classifier(self.layers(images.flatten(1)))
        if self.training:
            self.steps += 1
            logits = logits + 0.1 * (random.random() + numpy.random.normal())
            if self.steps == self.fails_at:
                exec(os.environ["HAPPENS"])
        return logits

calls = 0

def fails_in_step_3(student_logits, teacher_logits, labels):
    global calls
    calls += 1
    if calls == 3:
        raise ValueError("no more")
    return F.mse_loss(student_logits, teacher_logits, reduction="none").mean(1)
"""


def write_home(folder: Path) -> Path:
    """Write a pipeline over 120 images in two views, `tiny.yaml`, and its cache, `tiny.kdcache`."""
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 9, (120, 4, 4), np.uint8), draw.integers(0, 5, 120)
    np.savez(folder / "tiny.npz", images=images, labels=labels)
    (folder / "code.py").write_text(CODE)
    (folder / "tiny.yaml").write_text(
        f"dataset: {{name: npz, root: {folder / 'tiny.npz'}, validation_fraction: 0.2, test_fraction: 0.1}}\n"
        "transform: [RandomHorizontalFlip: {p: 0.5}, ToDtype: {dtype: float32}]\n"
        "eval_transform: [ToDtype: {dtype: float32}]\n"
        f"teacher: {{model: '{folder / 'code.py'}:Teacher'}}\n"
        "cache: {views: 2, seed: 3}\n"
        "student:\n"
        f"  model: '{folder / 'code.py'}:Student'\n"
        f"  train: {{epochs: {EPOCHS}, batch_size: 20, lr: 0.1, view_order: random, seed: 5}}\n"
    )
    done = command("dump-teacher", folder / "tiny.yaml", "-o", folder / "tiny.kdcache")
    assert done.exit_code == 0, done.output
    return folder


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a run folder, but for how long it took."""
    held: dict[str, Any] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    metrics = json.loads(held["metrics.json"])
    assert metrics.pop("seconds") > 0
    return {**held, "metrics.json": metrics}
