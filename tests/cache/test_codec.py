"""Rows against the dense float64 softmax of the logits that they were made of.

Two sorts of rounding are allowed, and nothing else. A value stored as float16 is off by at most 2^-11 of itself (or
half the smallest subnormal); everything is computed in float32, so what is as large as the logits is off by a few 2^-24
of the largest of them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcache.cache.format.codec import Rows, decode, encode, index_dtype, stated_classes
from kdcache.cache.format.encoding import TAIL_TEMPERATURES, Encoding
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.errors import CorruptError

LOWEST = torch.finfo(torch.float16).min
Batch = tuple[Tensor, Tensor, Encoding]
some = settings(max_examples=150, deadline=None)


def encoding_of(num_classes: int, top_k: int, dtype: str = "float16") -> Encoding:
    tail = "none" if top_k == num_classes else "uniform"
    return Encoding.model_validate({"num_classes": num_classes, "top_k": top_k, "tail": tail, "dtype": dtype})


@st.composite
def batches(draw: st.DrawFn, dense: bool = False) -> Batch:
    """Logits of many sizes and kinds, labels (-1: not known; about every third the teacher's choice), an encoding."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**63 - 1)))
    size, classes = draw(st.integers(1, 8)), draw(st.integers(2, 40))
    spread = 2 * torch.rand(size, classes, generator=generator, dtype=torch.float64) - 1
    kinds = torch.stack([spread, spread[:, :1].expand(-1, classes), (3 * spread).round(), (spread > 0.9).double()])
    logits = kinds[torch.randint(len(kinds), (size,), generator=generator), torch.arange(size)]
    logits = logits * draw(st.sampled_from([1e-3, 1, 10, 1e4])) + draw(st.sampled_from([0, 30, -30]))
    logits = logits.to(draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])))
    anything = torch.randint(-1, classes, (size,), generator=generator)
    labels = torch.where(torch.rand(size, generator=generator) < 0.3, logits.argmax(dim=1), anything)
    top_k = classes if dense else draw(st.integers(1, classes - 1))
    return logits, labels, encoding_of(classes, top_k, draw(st.sampled_from(["float16", "float32"])))


def half(values: Tensor) -> Tensor:
    """The rounding of values stored as float16."""
    return values.abs() * 2**-11 + 2**-25


def single(logits: Tensor) -> Tensor:
    """The rounding of float32 arithmetic with rows of logits, [B, 1]."""
    return (logits.double().abs().amax(dim=1, keepdim=True) + 8) * 2**-21


def stored(values: Tensor, encoding: Encoding) -> Tensor:
    """Twice the rounding of log-probabilities in their type: that of storing, and that of restoring the sum."""
    return 2 * half(values) if encoding.dtype == "float16" else torch.zeros_like(values)


def assert_within(actual: Tensor, expected: Tensor, allowed: Tensor) -> None:
    error = (actual.double() - expected).abs()
    assert (error <= allowed).all(), f"off by {(error / allowed).max():.3g} times what is allowed"


def tail_of(rows: Rows, labels: Tensor, encoding: Encoding) -> Tensor:
    """[B, C] bool: the classes that are neither in the head nor the label."""
    assert rows.indices is not None
    tail = torch.ones(len(rows), encoding.num_classes, dtype=torch.bool)
    for row, label, head in zip(tail, labels.tolist(), rows.indices.tolist(), strict=True):
        row[head] = False
        if label >= 0:
            row[label] = False
    return tail


def column(rows: Rows, encoding: Encoding, name: str) -> Tensor:
    return rows.statistics[:, encoding.statistics.index(name)]


def log_mass(log_probs: Tensor, classes: Tensor) -> Tensor:
    return log_probs.masked_fill(~classes, -math.inf).logsumexp(dim=1)


def assert_same_rows(one: Rows, other: Rows, logits: Tensor) -> None:
    """Classes and log-probabilities to the bit, the sums over a row to their last one.

    torch splits the sum over a row among vector lanes or threads where it is the only row of a batch, so the deviation
    of two logits, or the logsumexp of 40,000, may differ there in the last bit of float32. The writer therefore cuts
    batches always alike.
    """
    ours, theirs = one.arrays(), other.arrays()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & {"log_probs", "indices"})
    assert_within(one.logsumexp, other.logsumexp.double(), single(logits).squeeze(1))
    statistics = other.statistics.double()
    assert_within(one.statistics, statistics, 2 * half(statistics) + single(logits))


