"""A step of a language model: the dense computation, in whatever way its sequences are ordered, cut and packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.language_models import tiny
from helpers.language_training import (
    ALL,
    LOSSES,
    WAYS,
    Taught,
    by_hand,
    by_the_trainer,
    cache_of,
    check_same,
    loss_of,
    taught,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache.sequences import CachedSequences
from kdcache.config.text import TokenTrainSpec
from kdcache.data.packing import token_batch
from kdcache.losses import Loss
from kdcache.train.tokens.batches import as_token_batch, cut_epoch, micro_batches, with_packing


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Taught, CachedSequences]:
    found = taught()
    return found, cache_of(found, tmp_path_factory.mktemp("exact") / "t.kdcache").sequences()


@pytest.fixture(scope="module")
def lowrank(tmp_path_factory: pytest.TempPathFactory) -> CachedSequences:
    folder = tmp_path_factory.mktemp("lowrank")
    return cache_of(taught(), folder / "t.kdcache", top_k=8, tail="lowrank", rank=6, pilot_rows=60).sequences()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("tau", "max_length"), [(1.0, None), (2.0, None), (1.0, 10)])
def test_a_step_is_that_of_whole_logits_in_float64(
    way: str, tau: float, max_length: int | None, exact: tuple[Taught, CachedSequences]
) -> None:
    given, teacher = exact
    loss = loss_of(name="kd", temperature={"tau": tau})
    found = by_the_trainer(teacher, ALL, loss, max_length=max_length, **WAYS[way])
    check_same(found, by_hand(given, ALL, tau, max_length))


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_does_not_depend_on_the_order_and_the_division_of_its_sequences(
    name: str, lowrank: CachedSequences
) -> None:
    loss = loss_of(**LOSSES[name])
    expected = by_the_trainer(lowrank, ALL, loss)
    for way in ("padded", "micro-batches", "padded micro-batches"):
        check_same(by_the_trainer(lowrank, ALL[::-1], loss, **WAYS[way]), expected)


@given(st.permutations(ALL), st.integers(1, 60), st.booleans(), st.integers(2, 40))
@settings(max_examples=10, deadline=None)
def test_any_order_cut_and_packing_gives_the_same_step(
    lowrank_teacher: CachedSequences, order: list[int], micro: int, packed: bool, max_length: int
) -> None:
    loss = loss_of(name="kd")
    expected = by_the_trainer(lowrank_teacher, ALL, loss, max_length=max_length)
    found = by_the_trainer(lowrank_teacher, order, loss, max_length=max_length, micro_batch_tokens=micro, packed=packed)
    check_same(found, expected)


@pytest.fixture(scope="module")
def lowrank_teacher(lowrank: CachedSequences) -> CachedSequences:
    return lowrank


def test_a_stream_gives_the_step_of_rows_in_memory(lowrank: CachedSequences, tmp_path: Path) -> None:
    cache = cache_of(taught(), tmp_path / "t.kdcache", top_k=8, tail="lowrank", rank=6, pilot_rows=60)
    streamed = cache.sequences(placement="stream")
    for max_length in (None, 10):
        streamed.prefetch([ALL])
        found = by_the_trainer(streamed, ALL, loss_of(name="kd"), max_length=max_length)
        check_same(found, by_the_trainer(lowrank, ALL, loss_of(name="kd"), max_length=max_length), 0)


# Batches


@given(st.permutations(ALL), st.booleans(), st.none() | st.integers(2, 20))
@settings(max_examples=25, deadline=None)
def test_a_batch_of_a_cache_is_that_of_its_sequences(
    lowrank_teacher: CachedSequences, which: list[int], packed: bool, max_length: int | None
) -> None:
    found = taught().sequences
    expected = token_batch([found[index] for index in which], max_length, packed)
    cut = None if max_length is None else [max_length] * len(which)
    batch = as_token_batch(which, lowrank_teacher.text(which, cut), packed)
    for one, other in zip(batch, expected, strict=True):
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert one == other


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 3), st.integers(1, 80), st.booleans())
def test_every_sequence_is_in_one_micro_batch_and_none_is_too_large(
    lengths: list[int], ranks: int, tokens: int, packed: bool
) -> None:
    spec = TokenTrainSpec(batch_tokens=tokens, micro_batch_tokens=max(tokens // 2, 1), packed=packed)
    order = list(range(len(lengths)))[::-1]
    steps = cut_epoch(order, lengths, spec, ranks)
    assert sorted(index for step in steps for part in step for micro in part for index in micro) == sorted(order)
    for step in steps:
        assert len(step) == ranks
        for micro in (micro for part in step for micro in part if micro):
            sizes = [lengths[index] for index in micro]
            size = sum(sizes) if packed else max(sizes) * len(sizes)
            assert size <= max(tokens // 2, 1) or len(micro) == 1


# What else a step does


def test_a_student_with_more_tokens_gives_them_probability_0(exact: tuple[Taught, CachedSequences]) -> None:
    _, teacher = exact
    model = tiny(vocab_size=200)
    smaller = tiny()
    weights = model.network.state_dict()
    smaller.network.load_state_dict(
        {
            name: weights[name][: len(value)] if weights[name].shape != value.shape else weights[name]
            for name, value in smaller.network.state_dict().items()
        }
    )
    for name in ("kd", "ce"):
        loss = loss_of(name=name)
        found, expected = (by_the_trainer(teacher, ALL, loss, each) for each in (model, smaller))
        for one, other in zip(found.parts, expected.parts, strict=True):
            torch.testing.assert_close(one, other)


def test_label_smoothing_is_that_of_torch(exact: tuple[Taught, CachedSequences]) -> None:
    given, teacher = exact
    found = by_the_trainer(teacher, [2], loss_of(name="ce"), label_smoothing=0.2)
    tokens, mask = given.sequences[2].tokens, given.sequences[2].taught
    at = mask.nonzero().squeeze(1)
    with torch.no_grad():
        logits = tiny().network(input_ids=tokens[None]).logits[0, at]
    expected = torch.nn.functional.cross_entropy(logits, tokens[at + 1], label_smoothing=0.2)
    torch.testing.assert_close(found.parts[0].double(), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mixed_precision_is_near_float32(precision: str, exact: tuple[Taught, CachedSequences]) -> None:
    _, teacher = exact
    make: Callable[[], Any] = lambda: tiny(dtype=torch.float32)  # noqa: E731
    loss: Loss = loss_of(name="kd")
    found = by_the_trainer(teacher, ALL, loss, make(), precision=precision)
    expected = by_the_trainer(teacher, ALL, loss)
    check_same(found._replace(weights={}), expected._replace(weights={}), 0.02 if precision == "bf16" else 1e-5)
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name].double(), value, rtol=0.05, atol=2e-3, msg=name)


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=40))
def test_little_is_padded(lengths: list[int]) -> None:
    """But in micro-batches of a thousand tokens or fewer."""
    spec = TokenTrainSpec(packed=False, batch_tokens=10**6)
    for micro in micro_batches(range(len(lengths)), lengths, spec):
        sizes = [lengths[index] for index in micro]
        padded = max(sizes) * len(sizes)
        assert padded - sum(sizes) <= max(0.2 * padded, 1024 + max(sizes))


def test_packing_follows_the_attention_of_the_network() -> None:
    model, spec = tiny(), TokenTrainSpec()
    assert with_packing(spec, model).packed is False
    model.network.config._attn_implementation_internal = "flash_attention_2"  # type: ignore[union-attr]
    assert with_packing(spec, model).packed is True
    assert with_packing(spec, replace(model, packs=False)).packed is False
    assert with_packing(TokenTrainSpec(packed=True), tiny()).packed is True
