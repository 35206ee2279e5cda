"""The codec of vectors: against numpy's float64, and properties that hold for any vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcache.cache.format.output_records import VectorEncoding, VectorRequest
from kdcache.cache.format.vector_codec import decode_vectors, encode_vectors, fit_basis
from kdcache.cache.vector_planner import plan_vectors, vector_fidelity
from kdcache.errors import UsageError


def correlated(rows: int, length: int, seed: int = 0, decay: float = 1.5) -> Tensor:
    """Vectors [rows, length] whose deviations fall over some decades along axes that no coordinate is near."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(length, length, generator=generator, dtype=torch.float64))
    drawn = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    vectors: Tensor = (drawn * torch.logspace(0, -decay, length, dtype=torch.float64)) @ rotation + 0.3
    return vectors.float()


def klt(length: int, components: int, step: float, *, dtype: str = "int16", normalized: bool = False) -> VectorEncoding:
    return VectorEncoding.model_validate(
        {
            "codec": "klt",
            "length": length,
            "dtype": dtype,
            "components": components,
            "step": step,
            "normalized": normalized,
        }
    )


def test_the_axes_are_those_of_numpys_covariance() -> None:
    vectors = correlated(300, 12)
    basis, deviations = fit_basis(vectors)
    variances, axes = np.linalg.eigh(np.cov(vectors.double().numpy().T))
    np.testing.assert_allclose(deviations.numpy() ** 2, variances[::-1], rtol=1e-8)
    np.testing.assert_allclose(np.abs((basis.axes.double().numpy() * axes.T[::-1]).sum(axis=1)), 1, rtol=1e-6)
    assert (basis.axes.gather(1, basis.axes.abs().argmax(dim=1, keepdim=True)) > 0).all()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(2, 40),
    length=st.integers(1, 20),
    step=st.floats(0.01, 1),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 2**16),
)
def test_each_coordinate_is_within_half_a_step(rows: int, length: int, step: float, scale: float, seed: int) -> None:
    vectors = correlated(rows, length, seed) * scale
    basis, _ = fit_basis(vectors)
    # What has no coordinate, for want of rows, is kept by no number of axes.
    encoding = klt(length, len(basis.axes), step * scale)
    decoded = decode_vectors(encode_vectors(vectors, encoding, basis), encoding, basis)
    error = (vectors.double() - decoded.double()) @ basis.axes.double().T
    assert error.abs().max() <= step * scale * 0.5001 + 1e-5 * vectors.abs().max()


def test_coordinates_beyond_the_type_are_clamped() -> None:
    vectors = correlated(50, 4) * 1000
    basis, _ = fit_basis(vectors)
    rows = encode_vectors(vectors, klt(4, 4, 1.0, dtype="int8"), basis)
    assert rows.values.dtype == torch.int8
    assert [int(rows.values.min()), int(rows.values.max())] == [-127, 127]


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 20), length=st.integers(1, 20), seed=st.integers(0, 2**16), zero=st.booleans())
def test_int8_is_within_half_of_the_rows_scale(rows: int, length: int, seed: int, zero: bool) -> None:
    vectors = correlated(rows, length, seed)
    if zero:
        vectors[0] = 0
    encoding = VectorEncoding(codec="int8", length=length, dtype="int8")
    encoded = encode_vectors(vectors, encoding)
    largest = vectors.abs().amax(dim=1, keepdim=True)
    assert ((decode_vectors(encoded, encoding) - vectors).abs() <= largest / 127 * 0.5001).all()


@pytest.mark.parametrize("codec", ["float16", "float32"])
def test_plain_types_are_those_of_numpy(codec: str) -> None:
    vectors = correlated(30, 7)
    encoding = VectorEncoding.model_validate({"codec": codec, "length": 7, "dtype": codec})
    decoded = decode_vectors(encode_vectors(vectors, encoding), encoding)
    np.testing.assert_array_equal(decoded.numpy(), vectors.numpy().astype(codec).astype("float32"))


def test_rows_are_encoded_one_by_one() -> None:
    vectors = correlated(64, 16)
    basis, deviations = fit_basis(vectors)
    encoding = klt(16, 16, float(deviations.median()) / 4)
    order = torch.randperm(64)
    together = encode_vectors(vectors, encoding, basis).values
    assert torch.equal(encode_vectors(vectors[order], encoding, basis).values, together[order])


# The planner


@pytest.mark.parametrize("fidelity", [1e-2, 1e-3, 1e-4])
def test_the_planned_encoding_is_within_the_fidelity_on_other_vectors(fidelity: float) -> None:
    pilot, others = correlated(2048, 48), correlated(3000, 48).roll(1, dims=0)[2048:]
    planned = plan_vectors(pilot, VectorRequest(encoding="auto", fidelity=fidelity))
    decoded = decode_vectors(encode_vectors(others, planned.encoding, planned.basis), planned.encoding, planned.basis)
    found = vector_fidelity(others, decoded)
    assert planned.encoding.codec == "klt"
    assert found.one_minus_cosine <= 1.1 * fidelity
    assert found.relative_error <= 2.2 * fidelity


