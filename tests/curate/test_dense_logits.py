"""Dense logits become a cache and come back, held against the arrays themselves and the codec's own bounds."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner, Result
from helpers.processes import exit_code, in_a_process, recipe
from helpers.tiny import FLIP, TinyTeacher, tiny_samples

from kdcache import Cache, CacheSpec, dump_teacher, open_cache
from kdcache.cache.fidelity import total_variation
from kdcache.cache.inspect.audit import audit
from kdcache.cli import main
from kdcache.curate.dense_logits import cache_of_logits, logits_of_cache
from kdcache.data.replay import replay
from kdcache.errors import CorruptError, KdcacheError, MismatchError, UsageError

SAMPLES = tiny_samples(37, 12)
LOGITS = np.random.default_rng(0).normal(0, 3, (37, 12)).astype(np.float32)
SPEC = CacheSpec(shard_rows=8)


def logits_of(cache: Cache, view: int = 0) -> npt.NDArray[np.float32]:
    return cache.teacher()(torch.arange(len(cache)), view).numpy()


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_dense_logits_are_kept_to_the_precision_that_the_codec_promises(
    tmp_path: Path, suffix: str, dtype: type[np.floating[Any]]
) -> None:
    source = tmp_path / f"mine{suffix}"
    given = LOGITS.astype(dtype)
    if suffix == ".npz":
        np.savez(source, logits=given)
    else:
        np.save(source, given)
    cache = cache_of_logits(source, SAMPLES, tmp_path / "c.kdcache", spec=SPEC)
    assert audit(cache.path).failure is None
    assert replay(cache, SAMPLES).rounded == 0
    true, found = torch.from_numpy(given.astype(np.float32)), torch.from_numpy(logits_of(cache))
    log_probs = true.log_softmax(dim=1)
    assert ((found.log_softmax(dim=1) - log_probs).abs() <= log_probs.abs() * 2**-10 + 2**-20).all()
    assert (found.logsumexp(dim=1) - true.logsumexp(dim=1)).abs().max() < 1e-3
    plan = cache.manifest.plan
    assert (plan.teacher.name, plan.teacher.parameters) == ("mine", 0)
    assert plan.teacher.precision == f"unknown, kept in {np.dtype(dtype).name}"
    assert plan.lineage is not None
    assert (plan.lineage.operation, plan.lineage.arguments["file"]) == ("convert", source.name)
    assert cache.manifest.summary.teacher_accuracy == (given.argmax(axis=1) == SAMPLES.labels).mean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.kdcache", source.name]


def test_many_classes_are_planned_as_in_a_dump(tmp_path: Path) -> None:
    samples = tiny_samples(200, 100)
    teacher = TinyTeacher(100)
    logits = teacher.forward(samples.images.pixels)  # type: ignore[attr-defined]  # they are in memory
    np.save(tmp_path / "l.npy", logits.numpy())
    spec = CacheSpec(shard_rows=64, pilot_rows=160, fidelity=0.02)
    cache = cache_of_logits(tmp_path / "l.npy", samples, tmp_path / "c.kdcache", spec=spec)
    dumped = dump_teacher(teacher, samples, tmp_path / "d.kdcache", spec=spec)
    assert cache.manifest.plan.encoding == dumped.manifest.plan.encoding
    assert cache.manifest.plan.fidelity == dumped.manifest.plan.fidelity
    assert np.array_equal(logits_of(cache), logits_of(dumped))
    assert float(total_variation(logits, torch.from_numpy(logits_of(cache)), 4).mean()) < 0.02


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kept", [{"top_k": "all"}, {"top_k": 3, "rank": 4, "pilot_rows": 32}])
def test_a_cache_becomes_the_logits_that_it_gives_and_a_cache_again(
    tmp_path: Path, kept: dict[str, Any], views: int
) -> None:
    transform = FLIP if views > 1 else []
    spec = CacheSpec.model_validate({"shard_rows": 8, "seed": 5, "views": views, **kept})
    cache = dump_teacher(TinyTeacher(12), SAMPLES, tmp_path / "c.kdcache", transform=transform, spec=spec)
    expected = np.stack([logits_of(cache, view) for view in range(views)])
    expected = expected if views > 1 else expected[0]
    logits_of_cache(cache, tmp_path / "l.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "l.npy"), expected)
    logits_of_cache(cache, tmp_path / "l.npz")
    with np.load(tmp_path / "l.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["logits"], expected)
        np.testing.assert_array_equal(arrays["labels"], SAMPLES.labels)
        np.testing.assert_array_equal(arrays["sample_keys"], SAMPLES.keys())
        assert arrays["seed"] == 5
    spec = CacheSpec(shard_rows=8, dtype="float32")
    again = cache_of_logits(tmp_path / "l.npz", SAMPLES, tmp_path / "a.kdcache", transform=transform, spec=spec)
    for view in range(views):
        np.testing.assert_allclose(logits_of(again, view), expected[view] if views > 1 else expected, atol=2e-5)
    assert replay(again, SAMPLES).rounded == 0


REFUSED: dict[str, tuple[dict[str, Any], type[KdcacheError], str]] = {
    "fewer rows": ({"logits": LOGITS[:36]}, MismatchError, "36 rows of 12 classes"),
    "other classes": ({"logits": LOGITS[:, :11]}, MismatchError, "37 rows of 11 classes"),
    "other samples": ({"logits": LOGITS, "sample_keys": SAMPLES.keys()[::-1]}, MismatchError, "another order"),
    "other labels": ({"logits": LOGITS, "labels": SAMPLES.labels[::-1]}, MismatchError, "has label"),
    "views of nothing random": ({"logits": np.stack([LOGITS, LOGITS])}, UsageError, "all would be the same"),
    "whole numbers": ({"logits": LOGITS.astype(np.int64)}, UsageError, "holds int64"),
    "one row": ({"logits": LOGITS[0]}, UsageError, r"holds float32 \[12\]"),
    "objects": ({"logits": np.array([{}])}, UsageError, "cannot read logits"),
    "no logits": ({"values": LOGITS}, UsageError, "cannot read logits"),
    "a NaN": ({"logits": np.where(np.arange(37)[:, None] == 20, np.nan, LOGITS)}, CorruptError, "for sample 20"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path: Path, what: str) -> None:
    arrays, kind, why = REFUSED[what]
    with pytest.raises(kind, match=why):
        cache_of_logits(save(tmp_path / "l.npz", **arrays), SAMPLES, tmp_path / "c.kdcache", spec=SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["l.npz"]


def test_random_views_of_an_unknown_seed_are_refused(tmp_path: Path) -> None:
    for arrays in ({"logits": LOGITS}, {"logits": np.stack([LOGITS, LOGITS])}):
        with pytest.raises(UsageError, match="does not say from which seed"):
            cache_of_logits(
                save(tmp_path / "l.npz", **arrays), SAMPLES, tmp_path / "c.kdcache", transform=FLIP, spec=SPEC
            )


def _convert_and_die(source: Path, out: Path) -> None:
    """Killed as it puts the third marker in place."""
    renamed = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal renamed
        if event == "os.rename" and "/commits/" in str(args[0]):
            renamed += 1
            if renamed == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    cache_of_logits(source, SAMPLES, out, spec=SPEC)


def test_a_killed_conversion_goes_on_and_leaves_no_scratch(tmp_path: Path) -> None:
    source, out = save(tmp_path / "l.npz", logits=LOGITS), tmp_path / "c.kdcache"
    assert exit_code(in_a_process(_convert_and_die, source, out)) == -signal.SIGKILL
    with pytest.raises(KdcacheError, match="not sealed"):
        open_cache(out)
    made = cache_of_logits(source, SAMPLES, out, spec=SPEC)
    assert made.manifest == cache_of_logits(source, SAMPLES, tmp_path / "once.kdcache", spec=SPEC).manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.kdcache", "l.npz", "once.kdcache"]


# On the command line, with every other command of the family.


def kdcache(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def as_json(*arguments: object) -> Any:
    done = kdcache(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_every_command_on_whole_caches(tmp_path: Path) -> None:
    pipeline = recipe(tmp_path)
    still = "transform=[ToDtype: {dtype: float32}]"
    logits = save(tmp_path / "l.npz", logits=LOGITS[:12, :10])
    a, one, two, whole = (tmp_path / f"{name}.kdcache" for name in ("a", "one", "two", "whole"))
    made = as_json("convert", logits, "--pipeline", pipeline, "--set", still, "--set", "cache.top_k=all", "-o", a)
    assert made["plan"]["lineage"]["operation"] == "convert"
    (tmp_path / "ids").write_text("6\n7\n8\n9\n10\n11\n")
    assert as_json("select", a, "-o", one, "--samples", "0-5")["plan"]["dataset"]["samples"] == 6
    assert as_json("select", a, "-o", two, "--samples", tmp_path / "ids", "--data", pipeline)["plan"]["views"]
    assert as_json("merge", one, two, "-o", whole)["plan"]["lineage"]["parents"] == [
        open_cache(path).manifest.digest for path in (one, two)
    ]
    found = as_json("diff", a, whole)
    assert found["rows"]["same_class"] == 1
    assert {line["key"] for line in found["manifest"]} >= {"lineage.operation", "digest"}
    assert found["rows"]["variations"][0]["mean"] == 0
    assert as_json("diff", one, two)["why_not"].startswith("they have different samples")
    census = as_json("summarize", whole, "--worst", 2)
    assert census["rows"] == 12
    assert len(census["hardest"]) == 2
    of_classes = tmp_path / "three.kdcache"
    names = open_cache(a).manifest.plan.dataset.class_names[:3]
    chosen = ["--classes", ",".join(names), "--samples", "of-classes", "--data", pipeline]
    assert as_json("select", a, "-o", of_classes, *chosen)["plan"]["dataset"]["class_names"] == list(names)
    assert open_cache(of_classes).labels.tolist() == [0, 1, 2, 0, 1]
    assert as_json("convert", whole, "-o", tmp_path / "out.npy")["shape"] == [12, 10]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), logits_of(open_cache(a)))
    for command in (["summarize", whole], ["diff", a, whole], ["diff", one, two], ["card", whole]):
        done = kdcache(*command)
        assert done.exit_code == 0, done.output
        assert done.stdout


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["select", "--views", "1-2"], "not the first ones"),
        (["select", "--views", "x"], "write for example --views"),
        (["select", "--samples", "of-classes"], "needs --classes"),
        (["select"], "nothing is selected"),
        (["merge"], "one cache is given"),
    ],
)
def test_mistakes_end_in_one_message(tmp_path: Path, arguments: list[str], why: str) -> None:
    cache = dump_teacher(TinyTeacher(), tiny_samples(), tmp_path / "c.kdcache", spec=SPEC)
    done = kdcache(arguments[0], cache.path, "-o", tmp_path / "out.kdcache", *arguments[1:])
    assert done.exit_code == 2
    assert why in done.stderr
    assert not (tmp_path / "out.kdcache").exists()


def test_logits_alone_are_no_cache(tmp_path: Path) -> None:
    done = kdcache("convert", save(tmp_path / "l.npz", logits=LOGITS), "-o", tmp_path / "c.kdcache")
    assert done.exit_code == 2
    assert "--pipeline" in done.stderr
