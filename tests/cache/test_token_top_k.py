"""Rows of which the top k are known, against those that the encoder of whole distributions makes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcache.cache.format.sequence_integrity import token_row_checks
from kdcache.cache.format.token_codec import encode_tokens
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.format.token_top_k import TopK, defect_of, encode_top_k


def encoding(size: int, k: int) -> TokenEncoding:
    return TokenEncoding(num_classes=size, top_k=k, tail="ghost", dtype="float32", level=False, temperatures=(1.0,))


def known(logits: Tensor, next_tokens: Tensor, k: int) -> TopK:
    log_probs = logits.double().log_softmax(dim=1)
    top = log_probs.topk(k, dim=1)
    return TopK(top.indices, top.values, log_probs.gather(1, next_tokens.unsqueeze(1)).squeeze(1))


@given(
    size=st.integers(3, 400),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_row_of_the_top_k_is_that_of_the_whole_distribution(
    size: int, spread: float, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(size - 1, 40)))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, size, generator=generator) * spread
    next_tokens = torch.randint(0, size, (5,), generator=generator)
    rows = known(logits, next_tokens, k)
    assert defect_of(rows, next_tokens, size, 1e-3) is None
    found, expected = (
        encode_top_k(rows, next_tokens, encoding(size, k)),
        encode_tokens(logits, next_tokens, encoding(size, k)),
    )
    assert not [what for what, wrong in token_row_checks(found, next_tokens, encoding(size, k)) if wrong.any()]
    if spread:
        assert found.part("indices").tolist() == expected.part("indices").tolist()
    torch.testing.assert_close(found.part("log_probs"), expected.part("log_probs"), rtol=1e-5, atol=1e-5)
    (label, mass), (of_label, of_mass) = found.part("statistics").T.double(), expected.part("statistics").T.double()
    torch.testing.assert_close(label, of_label, rtol=2**-9, atol=1e-5)
    # What the top k leave is known up to the rounding of a float32 sum.
    torch.testing.assert_close(mass.exp(), of_mass.exp(), rtol=2**-7, atol=2e-7)


def test_probabilities_of_zero_are_stored_as_the_least_number() -> None:
    rows = TopK(torch.tensor([[3, 1]]), torch.tensor([[0.0, -math.inf]]), torch.tensor([-math.inf]))
    next_tokens = torch.tensor([0])
    assert defect_of(rows, next_tokens, 9, 1e-3) is None
    found = encode_top_k(rows, next_tokens, encoding(9, 2))
    lowest = torch.finfo(torch.float16).min
    assert found.part("log_probs").tolist() == [[0.0, lowest]]
    assert found.part("statistics")[0].tolist() == [lowest, pytest.approx(math.log(2.0**-24), rel=1e-3)]


def change(rows: TopK, row: int, **parts: object) -> TopK:
    made = {name: value.clone() for name, value in rows._asdict().items() if value is not None}
    for name, value in parts.items():
        made[name][row] = torch.as_tensor(value, dtype=made[name].dtype)
    return TopK(**made)


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"log_probs": [-0.1, math.nan]}, "NaN"),
        ({"label_log_probs": math.nan}, "NaN"),
        ({"log_probs": [0.1, -9.0]}, "above 0"),
        ({"label_log_probs": 0.1}, "above 0"),
        ({"indices": [-1, 4]}, "outside of the vocabulary of 9"),
        ({"indices": [9, 4]}, "outside of the vocabulary of 9"),
        ({"indices": [4, 4]}, "there twice"),
        ({"log_probs": [-0.1, -0.2]}, "more than 1"),
        ({"log_probs": [-5.0, -6.0]}, "cannot add up to 1"),
        ({"indices": [8, 4], "log_probs": [-0.5, -1.5], "label_log_probs": -0.7}, "two log-probabilities"),
        ({"indices": [3, 4], "log_probs": [-0.5, -1.5], "label_log_probs": -0.7}, "more probable than the last"),
    ],
)
def test_an_impossible_row_is_found(parts: dict[str, object], what: str) -> None:
    generator = torch.Generator().manual_seed(0)
    next_tokens = torch.tensor([8, 8, 8, 8])
    rows = known(torch.randn(4, 9, generator=generator), next_tokens, 2)
    assert defect_of(rows, next_tokens, 9, 1e-3) is None
    found = defect_of(change(rows, 2, **parts), next_tokens, 9, 1e-3)
    assert found is not None
    assert found.row == 2
    assert what in found.what
