"""Noise on logits: its formula, its distribution, what it depends on, and what it does not depend on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcache.models.noise import Noise, key_of_noise, standard_normals

N, C = 2000, 10
KEY = bytes(range(32))
CONTENT = np.random.default_rng(0).integers(0, 2**64, N, np.uint64)
NOISE = Noise(KEY, 0.5, 1.0, CONTENT, None, by_id=True)
IDS = torch.arange(N)
CONTEXT: dict[str, Any] = {"teacher": {"name": "a", "weights_digest": "b"}, "seed": 3, "sigma": 0.5, "temperature": 2.0}


def drawn(noise: Noise, view: int = 0, ids: Tensor = IDS, classes: int = C) -> Tensor:
    """The noise alone, in units of sigma, [n, C]."""
    return noise(torch.zeros(len(ids), classes), ids, view) / noise.sigma


def by_hand(name: bytes, count: int) -> list[float]:
    """Uniform numbers from SHAKE-256, and Wichura's inverse of the normal distribution, which Python has."""
    stream = hashlib.shake_256(KEY + name).digest(8 * count)
    numbers = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") >> 12 for i in range(count)]
    return [NormalDist().inv_cdf((2 * number + 1) / 2**53) for number in numbers]


@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_normals_are_those_of_the_inverse_distribution(count: int) -> None:
    names = [b"a", b"b", b"\0"]
    expected = [by_hand(name, count) for name in names]
    found = standard_normals(KEY, names, count)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_the_name_of_a_row_is_purpose_image_view_and_id() -> None:
    ids = torch.tensor([7])
    for noise, last in ((NOISE, 7), (replace(NOISE, by_id=False), 0)):
        name = b"rows" + b"".join(int(number).to_bytes(8, "little") for number in (CONTENT[7], 3, last))
        torch.testing.assert_close(drawn(noise, 3, ids)[0], torch.tensor(by_hand(name, C)))


def test_the_noise_is_standard_normal() -> None:
    values = torch.cat([drawn(NOISE, view) for view in range(5)]).double()
    count = values.numel()  # 100,000; the bounds are of five standard deviations of each statistic
    assert abs(float(values.mean())) < 5 / math.sqrt(count)
    assert abs(float(values.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((values**3).mean())) < 5 * math.sqrt(15 / count)
    assert abs(float((values**4).mean()) - 3) < 5 * math.sqrt(96 / count)
    # Kolmogorov and Smirnov: above 2.2 / sqrt(n) by chance once in 16,000 times.
    ordered = values.flatten().sort().values
    expected = torch.special.ndtr(ordered)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert float((expected - steps).abs().max()) < 2.2 / math.sqrt(count)


def test_classes_samples_and_views_are_independent() -> None:
    first, second = drawn(NOISE, 0), drawn(NOISE, 1)
    bound = 5 / math.sqrt(N)
    assert float((torch.corrcoef(first.T) - torch.eye(C)).abs().max()) < bound
    crossed = torch.corrcoef(torch.cat([first, second], dim=1).T)[:C, C:]
    assert float(crossed.abs().max()) < bound
    neighbors = torch.corrcoef(torch.cat([first[:-1], first[1:]], dim=1).T)[:C, C:]
    assert float(neighbors.abs().max()) < bound
    assert float(torch.corrcoef((first**2).T).fill_diagonal_(0).abs().max()) < 2 * bound


class Words:
    """A stream of the smallest and the largest words."""

    def __init__(self, _: bytes) -> None:
        pass

    def digest(self, length: int) -> bytes:
        return (bytes(8) + b"\xff" * 8 + bytes(7) + b"\x80")[:length]


def test_the_largest_numbers_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashlib, "shake_256", Words)
    found = standard_normals(KEY, [b"a"], 3)[0].tolist()
    largest = -NormalDist().inv_cdf(2**-53)
    assert found[:2] == pytest.approx([-largest, largest], rel=1e-6)
    assert found[2] == pytest.approx(0, abs=1e-15)


OTHER = {
    "key": replace(NOISE, key=bytes(range(1, 33))),
    "content": replace(NOISE, content=CONTENT + np.uint64(1)),
    "purpose": replace(NOISE, purpose="probes"),
    "not by id": replace(NOISE, by_id=False),
}


@pytest.mark.parametrize("name", OTHER)
def test_noise_of_anything_else_is_independent(name: str) -> None:
    both = torch.stack([drawn(NOISE).flatten(), drawn(OTHER[name]).flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / math.sqrt(N * C)


def test_copies_of_an_image_have_the_same_noise_only_where_they_have_the_same_logits() -> None:
    copies = np.full(2, 5, np.uint64)
    rows = {by_id: drawn(Noise(KEY, 1.0, 1.0, copies, None, by_id), 0, torch.arange(2)) for by_id in (False, True)}
    assert torch.equal(rows[False][0], rows[False][1])
    assert not torch.isclose(rows[True][0], rows[True][1]).any()


@pytest.mark.parametrize("where", ["teacher", "seed", "sigma", "temperature", "secret"])
def test_another_teacher_seed_or_strength_has_another_key(where: str) -> None:
    other = {**CONTEXT, where: {"name": "a", "weights_digest": "c"} if where == "teacher" else 7.0}
    if where == "secret":
        other = CONTEXT
    keys = {key_of_noise(KEY, CONTEXT), key_of_noise(KEY[::-1] if where == "secret" else KEY, other)}
    assert len(keys) == 2 and {len(key) for key in keys} == {32}


def test_the_order_of_the_keys_and_tuples_do_not_matter() -> None:
    assert key_of_noise(KEY, {"a": (1, 2), "b": 3}) == key_of_noise(KEY, {"b": 3, "a": [1, 2]})


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, N - 1), min_size=1, max_size=40),
    st.lists(st.integers(0, 40), max_size=5),
    st.integers(0, 2**20),
    st.integers(1, 33),
)
def test_a_row_does_not_depend_on_its_batch(ids: Sequence[int], cuts: Sequence[int], view: int, classes: int) -> None:
    weights = np.random.default_rng(1).random(N)
    noise = Noise(KEY, 0.7, 3.0, CONTENT, weights, by_id=True)
    logits = torch.randn(len(ids), classes, generator=torch.Generator().manual_seed(0))
    whole = noise(logits, torch.tensor(ids), view)
    ends = sorted({min(cut, len(ids)) for cut in cuts} | {0, len(ids)})
    parts = [noise(logits[a:b], torch.tensor(ids[a:b]), view) for a, b in pairwise(ends)]
    assert torch.equal(torch.cat(parts), whole)
    back = noise(logits.flip(0), torch.tensor(ids[::-1]), view)
    assert torch.equal(back.flip(0), whole)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 100), st.floats(1, 100), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_the_formula(sigma: float, temperature: float, weights: list[float]) -> None:
    logits, ids = torch.randn(3, C, generator=torch.Generator().manual_seed(0)) * 10, torch.arange(3)
    normals = drawn(replace(NOISE, sigma=1.0), ids=ids).double()
    w = torch.tensor(weights, dtype=torch.float64)[:, None]
    expected = logits / (1 + w * (temperature - 1)) + sigma * w * normals
    found = Noise(KEY, sigma, temperature, CONTENT, np.array(weights), by_id=True)(logits, ids, 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * (1 + sigma))
    public = torch.tensor(weights) == 0
    assert torch.equal(found[public], logits[public])
    assert found.dtype == torch.float32
