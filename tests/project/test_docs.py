"""README and guides do what they say: their commands run, their Python runs, and they print what is shown."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.processes import PATIENCE, command_line, exit_code, in_a_process

from kdcache.cli import main
from kdcache.config.loader import load_pipeline
from kdcache.config.schema import EnsembleSpec
from kdcache.evaluation import scorecard

# FORMAT.md, FIDELITY.md and PERFORMANCE.md show what takes long or is compared elsewhere; the others have no commands.
GUIDES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("DUMPING", "TRAINING", "GRAPHS", "EVALUATION", "CACHE", "SHARING", "IMPORT_EXPORT")
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


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a clone to a document's commands, with `pip` and `pytest` already run."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("pipelines", "data", "benchmarks", "tests", "examples", "docs"):
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
        command,
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def run_in_forks(block: str, folder: Path) -> str:
    """Run a block of `kdcache` commands, each in its own process, forked so that it need not import."""
    printed = ""
    for line in block.replace("\\\n", "").replace("$PWD", str(folder)).splitlines():
        name, *arguments = shlex.split(line)
        assert name == "kdcache"
        output = folder / ".tools" / "output"
        process = in_a_process(without_benchmarks, output, folder, arguments)
        assert exit_code(process) == 0, (line, output.read_text())
        assert "Warning" not in output.read_text(), (line, output.read_text())
        printed += output.read_text()
        output.unlink()
        if "-o" in arguments and "--dry-run" not in arguments:
            assert (folder / arguments[arguments.index("-o") + 1]).exists(), line
    return printed


def without_benchmarks(output: Path, folder: Path, arguments: list[str]) -> None:
    """Run a command as if typed in that folder; no test here looks at how fast a network is."""
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorecard, "score_networks", partial(scorecard.score_networks, min_run_time=0.0))
        command_line(output, {}, *arguments)


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
        ours = block.startswith("kdcache ")
        printed += run_in_forks(block, checkout) if ours else run(["bash", "-euc", block], checkout)
    for number, block in enumerate(blocks("python", text)):
        if block.partition("\n")[2] in files.values():
            continue
        script = checkout / f"block{number}.py"
        script.write_text(block)
        run([sys.executable, "-W", "error", str(script)], checkout)
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
        found.append(load_pipeline(tmp_path / "pipeline.yaml"))
    assert any(pipeline.cache.views == 10 for pipeline in found)
    assert any(isinstance(pipeline.teacher, EnsembleSpec) for pipeline in found)


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
