"""The bytes of the encoder against those of the formulas of docs/FORMAT.md, computed one by one in torch.

Stored bytes are part of a cache's root digest: what is computed faster must not change one of them.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdcache.cache.format.codec import Rows, encode, index_dtype, tail_log_mass
from kdcache.cache.format.encoding import TAIL_TEMPERATURES, Encoding
from kdcache.cache.format.row_reductions import finite_rows
from kdcache.cache.format.tail_basis import TailBasis, fit_coordinates, principal_components, round_coordinates

KINDS = ["normal", "tied", "all equal", "rounded", "offset", "extreme", "one hot", "denormal", "signed zeros"]
SHAPES = [(5, 2, 1), (64, 17, 3), (64, 40, 16), (33, 300, 4), (256, 1000, 16), (16, 1000, 999), (3, 40000, 64)]


def logits_of(kind: str, rows: int, classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, classes, generator=generator)
    return {
        "normal": 3 * values,
        "tied": (2 * values).round(),
        "all equal": values[:, :1].expand(-1, classes) * 1e4,
        "rounded": (50 * values).bfloat16().float(),
        "offset": values + 10.0 ** torch.randint(-3, 8, (rows, 1), generator=generator),
        "extreme": values.sign() * torch.rand(rows, classes, generator=generator) * 3e38,
        "one hot": (values == values.amax(dim=1, keepdim=True)) * torch.rand(rows, 1, generator=generator) * 1e4,
        "denormal": values * 1e-40,
        "signed zeros": torch.where(values > 0, 0.0, -0.0),
    }[kind]


def encoding_of(classes: int, top_k: int, dtype: str, rank: int = 0) -> Encoding:
    tail = "none" if top_k == classes else "lowrank" if rank else "uniform"
    return Encoding.model_validate({"num_classes": classes, "top_k": top_k, "tail": tail, "dtype": dtype, "rank": rank})


def by_the_formulas(logits: Tensor, labels: Tensor, encoding: Encoding, basis: TailBasis | None) -> dict[str, Tensor]:
    """Return the arrays of the rows of float32 logits; sorting is stable, so that ties go to the lower class."""
    log_probs = logits.log_softmax(dim=1)
    known, label = labels >= 0, labels.clamp_min(0).unsqueeze(1)
    columns = {
        "label_log_prob": torch.where(known, log_probs.gather(1, label).squeeze(1), 0.0),
        "logit_mean": logits.mean(dim=1),
        "logit_std": logits.std(dim=1, correction=0),
        "entropy": -(log_probs.exp() * log_probs.clamp_min(-1e4)).sum(dim=1),
    }
    arrays = {"log_probs": log_probs, "logsumexp": logits.logsumexp(dim=1)}
    if not encoding.dense:
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, : encoding.top_k]
        stated = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, order, True)
        stated |= torch.zeros_like(stated).scatter(1, label, known.unsqueeze(1))
        for t in TAIL_TEMPERATURES:
            masked = (logits / t).log_softmax(dim=1).masked_fill(stated, -math.inf)
            columns[f"tail_log_mass_t{t}"] = masked.logsumexp(dim=1)
        arrays |= {"log_probs": log_probs.gather(1, order), "indices": order.to(index_dtype(encoding.num_classes))}
        if basis is not None:
            coordinates = fit_coordinates(logits, stated, basis.basis, basis.mean)
            arrays["tail"] = round_coordinates(coordinates, basis.scale)
    dtype = getattr(torch, encoding.dtype)
    limits = torch.finfo(torch.float16).max, torch.finfo(dtype).max
    statistics = torch.stack([columns[name] for name in encoding.statistics], dim=1)
    arrays["statistics"] = statistics.clamp(-limits[0], limits[0]).half()
    arrays["log_probs"] = arrays["log_probs"].clamp(-limits[1], limits[1]).to(dtype)
    return arrays


def assert_same_bits(rows: Rows, expected: dict[str, Tensor]) -> None:
    arrays = rows.arrays()
    assert arrays.keys() == expected.keys()
    for name, values in arrays.items():
        assert values.dtype == expected[name].dtype, name
        assert values.contiguous().numpy().tobytes() == expected[name].contiguous().numpy().tobytes(), name


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_not_a_bit_differs_from_the_formulas(kind: str, shape: tuple[int, int, int], dtype: str) -> None:
    n_rows, classes, top_k = shape
    logits = logits_of(kind, n_rows, classes)
    labels = torch.randint(-1, classes, (n_rows,), generator=torch.Generator().manual_seed(1))
    for k in (top_k, classes):
        encoding = encoding_of(classes, k, dtype)
        assert_same_bits(encode(logits, labels, encoding), by_the_formulas(logits, labels, encoding, None))


@pytest.mark.parametrize("precision", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "tied", "one hot"])
def test_nor_of_logits_of_another_precision(kind: str, precision: torch.dtype) -> None:
    logits = logits_of(kind, 64, 300).to(precision)
    labels, encoding = logits.argmax(dim=1), encoding_of(300, 8, "float16")
    assert_same_bits(encode(logits, labels, encoding), by_the_formulas(logits.float(), labels, encoding, None))


@pytest.mark.parametrize("kind", KINDS[:5])
def test_nor_of_rows_with_coordinates(kind: str) -> None:
    pilot = logits_of("normal", 400, 120, seed=2)
    basis = TailBasis(*principal_components(pilot, 24), torch.full((24,), 0.2))
    logits, labels = logits_of(kind, 50, 120), torch.arange(-1, 49)
    encoding = encoding_of(120, 4, "float16", rank=24)
    assert_same_bits(encode(logits, labels, encoding, basis), by_the_formulas(logits, labels, encoding, basis))


@pytest.mark.parametrize("kind", ["normal", "offset", "extreme"])
def test_the_standard_deviation_of_many_rows_is_that_of_torch(kind: str) -> None:
    logits = logits_of(kind, 20_000, 100, seed=3)
    rows = encode(logits, torch.full((20_000,), -1), encoding_of(100, 100, "float16"))
    limit = torch.finfo(torch.float16).max
    expected = logits.std(dim=1, correction=0).clamp_max(limit).half()
    assert torch.equal(rows.statistics[:, encoding_of(100, 100, "float16").statistics.index("logit_std")], expected)


def test_a_mass_of_no_class_is_0() -> None:
    logits = torch.randn(2, 3)
    stated = torch.tensor([[True, True, True], [True, False, True]])
    masses = tail_log_mass(logits, stated, 2.0)
    assert masses[0] == -math.inf
    assert masses[1] == (logits[1] / 2).log_softmax(dim=0)[1]


def test_a_batch_of_no_rows_is_encoded() -> None:
    assert len(encode(torch.empty(0, 9), torch.empty(0, dtype=torch.int64), encoding_of(9, 2, "float16"))) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_found(value: float) -> None:
    logits = torch.randn(4, 50)
    logits[1, 0], logits[3, 49] = value, value
    logits[2, 7] = torch.finfo(torch.float32).max
    assert finite_rows(logits).tolist() == [True, False, True, False]
    assert finite_rows(logits.half()).tolist() == [True, False, False, False]
