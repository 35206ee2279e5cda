"""`kdcache doctor` of a pipeline of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers.cli import ok
from helpers.texts import RECORDS, write_lines, write_pipeline, write_tokenizer

from kdcache import open_cache
from kdcache.cli import main

STUDENT = """
student:
  model: transformers:llama
  args: {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2, bos_token_id: 1,
         eos_token_id: 2, max_position_embeddings: 64}
  train: {batch_tokens: 96}
"""


@pytest.fixture
def pipeline(text_teacher: Path, tmp_path: Path) -> Path:
    path = write_pipeline(tmp_path / "p.yaml", write_lines(tmp_path / "text.jsonl", RECORDS), text_teacher)
    path.write_text(path.read_text() + STUDENT)
    return path


def doctor(pipeline: Path, *given: str) -> tuple[int, dict[str, str], str]:
    """Exit code, what was found by name, and what was said of the first problem."""
    sets = [part for one in given for part in ("--set", one)]
    arguments = ["doctor", str(pipeline), "-o", str(pipeline.parent), "--json", "--device", "cpu", *sets]
    done = CliRunner().invoke(main, arguments)
    told = json.loads(done.stdout)
    assert told["ok"] == (done.exit_code == 0)
    return done.exit_code, {check["name"]: check["result"] for check in told["checks"]}, done.stderr


def test_what_is_well_is_said_and_the_cache_is_as_large_as_said(pipeline: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, found, _ = doctor(pipeline)
    assert code == 0
    assert list(found)[-3:] == ["text", "teacher", "student"]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
    ok("dump-teacher", pipeline, "-o", tmp_path / "c.kdcache", "--device", "cpu")
    cache = open_cache(tmp_path / "c.kdcache")
    assert cache.manifest.plan.sequences is not None
    tokens = sum(cache.manifest.plan.sequences.tokens)
    assert found["text"].startswith(f"text: {len(cache)} sequences of up to 48 tokens, {tokens:,} in all; 400 tokens")
    said = float(found["teacher"].partition("estimated cache: ")[2].split()[0])
    stored = sum(path.stat().st_size for path in (tmp_path / "c.kdcache").rglob("*") if path.is_file())
    assert said == pytest.approx(stored / 1e6, rel=0.5)
    parameters = 2 * 400 * 16 + 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16  # tokens, attention, gated layers, norms
    assert found["student"].startswith(f"{parameters:,} parameters, ")


PROBLEMS = {
    "dataset.root=nowhere.jsonl": (2, "text", "file not found: nowhere.jsonl"),
    "dataset.max_length=99": (4, "text", "sequences have up to 99 tokens, and LlamaForCausalLM takes 64"),
    "teacher.model=hf:nowhere": (2, "text", "file not found: nowhere"),
    "cache.rank=99": (2, "text", "rank"),
    "student.args.max_position_embeddings=20": (4, "student", "up to 48 tokens, and LlamaForCausalLM takes 20"),
    "student.args.vocab_size=300": (4, "student", "the vocabulary of the teacher has 400 tokens"),
    "student.args.hidden_sise=8": (2, "student", "hidden_sise"),
    "student.train.trackers=[aim]": (2, "student", "the tracker aim is not installed"),
    "student.train.epochs=0": (2, "pipeline", "student.train.epochs"),
}


@pytest.mark.parametrize(("given", "expected"), PROBLEMS.items(), ids=PROBLEMS)
def test_what_is_not_well_is_named(given: str, expected: tuple[int, str, str], pipeline: Path) -> None:
    code, what, words = expected
    found_code, found, said = doctor(pipeline, given)
    assert (found_code, words in found[what], words in said) == (code, True, True), (found, said)


def test_a_student_with_another_tokenizer_is_found(pipeline: Path, text_teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_tokenizer(other, size=350)
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((text_teacher / name).read_bytes())
    code, found, _ = doctor(pipeline, f"student.model=hf:{other}", "student.args={}")
    assert code == 4
    assert f"in {other}" in found["student"]
    assert "tokenizer of the teacher" in found["student"]


def test_a_batch_that_does_not_fit_says_how_it_becomes_smaller(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory: tried to allocate 2 GiB")

    monkeypatch.setattr("kdcache.dump.tokens.estimate.run_pilot", too_large)
    monkeypatch.setattr("kdcache.doctor_text.chunked_loss", too_large)
    code, found, said = doctor(pipeline)
    assert code == 4
    assert "tried to allocate" in found["teacher"] and "tried to allocate" in found["student"]
    assert "cache.batch_tokens" in said and "micro_batch_tokens" in said


def test_a_student_alone_is_not_checked(pipeline: Path) -> None:
    text = pipeline.read_text().splitlines()
    pipeline.write_text("\n".join(line for line in text if not line.startswith("teacher")))
    code, found, _ = doctor(pipeline)
    assert (code, found["teacher"].startswith("none in the pipeline")) == (0, True)