@pytest.mark.parametrize("fidelity", [1e-2, 3e-3, 1.3e-3, 1e-3, 3e-4, 1e-4])
def test_no_step_that_is_5_percent_larger_is_within_the_fidelity(fidelity: float) -> None:
    pilot = correlated(2048, 48)
    planned = plan_vectors(pilot, VectorRequest(encoding="klt", fidelity=fidelity))
    assert planned.encoding.step is not None
    larger = planned.encoding.model_copy(update={"step": 1.05 * planned.encoding.step})
    held = pilot[::4]
    decoded = decode_vectors(encode_vectors(held, larger, planned.basis), larger, planned.basis)
    found = vector_fidelity(held, decoded)
    assert found.one_minus_cosine > fidelity or found.relative_error > 2 * fidelity


def test_klt_is_smaller_than_int8_where_vectors_are_correlated() -> None:
    sizes = {
        codec: plan_vectors(
            correlated(2048, 64), VectorRequest.model_validate({"encoding": codec, "fidelity": 1e-3})
        ).bytes_per_row
        for codec in ("klt", "int8", "float16", "float32")
    }
    assert sizes["klt"] < 0.7 * sizes["int8"] < 0.6 * sizes["float16"] < sizes["float32"]


def test_of_a_small_cache_the_axes_cost_more_than_they_save() -> None:
    pilot, request = correlated(2048, 64), VectorRequest(encoding="auto", fidelity=1e-3)
    assert plan_vectors(pilot, request, n_rows=200).encoding.codec == "int8"
    assert plan_vectors(pilot, request, n_rows=200_000).encoding.codec == "klt"


def test_a_cosine_does_not_hide_the_loss_of_what_varies_around_a_large_mean() -> None:
    pilot = correlated(2048, 16) + 100
    planned = plan_vectors(pilot, VectorRequest(encoding="auto", fidelity=1e-2))
    assert planned.fidelity.relative_error <= 2e-2
    assert planned.fidelity.one_minus_cosine < 1e-5


def test_normalized_vectors_are_decoded_as_such() -> None:
    pilot = torch.nn.functional.normalize(correlated(1024, 24), dim=1)
    planned = plan_vectors(pilot, VectorRequest(encoding="auto", fidelity=1e-2))
    decoded = decode_vectors(encode_vectors(pilot, planned.encoding, planned.basis), planned.encoding, planned.basis)
    assert planned.encoding.normalized
    torch.testing.assert_close(decoded.norm(dim=1), torch.ones(1024))


@pytest.mark.parametrize(
    "pilot",
    [torch.zeros(20, 3), torch.ones(20, 5), correlated(40, 1), correlated(3, 30), correlated(1, 4)],
    ids=["zeros", "all the same", "one number", "fewer rows than numbers", "one row"],
)
@pytest.mark.parametrize("encoding", ["auto", "int8", "float16", "float32"])
def test_degenerate_vectors_are_planned(pilot: Tensor, encoding: str) -> None:
    request = VectorRequest.model_validate({"encoding": encoding, "fidelity": 1e-3})
    planned = plan_vectors(pilot, request)
    decoded = decode_vectors(encode_vectors(pilot, planned.encoding, planned.basis), planned.encoding, planned.basis)
    assert (decoded - pilot).abs().max() <= 0.03 * max(float(pilot.abs().max()), 1e-6)


def test_numbers_beyond_float16_are_kept_in_another_type() -> None:
    pilot = correlated(512, 6) * 1e6
    with pytest.raises(UsageError, match="float16 cannot hold the vectors, whose largest number is"):
        plan_vectors(pilot, VectorRequest(encoding="float16", fidelity=None))
    assert plan_vectors(pilot, VectorRequest(encoding="auto", fidelity=1e-3)).encoding.codec != "float16"


def test_a_codec_that_is_not_within_the_fidelity_is_refused_with_what_it_has() -> None:
    with pytest.raises(UsageError, match=r"encoding int8 is not within fidelity 1e-08: 1 - cosine .*e-0") as caught:
        plan_vectors(correlated(512, 20), VectorRequest(encoding="int8", fidelity=1e-8))
    assert "set its encoding to auto or float32" in caught.value.fix


@pytest.mark.parametrize(
    "wrong",
    [
        {"codec": "klt", "dtype": "float16", "components": 2, "step": 0.1},
        {"codec": "klt", "dtype": "int8", "components": 0, "step": 0.1},
        {"codec": "klt", "dtype": "int8", "components": 9, "step": 0.1},
        {"codec": "klt", "dtype": "int8", "components": 2, "step": None},
        {"codec": "klt", "dtype": "int8", "components": 2, "step": float("nan")},
        {"codec": "int8", "dtype": "int16"},
        {"codec": "float16", "dtype": "float16", "step": 0.1},
        {"codec": "float32", "dtype": "float32", "components": 2},
    ],
)
def test_an_encoding_that_does_not_agree_with_itself_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="VectorEncoding"):
        VectorEncoding.model_validate({"length": 8, **wrong})
