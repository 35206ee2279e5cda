"""README and guides do what they say: their commands run, their Python runs, and they print what is shown."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.forked import captured, command, script
from helpers.paths import ROOT
from helpers.processes import PATIENCE

from kdcache.cli import main
from kdcache.config.loader import load_any_pipeline
from kdcache.config.schema import EnsembleSpec, Pipeline
from kdcache.demo import digits

# FORMAT.md, FIDELITY.md and PERFORMANCE.md show what takes long or is compared elsewhere; the others have no commands.
GUIDES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "DUMPING",
            "TRAINING",
            "GRAPHS",
            "LANGUAGE_MODELS",
            "SEGMENTATION",
            "EVALUATION",
            "CACHE",
            "SHARING",
            "IMPORT_EXPORT",
        )
    ),
    "docs/PIPELINES.md",
    "docs/EXTENDING.md",
]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def shown_files(text: str) -> dict[str, str]:
    """Return the files that a document shows, by path: blocks whose first line is a comment with the path."""
    block = r"^```(?:python|yaml)\n# ([\w/]+\.(?:py|yaml))\n(.*?)^```$"
    return dict(re.findall(block, text, flags=re.MULTILINE | re.DOTALL))


def shorten(recipe: Path, epochs: dict[str, str]) -> None:
    """Make the networks of a recipe train for fewer epochs: no test here looks at how good they are."""
    text = recipe.read_text()
    for before, after in epochs.items():
        assert before in text
        text = text.replace(before, after)
    recipe.write_text(text)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a clone to a document's commands, with `pip` and `pytest` already run."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("data", "benchmarks", "tests", "examples", "docs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "pipelines", folder / "pipelines")
    shorten(folder / "pipelines" / "digits.yaml", {"epochs: 30,": "epochs: 3,", "epochs: 60,": "epochs: 3,"})
    shorten(folder / "pipelines" / "scenes.yaml", {"epochs: 30,": "epochs: 1,"})
    tools = folder / ".tools"
    tools.mkdir()
    for name in ("pip", "pytest"):
        (tools / name).write_text('#!/bin/sh\necho "$0 $@" >> "$(dirname "$0")/called"\n')
        (tools / name).chmod(0o755)
    return folder


def run(line: str, folder: Path) -> str:
    """Run a command of a block: those of kdcache and of Python in forks, which need not import."""
    name, *arguments = shlex.split(line)
    if name == "kdcache":
        done = captured(without_benchmarks, folder, arguments, cwd=folder)
    elif name == "python":
        done = captured(script, folder / arguments[0], *arguments[1:], cwd=folder)
    else:
        path = os.pathsep.join([str(folder / ".tools"), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-euc", line],
            cwd=folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
    assert done.returncode == 0, (line, done.stdout + done.stderr)
    assert "Warning" not in done.stderr, (line, done.stderr)
    if "-o" in arguments and "--dry-run" not in arguments:
        assert (folder / arguments[arguments.index("-o") + 1]).exists(), line
    return done.stdout + done.stderr


def run_block(block: str, folder: Path) -> str:
    text = block.replace("\\\n", "").replace("$PWD", str(folder))
    if "<<" in text:  # a here-document is of several lines
        return run(text, folder)
    return "".join(run(command, folder) for line in text.splitlines() for command in line.split(" && "))


def without_benchmarks(folder: Path, arguments: list[str]) -> None:
    """Run a command; no test here looks at how fast a network is, or how good those of the demo are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "package_data", folder.joinpath)
        command(*arguments)


def names_of_lines(text: str) -> list[str]:
    """What each line is about: all of it up to two spaces, where its figures begin."""
    return [line.strip().split("  ")[0] for line in text.splitlines()]


@pytest.mark.parametrize("name", GUIDES)
def test_every_block_runs_in_order_and_prints_what_is_shown(name: str, checkout: Path) -> None:
    text, printed = read(name), ""
    files = shown_files(text)
    for path, content in files.items():
        if "/" not in path:
            (checkout / path).write_text(content)
    for block in blocks("bash", text):
        printed += run_block(block, checkout)
    for number, block in enumerate(blocks("python", text)):
        if block.partition("\n")[2] in files.values():
            continue
        program = checkout / f"block{number}.py"
        program.write_text(block)
        done = captured(script, program, cwd=checkout)
        assert done.returncode == 0, done.stdout + done.stderr
    for block in blocks("text", text):
        assert set(names_of_lines(block)) <= set(names_of_lines(printed))
    if name == "README.md":
        assert (checkout / ".tools" / "called").read_text().count("install -e") == 2
        assert (checkout / "kdcache-demo" / "demo.png").stat().st_size > 10_000


def test_adding_a_loss_is_shown_as_it_is_tested() -> None:
    text, tested = read("docs/EXTENDING.md"), read("tests/losses/test_adding_a_loss.py")
    assert shown_files(text)["kdcache/losses/jeffreys.py"] in tested
    (line,) = re.findall(r"^```\n(.+)\n```$", text, flags=re.MULTILINE)
    assert line in tested


def test_yaml_blocks_are_good_pipelines(tmp_path: Path) -> None:
    found = []
    for block in blocks("yaml", "\n".join(map(read, GUIDES))):
        dataset = "" if "dataset:" in block else "dataset: {name: cifar100}\n"
        (tmp_path / "pipeline.yaml").write_text(dataset + block)
        found.append(load_any_pipeline(tmp_path / "pipeline.yaml"))
    of_images = [pipeline for pipeline in found if isinstance(pipeline, Pipeline)]
    assert len(of_images) < len(found)
    assert any(pipeline.cache.views == 10 for pipeline in of_images)
    assert any(isinstance(pipeline.teacher, EnsembleSpec) for pipeline in of_images)


def test_commands_that_need_more_than_is_here_are_ones_that_can_be_given() -> None:
    """Those that are only indented need GPUs or downloads: each is parsed, and not run."""
    text = "\n".join(map(read, GUIDES))
    lines = [line.split() for line in text.splitlines() if re.match(r"    (kdcache|torchrun) ", line)]
    assert len(lines) >= 13
    for line in lines:
        _, command, *arguments = line[line.index("kdcache") :]
        there = {
            "PIPELINE": str(ROOT / "pipelines" / "digits.yaml"),
            "docs/RESULTS.md": str(ROOT / "docs" / "RESULTS.md"),
        }
        main.commands[command].make_context(command, [there.get(argument, argument) for argument in arguments])


def test_the_first_screen_has_the_two_commands() -> None:
    screen = read("README.md").splitlines()
    assert len(screen) <= 170
    assert "pip install -e . && kdcache demo" in screen[:25]
    assert "pip install -e '.[test]' && pytest" in screen[:25]
    assert "pip install -e '.[test]' && pytest" in read(".ci/run")