# All classes kept


@some
@given(batch=batches(dense=True))
def test_all_classes_give_the_logits_back(batch: Batch) -> None:
    logits, labels, encoding = batch
    rows = encode(logits, labels, encoding)
    assert rows.indices is None
    assert set(rows.arrays()) == {"log_probs", "logsumexp", "statistics"}
    exact = logits.double()
    assert_within(decode(rows, labels, encoding), exact, stored(exact.log_softmax(dim=1), encoding) + single(logits))


# Head and label


@some
@given(batch=batches())
def test_the_head_is_the_largest_classes_in_order(batch: Batch) -> None:
    logits, labels, encoding = batch
    rows = encode(logits, labels, encoding)
    assert rows.indices is not None
    head = rows.indices.long()
    assert all(len(set(row)) == encoding.top_k for row in head.tolist())
    largest = logits.float().topk(encoding.top_k, dim=1).values
    assert torch.equal(logits.float().gather(1, head), largest)
    exact = logits.double().log_softmax(dim=1).gather(1, head)
    assert_within(rows.log_probs, exact, stored(exact, encoding) + single(logits))


def test_equal_logits_are_kept_in_class_order() -> None:
    rows = encode(torch.ones(2, 1000), torch.tensor([7, -1]), encoding_of(1000, 5))
    torch.testing.assert_close(rows.indices, torch.arange(5, dtype=torch.int16).expand(2, -1))


@some
@given(data=st.data())
def test_the_head_is_that_of_a_stable_sort_whatever_the_floats(data: st.DataObject) -> None:
    largest = torch.finfo(torch.float32).max
    ties = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, largest, -largest])
    floats = ties | st.floats(allow_nan=False, allow_infinity=False, width=32)
    values = torch.tensor(data.draw(st.lists(floats, min_size=2, max_size=30))).tolist()
    top_k = data.draw(st.integers(1, len(values) - 1))
    rows = encode(torch.tensor([values]), torch.tensor([-1]), encoding_of(len(values), top_k))
    assert rows.indices is not None
    assert rows.indices[0].tolist() == sorted(range(len(values)), key=lambda j: -values[j])[:top_k]
    stated = stated_classes(torch.tensor([values]), torch.tensor([-1]), top_k)
    assert stated.nonzero()[:, 1].tolist() == sorted(rows.indices[0].tolist())


@some
@given(batch=batches())
def test_head_and_label_come_back_whatever_the_rank_of_the_label(batch: Batch) -> None:
    logits, labels, encoding = batch
    rows = encode(logits, labels, encoding)
    assert rows.indices is not None
    decoded, exact = decode(rows, labels, encoding), logits.double()
    log_probs = exact.log_softmax(dim=1)
    head = rows.indices.long()
    allowed = stored(log_probs, encoding) + single(logits)
    assert_within(decoded.gather(1, head), exact.gather(1, head), allowed.gather(1, head))
    known = labels >= 0
    label = labels[known].unsqueeze(1)
    allowed = 2 * half(log_probs) + single(logits)
    assert_within(decoded[known].gather(1, label), exact[known].gather(1, label), allowed[known].gather(1, label))


@some
@given(batch=batches())
def test_decoded_logits_are_finite_and_in_the_order_of_the_head(batch: Batch) -> None:
    logits, labels, encoding = batch
    rows = encode(logits, labels, encoding)
    assert rows.indices is not None
    decoded = decode(rows, labels, encoding)
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()
    assert all(values.isfinite().all() for values in rows.arrays().values())
    head = decoded.gather(1, rows.indices.long())
    assert (head.diff(dim=1) <= 0).all()
    # Exactly: the tail, and a label outside the head, are at most as likely as the head's last.
    outside = decoded.scatter(1, rows.indices.long(), -math.inf)
    assert (outside.amax(dim=1) <= head[:, -1]).all()


