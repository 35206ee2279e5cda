"""Files of llama.cpp's log-probabilities, written here as tools/perplexity/perplexity.cpp writes them."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.cli import ok, refused

from kdcache import KdcacheError, open_cache
from kdcache.cache.inspect.audit import audit
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.curate.foreign import cache_of_kld

CONTEXT, CHUNKS = 12, 3
FIRST = CONTEXT // 2


def row(logits: npt.NDArray[np.float32]) -> bytes:
    """`log_softmax` of perplexity.cpp@050fc7f, for one position, one number after the other as there."""
    largest = max(logits.tolist())
    lowest = max(min(logits.tolist()), largest - 16)
    total = sum(math.exp(value - largest) for value in logits.tolist())
    scale = float(np.float32((largest - lowest) / 65535))
    steps = [round((value - lowest) / scale) if scale and value > lowest else 0 for value in logits.tolist()]
    padding = [0] * (2 * ((len(steps) + 1) // 2) - len(steps))
    head = struct.pack("<ff", scale, lowest - largest - math.log(total))
    return head + struct.pack(f"<{len(steps) + len(padding)}H", *steps, *padding)


def write(path: Path, size: int = 101, spread: float = 5.0) -> tuple[npt.NDArray[Any], torch.Tensor]:
    """Write a file, and return its tokens [chunks, context] and logits [chunks, rows, V]."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, size, (CHUNKS, CONTEXT), dtype=np.int32)
    logits = (generator.normal(size=(CHUNKS, CONTEXT - 1 - FIRST, size)) * spread).astype(np.float32)
    with path.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<iii", CONTEXT, size, CHUNKS) + tokens.astype("<i4").tobytes())
        for chunk in logits:
            file.write(b"".join(map(row, chunk)))
    return tokens, torch.from_numpy(logits)


@pytest.mark.parametrize(("size", "spread"), [(101, 5.0), (64, 1.0), (301, 9.0)])
def test_rows_are_those_that_llama_cpp_wrote(size: int, spread: float, tmp_path: Path) -> None:
    tokens, logits = write(tmp_path / "base.kld", size, spread)
    cache = cache_of_kld(tmp_path / "base.kld", tmp_path / "c.kdcache", bos=None, spec=TokenCacheSpec(top_k=4))
    assert audit(cache.path).failure is None
    teacher = cache.sequences()
    assert teacher.encoding.temperatures == (1.0,)
    assert not cache.level_known
    batch = teacher(range(CHUNKS))
    assert batch.tokens.reshape(CHUNKS, CONTEXT).tolist() == tokens.tolist()
    assert batch.positions[:5].tolist() == [*range(FIRST, CONTEXT - 1)]
    exact = logits.double().log_softmax(dim=2).flatten(0, 1)
    targets = teacher.targets(batch.rows)
    top = exact.topk(4, dim=1)
    torch.testing.assert_close(targets.log_probs.double(), top.values, rtol=2**-10, atol=5e-4)
    rest = 1 - top.values.exp().sum(dim=1)
    torch.testing.assert_close(targets.tail_log_mass[:, 0].double().exp(), rest, rtol=1e-2, atol=2e-4)


def test_bos_takes_the_place_of_the_first_token_of_each_chunk(tmp_path: Path) -> None:
    tokens, _ = write(tmp_path / "base.kld")
    cache = cache_of_kld(tmp_path / "base.kld", tmp_path / "c.kdcache", bos=7, spec=TokenCacheSpec(top_k=4))
    found = cache.sequences()(range(CHUNKS)).tokens.reshape(CHUNKS, CONTEXT)
    assert found[:, 0].tolist() == [7] * CHUNKS
    assert found[:, 1:].tolist() == tokens[:, 1:].tolist()
    sequences = cache.manifest.plan.sequences
    assert sequences is not None
    assert sequences.vocabulary.special == {"bos": 7}


def test_the_floor_of_a_row_is_not_taken_for_a_probability(tmp_path: Path) -> None:
    """One token has nearly all of the mass, and 299 are more than 16 nats below it."""
    logits = np.full(300, -30.0, np.float32)
    logits[5], logits[9] = 10.0, 5.0
    with (tmp_path / "base.kld").open("wb") as file:
        file.write(b"_logits_" + struct.pack("<iii", 4, 300, 1) + np.zeros(4, "<i4").tobytes() + row(logits))
    cache = cache_of_kld(tmp_path / "base.kld", tmp_path / "c.kdcache", bos=None, spec=TokenCacheSpec(top_k=2))
    targets = cache.sequences().targets(cache.sequences()([0]).rows)
    assert targets.indices.tolist() == [[5, 9]]
    assert targets.tail_log_mass.exp().item() < 1e-6  # of `lowest` for each: 3e-5


def test_it_is_a_command(tmp_path: Path) -> None:
    write(tmp_path / "base.kld")
    source, out = tmp_path / "base.kld", tmp_path / "c.kdcache"
    error = refused(2, "convert", source, "--from", "llama-cpp", "-o", out)
    assert "--bos ID" in error
    assert not out.exists()
    ok("convert", source, "--from", "llama-cpp", "--bos", "none", "--top-k", "4", "--rank", "3", "-o", out)
    assert open_cache(out).sequences().encoding.rank == 3
    assert "15 of their positions" in ok("info", out)
    ok("verify", out)
    assert "samples with one row each" in refused(2, "convert", out, "-o", tmp_path / "x.npz")


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another magic": (lambda data: b"_logit__" + data[8:], "is not a file of llama.cpp"),
    "empty": (lambda _: b"", "is not a file of llama.cpp"),
    "truncated": (lambda data: data[:-2], "its header states"),
    "too long": (lambda data: data + b"\0\0", "its header states"),
    "no chunks": (lambda data: data[:16] + struct.pack("<i", 0) + data[20:], "states 0 chunks"),
    "many chunks": (lambda data: data[:16] + struct.pack("<i", 2**30) + data[20:], "its header states"),
    "negative context": (lambda data: data[:8] + struct.pack("<i", -4) + data[12:], "chunks of -4 tokens"),
    "a token of another vocabulary": (lambda data: data[:24] + struct.pack("<i", 101) + data[28:], "of 101 in chunk 0"),
    "a scale that is not a number": (
        lambda data: data[:164] + struct.pack("<f", math.nan) + data[168:],
        "add up to 1: chunk 0, position 6",
    ),
    "a lowest log-probability above 0": (
        lambda data: data[:168] + struct.pack("<f", 1.0) + data[172:],
        "add up to 1: chunk 0, position 6",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_refused_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    write(tmp_path / "base.kld")
    change, message = DAMAGE[what]
    data = (tmp_path / "base.kld").read_bytes()
    assert struct.unpack("<f", data[164:168])[0] > 0  # the first scale: 20 bytes, and 36 tokens of 4
    (tmp_path / "base.kld").write_bytes(change(data))
    with pytest.raises(KdcacheError, match=message):
        cache_of_kld(tmp_path / "base.kld", tmp_path / "c.kdcache", bos=None, spec=TokenCacheSpec(top_k=4))
    assert not [path for path in tmp_path.iterdir() if path.name != "base.kld"]
