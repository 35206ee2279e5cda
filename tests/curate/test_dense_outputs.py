"""Named outputs in files: caches of them, and files of caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from helpers.tiny import FLIP, tiny_samples

from kdcache.cache.format.output_records import VectorEncoding
from kdcache.cli import main
from kdcache.config.cache import CacheSpec
from kdcache.curate.decoded_files import logits_of_cache
from kdcache.curate.dense_logits import cache_of_logits
from kdcache.errors import CorruptError, KdcacheError, MismatchError, UsageError

N, C, D = 37, 10, 12


def arrays(views: int = 1) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    lead = (views, N) if views > 1 else (N,)
    made = {"logits": C, "features": D, "scores": 3, "second": 5}
    return {name: rng.normal(size=(*lead, width)).astype(np.float32) for name, width in made.items()}


def spec(**outputs: Any) -> CacheSpec:
    return CacheSpec.model_validate({"outputs": outputs, "top_k": "all", "dtype": "float32", "shard_rows": 16})


ALL: dict[str, Any] = {
    "features": {"encoding": "float32"},
    "scores": {"kind": "score"},
    "second": {"kind": "classes", "top_k": "all", "dtype": "float32"},
}


@pytest.mark.parametrize("suffix", ["npz", "pt"])
@pytest.mark.parametrize("views", [1, 2])
def test_every_output_of_a_file_is_in_the_cache(suffix: str, views: int, tmp_path: Path) -> None:
    values, path = arrays(views), tmp_path / f"said.{suffix}"
    seed = {"seed": np.array(3)} if views > 1 else {}
    if suffix == "npz":
        np.savez(path, **values, **seed)  # type: ignore[arg-type]  # numpy's stub takes no mapping
    else:
        torch.save({name: torch.tensor(value) for name, value in (values | seed).items()}, path)
    transform = FLIP if views > 1 else []
    cache = cache_of_logits(path, tiny_samples(N), tmp_path / "c.kdcache", spec=spec(**ALL), transform=transform)
    assert cache.manifest.plan.output_names == ["logits", "features", "scores", "second"]
    ids = torch.arange(N)
    for view in range(views):
        for name in ("features", "scores"):
            expected = values[name][view] if views > 1 else values[name]
            assert cache.teacher(name)(ids, view).numpy().tobytes() == expected.tobytes()
        for name, teacher in (("logits", cache.teacher()), ("second", cache.teacher("second"))):
            expected = values[name][view] if views > 1 else values[name]
            torch.testing.assert_close(teacher(ids, view), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_there_and_back_again(tmp_path: Path) -> None:
    values = arrays()
    np.savez(tmp_path / "said.npz", **values)  # type: ignore[arg-type]  # numpy's stub takes no mapping
    cache = cache_of_logits(tmp_path / "said.npz", tiny_samples(N), tmp_path / "c.kdcache", spec=spec(**ALL))
    shapes = logits_of_cache(cache, tmp_path / "again.npz")
    assert shapes == {"logits": [N, C], "features": [N, D], "scores": [N, 3], "second": [N, 5]}
    with np.load(tmp_path / "again.npz") as again:
        assert {*again} == {*values, "labels", "sample_keys", "seed"}
        for name, value in values.items():
            np.testing.assert_allclose(again[name], value, rtol=1e-5, atol=1e-5)
    second = cache_of_logits(tmp_path / "again.npz", tiny_samples(N), tmp_path / "d.kdcache", spec=spec(**ALL))
    ids = torch.arange(N)
    assert torch.equal(second.teacher("features")(ids), cache.teacher("features")(ids))


def test_a_file_without_logits_and_one_score_per_sample(tmp_path: Path) -> None:
    ages = np.linspace(0, 90, N).astype(np.float32)
    np.savez(tmp_path / "ages.npz", age=ages)
    settings = CacheSpec.model_validate({"logits": False, "outputs": {"age": {"kind": "score"}}})
    cache = cache_of_logits(tmp_path / "ages.npz", tiny_samples(N), tmp_path / "c.kdcache", spec=settings)
    assert cache.manifest.plan.output_names == ["age"]
    assert cache.teacher("age")(torch.arange(N))[:, 0].numpy().tolist() == ages.tolist()
    assert logits_of_cache(cache, tmp_path / "again.npy") == {"age": [N, 1]}
    assert np.load(tmp_path / "again.npy")[:, 0].tolist() == ages.tolist()


def test_vectors_are_planned_from_their_fidelity(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    low_rank = (rng.normal(size=(N * 20, 3)) @ rng.normal(size=(3, 64))).astype(np.float32)
    np.savez(tmp_path / "said.npz", embedding=low_rank)
    settings = CacheSpec.model_validate({"logits": False, "outputs": {"embedding": {"encoding": "klt"}}})
    cache = cache_of_logits(tmp_path / "said.npz", tiny_samples(N * 20), tmp_path / "c.kdcache", spec=settings)
    found = cache.teacher("embedding")(torch.arange(N * 20))
    cosine = torch.nn.functional.cosine_similarity(found, torch.from_numpy(low_rank), dim=1)
    assert float(1 - cosine.mean()) < 1e-3
    encoding = cache.outputs["embedding"].encoding
    assert isinstance(encoding, VectorEncoding) and encoding.components == 3


def test_probabilities_of_another_head_are_recognized(tmp_path: Path) -> None:
    values = arrays()
    values["second"] = torch.from_numpy(values["second"]).softmax(dim=1).numpy()
    np.savez(tmp_path / "said.npz", **values)  # type: ignore[arg-type]  # numpy's stub takes no mapping
    cache = cache_of_logits(tmp_path / "said.npz", tiny_samples(N), tmp_path / "c.kdcache", spec=spec(**ALL))
    assert cache.level_known and cache.outputs["second"].level == "unknown"
    found = cache.teacher("second")(torch.arange(N)).softmax(dim=1)
    torch.testing.assert_close(found, torch.from_numpy(values["second"]), rtol=1e-4, atol=1e-5)


def spoilt(name: str) -> dict[str, Any]:
    values: dict[str, Any] = dict(arrays())
    if name == "NaN":
        values["features"][20, 3] = np.nan
    elif name == "rows":
        values["scores"] = values["scores"][:-1]
    elif name == "lacking":
        del values["second"]
    elif name == "type":
        values["features"] = values["features"].astype(np.int64)
    elif name == "shape":
        values["features"] = values["features"][None, None]
    return values


WRONG: list[tuple[str, type[KdcacheError], str]] = [
    ("NaN", CorruptError, "NaN or infinite features for sample 20"),
    ("rows", MismatchError, "36 rows of 3 scores, tiny/train has 37 samples"),
    ("lacking", UsageError, "holds logits, features, scores, but no second"),
    ("type", UsageError, r"holds int64 \[37, 12\] as features"),
    ("shape", UsageError, r"holds float32 \[1, 1, 37, 12\] as features"),
]


@pytest.mark.parametrize(("what", "error", "words"), WRONG)
def test_wrong_files(what: str, error: type[KdcacheError], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "said.npz", **spoilt(what))
    with pytest.raises(error, match=words):
        cache_of_logits(tmp_path / "said.npz", tiny_samples(N), tmp_path / "c.kdcache", spec=spec(**ALL))
    assert not any(tmp_path.glob("c.kdcache*"))


def test_what_one_file_cannot_hold(tmp_path: Path) -> None:
    np.save(tmp_path / "said.npy", arrays()["logits"])
    with pytest.raises(UsageError, match=r"holds one array, and cache.outputs names features"):
        cache_of_logits(tmp_path / "said.npy", tiny_samples(N), tmp_path / "c.kdcache", spec=spec(features={}))
    np.savez(tmp_path / "said.npz", **arrays())  # type: ignore[arg-type]  # numpy's stub takes no mapping
    with pytest.raises(UsageError, match=r"an array labels of .* is not an output"):
        cache_of_logits(tmp_path / "said.npz", tiny_samples(N), tmp_path / "c.kdcache", spec=spec(labels={}))
    cache = cache_of_logits(tmp_path / "said.npz", tiny_samples(N), tmp_path / "c.kdcache", spec=spec(**ALL))
    with pytest.raises(UsageError, match="has logits, features, scores, second, and an npy file one array"):
        logits_of_cache(cache, tmp_path / "again.npy")


def test_on_the_command_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    np.savez(tmp_path / "said.npz", embedding=(x @ rng.normal(size=(4, 6))).astype(np.float32))
    (tmp_path / "p.yaml").write_text(
        f"dataset: {{name: npz, root: {tmp_path}/data.npz, validation_fraction: 0, test_fraction: 0}}\n"
        "cache: {logits: false, outputs: {embedding: {encoding: float16}}}\n"
    )
    run = CliRunner()

    def convert(*given: object) -> Any:
        done = run.invoke(main, ["convert", *map(str, given), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    convert(tmp_path / "said.npz", "--pipeline", tmp_path / "p.yaml", "-o", tmp_path / "c.kdcache")
    written = convert(tmp_path / "c.kdcache", "-o", tmp_path / "again.npz")
    assert (written["shape"], written["outputs"]) == (None, {"embedding": [N, 6]})
    done = run.invoke(main, ["convert", str(tmp_path / "c.kdcache"), "-o", str(tmp_path / "b.npz")])
    assert f"embedding [{N}, 6]" in done.stdout


def test_too_many_scores_and_rows_that_are_not_those_of_the_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", age=np.zeros((N, 70), np.float32))
    settings = CacheSpec.model_validate({"logits": False, "outputs": {"age": {"kind": "score"}}})
    with pytest.raises(UsageError, match="age: there are 70 numbers per sample, and scores are at most 64"):
        cache_of_logits(tmp_path / "wide.npz", tiny_samples(N), tmp_path / "c.kdcache", spec=settings)
    short = arrays() | {"labels": tiny_samples(N).labels, "features": np.zeros((N - 1, D), np.float32)}
    np.savez(tmp_path / "short.npz", **short)  # type: ignore[arg-type]  # numpy's stub takes no mapping
    with pytest.raises(UsageError, match=r"holds features \[36, 12\], that is 36 rows, and 37 labels"):
        cache_of_logits(tmp_path / "short.npz", tiny_samples(N), tmp_path / "c.kdcache", spec=spec(**ALL))
