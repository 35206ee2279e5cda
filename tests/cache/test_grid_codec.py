"""The codec of maps: exact in integers, and within half a step of what it was given; what the planner promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcache.cache.fidelity import total_variation
from kdcache.cache.format.grid_codec import decode_grids, differences_of, encode_grids, sums_of
from kdcache.cache.format.grid_encoding import GridEncoding, GridRequest
from kdcache.cache.grid_planner import PlannedGrids, pilot_stride, plan_grids
from kdcache.errors import UsageError


def smooth(maps: int, channels: int, height: int = 12, width: int = 16, seed: int = 0, spread: float = 4.0) -> Tensor:
    """Maps whose neighboring places say nearly the same, as the logits of a segmentation network."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(maps, channels, 4, 4, generator=generator)
    fine = torch.randn(maps, channels, height, width, generator=generator)
    size = (height, width)
    return spread * (torch.nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=False) + fine / 20)


def encoding_of(maps: Tensor, **settings: Any) -> GridEncoding:
    shape = dict(zip(("channels", "height", "width"), maps.shape[1:], strict=True))
    return GridEncoding.model_validate({"codec": "steps", "dtype": "int8", "step": 0.25, **shape, **settings})


def request(encoding: Any = "auto", fidelity: float | None = None, *, over_places: bool = False) -> GridRequest:
    return GridRequest(encoding=encoding, fidelity=fidelity, over_places=over_places)


@settings(deadline=None, max_examples=60)
@given(bits=st.sampled_from([8, 16]), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_sums_undo_differences_of_any_integers(bits: int, height: int, width: int, seed: int) -> None:
    dtype = torch.int8 if bits == 8 else torch.int16
    info, generator = torch.iinfo(dtype), torch.Generator().manual_seed(seed)
    numbers = torch.randint(info.min, info.max + 1, (2, 3, height, width), generator=generator).to(dtype)
    stored = differences_of(numbers)
    assert stored.dtype == dtype
    assert torch.equal(sums_of(stored), numbers)


def test_the_differences_are_those_of_numpy() -> None:
    numbers = torch.randint(-128, 128, (5, 7, 6), generator=torch.Generator().manual_seed(1))
    padded = np.pad(numbers.numpy(), ((0, 0), (1, 0), (1, 0)))
    expected = np.diff(np.diff(padded, axis=1), axis=2)
    found = differences_of(numbers.to(torch.int8)).numpy()
    np.testing.assert_array_equal(found, (expected + 128) % 256 - 128)


def test_small_differences_of_two_bytes_have_an_upper_byte_of_0() -> None:
    stored = differences_of(torch.arange(-3, 4, dtype=torch.int16).reshape(7, 1, 1))
    assert stored.flatten().tolist() == [5, 3, 1, 0, 2, 4, 6]


@settings(deadline=None, max_examples=40)
@given(
    step=st.floats(0.05, 1), level=st.booleans(), dtype=st.sampled_from(["int8", "int16"]), seed=st.integers(0, 2**16)
)
def test_each_number_is_within_half_a_step(step: float, level: bool, dtype: str, seed: int) -> None:
    maps = smooth(2, 5, seed=seed, spread=1.0)
    encoding = encoding_of(maps, step=step, level=level, dtype=dtype)
    wanted = maps if level else maps - maps.mean(dim=1, keepdim=True)
    wanted = wanted.clamp(-127 * step, 127 * step) if dtype == "int8" else wanted
    assert ((decode_grids(encode_grids(maps, encoding), encoding) - wanted).abs() <= step / 2 + 1e-5).all()


def test_a_number_beyond_the_type_is_off_at_its_own_place_alone() -> None:
    maps = smooth(1, 3)
    maps[0, 1, 4, 5] = 1e6
    encoding = encoding_of(maps)
    apart = (decode_grids(encode_grids(maps, encoding), encoding) - maps).abs() > 0.126
    assert apart.nonzero().tolist() == [[0, 1, 4, 5]]


@pytest.mark.parametrize("codec", ["float16", "float32"])
def test_plain_numbers_are_stored_as_they_are(codec: str) -> None:
    maps = smooth(2, 3)
    encoding = encoding_of(maps, codec=codec, dtype=codec, step=None)
    assert torch.equal(decode_grids(encode_grids(maps, encoding), encoding), maps.to(getattr(torch, codec)).float())


def decoded(planned: PlannedGrids, maps: Tensor) -> Tensor:
    return decode_grids(encode_grids(maps, planned.encoding, planned.basis), planned.encoding, planned.basis)


@pytest.mark.parametrize("encoding", ["auto", "steps", "klt"])
@pytest.mark.parametrize("fidelity", [0.002, 0.02])
def test_classes_are_within_the_fidelity_on_maps_that_were_not_seen(encoding: str, fidelity: float) -> None:
    planned = plan_grids(smooth(32, 7), "classes", request(encoding, fidelity))
    others = smooth(16, 7, seed=5)
    again = decoded(planned, others)
    true, kept = (maps.double().movedim(1, 3).flatten(0, 2) for maps in (others, again))
    found = float(total_variation(true, kept, 1).mean())
    assert fidelity / 3 < found < 1.2 * fidelity
    assert planned.fidelity.total_variation == pytest.approx(found, rel=0.2)
    assert not planned.encoding.level
    assert float(again.mean(dim=1).abs().max()) < planned.encoding.step or planned.encoding.codec == "steps"  # type: ignore[operator]


def test_over_places_keeps_the_level_and_takes_a_smaller_step() -> None:
    maps = smooth(32, 7)
    plain, over = (plan_grids(maps, "classes", request(fidelity=0.01, over_places=both)) for both in (False, True))
    assert over.encoding.level
    assert over.encoding.step < plain.encoding.step  # type: ignore[operator]
    true, again = (of.double().flatten(2).softmax(dim=2) for of in (maps[::4], decoded(over, maps[::4])))
    assert over.fidelity.over_places == pytest.approx(float((true - again).abs().sum(dim=2).mean()) / 2, rel=1e-3)
    assert over.fidelity.over_places <= 0.01  # type: ignore[operator]


def test_places_of_an_unknown_level_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="over_places compares the logits of different places"):
        plan_grids(smooth(8, 4), "classes", request(over_places=True), level_known=False)