@some
@given(batch=batches())
def test_logsumexp_is_the_dense_one_and_leads_back_to_the_largest_logit(batch: Batch) -> None:
    logits, labels, encoding = batch
    rows = encode(logits, labels, encoding)
    exact = logits.double()
    assert rows.logsumexp.dtype == torch.float32
    assert_within(rows.logsumexp, exact.logsumexp(dim=1), single(logits).squeeze(1))
    largest = rows.log_probs.amax(dim=1).double() + rows.logsumexp
    log_prob = exact.log_softmax(dim=1).amax(dim=1)
    assert_within(largest, exact.amax(dim=1), stored(log_prob, encoding) + single(logits).squeeze(1))


# Statistics and tail


@some
@given(batch=st.booleans().flatmap(batches))
def test_statistics_are_the_dense_ones(batch: Batch) -> None:
    logits, labels, encoding = batch
    rows = encode(logits, labels, encoding)
    exact = logits.double()
    log_probs = exact.log_softmax(dim=1)
    label_log_prob = log_probs.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    expected = {
        "label_log_prob": label_log_prob.where(labels >= 0, 0.0),
        "logit_mean": exact.sum(dim=1) / encoding.num_classes,
        "logit_std": exact.var(dim=1, correction=0).sqrt(),
        "entropy": torch.special.entr(log_probs.exp()).sum(dim=1),
    }
    if not encoding.dense:
        tail = tail_of(rows, labels, encoding)
        for t in TAIL_TEMPERATURES:
            mass = log_mass((exact / t).log_softmax(dim=1), tail)
            expected[f"tail_log_mass_t{t}"] = mass.clamp_min(LOWEST)  # the mass of an empty tail is 0
    assert rows.statistics.dtype == torch.float16
    assert rows.statistics.shape == (len(labels), len(expected))
    for name, values in expected.items():
        assert_within(column(rows, encoding, name), values, half(values) + single(logits).squeeze(1))


@some
@given(batch=batches())
def test_the_uniform_tail_has_the_mass_of_the_true_one(batch: Batch) -> None:
    logits, labels, encoding = batch
    rows = encode(logits, labels, encoding)
    decoded, tail = decode(rows, labels, encoding), tail_of(rows, labels, encoding)
    exact = logits.double().log_softmax(dim=1)
    mass, given_back = (log_mass(log_probs, tail) for log_probs in (exact, decoded.double().log_softmax(dim=1)))
    # The level is rounded with the mass, or with the head's last where that holds it down; the sum that both are
    # divided by is rounded with every term of it, by 2^-11 of sum p |log p| in all. Restoring the sum stretches the
    # level of each class, the mass over their number, by 2^-11 at most.
    entropy = torch.special.entr(exact.exp()).sum(dim=1)
    level = torch.maximum(half(mass), half(rows.log_probs[:, -1].double()))
    stretched = half(mass - tail.sum(dim=1).clamp_min(1).log())
    there = tail.any(dim=1)
    assert_within(
        given_back[there], mass[there], (level + stretched + half(entropy) + single(logits).squeeze(1))[there]
    )
    for row, classes in zip(decoded, tail, strict=True):
        assert len(row[classes].unique()) <= 1


def tail_decoded(shape: Tensor, last: float, mass: Tensor) -> Tensor:
    """The tail [n] of a row in float32 that says this shape [n] and log-mass, below a head of class 0 at `last`.

    It is the one direction of its basis; the teacher that would say so need not exist.
    """
    encoding = Encoding(num_classes=len(shape) + 1, top_k=1, tail="lowrank", rank=1, dtype="float32")
    statistics = torch.zeros(1, len(encoding.statistics), dtype=torch.float16)
    statistics[0, encoding.statistics.index("tail_log_mass_t1")] = mass
    head, nothing, one = torch.tensor([[last]]), torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1)
    rows = Rows(head, nothing, torch.zeros(1), statistics, one.to(torch.int8))
    basis = TailBasis(torch.cat([torch.zeros(1), shape]).unsqueeze(0), torch.zeros(len(shape) + 1), one[0])
    return decode(rows, torch.tensor([-1]), encoding, basis)[0, 1:]


