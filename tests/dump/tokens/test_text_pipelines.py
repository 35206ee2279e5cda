"""Pipelines of text on the command line: what it prints, estimates and refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.cli import ok, refused
from helpers.texts import RECORDS, UNMARKED, write_lines, write_pipeline, write_teacher, write_tokenizer

from kdcache import Cache, open_cache


def test_what_is_printed_says_what_the_cache_is(pipeline: Path, cache: Cache) -> None:
    said = ok("dump-teacher", pipeline, "-o", cache.path, "--device", "cpu")  # it is complete
    assert said == ok("info", cache.path)
    lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in said.splitlines())
    assert lines["teacher"].startswith("hf:teacher, ")
    assert lines["data set"].startswith("texts/train, ")
    assert "of their positions with a row" in lines["tokens"]
    assert lines["vocabulary"].endswith("; bos 1, eos 2, pad 0") or lines["vocabulary"].endswith("; eos 2, pad 0")
    assert re.fullmatch(r"sha256:\w{12}\.\.\., chat template sha256:\w{12}\.\.\.", lines["tokenizer"])
    assert "top 4, tail of rank 6" in lines["output next_token"]
    teacher = cache.manifest.plan.teacher
    assert teacher.code_digest is not None
    assert json.loads(ok("info", cache.path, "--json"))["plan"]["teacher"]["name"] == "hf:teacher"


def test_a_cache_passes_all_checks_of_its_pipeline(pipeline: Path, cache: Cache) -> None:
    said = ok("verify", cache.path, pipeline, "--replay", "--teacher", "--rows", 60)
    assert "teacher   the same weights and configuration" in said
    assert re.search(r"tokens    [\d,]+ of \d+ sequences are those that the data set gives now", said)
    assert "Cached distributions against those of the live teacher, 60 rows" in said
    found = json.loads(ok("verify", cache.path, pipeline, "--replay", "--teacher", "--json"))
    assert found["ok"]
    assert [agreement["temperature"] for agreement in found["language_model"]] == [1.0, 2.0]
    assert found["replayed_text"]["sequences"] == len(cache)


def test_a_dry_run_estimates_and_writes_nothing(pipeline: Path, cache: Cache, tmp_path: Path) -> None:
    command = ("dump-teacher", pipeline, "-o", tmp_path / "d.kdcache", "--dry-run", "--device", "cpu")
    found = json.loads(ok(*command, "--json"))
    assert not list(tmp_path.iterdir())
    assert found["bytes"] == pytest.approx(cache.bytes_on_disk, rel=0.15)
    assert found["rows"] == sum(cache.manifest.plan.sequences.rows)  # type: ignore[union-attr]
    assert 0 < found["gradient_error"]["1"] < found["gradient_error"]["2"] < 1
    said = ok(*command)
    assert [line.split()[0] for line in said.splitlines()] == ["rows", "text", "error", "size", "time"]
    ghost, draws = (
        json.loads(ok(*command, "--json", "--set", f"cache.tail={tail}"))["gradient_error"]
        for tail in ("ghost", "draws")
    )
    assert list(ghost) == ["1", "2"]
    assert list(draws) == ["1"]


# Mistakes.


def check_refused(pipeline: Path, code: int, message: str, *arguments: object) -> None:
    out = pipeline.parent / "refused.kdcache"
    said = " ".join(refused(code, "dump-teacher", pipeline, "-o", out, "--device", "cpu", *arguments).split())
    assert re.search(message, said), said
    assert not list(pipeline.parent.glob("refused.kdcache*"))


def test_mistakes_in_a_pipeline_are_named_and_leave_nothing(pipeline: Path, tmp_path: Path) -> None:
    for setting, code, message in (
        ("dataset.max_length=100", 4, "up to 100 tokens, and LlamaForCausalLM takes 64 fix: set dataset.max_length"),
        ("dataset.root=nothing.jsonl", 2, "file not found: nothing.jsonl"),
        ("dataset.root=null", 2, "the pipeline names no texts"),
        ("dataset.tokenizer=nothing", 2, "nothing is not a folder"),
        ("dataset.format=messages", 2, r"texts.jsonl, line 1: it has the keys 'text', and none for messages"),
        ("dataset.name=texts", 2, r"Input should be .*, 'text' or path/file.py:function, did you mean text\?"),
        ("teacher.model=hf:nothing", 2, "file not found: nothing/config.json"),
        ("teacher.model=transformers:llama", 2, "is a new network with random weights"),
        ("teacher.model=llama", 2, "Input should be hf:FOLDER, transformers:TYPE or path/file.py:function"),
        ("cache.top_k=all", 2, "top_k"),
        ("cache.rank=500", 2, "rank 500, step 0.4 are impossible for 400 tokens"),
        ("cache.precision=int8", 2, "precision"),
    ):
        check_refused(pipeline, code, message, "--set", setting)
    check_refused(pipeline, 2, "--decode-images is for images", "--decode-images")
    check_refused(pipeline, 2, "--extend is for images", "--extend", tmp_path)


def test_another_tokenizer_than_the_teacher_s_is_refused(pipeline: Path, tmp_path: Path) -> None:
    other = write_tokenizer(tmp_path / "other", size=395)
    named = ("--set", f"dataset.tokenizer={other}")
    check_refused(pipeline, 4, r"has 395 tokens, and the tokenizer in .* has 400", *named)
    shutil.rmtree(other)
    file = write_tokenizer(other) / "tokenizer.json"
    a, b, placeholder = '"a": ', '"b": ', '"?a": '
    file.write_text(file.read_text().replace(a, placeholder).replace(b, a).replace(placeholder, b))
    check_refused(pipeline, 4, r"token \d+ is b'b' in the tokenizer in .*, and b'a' in the", *named)
    unmarked = write_tokenizer(tmp_path / "unmarked", UNMARKED)  # the same tokens with another template
    ok("dump-teacher", pipeline, "-o", tmp_path / "c.kdcache", "--set", f"dataset.tokenizer={unmarked}")


def test_a_tokenizer_of_more_tokens_than_the_head_is_refused(text_teacher: Path, tmp_path: Path) -> None:
    folder = write_teacher(tmp_path / "small", vocab_size=390)
    root = write_lines(tmp_path / "t.jsonl", RECORDS)
    pipeline = write_pipeline(tmp_path / "p.yaml", root, folder)
    check_refused(pipeline, 4, "small has 400 tokens, and the head of LlamaForCausalLM 390")


def test_what_changed_since_the_dump_is_found(pipeline: Path, cache: Cache, tmp_path: Path) -> None:
    changed = write_lines(tmp_path / "t.jsonl", [*RECORDS[:2], {"text": RECORDS[2]["text"][:-9]}, RECORDS[3]])
    said = refused(4, "verify", cache.path, pipeline, "--set", f"dataset.root={changed}")
    assert re.search(r"sequence \d+ (has|is)|token \d+ of sequence \d+ is|the cache has \d+ sequences", said)
    other = write_teacher(tmp_path / "other", seed=1)
    said = refused(4, "verify", cache.path, pipeline, "--teacher", "--set", f"teacher.model=hf:{other}")
    assert "this teacher has the weights sha256:" in said
    copy = shutil.copytree(str(pipeline.read_text().split("hf:")[1].split("'")[0]), tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    said = refused(4, "verify", cache.path, pipeline, "--teacher", "--set", f"teacher.model=hf:{copy}")
    assert "configuration or code has the digest" in said


def test_records_of_token_ids_need_no_tokenizer(text_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(text_teacher / name, folder)
    root = write_lines(tmp_path / "ids.jsonl", [{"input_ids": list(range(9 + n, 40))} for n in range(5)])
    out = tmp_path / "c.kdcache"
    ok("dump-teacher", write_pipeline(tmp_path / "p.yaml", root, folder), "-o", out, "--tail", "ghost")
    plan = open_cache(out).manifest.plan
    assert plan.sequences is not None
    assert (plan.sequences.vocabulary.size, plan.sequences.vocabulary.digest) == (412, None)


def test_a_network_of_the_user_is_a_teacher(text_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from transformers import AutoModelForCausalLM\n\n\n"
        "def teacher(folder):\n    return AutoModelForCausalLM.from_pretrained(folder)\n"
    )
    root = write_lines(tmp_path / "t.jsonl", RECORDS[:2])
    pipeline = write_pipeline(tmp_path / "p.yaml", root, text_teacher, f", tokenizer: '{text_teacher}'")
    mine = f"{{model: '{tmp_path / 'mine.py'}:teacher', args: {{folder: '{text_teacher}'}}}}"
    ok("dump-teacher", pipeline, "-o", tmp_path / "c.kdcache", "--set", f"teacher={mine}")
    teacher = open_cache(tmp_path / "c.kdcache").manifest.plan.teacher
    assert teacher.name == "mine.py:teacher"
    assert teacher.code_digest is not None


def test_half_precision_is_recorded_and_compared(pipeline: Path, cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    ok("dump-teacher", pipeline, "-o", out, "--precision", "bf16")
    assert open_cache(out).manifest.plan.teacher.precision == "bf16"
    ok("verify", out, pipeline, "--teacher", "--set", "cache.precision=bf16")
    said = refused(4, "verify", out, pipeline, "--teacher")
    assert "the teacher would run in fp32, that of the cache ran in bf16" in said
    assert torch.equal(*(each.sequences().token_start for each in (cache, open_cache(out))))


def test_caches_of_images_and_pipelines_of_text_do_not_mix(pipeline: Path, cache: Cache) -> None:
    said = refused(2, "verify", cache.path, "digits")
    assert "those of this cache are sequences of tokens" in said
