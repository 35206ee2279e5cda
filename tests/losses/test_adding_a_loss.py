"""A new divergence is one file and one line of the registry: everything else reads the traits of its options."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kdcache

JEFFREYS = '''
"""Jeffreys' divergence."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kdcache.losses.divergences import kl
from kdcache.losses.options import DivergenceOptions, Presets


def jeffreys(student_scaled: Tensor, teacher_scaled: Tensor, labels: Tensor, share: float = 0.5) -> Tensor:
    """Return share * KL(p || q) + (1 - share) * KL(q || p) of each sample (Jeffreys 1946)."""
    forward, backward = kl(student_scaled, teacher_scaled, labels), kl(teacher_scaled, student_scaled, labels)
    return share * forward + (1 - share) * backward


class Jeffreys(DivergenceOptions):
    """Options of `jeffreys`."""

    compute = staticmethod(jeffreys)
    presets: ClassVar[Presets] = {"jeff": {"kd_weight": 0.25}}
    infinite_at_zeros = True

    kind: Literal["jeffreys"] = "jeffreys"
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
'''

TRIAL = """
import json, sys
import torch
from pydantic import ValidationError
import kdcache
from kdcache.losses import Loss, distillation_loss
from kdcache.losses.divergences import kl

recipe, out = sys.argv[1:]
def pipeline(*overrides):
    return kdcache.load_pipeline(recipe, ["student.train.epochs=1", *overrides])

generator = torch.Generator().manual_seed(0)
v, u = (torch.randn(6, 10, generator=generator, dtype=torch.float64) for _ in range(2))
labels = torch.arange(6)
loss = pipeline("loss.name=jeff", "loss.ce_weight=0.0", "loss.divergence.share=0.25").loss
value = distillation_loss(v, u, labels, loss).total
expected = 0.25 * 16 * (0.25 * kl(v / 4, u / 4, labels) + 0.75 * kl(u / 4, v / 4, labels)).mean()
try:
    Loss.model_validate({"name": "jeff+truncated"})
    refused = ""
except ValidationError as error:
    refused = str(error)
samples = kdcache.load_split(pipeline().dataset, "train")
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
cache = kdcache.dump_teacher(model, samples, out + "/digits.kdcache")
kdcache.train_student(pipeline("loss.name=jeff+ka"), cache, out + "/run")
print(json.dumps({"value": value.item(), "expected": expected.item(), "refused": refused, "file": kdcache.__file__}))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with a file and a line more."""
    source = Path(kdcache.__file__).parent
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(source, folder / "kdcache", ignore=shutil.ignore_patterns("__pycache__"))
    for data in ("data", "pipelines"):
        (folder / data).symlink_to(source.parent / data)
    (folder / "kdcache" / "losses" / "jeffreys.py").write_text(JEFFREYS)
    registry = folder / "kdcache" / "losses" / "registry.py"
    line = '    "kl": divergences.KL,\n'
    text = registry.read_text().replace(line, line + '    "jeffreys": jeffreys.Jeffreys,\n')
    text = text.replace("    divergences,\n", "    divergences,\n    jeffreys,\n")
    assert text.count("jeffreys") == 3
    registry.write_text(text)
    return folder


def test_a_new_divergence_is_named_checked_computed_and_trained_with(copy: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRIAL, str(copy / "pipelines" / "digits.yaml"), str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["file"] == str(copy / "kdcache" / "__init__.py")
    assert result["value"] == pytest.approx(result["expected"], rel=1e-12)
    assert "jeffreys is infinite where truncation leaves the teacher no probability" in result["refused"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["loss"] == "jeff+ka"