def water(shape: Tensor, mass: float, last: float) -> Tensor:
    """min(x + d, last) [n] float64 with the d that gives the mass, found class by class from the largest."""
    descending = shape.double().sort(descending=True).values
    for capped in range(len(shape)):
        room = math.exp(mass) - capped * math.exp(last)
        d = math.log(max(room, 1e-300)) - descending[capped:].logsumexp(0).item()
        if descending[capped] + d <= last:
            return (shape.double() + d).clamp_max(last)
    return torch.full_like(shape, last, dtype=torch.float64)


@some
@given(
    seed=st.integers(0, 2**63 - 1),
    classes=st.integers(1, 60),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 10.0, 100.0, 3000.0]),
    of_cap=st.floats(0.01, 1.2),
)
def test_a_tail_has_its_mass_and_its_order_under_the_cap(seed: int, classes: int, spread: float, of_cap: float) -> None:
    shape, last = spread * torch.randn(classes, generator=torch.Generator().manual_seed(seed)), -7.0
    mass = torch.tensor(last + math.log(of_cap * classes)).half()
    tail = tail_decoded(shape, last, mass)
    assert tail.isfinite().all()
    assert (tail <= last).all()
    assert (tail[shape.argsort(descending=True)].diff() <= 0).all()
    wanted = min(mass.item(), last + math.log(classes))
    assert tail.double().logsumexp(dim=0).item() == pytest.approx(wanted, rel=0, abs=6e-4 + spread * 1e-6)


@some
@given(seed=st.integers(0, 2**63 - 1), spread=st.floats(0, 3), of_cap=st.floats(0.01, 6))
def test_what_the_cap_takes_goes_to_the_classes_below_it(seed: int, spread: float, of_cap: float) -> None:
    shape, last = spread * torch.randn(200, generator=torch.Generator().manual_seed(seed)), -7.0
    mass = torch.tensor(last + math.log(of_cap)).half()
    expected = water(shape, mass.item(), last)
    torch.testing.assert_close(tail_decoded(shape, last, mass).double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (-1, [3, 2, math.log((math.e + 1) / 2), math.log((math.e + 1) / 2)]),  # the tail is classes 2 and 3
        (0, [3, 2, math.log((math.e + 1) / 2), math.log((math.e + 1) / 2)]),
        (1, [3, 2, math.log((math.e + 1) / 2), math.log((math.e + 1) / 2)]),
        (2, [3.0, 2.0, 1.0, 0.0]),  # class 3 alone
        (3, [3.0, 2.0, 1.0, 0.0]),
    ],
)
def test_what_a_label_adds_to_the_top_two_of_four(label: int, expected: list[float], dtype: str) -> None:
    encoding, labels = encoding_of(4, 2, dtype), torch.tensor([label])
    rows = encode(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), labels, encoding)
    torch.testing.assert_close(decode(rows, labels, encoding), torch.tensor([expected]), rtol=0, atol=2e-3)
    torch.testing.assert_close(rows.indices, torch.tensor([[0, 1]], dtype=torch.uint8))


def test_an_empty_tail_has_no_mass_and_leaves_the_logits_exact() -> None:
    encoding, labels, logits = encoding_of(3, 2), torch.tensor([2]), torch.tensor([[3.0, 2.0, -7.0]])
    rows = encode(logits, labels, encoding)
    assert (rows.statistics[:, -len(TAIL_TEMPERATURES) :] == LOWEST).all()
    torch.testing.assert_close(decode(rows, labels, encoding), logits, rtol=0, atol=5e-3)


def test_a_label_outside_the_head_does_not_overtake_it() -> None:
    # In float16 the label's log-probability is rounded up, past the head's in float32.
    encoding, labels = encoding_of(5, 1, "float32"), torch.tensor([1])
    decoded = decode(encode(torch.tensor([[1e-5, 0.0, 0.0, 0.0, 0.0]]), labels, encoding), labels, encoding)
    assert decoded[0, 1] <= decoded[0, 0]


# Batches


