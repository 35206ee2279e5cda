"""`kdcache demo --tokens`: each figure is that of a computation apart, and what is finished is not made again."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.cli import ok, refused
from helpers.paths import ROOT, TESTS
from helpers.processes import PATIENCE, until
from helpers.token_demo import SMALL, small_demo
from torch import Tensor

from kdcache.cli import demo_tokens
from kdcache.demo import text_teacher, tokens
from kdcache.demo.tokens import LOSSES, TokenDemo, as_record
from kdcache.errors import InterruptedRun, MismatchError, UsageError
from kdcache.runtime.progress import Silent


class Home(NamedTuple):
    """A demo that is complete."""

    folder: Path
    results: TokenDemo


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("token-demo") / "demo"
    return Home(folder, small_demo(folder))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command run the small demo."""
    monkeypatch.setattr(tokens, "TokenDemoSizes", lambda: SMALL)


def held_out(folder: Path) -> Iterator[Tensor]:
    """Yield the held-out texts in windows of 128 tokens, each of which begins with the last of the one before it."""
    tokenizer = import_module("tokenizers").Tokenizer.from_file(str(folder / "teacher" / "tokenizer.json"))
    for line in (folder / "texts" / "held-out.jsonl").read_text().splitlines():
        ids = tokenizer.encode(json.loads(line)["text"]).ids
        for start in range(0, len(ids) - 1, 127):
            yield torch.tensor(ids[start : start + 128])


def network(folder: Path) -> Any:
    return import_module("transformers").LlamaForCausalLM.from_pretrained(folder).double().eval()


class Measured(NamedTuple):
    perplexity: float
    kl: float
    agreement: float
    positions: int


@torch.no_grad()
def measured(folder: Path, run: Path) -> Measured:
    """Measure a network in float64, one sequence at a time."""
    teacher, student = network(folder / "teacher"), network(run)
    nll, kl, same, count = 0.0, 0.0, 0, 0
    for ids in held_out(folder):
        p, q = (each(input_ids=ids[None]).logits[0, :-1].softmax(dim=1) for each in (teacher, student))
        nll -= float(q[torch.arange(len(ids) - 1), ids[1:]].log().sum())
        kl += float((p * (p / q).log()).sum())
        same += int((p.argmax(dim=1) == q.argmax(dim=1)).sum())
        count += len(ids) - 1
    return Measured(math.exp(nll / count), kl / count, same / count, count)


def test_a_student_has_the_figures_of_a_computation_apart(home: Home) -> None:
    student = home.results.students[-1]
    apart = measured(home.folder, Path(student.run) / "model")
    assert student.perplexity == pytest.approx(apart.perplexity, rel=1e-4)
    assert student.kl == pytest.approx(apart.kl, rel=1e-3)
    assert student.agreement == pytest.approx(apart.agreement, abs=2 / apart.positions)
    assert home.results.held_out_positions == apart.positions


def test_the_teacher_has_the_perplexity_of_a_computation_apart(home: Home) -> None:
    apart = measured(home.folder, home.folder / "teacher")
    assert home.results.teacher_perplexity == pytest.approx(apart.perplexity, rel=1e-4)


def test_the_bytes_are_those_of_the_arrays_on_the_disk(home: Home) -> None:
    rows = home.folder / tokens.CACHE / "data.zarr" / "outputs" / "next_token"

    def stored(*names: str) -> float:
        files = (path for name in names for path in (rows / name).rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files) / home.results.positions

    head = ("log_probs", "indices")
    assert home.results.bytes_per_token == {
        "kd-renormalized": stored(*head),
        "kd-ghost": stored(*head, "statistics"),
        "kd-lowrank": stored(*head, "statistics", "tail"),
    }
    assert min(home.results.bytes_per_token.values()) > 0


def test_there_is_a_student_of_each_loss_and_all_differ(home: Home) -> None:
    assert [student.student for student in home.results.students] == list(LOSSES)
    assert len({student.perplexity for student in home.results.students}) == len(LOSSES)


def test_the_table_shows_the_figures(home: Home, small: None) -> None:
    printed = ok("demo", "--tokens", "-o", home.folder, "--seeds", "1", "--device", "cpu")
    for student in home.results.students:
        (line,) = re.findall(rf"^student, {student.student} .*$", printed, re.MULTILINE)
        stored = home.results.bytes_per_token.get(student.student)
        shown = [f"{student.perplexity:.1f}", f"{student.kl:.3f}", f"{student.agreement:.1%}", f"{student.seconds:.1f}"]
        assert line.split()[2:] == ([] if stored is None else [f"{stored:.0f}"]) + shown
    assert f"{home.results.teacher_perplexity:.1f}" in printed
    assert "one seed" in printed


def test_several_seeds_have_a_mean_and_a_standard_deviation() -> None:
    assert demo_tokens.mean_and_spread([1.0, 2.0, 6.0], ".2f") == "3.00 ± 2.65"
    assert demo_tokens.mean_and_spread([0.5], ".0%") == "50%"


def test_the_same_command_returns_what_is_there(home: Home, small: None) -> None:
    before = {path: path.stat().st_mtime_ns for path in home.folder.rglob("*.safetensors")}
    found = json.loads(ok("demo", "--tokens", "-o", home.folder, "--seeds", "1", "--device", "cpu", "--json"))
    assert found == json.loads(json.dumps(as_record(home.results)))
    assert found == json.loads((home.folder / "demo.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in home.folder.rglob("*.safetensors")}
    assert (home.folder / tokens.PICTURE).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_pipeline_in_the_folder_is_that_of_the_cache(home: Home) -> None:
    pipeline, cache = home.folder / tokens.PIPELINE, home.folder / tokens.CACHE
    found = json.loads(ok("verify", cache, pipeline, "--replay", "--teacher", "--device", "cpu", "--json"))
    assert not found["problems"]


def same_figures(results: TokenDemo, others: TokenDemo) -> None:
    assert results.digest == others.digest
    for one, other in zip(results.students, others.students, strict=True):
        assert (one.student, one.seed) == (other.student, other.seed)
        assert one[3:6] == other[3:6]


def test_killed_in_stage_one_it_is_resumed_with_the_same_results(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    program = f"from pathlib import Path; from helpers.token_demo import small_demo; small_demo(Path({str(out)!r}))"
    path = os.pathsep.join([str(ROOT), str(TESTS)])
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path})
    until((out / "teacher").is_dir)
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    assert not (out / "demo.json").exists()
    same_figures(small_demo(out), home.results)


def test_interrupted_in_stage_two_it_keeps_the_students(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "train_on_sequences", interrupted)
        with pytest.raises(InterruptedRun, match="run the same command again to resume"):
            small_demo(out)
    kept = {path.parent for path in out.rglob("metrics.json")}
    assert len(kept) == len(LOSSES) - 1
    same_figures(small_demo(out), home.results)


def test_a_folder_of_something_else_is_refused(tmp_path: Path, small: None) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "exists" in refused(2, "demo", "--tokens", "-o", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_demo_of_other_settings_is_refused(home: Home) -> None:
    with pytest.raises(MismatchError, match="vocabulary was 280, and is 300 now"):
        tokens.run_token_demo(home.folder, 1, "cpu", Silent(), replace(SMALL, vocabulary=300))


@pytest.mark.parametrize("name", ["transformers", "tokenizers"])
def test_without_a_library_nothing_is_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"pip install 'kdcache\[lm\]'"):
        text_teacher.check_libraries()
    assert "kdcache[lm]" in refused(2, "demo", "--tokens", "-o", tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []
