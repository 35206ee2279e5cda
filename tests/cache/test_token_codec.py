"""Rows of next-token distributions against dense computation in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.sequences import tail_log_mass_at
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcache.cache.format.codec import Rows, encode, stated_at
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.token_codec import encode_tokens, largest_tokens, mass_columns
from kdcache.cache.format.token_encoding import TOKEN_TEMPERATURES, TokenEncoding, TokenTail
from kdcache.cache.format.token_tails import fit_tails, tail_weights
from kdcache.cache.token_basis import fit_token_basis
from kdcache.errors import CorruptError


def encoding(size: int, top_k: int = 8, rank: int = 0, dtype: str = "float32") -> TokenEncoding:
    tail: TokenTail = "lowrank" if rank else "ghost"
    return TokenEncoding.model_validate(
        {
            "num_classes": size,
            "top_k": top_k,
            "tail": tail,
            "rank": rank,
            "dtype": dtype,
            "level": True,
            "temperatures": TOKEN_TEMPERATURES,
        }
    )


def peaked(rows: int = 40, size: int = 3000, seed: int = 0) -> Tensor:
    """Logits with the shape of a language model's: a rank of 12, a bias of each token, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(size, 12, generator=generator)
    bias = 2 * torch.randn(size, generator=generator)
    noise = 0.3 * torch.randn(rows, size, generator=generator)
    return torch.randn(rows, 12, generator=generator) @ axes.T + bias + noise


def dense_mass(logits: Tensor, top_k: int, temperature: float) -> Tensor:
    """The mass outside the k largest, summed over the tokens themselves."""
    probabilities = (logits.double() / temperature).softmax(dim=1).sort(dim=1, descending=True).values
    return probabilities[:, top_k:].sum(dim=1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_head_is_in_the_order_of_the_format_also_among_equal_logits(data: st.DataObject) -> None:
    size = data.draw(st.integers(3, 90))
    top_k = data.draw(st.integers(1, size - 1))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size))
    logits = torch.tensor([values, values[::-1]], dtype=torch.float32)
    ranked = [sorted((-value, token) for token, value in enumerate(row)) for row in logits.tolist()]
    expected = [[token for _, token in row] for row in ranked]
    order, largest = largest_tokens(logits, top_k)
    assert order.tolist() == [row[:top_k] for row in expected]
    assert largest.tolist() == [logits[row, tokens[top_k]].item() for row, tokens in enumerate(expected)]


def test_statistics_are_those_of_the_dense_distribution() -> None:
    logits, of = peaked(), encoding(3000)
    labels = torch.randint(0, 3000, (40,), generator=torch.Generator().manual_seed(1))
    rows = encode_tokens(logits, labels, of)
    log_probs = logits.double().log_softmax(dim=1)
    expected = {
        "label_log_prob": log_probs.gather(1, labels.unsqueeze(1)).squeeze(1),
        "entropy": -(log_probs.exp() * log_probs).sum(dim=1),
        **{name: dense_mass(logits, 8, t).log() for t, name in mass_columns(of).items()},
    }
    columns = dict(zip(of.statistics, rows.part("statistics").double().unbind(dim=1), strict=True))
    assert list(columns) == list(of.statistics)
    for name, values in columns.items():
        torch.testing.assert_close(values, expected[name], rtol=2**-10, atol=1e-5, msg=name)
    torch.testing.assert_close(rows.part("logsumexp").double(), logits.double().logsumexp(dim=1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(rows.part("log_probs").double(), log_probs.topk(8).values, rtol=1e-6, atol=1e-5)


def test_a_row_in_several_blocks_is_a_row() -> None:
    logits, labels = peaked(rows=900), torch.zeros(900, dtype=torch.long)
    rows = encode_tokens(logits, labels, encoding(3000, dtype="float16"))
    alone = encode_tokens(logits[777:778], labels[:1], encoding(3000, dtype="float16"))
    for name, values in alone.arrays().items():
        torch.testing.assert_close(rows.arrays()[name][777:778], values, rtol=1e-3, atol=1e-6)


def test_the_head_and_its_statistics_are_those_of_the_codec_of_class_logits() -> None:
    """Another implementation, which is slower: with labels unknown it leaves only the head out of the tail."""
    logits = peaked()
    of_classes = Encoding(num_classes=3000, top_k=8, tail="uniform", dtype="float16")
    other: Rows = encode(logits, torch.full((40,), -1), of_classes)
    rows = encode_tokens(logits, torch.zeros(40, dtype=torch.long), encoding(3000, dtype="float16"))
    assert other.indices is not None
    assert torch.equal(rows.part("indices"), other.indices)
    torch.testing.assert_close(rows.part("log_probs"), other.log_probs, rtol=2**-10, atol=1e-6)
    columns = dict(zip(of_classes.statistics, other.statistics.unbind(dim=1), strict=True))
    ours = dict(zip(encoding(3000).statistics, rows.part("statistics").unbind(dim=1), strict=True))
    for name in ("entropy", "tail_log_mass_t1", "tail_log_mass_t2", "tail_log_mass_t4"):
        torch.testing.assert_close(ours[name], columns[name], rtol=2**-9, atol=1e-5)


def test_the_mass_of_a_tail_that_is_all_but_nothing_is_kept() -> None:
    logits = torch.full((1, 500), -200.0)
    logits[0, 7], logits[0, 3] = 40.0, 20.0
    rows = encode_tokens(logits, torch.tensor([7]), encoding(500, top_k=1))
    mass = rows.part("statistics")[0, 2].item()
    assert mass == pytest.approx(-20.0, rel=2**-10)
    assert tail_log_mass_at(rows, encoding(500, top_k=1), 2.0).item() == pytest.approx(-10.0, rel=2**-9)


@pytest.mark.parametrize("temperature", [1.0, 1.1, 4 / 3, 1.5, 1.75, 2.0, 3.0, 4.0, 6.0, 50.0])
def test_the_mass_at_any_temperature_is_that_of_the_distribution(temperature: float) -> None:
    logits, of = peaked(), encoding(3000, dtype="float16")
    rows = encode_tokens(logits, torch.zeros(40, dtype=torch.long), of)
    error = (tail_log_mass_at(rows, of, temperature).exp() - dense_mass(logits, 8, temperature)).abs()
    assert error.mean() < 3e-3  # TOKENS.md: 0.001 to 0.003 on two models
    if temperature in TOKEN_TEMPERATURES:
        assert error.max() < 2**-10


@pytest.mark.parametrize("rank", [1, 12, 16])
def test_coordinates_are_the_weighted_least_squares_of_the_tail(rank: int) -> None:
    logits = peaked(rows=64)
    basis = fit_token_basis(logits, 8, rank, step=0.1)
    order = largest_tokens(logits, 8)[0]
    found = fit_tails(logits, tail_weights(logits), order, basis)
    weights = ((logits.double() / 2).softmax(dim=1) * 3000 + 0.03).masked_fill(
        stated_at(order, torch.full((64,), -1), 3000), 0.0
    )
    axes, centered = basis.basis.double(), logits.double() - basis.mean.double()
    normal = torch.einsum("nv,rv,sv->nrs", weights, axes, axes)
    normal += 1e-6 * weights.sum(dim=1).reshape(-1, 1, 1) * torch.eye(rank)
    exact = torch.linalg.solve(normal, torch.einsum("nv,rv->nr", weights * centered, axes))
    assert ((found - exact).abs() / basis.scale).mean() < 0.05


def test_a_basis_holds_the_directions_of_the_teacher() -> None:
    logits = peaked(rows=200)
    basis = fit_token_basis(logits, 8, 12, step=0.2)
    axes = basis.basis.double()
    torch.testing.assert_close(axes @ axes.T, torch.eye(12).double(), atol=5e-3, rtol=0)
    fitted = logits.double() - logits.double().mean(dim=0)
    left = fitted - fitted @ axes.T @ axes
    assert left.square().mean() < 1.05 * 0.3**2  # only the noise


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [0, 2999])
def test_logits_that_are_not_finite_are_refused(value: float, token: int) -> None:
    logits = peaked(rows=4)
    logits[2, token] = value
    with pytest.raises(CorruptError, match="row 2 holds NaN or infinite"):
        encode_tokens(logits, torch.zeros(4, dtype=torch.long), encoding(3000))


def test_logits_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(CorruptError, match=r"\[4, 3000\] for 4 positions and 2999 tokens"):
        encode_tokens(peaked(rows=4), torch.zeros(4, dtype=torch.long), encoding(2999))


def test_equal_logits_have_a_tail_of_the_mass_of_their_number() -> None:
    rows = encode_tokens(torch.zeros(1, 1000), torch.tensor([5]), encoding(1000, top_k=10))
    assert rows.part("indices").tolist() == [list(range(10))]
    for t in (1.0, 1.7, 4.0, 9.0):
        assert tail_log_mass_at(rows, encoding(1000, top_k=10), t).exp().item() == pytest.approx(0.99, abs=1e-3)


def test_a_basis_of_more_directions_than_needed_stays_finite() -> None:
    logits = torch.zeros(8, 64)
    logits[:, 0] = torch.arange(8.0)
    basis = fit_token_basis(logits, 2, 6, step=0.1)
    assert isinstance(basis, TailBasis)
    rows = encode_tokens(logits, torch.zeros(8, dtype=torch.long), encoding(64, top_k=2, rank=6), basis)
    assert all(values.isfinite().all() for values in (basis.basis, basis.mean, basis.scale))
    assert rows.part("tail").abs().max() <= 127
