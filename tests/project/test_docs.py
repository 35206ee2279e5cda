"""The README does what it says: its commands run, its Python runs, its tables are the code's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any

import pytest
import yaml
from helpers.paths import ROOT
from helpers.processes import command_line, exit_code, in_a_process
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from kdcache.cli import main
from kdcache.config.loader import load_pipeline
from kdcache.config.schema import EnsembleSpec, Pipeline, StudentSpec
from kdcache.evaluation import scorecard
from kdcache.losses.config import Loss
from kdcache.losses.presets import PARTS

README, PIPELINES, LOSSES = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/PIPELINES.md", "docs/LOSSES.md")
)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone to the README's commands, with `pip` and `pytest` already run."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("pipelines", "data", "benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    tools = folder / ".tools"
    tools.mkdir()
    for name in ("pip", "pytest"):
        (tools / name).write_text('#!/bin/sh\necho "$0 $@" >> "$(dirname "$0")/called"\n')
        (tools / name).chmod(0o755)
    return folder


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(folder / ".tools"), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def run_in_forks(block: str, folder: Path) -> None:
    """A block that has but `kdcache` commands: each in a process of its own, forked so that it need not import."""
    for line in block.replace("\\\n", "").replace("$PWD", str(folder)).splitlines():
        name, *arguments = shlex.split(line)
        assert name == "kdcache"
        said = folder / ".tools" / "said"
        process = in_a_process(impatient, said, folder, arguments)
        assert exit_code(process, 400) == 0, (line, said.read_text())
        assert "Warning" not in said.read_text(), (line, said.read_text())
        said.unlink()
        if "-o" in arguments and "--dry-run" not in arguments:
            assert (folder / arguments[arguments.index("-o") + 1]).exists(), line


def impatient(said: Path, folder: Path, arguments: list[str]) -> None:
    """A command as if typed in that folder; how fast a network is, no test here looks at."""
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorecard, "score_networks", partial(scorecard.score_networks, min_run_time=0.0))
        command_line(said, {}, *arguments)


def names_of_lines(text: str) -> list[str]:
    """What each line is about: all of it up to two spaces, where its figures begin."""
    return [line.strip().split("  ")[0] for line in text.splitlines()]


def test_every_command_runs_in_order_and_prints_what_the_readme_shows(checkout: Path) -> None:
    printed = ""
    for block in blocks("bash"):
        if block.startswith("kdcache "):
            run_in_forks(block, checkout)
        else:
            printed += run(["bash", "-euc", block], checkout)
    assert (checkout / ".tools" / "called").read_text().count("install -e") == 2
    assert names_of_lines(blocks("text")[0]) == names_of_lines(printed)
    benchmark = next(block for block in blocks("text") if block.startswith("300 classes"))
    assert names_of_lines(run([sys.executable, "benchmarks/fidelity.py"], checkout)) == names_of_lines(benchmark)
    assert (checkout / "kdcache-demo" / "demo.png").stat().st_size > 10_000
    assert (checkout / "runs" / "digits-ka" / "model.safetensors").is_file()
    for number, block in enumerate(blocks("python")):
        script = checkout / f"block{number}.py"
        script.write_text(block)
        run([sys.executable, "-W", "error", str(script)], checkout)


def test_yaml_blocks_are_good_pipelines(tmp_path: Path) -> None:
    read = []
    for block in blocks("yaml", README + PIPELINES):
        dataset = "" if "dataset:" in block else "dataset: {name: cifar100}\n"
        (tmp_path / "pipeline.yaml").write_text(dataset + block)
        read.append(load_pipeline(tmp_path / "pipeline.yaml"))
    assert any(pipeline.cache.views == 10 for pipeline in read)
    assert any(isinstance(pipeline.teacher, EnsembleSpec) for pipeline in read)


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, what it means, default) of every key of a pipeline file."""
    for name, field in section.model_fields.items():
        if name == "student":  # whose other keys are the teacher's
            own = StudentSpec.model_fields["transform"]
            yield "`student.transform`", " ".join((own.description or "").split()), ""
            continue
        inner = _sections(field.annotation)
        if not inner:
            yield (
                f"`{prefix}{name}`",
                " ".join((field.description or "").split()),
                _default(section, name, field.default),
            )
        for one in inner:
            yield from keys(one, f"{prefix}{name}.")


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a key may hold; none for a value, or for options of which `kind` says which are meant."""
    options = annotation.__args__ if isinstance(annotation, UnionType) else (annotation,)
    return [
        kind
        for kind in options
        if isinstance(kind, type) and issubclass(kind, BaseModel) and "kind" not in kind.model_fields
    ]


def _default(section: type[BaseModel], name: str, default: Any) -> str:
    if section is Loss and name != "name":
        return "by name"
    if default is PydanticUndefined:
        return "" if section is EnsembleSpec else "required"  # which stands in the place of a single teacher
    return f"`{yaml.safe_dump(default).splitlines()[0]}`" if default not in (None, "", [], {}) else ""


def test_the_table_of_keys_is_the_schema() -> None:
    table = "\n".join(f"| {key} | {meaning} | {default} |" for key, meaning, default in keys(Pipeline))
    assert table in PIPELINES, f"put this table into docs/PIPELINES.md:\n{table}"


def _options(axis: Any) -> str:
    said = ", ".join(f"{key} {value}" for key, value in axis.arguments().items())
    return f"{axis.kind}: {said}" if said else str(axis.kind)


def test_the_table_of_loss_names_is_what_they_stand_for() -> None:
    rows = []
    for name in ("ce", *PARTS):
        loss = Loss.model_validate({"name": name})
        axes = (loss.temperature, loss.adjustment, loss.divergence)
        said = [_options(axis) for axis in axes if axis.kind not in ("none", "kl")]
        said += [f"normalization {loss.normalization}"] * (loss.normalization != "none")
        weights = (loss.ce_weight, loss.kd_weight, loss.plain_kd_weight, loss.warmup_epochs)
        rows.append(f"| `{name}` | " + " | ".join(f"{value:g}" for value in weights) + f" | {'; '.join(said)} |")
    table = "\n".join(rows)
    assert table in LOSSES, f"put this table into docs/LOSSES.md:\n{table}"


def test_commands_that_need_more_than_is_here_are_ones_that_can_be_given() -> None:
    """Those that are only indented need GPUs or downloads: each is parsed, and not run."""
    lines = [line.split() for line in README.splitlines() if re.match(r"    (kdcache|torchrun) ", line)]
    assert len(lines) >= 7
    for line in lines:
        _, command, *arguments = line[line.index("kdcache") :]
        there = {
            "PIPELINE": str(ROOT / "pipelines" / "digits.yaml"),
            "docs/RESULTS.md": str(ROOT / "docs" / "RESULTS.md"),
        }
        main.commands[command].make_context(command, [there.get(argument, argument) for argument in arguments])


def test_the_first_screen_has_the_two_commands() -> None:
    screen = README.splitlines()[:25]
    assert "pip install -e . && kdcache demo" in screen
    assert "pip install -e '.[test]' && pytest" in screen
    assert "pip install -e '.[test]' && pytest" in (ROOT / ".ci" / "run").read_text()
