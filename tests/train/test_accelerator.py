"""Settings of accelerate in the environment change no result: the pipeline alone decides."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers.paths import ROOT
from helpers.tiny import tiny_samples
from torch import Tensor, nn

from kdcache.cli import main
from kdcache.config.schema import TrainSpec
from kdcache.data.views import View
from kdcache.errors import UsageError
from kdcache.losses import Loss
from kdcache.train.accelerator import ignored_settings
from kdcache.train.step import Trainer

SETTINGS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "true",
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_FP8_BACKEND": "TE",
    "ACCELERATE_CONFIG_DS_FIELDS": "x",
}

LAUNCHERS = {
    "PMI_SIZE": "2",
    "PMI_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "MPI_LOCALNRANKS": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "3",
    "FORK_LAUNCHED": "1",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
    "FSDP_OFFLOAD_PARAMS": "true",
}
"""What mpirun, srun and parts of other launchers leave, where torchrun started nothing."""


def trained() -> list[Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    samples = tiny_samples(37)
    spec = TrainSpec(batch_size=13, lr=0.1)
    trainer = Trainer(model, spec, Loss.model_validate({"name": "ce"}), len(samples))
    assert trainer.accelerator.mixed_precision == "no"
    assert trainer.accelerator.gradient_accumulation_steps == 1
    assert trainer.accelerator.state.dynamo_plugin.backend.value == "NO"
    for epoch in (1, 2):
        trainer.epoch(View(samples, []), epoch)
    return [copy.deepcopy(value.detach()) for value in model.parameters()]


@pytest.mark.parametrize("name", [*sorted(SETTINGS.keys() - {"ACCELERATE_FP8_BACKEND"}), *LAUNCHERS])
def test_a_setting_of_the_environment_changes_no_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained()
    monkeypatch.setenv(name, {**SETTINGS, **LAUNCHERS}[name])
    for ours, theirs in zip(trained(), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert os.environ[name] == {**SETTINGS, **LAUNCHERS}[name], "it is put back"


def train(out: Path, *more: object) -> Any:
    arguments = ["train-student", ROOT / "pipelines" / "digits.yaml", "--loss", "ce", "-o", out, "--device", "cpu"]
    return CliRunner().invoke(main, [*map(str, [*arguments, "--set", "student.train.epochs=1", *more])])


def test_a_run_is_the_same_and_records_what_it_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers = ("--set", "student.train.trackers=[tensorboard]")  # these create an Accelerator of their own
    assert train(tmp_path / "plain", *trackers).exit_code == 0
    for name, value in {**SETTINGS, **LAUNCHERS, "ACCELERATE_MIXED_PRECISION": "fp8"}.items():
        monkeypatch.setenv(name, value)
    done = train(tmp_path / "set", *trackers)
    assert done.exit_code == 0, done.output
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 (use train.gradient_accumulation_steps)" in done.stderr
    for name in ("model.safetensors", "metrics.csv"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    plain, settings = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("plain", "set"))
    assert plain["ignored_environment"] == {}
    assert settings["ignored_environment"] == {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "fp8",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_TORCH_DEVICE": "meta",
    }
    assert {name: os.environ[name] for name in LAUNCHERS} == LAUNCHERS, "they are put back"


def test_what_accelerate_launch_sets_by_default_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_USE_CPU": "False",
        "ACCELERATE_USE_FSDP": "false",
    }.items():
        monkeypatch.setenv(name, value)
    assert ignored_settings() == {}


def test_sharding_of_the_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="asks for FSDP"):
        ignored_settings()
    assert train(tmp_path / "run").exit_code == 2
    assert list(tmp_path.iterdir()) == []