@pytest.mark.parametrize("encoding", ["auto", "steps", "klt"])
def test_vectors_are_within_both_bounds(encoding: str) -> None:
    maps = smooth(24, 9).relu() + 0.5
    planned = plan_grids(maps, "vector", request(encoding, 0.003))
    true, again = (of.double().movedim(1, 3).flatten(0, 2) for of in (maps[::4], decoded(planned, maps[::4])))
    cosine = torch.nn.functional.cosine_similarity(true, again)
    spread = (true - true.mean(dim=0)).square().sum()
    assert float((1 - cosine).mean()) <= 0.003
    assert float((true - again).square().sum() / spread) <= 0.0065


def test_vectors_of_length_1_keep_it() -> None:
    maps = torch.nn.functional.normalize(smooth(16, 6), dim=1)
    planned = plan_grids(maps, "vector", request())
    assert planned.encoding.normalized
    torch.testing.assert_close(decoded(planned, maps).norm(dim=1), torch.ones(16, 12, 16))


def test_axes_of_few_classes_are_kept_where_most_classes_say_the_same() -> None:
    few = smooth(32, 3, spread=6.0)
    mixed = torch.einsum("cr,brhw->bchw", torch.randn(24, 3, generator=torch.Generator().manual_seed(2)), few)
    planned = plan_grids(mixed, "classes", request(fidelity=0.01), 1000)
    assert planned.encoding.codec == "klt"
    assert planned.encoding.components <= 4
    assert planned.bytes_per_row < 0.5 * plan_grids(mixed, "classes", request("steps", 0.01)).bytes_per_row


def test_small_is_smaller_and_decodes_to_the_same() -> None:
    maps = smooth(16, 12, 32, 32, spread=1.0)
    fast, small = (
        plan_grids(maps, "classes", GridRequest(encoding="steps", fidelity=0.02, over_places=False, compression=how))
        for how in ("fast", "small")
    )
    assert fast.encoding == small.encoding.model_copy(update={"compression": "fast"})
    assert small.bytes_per_row < 0.98 * fast.bytes_per_row
    assert torch.equal(decoded(fast, maps), decoded(small, maps))


def entropy(differences: Tensor) -> float:
    """Bytes of integers [B, W, h, w] whose planes are coded one by one with the shares of their values."""
    total = 0.0
    for plane in differences.movedim(1, 0).flatten(1):
        counts = plane.unique(return_counts=True)[1].double()
        total -= float((counts * (counts / counts.sum()).log2()).sum()) / 8
    return total


@pytest.mark.parametrize("fidelity", [0.005, 0.02])
def test_maps_take_hardly_more_bytes_than_the_entropy_of_their_planes(fidelity: float) -> None:
    maps = smooth(16, 12, 48, 64, spread=1.0)
    planned = plan_grids(maps, "classes", request("steps", fidelity))
    least = entropy(encode_grids(maps[::4], planned.encoding).values) / 4
    assert least < planned.bytes_per_row < 1.16 * least


def test_scores_are_exact_unless_a_step_is_asked_for() -> None:
    maps = smooth(8, 1)
    assert torch.equal(decoded(plan_grids(maps, "score", request()), maps), maps)
    stepped = plan_grids(maps, "score", request("steps", 0.001))
    assert stepped.fidelity.relative_error <= 0.002  # type: ignore[operator]
    assert stepped.fidelity.one_minus_cosine is None


def test_large_ranges_take_two_bytes() -> None:
    maps = smooth(16, 4, spread=300.0)
    planned = plan_grids(maps, "classes", request("steps", 0.001))
    assert planned.encoding.dtype == "int16"
    assert planned.fidelity.total_variation <= 0.001  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["classes", "vector"])
def test_maps_that_are_the_same_everywhere_are_stored(kind: Any) -> None:
    maps = torch.ones(8, 3, 4, 4)
    planned = plan_grids(maps, kind, request())
    assert torch.equal(decoded(planned, maps), torch.zeros_like(maps) if kind == "classes" else maps)
    with pytest.raises(UsageError, match="the same everywhere"):
        plan_grids(maps, kind, request("steps"))


def test_a_single_map_is_planned() -> None:
    assert plan_grids(smooth(1, 3), "classes", request()).fidelity.maps == 1


def test_float16_that_cannot_hold_them_is_refused() -> None:
    with pytest.raises(UsageError, match="float16 cannot hold the maps, whose largest number is"):
        plan_grids(smooth(8, 3, spread=1e6), "vector", request("float16"))


@pytest.mark.parametrize(
    ("maps", "numbers", "kept"), [(4096, 100, 128), (100, 100, 100), (4096, 2**25, 4), (3, 2**30, 3)]
)
def test_a_pilot_keeps_as_many_maps_as_fit(maps: int, numbers: int, kept: int) -> None:
    assert kept * 0.5 <= len(range(0, maps, pilot_stride(maps, numbers))) <= kept
