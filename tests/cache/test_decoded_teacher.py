"""A teacher that keeps what it has decoded: the same logits as the one that decodes, each view decoded once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcache.cache import decoded_teacher
from kdcache.cache.decoded_teacher import DecodedTeacher, decode_if_small

N, C, VIEWS = 23, 7, 4
LOGITS = torch.randn(VIEWS, N, C, generator=torch.Generator().manual_seed(0))


class Decoder:
    """A teacher whose last bits depend, as a product of matrices may, on the rows that are asked for together."""

    def __init__(self) -> None:
        self.rows: Counter[int] = Counter()

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        self.rows[view] += len(ids)
        return LOGITS[view, ids] + 1e-6 * len(ids)

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(N, generator=generator)

    def prefetch(self, batches: Iterable[Tensor], view: int = 0) -> None:
        assert [int(i) for batch in batches for i in batch] == list(range(N)), "a view is read from first to last"


Asked = Sequence[tuple[int, list[int]]]
asked = st.lists(st.tuples(st.integers(0, VIEWS - 1), st.lists(st.integers(0, N - 1), max_size=9)), max_size=12)


@settings(deadline=None)
@given(asked, asked, st.integers(1, VIEWS))
def test_the_logits_are_the_same_to_the_bit_whatever_was_asked_for_before(
    before: Asked, then: Asked, kept: int
) -> None:
    fresh, used = DecodedTeacher(Decoder(), N, kept), DecodedTeacher(Decoder(), N, kept)
    for view, ids in before:
        used(torch.tensor(ids, dtype=torch.int64), view)
    for view, ids in then:
        which = torch.tensor(ids, dtype=torch.int64)
        assert torch.equal(used(which, view), fresh(which, view))
        torch.testing.assert_close(used(which, view), LOGITS[view, which], atol=1e-4, rtol=0)


def test_a_view_is_decoded_once_and_those_that_came_first_stay() -> None:
    decoder = Decoder()
    teacher = DecodedTeacher(decoder, N, 2)
    for _ in range(3):
        for view in (0, 1, 2):
            teacher(torch.arange(N), view)
    of_one = N + 1  # a first row says how wide a row is
    assert decoder.rows == {0: of_one, 1: 3 * of_one, 2: 3 * of_one}


def test_a_view_is_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_teacher, "_LOGITS_PER_DECODE", 5 * C)
    logits = DecodedTeacher(Decoder(), N, 1)(torch.arange(N), 3)
    torch.testing.assert_close(logits, LOGITS[3], atol=1e-4, rtol=0)


@pytest.mark.parametrize("wrong", [N, -1])
def test_ids_that_are_not_there_are_refused(wrong: int) -> None:
    with pytest.raises(IndexError):
        DecodedTeacher(Decoder(), N, 1)(torch.tensor([0, wrong]), 0)


def test_what_was_given_may_be_changed() -> None:
    teacher = DecodedTeacher(Decoder(), N, 1)
    teacher(torch.arange(N), 0).zero_()
    assert float(teacher(torch.arange(N), 0).abs().max()) > 0


def test_logits_are_kept_where_a_view_of_them_is_small() -> None:
    decoder = Decoder()
    assert isinstance(decode_if_small(decoder, 50_000, 100), DecodedTeacher)  # CIFAR-100
    assert decode_if_small(decoder, 1_281_167, 1000) is decoder  # ImageNet
