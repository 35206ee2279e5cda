"""`summarize` and `diff` of outputs beside class logits, against numpy on the vectors that are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli import kdcache
from helpers.paths import GOLDEN

from kdcache import Cache, open_cache
from kdcache.cache.inspect.diff import compare
from kdcache.cache.inspect.output_statistics import output_statistics
from kdcache.curate.select import select

PATH = GOLDEN / "outputs-v1.kdcache"


@pytest.fixture(scope="module")
def cache() -> Cache:
    return open_cache(PATH)


def test_statistics_are_those_of_the_decoded_rows(cache: Cache) -> None:
    found = {one.output: one for one in output_statistics(cache)}
    assert list(found) == ["age", "color", "embedding", "half", "hidden"]
    for name, one in found.items():
        values = cache.teacher(name)(torch.arange(20)).double().numpy()
        expected = (
            values.min(),
            values.max(),
            np.linalg.norm(values, axis=1).mean(),
            np.sqrt(values.var(axis=0).sum()),
        )
        assert one[4:] == pytest.approx(expected, rel=1e-6)
        assert (one.rows, one.length) == values.shape


def test_a_cache_does_not_differ_from_itself_and_outputs_of_one_alone_are_named(cache: Cache, tmp_path: Path) -> None:
    assert all(one[2:] == (0.0, 0.0, 0.0, None) for one in compare(cache, cache).outputs)
    some = select(cache, tmp_path / "s.kdcache", outputs=["embedding"])
    difference = compare(cache, some)
    assert difference.why_not == f"{some.path} does not have them"
    found = {one.output: one.why_not for one in difference.outputs}
    assert found.pop("embedding") is None
    assert set(found.values()) == {f"{some.path} does not have it"}


def test_differences_are_those_of_the_decoded_rows(cache: Cache, tmp_path: Path) -> None:
    """The same samples, whose vectors come from another teacher."""
    from torch import Tensor, nn

    from kdcache import dump_teacher, wrap

    with np.load(GOLDEN / "outputs-v1.npz") as frozen:
        images, weight = torch.from_numpy(frozen["images"]), torch.from_numpy(frozen["weight"])

    class Other(nn.Module):
        def forward(self, given: Tensor) -> dict[str, Tensor]:
            hidden = given.flatten(1) @ weight
            return {"age": hidden[:, 12:14] + 0.25, "hidden": hidden[:, 4:8]}

    data = wrap(torch.utils.data.TensorDataset(images, torch.from_numpy(cache.labels).long()), 4, name="golden")
    outputs = {"age": {"kind": "score"}, "hidden": {"encoding": "float32"}}
    other = dump_teacher(Other(), data, tmp_path / "o.kdcache", logits=False, outputs=outputs, shard_rows=8)
    found = {one.output: one for one in compare(cache, other).outputs}
    ids = torch.arange(20)
    ours, theirs = (each.teacher("age")(ids).double().numpy() for each in (cache, other))
    cosines = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    spread = ((ours - ours.mean(axis=0)) ** 2).sum()
    expected = ((1 - cosines).mean(), ((ours - theirs) ** 2).sum() / spread, np.abs(ours - theirs).max())
    assert found["age"][2:5] == pytest.approx(expected, rel=1e-6)
    assert found["hidden"].why_not == "it is a vector of 6 in one, and a vector of 4 in the other"


def test_commands_print_outputs_with_and_without_logits(tmp_path: Path) -> None:
    assert "embedding   vector" in kdcache("summarize", PATH).stdout
    only = tmp_path / "only.kdcache"
    assert kdcache("select", PATH, "--output", "embedding", "--output", "age", "-o", only).exit_code == 0
    printed = json.loads(kdcache("summarize", only, "--json").stdout)
    assert [one["output"] for one in printed["outputs"]] == ["age", "embedding"]
    assert "classes" not in printed
    told = kdcache("diff", only, PATH).stdout
    assert f"logits are not compared: {only} does not have them" in told
    assert "the output color is not compared" in told
    assert json.loads(kdcache("card", only, "--json").stdout)["picture"] is None
    assert "vectors of 8" in kdcache("info", only).stdout
    assert kdcache("verify", only).exit_code == 0
    refused = kdcache("info", only, "--fidelity")
    assert refused.exit_code == 4
    assert refused.stderr.startswith("error: this cache holds no class logits; it holds age, embedding")