@some
@given(batch=st.booleans().flatmap(batches), seed=st.integers(0, 2**63 - 1))
def test_permuted_samples_give_permuted_rows(batch: Batch, seed: int) -> None:
    logits, labels, encoding = batch
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    whole = encode(logits, labels, encoding)
    assert_same_rows(encode(logits[order], labels[order], encoding), whole[order], logits[order])
    assert torch.equal(decode(whole[order], labels[order], encoding), decode(whole, labels, encoding)[order])


@some
@given(batch=st.booleans().flatmap(batches), data=st.data())
def test_rows_do_not_depend_on_where_a_batch_is_cut(batch: Batch, data: st.DataObject) -> None:
    logits, labels, encoding = batch
    size = data.draw(st.integers(1, len(labels)))
    starts = range(0, len(labels), size)
    parts = [encode(logits[at : at + size], labels[at : at + size], encoding) for at in starts]
    assert_same_rows(Rows.concatenate(parts), encode(logits, labels, encoding), logits)


@some
@given(batch=st.booleans().flatmap(batches), data=st.data())
def test_rows_cut_and_joined_are_the_rows(batch: Batch, data: st.DataObject) -> None:
    logits, labels, encoding = batch
    rows = encode(logits, labels, encoding)
    cut = data.draw(st.integers(0, len(rows)))
    joined = Rows.concatenate([rows[:cut], rows[cut:]])
    assert len(joined) == len(labels)
    assert joined.arrays().keys() == rows.arrays().keys()
    assert all(torch.equal(values, rows.arrays()[name]) for name, values in joined.arrays().items())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("top_k", [2, 5])
def test_logits_and_rows_are_left_as_they_were(top_k: int, dtype: str) -> None:
    encoding, logits, labels = encoding_of(5, top_k, dtype), torch.arange(10.0).reshape(2, 5), torch.tensor([3, -1])
    rows = encode(logits, labels, encoding)
    before = {name: values.clone() for name, values in rows.arrays().items()}
    decode(rows, labels, encoding).zero_()
    assert torch.equal(logits, torch.arange(10.0).reshape(2, 5))
    assert torch.equal(labels, torch.tensor([3, -1]))
    assert all(torch.equal(values, before[name]) for name, values in rows.arrays().items())


# Refusals and limits


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_that_are_not_finite_are_refused_by_name(dtype: torch.dtype, value: float) -> None:
    logits = torch.zeros(4, 3, dtype=dtype)
    logits[2, 1] = value
    with pytest.raises(CorruptError, match="row 2 of the batch holds NaN or infinite logits"):
        encode(logits, torch.zeros(4, dtype=torch.int64), encoding_of(3, 1))


def test_logits_too_large_for_float32_are_refused_by_name() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 1e300]], dtype=torch.float64)
    with pytest.raises(CorruptError, match="row 1 of the batch holds NaN or infinite logits"):
        encode(logits, torch.tensor([0, 0]), encoding_of(2, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_largest_half_precision_logits_stay_finite(dtype: torch.dtype, top_k: int) -> None:
    largest = min(torch.finfo(dtype).max, 1e30)
    logits = torch.tensor([[largest, -largest, 0.0], [-largest, -largest, -largest]], dtype=dtype)
    labels = torch.tensor([1, 0])
    rows = encode(logits, labels, encoding_of(3, top_k))
    assert all(values.isfinite().all() for values in rows.arrays().values())
    decoded = decode(rows, labels, encoding_of(3, top_k))
    assert decoded.isfinite().all()
    assert torch.equal(decoded.amax(dim=1), logits.float().amax(dim=1))


@pytest.mark.parametrize("shape", [(2, 3), (3, 4), (2, 5), (4,), (2,), (2, 4, 1), (1, 2, 4), (4, 2)], ids=str)
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CorruptError, match="for 2 labels and 4 classes"):
        encode(torch.zeros(shape), torch.tensor([0, 1]), encoding_of(4, 2))


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [
        (2, torch.uint8),
        (256, torch.uint8),
        (257, torch.int16),
        (32768, torch.int16),
        (32769, torch.int32),
        (40000, torch.int32),
    ],
)
def test_indices_have_the_smallest_type_that_holds_the_last_class(classes: int, dtype: torch.dtype) -> None:
    assert index_dtype(classes) == dtype
    logits = torch.full((2, classes), -20.0)
    logits[0, classes - 1], logits[1, 0], logits[1, classes - 1] = 5.0, 5.0, 3.0
    labels = torch.tensor([0, classes - 1])
    encoding = encoding_of(classes, 1)
    rows = encode(logits, labels, encoding)
    assert rows.indices is not None
    assert rows.indices.dtype == dtype
    assert rows.indices.tolist() == [[classes - 1], [0]]
    torch.testing.assert_close(decode(rows, labels, encoding), logits, rtol=0, atol=2e-2)


def stable_order(logits: Tensor) -> Tensor:
    return logits.sort(dim=1, descending=True, stable=True).indices


@some
@given(batch=batches(), level=st.sampled_from([0.0, -300.0, 2e4]))
def test_a_row_decodes_in_the_order_that_it_states(batch: Batch, level: float) -> None:
    logits, labels, encoding = batch
    rows = encode(logits, labels, encoding)
    decoded = decode(replace(rows, logsumexp=rows.logsumexp + level), labels, encoding)
    assert rows.indices is not None
    assert torch.equal(decoded.argmax(dim=1), rows.indices[:, 0].long())
    assert torch.equal(stable_order(decoded)[:, : encoding.top_k], rows.indices.long())


@some
@given(
    classes=st.integers(2, 30),
    top_k=st.integers(1, 4),
    equal=st.integers(1, 30),
    dtype=st.sampled_from(["float16", "float32"]),
    kind=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**63 - 1),
)
def test_classes_that_are_equal_or_nearly_keep_their_order(
    classes: int, top_k: int, equal: int, dtype: str, kind: torch.dtype, seed: int
) -> None:
    """Some of the largest logits are equal, or differ by less than the type of the head can tell."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(16, classes, generator=generator, dtype=torch.float64)
    tied = torch.rand(16, classes, generator=generator).argsort(dim=1)[:, :equal]
    gaps = torch.rand(16, tied.shape[1], generator=generator, dtype=torch.float64)
    gaps = gaps * 10.0 ** -torch.randint(2, 8, gaps.shape, generator=generator)
    logits = logits.scatter(1, tied, 5 + gaps).to(kind)
    labels = torch.randint(-1, classes, (16,), generator=generator)
    encoding = encoding_of(classes, min(top_k, classes - 1), dtype)
    rows = encode(logits, labels, encoding)
    decoded = decode(rows, labels, encoding)
    assert torch.equal(stable_order(decoded)[:, : encoding.top_k], stable_order(logits.float())[:, : encoding.top_k])
    assert torch.equal(decoded.argmax(dim=1), logits.float().argmax(dim=1))


@pytest.mark.parametrize("tail", ["uniform", "lowrank"])
def test_with_one_class_per_row_the_top_class_is_the_stated_one(tail: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = 0.3 * torch.randn(5000, 20, generator=generator), torch.full((5000,), -1)
    labels[::2] = torch.randint(20, (2500,), generator=generator)
    encoding = Encoding.model_validate(
        {"num_classes": 20, "top_k": 1, "tail": tail, "rank": 2 if tail == "lowrank" else 0, "dtype": "float16"}
    )
    basis = TailBasis(torch.randn(2, 20, generator=generator), torch.zeros(20), torch.ones(2) / 8)
    used = basis if tail == "lowrank" else None
    decoded = decode(encode(logits, labels, encoding, used), labels, encoding, used)
    assert torch.equal(decoded.argmax(dim=1), logits.argmax(dim=1))


def test_the_lowest_and_largest_numbers_stay_finite_in_order() -> None:
    largest = torch.finfo(torch.float32).max
    rows = Rows(
        torch.zeros(3, 3, dtype=torch.float32),
        torch.tensor([[3, 1, 0]] * 3, dtype=torch.uint8),
        torch.tensor([-largest, 0.0, largest]),
        torch.zeros(3, 8, dtype=torch.float16),
    )
    decoded = decode(rows, torch.full((3,), -1), encoding_of(4, 3, "float32"))
    assert decoded.isfinite().all()
    assert torch.equal(stable_order(decoded)[1:, :3], torch.tensor([[3, 1, 0]] * 2))
