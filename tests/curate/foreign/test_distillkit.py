"""Files of DistillKit, of each configuration in its README, against the dense log-probabilities they are of."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.cli import ok, refused
from helpers.distillkit import README, position, tokens_of

from kdcache import KdcacheError, open_cache
from kdcache.cache.inspect.audit import audit
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.curate.foreign import cache_of_distillkit
from kdcache.curate.foreign.distillkit_codec import DistillKitCodec, read_codec
from kdcache.errors import UsageError

SIZE = 2000

TOLERANCE = {"recommended": 0.5, "budget": 0.6, "Qwen3-235B-Logits-Packed-8192": 0.6, "deep-dive": 0.2}
"""By how many nats a polynomial may be wrong, fitted well to the logits of these tests."""


def some_log_probs(count: int, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, size, generator=generator, dtype=torch.float64) * 2.5).log_softmax(dim=1)


def as_bytes(parts: list[bytes]) -> Any:
    return np.frombuffer(b"".join(parts), np.uint8).reshape(len(parts), -1)


@pytest.mark.parametrize("name", README)
def test_positions_of_the_configurations_in_the_readme(name: str) -> None:
    config = {**README[name], "d": SIZE}
    codec, exact = DistillKitCodec.model_validate(config), some_log_probs(5)
    stored = as_bytes([position(row.numpy(), config) for row in exact])
    packed = as_bytes([tokens_of(row.numpy(), config) for row in exact])
    assert (stored.shape[1], packed.shape[1]) == (codec.log_prob_bytes, codec.index_bytes)
    top = exact.topk(codec.k, dim=1)
    assert codec.tokens(packed).tolist() == top.indices.tolist()
    found = codec.log_probs(stored).double()
    first = slice(0, codec.exact_k)
    torch.testing.assert_close(found[:, first], top.values[:, first], rtol=2**-8, atol=1e-5)
    assert (found - top.values).abs().max() < TOLERANCE[name]
    assert (found.exp().sum(dim=1) - top.values.exp().sum(dim=1)).abs().max() < 0.02


def test_bits_by_hand_and_the_published_size() -> None:
    config = {"d": 8, "k": 3, "exact_k": 1, "exact_dtype": "float16", "delta_encoding": False, "polynomial_terms": None}
    codec = DistillKitCodec.model_validate(
        {**config, "residual_bins": [{"scale_dtype": "float32", "element_bits": 3, "num_elements": 2}]}
    )
    packed = np.array([[0b00111001, 0b00000000]], np.uint8)  # 001 110 010, and 7 bits that are not used
    assert codec.tokens(packed).tolist() == [[1, 6, 2]]
    # -0.5 is 0xB800 in float16 and 0.5 is 0x3F000000 in float32; then 001 000: -3 and -4 of these.
    stored = np.array([[0x00, 0xB8, 0x00, 0x00, 0x00, 0x3F, 0b00100000]], np.uint8)
    assert codec.log_probs(stored).tolist() == [[-0.5, -1.5, -2.0]]
    one_bit = [codec.residual_bins[0].model_copy(update={"element_bits": 1})]
    stored[0, -1] = 0b01000000
    assert codec.model_copy(update={"residual_bins": one_bit}).log_probs(stored).tolist() == [[-0.5, -0.5, 0.5]]
    budget = DistillKitCodec.model_validate({**README["budget"], "d": 2**16})
    assert budget.log_prob_bytes + budget.index_bytes == 114  # "around 114 bytes per token"


def test_a_polynomial_that_float32_cannot_resolve_is_not_relied_on() -> None:
    """Of the powers 0 to 4 and the root of 0, 1, ..., 111, whose condition number is 6e8."""
    sure = {name: DistillKitCodec.model_validate({**config, "d": SIZE}).sure for name, config in README.items()}
    assert sure == {"recommended": 16, "budget": 50, "Qwen3-235B-Logits-Packed-8192": 128, "deep-dive": 128}
    assert DistillKitCodec.model_validate({**README["recommended"], "d": SIZE, "normalize_t": True}).sure == 128


BAD_CODECS: dict[str, tuple[str, str]] = {
    "k": ("{d: 9, k: 10, exact_k: 10, residual_bins: []}", "k is 10, and d 9"),
    "exact_k": ("{d: 99, k: 10, exact_k: 11, residual_bins: []}", "exact_k is 11, and k 10"),
    "nothing": ("{d: 99, k: 10, exact_k: 1, residual_bins: []}", "nothing describes"),
    "bins": (
        "{d: 99, k: 9, exact_k: 8, residual_bins: [{scale_dtype: float16, element_bits: 2, num_elements: 2}]}",
        "more elements than the 1",
    ),
    "a term": ("{d: 99, k: 9, exact_k: 8, residual_bins: [], polynomial_terms: [cube]}", "polynomial_terms"),
    "a key": ("{d: 99, k: 9, exact_k: 9, residual_bins: [], exact_dtyp: float16}", "exact_dtyp"),
    "not a mapping": ("[1, 2]", "the codec of"),
    "not YAML": ("{", "not valid YAML"),
    "empty": ("", "the codec of"),
}


@pytest.mark.parametrize("what", BAD_CODECS)
def test_a_codec_that_is_impossible_is_refused(what: str, tmp_path: Path) -> None:
    text, message = BAD_CODECS[what]
    (tmp_path / "codec.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_codec(tmp_path / "codec.yaml")


def test_a_codec_is_read_from_a_training_configuration(tmp_path: Path) -> None:
    expected = DistillKitCodec.model_validate({**README["budget"], "d": SIZE})
    given = {**README["budget"], "d": SIZE}
    for name, content in (
        ("sampler", given),
        ("train", {"model": "x", "teacher": {"kind": "dataset", "logprob_compressor": given}}),
        ("readme", {"logprob_compressor": given}),
    ):
        (tmp_path / name).write_text(yaml.safe_dump(content))
        assert read_codec(tmp_path / name) == expected
    with pytest.raises(UsageError, match="--codec"):
        read_codec(tmp_path / "other")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UsageError, match="not text"):
        read_codec(tmp_path / "binary")


def write(path: Path, config: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a parquet file with the schema of DistillKit's `compressed_logit_schema`, and `attention_mask` if given."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    nested = pyarrow.list_(pyarrow.list_(pyarrow.uint8()))
    types = {"input_ids": pyarrow.list_(pyarrow.uint64()), "attention_mask": pyarrow.list_(pyarrow.int64())}
    columns = {}
    for name in rows[0]:
        values = [row[name] if name in types else row[name] and [*map(list, row[name])] for row in rows]
        columns[name] = pyarrow.array(values, types.get(name, nested))
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    (path.parent / "compression_config.yaml").write_text(yaml.safe_dump(config))


def compressed(log_probs: torch.Tensor, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "compressed_logprobs": [position(row.numpy(), config) for row in log_probs],
        "bytepacked_indices": [tokens_of(row.numpy(), config) for row in log_probs],
    }


def sampled(lengths: tuple[int, ...], config: dict[str, Any]) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """Rows as the sampler writes them, of all positions but the last, and their log-probabilities."""
    exact = [some_log_probs(length - 1, config["d"], length) for length in lengths]
    ids = [
        torch.randint(0, config["d"], (length,), generator=torch.Generator().manual_seed(length)) for length in lengths
    ]
    for tokens, rows in zip(ids, exact, strict=True):
        tokens[1::2] = rows.argmax(dim=1)[::2]
    return [
        {"input_ids": one.tolist(), **compressed(rows, config)} for one, rows in zip(ids, exact, strict=True)
    ], exact


@pytest.mark.parametrize("name", README)
def test_a_cache_has_the_rows_of_the_sampler(name: str, tmp_path: Path) -> None:
    config = {**README[name], "d": SIZE}
    rows, exact = sampled((6, 3, 9), config)
    write(tmp_path / "data_0.parquet", config, rows)
    spec = TokenCacheSpec(dtype="float32")
    cache = cache_of_distillkit(tmp_path, tmp_path / "c.kdcache", spec=spec)
    assert audit(cache.path).failure is None
    assert not cache.level_known
    teacher = cache.sequences()
    k = DistillKitCodec.model_validate(config).sure
    assert (teacher.encoding.temperatures, teacher.encoding.top_k) == ((1.0,), k)
    batch = teacher(range(3))
    assert batch.tokens.tolist() == [token for row in rows for token in row["input_ids"]]
    targets, top = teacher.targets(batch.rows), torch.cat(exact).topk(k, dim=1)
    assert targets.indices.tolist() == top.indices.tolist()
    assert (targets.log_probs - top.values).abs().max() < TOLERANCE[name]
    rest = 1 - top.values.exp().sum(dim=1)
    assert (targets.tail_log_mass[:, 0].double().exp() - rest).abs().max() < 0.03
    is_first = targets.indices[:, 0] == batch.next_tokens
    assert is_first.sum() >= 7
    label = torch.cat(exact).gather(1, batch.next_tokens.unsqueeze(1)).squeeze(1)
    stated = batch.rows.part("statistics")[:, 0].double()
    torch.testing.assert_close(stated[is_first], label[is_first], rtol=2**-8, atol=1e-2)


def test_texts_that_were_packed_are_sequences_of_their_own(tmp_path: Path) -> None:
    """As `pack_logits.py` joins them: each without its last token, numbered from 1, and 0 behind the last."""
    config = {**README["budget"], "d": SIZE}
    texts, exact = sampled((6, 2, 4), config)
    names = ("compressed_logprobs", "bytepacked_indices")
    packed: dict[str, Any] = {name: [one for text in texts for one in text[name]] for name in names}
    packed |= {
        "input_ids": [token for text in texts for token in text["input_ids"][:-1]],
        "attention_mask": [number for number, text in enumerate(texts, 1) for _ in text["input_ids"][:-1]],
    }
    packed["attention_mask"][-1] = 0
    write(tmp_path / "data_0.parquet", config, [packed, {**packed, "attention_mask": [1] * 9}])
    cache = cache_of_distillkit(tmp_path / "data_0.parquet", tmp_path / "c.kdcache", top_k=8)
    assert audit(cache.path).failure is None
    batch = cache.sequences()(range(3))
    # The text of one token is left out, and so is the last token of the third.
    assert batch.token_start.tolist() == [0, 5, 7, 16]
    assert batch.positions.tolist() == [0, 1, 2, 3, 5, *range(7, 15)]
    all_rows = torch.cat(exact).topk(8, dim=1).indices.tolist()
    assert batch.rows.part("indices").tolist() == [*all_rows[:4], all_rows[6], *all_rows[:8]]


def test_a_polynomial_of_a_bad_fit_is_refused_with_the_number_that_is_exact(tmp_path: Path) -> None:
    config = {**README["recommended"], "d": SIZE}
    rows, _ = sampled((4,), config)
    wrong = struct.pack("<6f", -60, 0, 0, 0, 0, 0)  # behind the exact values, in bfloat16
    rows[0]["compressed_logprobs"] = [one[: 2 * config["exact_k"]] + wrong for one in rows[0]["compressed_logprobs"]]
    write(tmp_path / "a.parquet", config, rows)
    with pytest.raises(KdcacheError, match="use --top-k 16"):
        cache_of_distillkit(tmp_path, tmp_path / "c.kdcache", top_k=20)
    assert audit(cache_of_distillkit(tmp_path, tmp_path / "c.kdcache").path).failure is None


def test_it_is_a_command(tmp_path: Path) -> None:
    config, out = {**README["recommended"], "d": SIZE}, tmp_path / "c.kdcache"
    write(tmp_path / "data_0.parquet", config, sampled((6, 3), config)[0])
    (tmp_path / "compression_config.yaml").rename(tmp_path / "codec.yaml")
    command = ("convert", tmp_path / "data_0.parquet", "--from", "distillkit", "-o", out)
    assert "--codec" in refused(2, *command)
    with_codec = (*command, "--codec", tmp_path / "codec.yaml")
    assert "128 tokens per position, and 200" in refused(2, *with_codec, "--top-k", "200")
    assert "the vocabulary has 100" in refused(2, *with_codec, "--vocabulary-size", "100")
    assert not out.exists()
    ok(*with_codec)
    encoding = open_cache(out).sequences().encoding
    assert (encoding.top_k, encoding.num_classes) == (16, SIZE)
    ok("verify", out)


def test_the_legacy_codec_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = {**README["budget"], "d": SIZE}
    write(tmp_path / "a.parquet", config, [{"input_ids": [1, 2], "packed_indices": [b"1"], "exact_values": [b"1"]}])
    with pytest.raises(UsageError, match="logits less their mean"):
        cache_of_distillkit(tmp_path, tmp_path / "c.kdcache")


def test_files_of_another_codec_or_other_columns_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    config, out = {**README["Qwen3-235B-Logits-Packed-8192"], "d": SIZE}, tmp_path / "c.kdcache"
    (row, other), _ = sampled((6, 3), config)
    source = tmp_path / "data_0.parquet"
    cases: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
        ([row], {**config, "exact_k": 16}, "compressed_logprobs has 140 bytes per position, and the codec makes 76"),
        ([row], {**config, "d": 5000}, "bytepacked_indices has 176 bytes per position, and the codec makes 208"),
        ([row], {**config, "delta_encoding": False}, "row 0, position 0: (a log-prob|the prob)"),
        ([other, {**row, "input_ids": row["input_ids"][:-2]}], config, "row 1: 4 tokens and 5 positions"),
        ([{**row, "compressed_logprobs": [b"1", b"22"]}], config, "lists of different lengths"),
        ([{**row, "bytepacked_indices": None}], config, "does not hold numbers"),
        ([{**row, "input_ids": [*row["input_ids"][:-1], 2**63]}], config, "sequence 0 has tokens from -"),
        ([{"input_ids": row["input_ids"]}], config, "lacks the columns compressed_logprobs, bytepacked_indices"),
        ([{**row, "attention_mask": [1]}], config, "6 tokens and 1 of attention_mask"),
        ([{**row, "attention_mask": [0] * 6}], config, "no texts of two or more tokens"),
    ]
    for rows, codec, message in cases:
        write(source, codec, rows)
        with pytest.raises(KdcacheError, match=message):
            cache_of_distillkit(source, out, codec=DistillKitCodec.model_validate(codec))
        assert not out.exists()
