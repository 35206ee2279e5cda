"""A cache of sequences against its teacher and its texts: what passes, and what is refused with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.texts import MARKED, RECORDS, write_lines, write_tokenizer
from torch import Tensor

from kdcache import Cache, TokenTargets
from kdcache.cache.fidelity import gradient_error
from kdcache.data.replay_text import check_same_text, replay_text
from kdcache.data.text import TokenizedText, TokenStore, load_text
from kdcache.dump.tokens import check_teacher
from kdcache.dump.tokens.agreement import gradient_errors, head_variation
from kdcache.dump.tokens.check_teacher import compare_language_model
from kdcache.dump.tokens.dump import dump_language_model
from kdcache.errors import MismatchError, UsageError
from kdcache.models.causal_lm import CausalLM
from kdcache.models.from_transformers_lm import load_causal_lm
from kdcache.models.teacher import TeacherIdentity

TAILS = ["lowrank", "ghost", "draws"]


@pytest.fixture(scope="module")
def text(text_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenizedText:
    path = write_lines(tmp_path_factory.mktemp("text") / "t.jsonl", RECORDS)
    return load_text(path, text_teacher, max_length=48)


@pytest.fixture
def model(text_teacher: Path) -> CausalLM:
    return load_causal_lm(str(text_teacher))


@pytest.fixture(scope="module")
def caches(text_teacher: Path, text: TokenizedText, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cache]:
    """A cache of each tail, with shards of five sequences."""
    folder, model = tmp_path_factory.mktemp("caches"), load_causal_lm(str(text_teacher))
    settings: dict[str, Any] = {"top_k": 4, "rank": 6, "pilot_rows": 200, "shard_sequences": 5, "batch_tokens": 200}
    return {tail: dump_language_model(model, text, folder / f"{tail}.kdcache", tail=tail, **settings) for tail in TAILS}


@pytest.mark.parametrize("tail", TAILS)
def test_the_teacher_of_the_cache_passes(tail: str, caches: dict[str, Cache], model: CausalLM) -> None:
    found = compare_language_model(caches[tail], model, rows=100)
    assert [agreement.temperature for agreement in found] == ([1.0] if tail == "draws" else [1.0, 2.0])
    assert all(agreement.rows == 100 for agreement in found)
    if tail == "draws":
        assert abs(found[0].head_variation) < 0.2
        return
    assert all(agreement.head_variation < 1e-3 for agreement in found)
    assert all(agreement.top1 == 1 for agreement in found)
    assert (found[0].total_variation is None) == (tail == "ghost")


def scrambled(model: CausalLM) -> CausalLM:
    with torch.no_grad():
        model.output.weight.copy_(model.output.weight.roll(1, dims=0))
    return model


@pytest.mark.parametrize("tail", TAILS)
def test_what_says_something_else_is_refused(
    tail: str, caches: dict[str, Cache], model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = scrambled(model)
    with pytest.raises(MismatchError, match="this teacher has the weights sha256:"):
        compare_language_model(caches[tail], other)
    digest = caches[tail].manifest.plan.teacher.weights_digest
    monkeypatch.setattr(check_teacher, "weights_digest", lambda _network: digest)
    message = "nats more than its own draws" if tail == "draws" else "says something else than the cache"
    with pytest.raises(MismatchError, match=message):
        compare_language_model(caches[tail], other)


def test_precision_and_configuration_are_compared(caches: dict[str, Cache], model: CausalLM) -> None:
    with pytest.raises(MismatchError, match="would run in bf16, that of the cache ran in fp32"):
        compare_language_model(caches["ghost"], model, precision="bf16")
    identity = TeacherIdentity("teacher", {}, "sha256:" + "0" * 64)
    with pytest.raises(MismatchError, match="configuration or code has the digest sha256:000"):
        compare_language_model(caches["ghost"], model, identity)


def test_the_variation_of_head_and_tail_is_that_of_the_dense_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, other = (2 * torch.randn(9, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = TokenTargets.of_logits(teacher, top_k=5)
    for t in (1.0, 2.0):
        p, q = (logits.div(t).softmax(1) for logits in (teacher, other))
        merged = [torch.cat([each.gather(1, targets.indices), torch.zeros(9, 1)], 1) for each in (p, q)]
        for each in merged:
            each[:, -1] = 1 - each.sum(1)
        expected = 0.5 * (merged[0] - merged[1]).abs().sum(1)
        torch.testing.assert_close(head_variation(other, targets, t), expected, atol=1e-6, rtol=1e-5)


def test_the_error_of_the_gradient_is_that_of_dense_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(12, 40, generator=generator)
    targets = TokenTargets.of_logits(logits, top_k=4)
    student = logits.softmax(1).mean(0).log()

    def parts() -> Any:
        yield from ((logits[rows], targets[rows]) for rows in (slice(0, 5), slice(5, 12)))

    def stored(t: float) -> Tensor:
        """A ghost: the head as it is, and the mass of the tail in the shape of the student."""
        p, q = (logits / t).softmax(1), (student / t).expand(12, -1).scatter(1, targets.indices, -torch.inf).softmax(1)
        head = torch.zeros_like(p).scatter(1, targets.indices, p.gather(1, targets.indices))
        return (head + q * (1 - head.sum(1, keepdim=True))).log() * t

    found = gradient_errors(parts, (1.0, 2.0))
    for t in (1, 2):
        assert found[t] == pytest.approx(gradient_error(logits, stored(t), student.expand(12, -1), t), rel=1e-4)


# Texts.


def test_the_same_text_is_compared_token_by_token(caches: dict[str, Cache], text: TokenizedText) -> None:
    found = replay_text(caches["ghost"], text)
    assert found == (len(text), int(text.store.lengths().sum()))


def changed(text: TokenizedText, index: int, at: int, what: str) -> TokenizedText:
    """The text with another token, or another taught position, in one of its sequences."""
    store = TokenStore(text.vocabulary_size)
    for number in range(len(text)):
        ids, taught = text.tokens(number)
        if number == index and what == "token":
            ids[at] = (ids[at] + 1) % 300
        elif number == index and what == "taught":
            taught[at] = not taught[at]
        elif number == index and what == "length":
            ids, taught = ids[:at], np.append(taught[: at - 1], False)
        store.add(ids, taught)
    return TokenizedText(text.name, text.split, text.vocabulary, store)


@pytest.mark.parametrize("index", [0, 6, 13])
def test_the_first_token_that_differs_is_named(index: int, caches: dict[str, Cache], text: TokenizedText) -> None:
    cache = caches["ghost"]
    vocabulary = cache.vocabulary
    assert vocabulary is not None
    ids = text.tokens(index)[0]
    before, now = int(ids[3]), (int(ids[3]) + 1) % 300
    pattern = (
        f"token 3 of sequence {index} is {before} {vocabulary[before]!r} in the cache, and {now} {vocabulary[now]!r} in"
    )
    for check in (check_same_text, replay_text):
        with pytest.raises(MismatchError) as raised:
            check(cache, changed(text, index, 3, "token"))
        assert pattern in raised.value.what
    with pytest.raises(MismatchError, match=f"token 4 of sequence {index} is taught in the cache, and not in the data"):
        replay_text(cache, changed(text, index, 4, "taught"))
    with pytest.raises(MismatchError, match=rf"sequence {index} has \d+ tokens in the cache, and 9 in the data set"):
        replay_text(cache, changed(text, index, 9, "length"))


def test_other_texts_and_tokenizers_are_refused(caches: dict[str, Cache], text: TokenizedText, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "t.jsonl", RECORDS[:3])
    fewer = load_text(lines, write_tokenizer(tmp_path / "same"), max_length=48)
    with pytest.raises(MismatchError, match=f"the cache has {len(text)} sequences, and t gives {len(fewer)} now"):
        check_same_text(caches["ghost"], fewer)
    other = load_text(lines, write_tokenizer(tmp_path / "other", MARKED, size=350), max_length=48)
    with pytest.raises(MismatchError, match="the tokenizer of t has 350 tokens, and the vocabulary of the cache"):
        check_same_text(caches["ghost"], other)


def test_a_cache_of_a_teacher_that_was_not_run_is_refused(model: CausalLM, tmp_path: Path) -> None:
    from helpers.sequences import some_text, write

    cache = write(some_text(), tmp_path / "c.kdcache")
    with pytest.raises(UsageError, match="was not run by kdcache"):
        compare_language_model(cache, model)
