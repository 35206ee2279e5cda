"""A cache of sequences whose writer is killed is resumed, and has the digest of one that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.processes import exit_code, in_a_process, kill_at
from helpers.sequences import some_text, write

from kdcache.cache.inspect.audit import audit
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.curate.token_cache import write_token_cache


def write_until(out: Path, sequence: int) -> None:
    """Write a cache, and die at the logits of a sequence of a shard."""
    text = some_text()

    def logits(index: int) -> torch.Tensor:
        if index == sequence and (out / "plan.json").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return text.logits[index]

    spec = TokenCacheSpec(top_k=4, tail="lowrank", rank=6, pilot_rows=100, shard_sequences=4)
    vocabulary, special = text.vocabulary, {"eos": 1}
    write_token_cache(
        text.sequences, logits, out, vocabulary=vocabulary, taught=text.taught, special=special, spec=spec
    )


def write_and_die_at(out: Path, commit: str, after: bool) -> None:
    kill_at(out, commit, after)
    write(some_text(), out, tail="lowrank")


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(some_text(), tmp_path_factory.mktemp("whole") / "c.kdcache", tail="lowrank").manifest.digest


@pytest.mark.parametrize("sequence", [0, 5, 8])
def test_killed_while_a_shard_is_encoded(sequence: int, digest: str, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    assert exit_code(in_a_process(write_until, out, sequence)) == -signal.SIGKILL
    assert len(list(out.glob("commits/0/*.json"))) == sequence // 4
    assert write(some_text(), out, tail="lowrank").manifest.digest == digest
    assert audit(out).failure is None


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("commit", [".partial", "/commits/0/1.json.partial", "/manifest.json.partial"])
def test_killed_at_a_commit(commit: str, after: bool, digest: str, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    assert exit_code(in_a_process(write_and_die_at, out, commit, after)) == -signal.SIGKILL
    sealed = (out / "manifest.json").exists()
    if not sealed:
        assert write(some_text(), out, tail="lowrank").manifest.digest == digest
    assert audit(out).failure is None
    assert audit(out).digest == digest
