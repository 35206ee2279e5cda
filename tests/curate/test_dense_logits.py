"""Dense logits to a cache and back, compared with the arrays themselves and the bounds of the codec."""

from __future__ import annotations

import json
import os
import signal
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner, Result
from helpers.processes import exit_code, in_a_process, recipe
from helpers.tiny import FLIP, TinyTeacher, tiny_samples

from kdcache import Cache, dump_teacher, open_cache
from kdcache.cache.fidelity import total_variation
from kdcache.cache.inspect.audit import audit
from kdcache.cli import main
from kdcache.config.cache import CacheSpec
from kdcache.curate.decoded_files import logits_of_cache
from kdcache.curate.dense_logits import cache_of_logits
from kdcache.data.replay import replay
from kdcache.errors import CorruptError, KdcacheError, MismatchError, UsageError
from kdcache.runtime.progress import Silent

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
def test_dense_logits_are_stored_to_the_precision_of_the_codec(
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
    "views of nothing random": ({"logits": np.stack([LOGITS, LOGITS])}, UsageError, "all views would be the same"),
    "whole numbers": ({"logits": LOGITS.astype(np.int64)}, UsageError, "holds int64"),
    "one row": ({"logits": LOGITS[0]}, UsageError, r"holds float32 \[12\]"),
    "objects": ({"logits": np.array([{}])}, UsageError, "cannot read logits"),
    "no logits": ({"values": LOGITS}, UsageError, "cannot read logits .* it holds values, but no logits"),
    "labels of another length": ({"logits": LOGITS, "labels": np.zeros(36, int)}, UsageError, r"labels int64 \[36\]"),
    "labels in two columns": (
        {"logits": LOGITS, "labels": np.zeros((37, 2), int)},
        UsageError,
        r"labels int64 \[37, 2\]",
    ),
    "labels that are floats": ({"logits": LOGITS, "labels": np.zeros(37)}, UsageError, r"expected integers \[37\]"),
    "labels beyond int32": ({"logits": LOGITS, "labels": np.full(37, 2**40)}, UsageError, "holds labels from"),
    "labels that are objects": ({"logits": LOGITS, "labels": np.array([{}])}, UsageError, "cannot read logits"),
    "keys that are text": ({"logits": LOGITS, "sample_keys": np.full(37, "a")}, UsageError, "sample_keys <U1"),
    "a negative seed": ({"logits": LOGITS, "seed": np.array(-1)}, UsageError, "a seed int64"),
    "several seeds": ({"logits": LOGITS, "seed": np.arange(2)}, UsageError, r"a seed int64 \[2\]"),
    "complex numbers": ({"logits": LOGITS.astype(complex)}, UsageError, "holds complex128"),
    "a NaN": ({"logits": np.where(np.arange(37)[:, None] == 20, np.nan, LOGITS)}, CorruptError, "for sample 20"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unusable_logits_are_refused_and_leave_nothing(tmp_path: Path, what: str) -> None:
    arrays, kind, why = REFUSED[what]
    with pytest.raises(kind, match=why):
        cache_of_logits(save(tmp_path / "l.npz", **arrays), SAMPLES, tmp_path / "c.kdcache", spec=SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["l.npz"]


def test_random_views_of_an_unknown_seed_are_refused(tmp_path: Path) -> None:
    for arrays in ({"logits": LOGITS}, {"logits": np.stack([LOGITS, LOGITS])}):
        with pytest.raises(UsageError, match="does not hold its seed"):
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


def test_a_killed_conversion_resumes_and_leaves_no_scratch(tmp_path: Path) -> None:
    source, out = save(tmp_path / "l.npz", logits=LOGITS), tmp_path / "c.kdcache"
    assert exit_code(in_a_process(_convert_and_die, source, out)) == -signal.SIGKILL
    with pytest.raises(KdcacheError, match="not sealed"):
        open_cache(out)
    made = cache_of_logits(source, SAMPLES, out, spec=SPEC)
    assert made.manifest == cache_of_logits(source, SAMPLES, tmp_path / "once.kdcache", spec=SPEC).manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.kdcache", "l.npz", "once.kdcache"]


# Formats.


def to_pt(path: Path, held: Any, **options: Any) -> Path:
    torch.save(held, path, **options)
    return path


TENSOR, HALF, COLUMN = torch.from_numpy(LOGITS), LOGITS.astype(np.float16), SAMPLES.labels[:, None]
KEYS = torch.from_numpy(SAMPLES.keys().view(np.int64))
FORMATS: dict[str, tuple[str, Any, npt.NDArray[np.float32], str]] = {
    "Fortran order": (".npy", np.asfortranarray(LOGITS), LOGITS, "float32"),
    "Fortran order, one view": (".npy", np.asfortranarray(LOGITS[None]), LOGITS, "float32"),
    "big-endian float16": (".npy", HALF.astype(">f2"), HALF.astype(np.float32), "float16"),
    "Fortran order, big-endian": (
        ".npz",
        {"logits": np.asfortranarray(LOGITS.astype(">f8")), "labels": COLUMN},
        LOGITS,
        "float64",
    ),
    "a column of labels, other arrays": (
        ".npz",
        {"logits": HALF, "labels": COLUMN.astype(">i8"), "paths": np.array(["a"])},
        HALF.astype(np.float32),
        "float16",
    ),
    "bfloat16": (".pt", TENSOR.bfloat16(), TENSOR.bfloat16().float().numpy(), "bfloat16"),
    "float16, one view": (".pt", TENSOR[None].half(), HALF.astype(np.float32), "float16"),
    "not contiguous, with gradient": (".pt", TENSOR.T.contiguous().T.requires_grad_(), LOGITS, "float32"),
    "legacy serialization": (".pth", TENSOR, LOGITS, "float32"),
    "a dictionary": (
        ".pth",
        {"logits": TENSOR.double(), "labels": torch.from_numpy(COLUMN), "sample_keys": KEYS, "seed": 0, "epoch": 7},
        LOGITS,
        "float64",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_values(tmp_path: Path, name: str) -> None:
    suffix, held, expected, dtype = FORMATS[name]
    source = tmp_path / f"l{suffix}"
    if suffix == ".npz":
        np.savez_compressed(source, **held)
    elif suffix == ".npy":
        np.save(source, held)
    else:
        to_pt(source, held, _use_new_zipfile_serialization=name != "legacy serialization")
    spec = CacheSpec(shard_rows=8, dtype="float32", top_k="all")
    cache = cache_of_logits(source, SAMPLES, tmp_path / "c.kdcache", spec=spec)
    np.testing.assert_allclose(logits_of(cache), expected, atol=2e-5, rtol=1e-6)
    teacher = cache.manifest.plan.teacher
    assert (teacher.precision, teacher.level) == (f"unknown, kept in {dtype}", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.kdcache", source.name]


def test_views_in_a_pt_file(tmp_path: Path) -> None:
    views = np.stack([LOGITS, LOGITS[:, ::-1]])
    source = to_pt(tmp_path / "l.pt", {"logits": torch.from_numpy(views.copy()), "seed": torch.tensor(5)})
    spec = CacheSpec(shard_rows=8, dtype="float32", top_k="all")
    cache = cache_of_logits(source, SAMPLES, tmp_path / "c.kdcache", transform=FLIP, spec=spec)
    assert (cache.manifest.plan.views.seed, cache.manifest.plan.views.count) == (5, 2)
    for view in range(2):
        np.testing.assert_allclose(logits_of(cache, view), views[view], atol=2e-5)


class Calls:
    """Ends every process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (77,)


PT_REFUSED: dict[str, tuple[Any, str]] = {
    "code": (Calls(), "cannot read logits"),
    "a list": ([1.0, 2.0], "a list, not a tensor"),
    "whole numbers": (torch.zeros(37, 12, dtype=torch.long), "holds int64"),
    "one row": (torch.zeros(12), r"holds float32 \[12\]"),
    "nothing": (torch.zeros(0, 12), r"holds float32 \[0, 12\]"),
    "a sparse tensor": (torch.eye(37, 12).to_sparse(), "cannot read logits|holds float32"),
    "a state_dict": ({"fc.weight": torch.zeros(37, 12)}, "it holds fc.weight, but no logits"),
    "an empty dictionary": ({}, "it holds nothing, but no logits"),
    "logits in a dictionary": ({"logits": {"a": LOGITS.tolist()}}, "a dict, not a tensor"),
    "labels that are text": ({"logits": torch.from_numpy(LOGITS), "labels": ["a"] * 37}, "holds labels <U1"),
    "labels of two lengths": ({"logits": torch.from_numpy(LOGITS), "labels": [[0], [0, 1]]}, "labels that are not an"),
}


@pytest.mark.parametrize("what", PT_REFUSED)
def test_unusable_pt_files_are_refused_in_a_line(tmp_path: Path, what: str) -> None:
    held, why = PT_REFUSED[what]
    with pytest.raises(UsageError, match=why) as refused:
        cache_of_logits(to_pt(tmp_path / "l.pt", held), SAMPLES, tmp_path / "c.kdcache", spec=SPEC)
    assert "\n" not in refused.value.what
    assert [path.name for path in tmp_path.iterdir()] == ["l.pt"]


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".pt", ".pth", ".csv"])
@pytest.mark.parametrize("content", [b"", b"1,2\n3,4\n", b"PK\x03\x04" + bytes(40), b"\x93NUMPY\x01\x00"])
def test_files_that_hold_no_arrays_are_refused_in_a_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    source = tmp_path / f"l{suffix}"
    source.write_bytes(content)
    with pytest.raises(UsageError, match="cannot read logits") as refused:
        cache_of_logits(source, SAMPLES, tmp_path / "c.kdcache", spec=SPEC)
    assert "\n" not in refused.value.what
    with pytest.raises(UsageError, match="cannot read logits"):
        cache_of_logits(tmp_path / f"missing{suffix}", SAMPLES, tmp_path / "c.kdcache", spec=SPEC)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("member", ["notes.txt", "folder/", "logits", "logits.npy"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_members_of_an_npz_are_refused_in_a_line(tmp_path: Path, member: str) -> None:
    source = save(tmp_path / "l.npz", logits=LOGITS)
    with zipfile.ZipFile(source, "a") as packed:
        packed.writestr(member, b"")
    why = "holds logits twice" if member == "logits.npy" else f"holds {member}, which is not an array"
    with pytest.raises(UsageError, match=why) as refused:
        cache_of_logits(source, SAMPLES, tmp_path / "c.kdcache", spec=SPEC)
    assert "\n" not in refused.value.what
    assert [path.name for path in tmp_path.iterdir()] == ["l.npz"]


def test_arrays_that_are_not_used_are_named(tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes(Silent):
        def say(self, text: str) -> None:
            notes.append(text)

    source = save(tmp_path / "l.npz", logits=LOGITS, paths=np.array(["a"]), temperature=np.array(4.0))
    cache_of_logits(source, SAMPLES, tmp_path / "c.kdcache", spec=SPEC, progress=Notes())
    assert notes == [f"note: {source} also holds paths, temperature, which is not used"]


# Outputs of Softmax and LogSoftmax.

EXACT = CacheSpec(shard_rows=8, dtype="float32", top_k="all")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["softmax", "log_softmax"])
@pytest.mark.parametrize("views", [1, 2])
def test_normalized_rows_are_log_probabilities_of_unknown_level(
    tmp_path: Path, kind: str, dtype: torch.dtype, views: int
) -> None:
    logits = torch.from_numpy(LOGITS / 2).double()
    stored = getattr(logits, kind)(dim=1).to(dtype)
    stored = torch.stack([stored, stored.flip(1)]) if views > 1 else stored
    source = to_pt(tmp_path / "l.pt", {"logits": stored, "seed": 0})
    transform = FLIP if views > 1 else None
    cache = cache_of_logits(source, SAMPLES, tmp_path / "c.kdcache", transform=transform, spec=EXACT)
    assert not cache.level_known
    name = {"softmax": "probabilities", "log_softmax": "log-probabilities"}[kind]
    assert cache.manifest.plan.teacher.precision == f"unknown, kept as {name} in {str(dtype).removeprefix('torch.')}"
    for view in range(views):
        found = torch.from_numpy(logits_of(cache, view)).double()
        assert found.logsumexp(dim=1).abs().max() < 1e-5
        values = (stored if views == 1 else stored[view]).double()
        expected = values.log() if kind == "softmax" else values
        torch.testing.assert_close(found, expected - expected.logsumexp(1, keepdim=True), atol=1e-5, rtol=1e-6)
    logits_of_cache(cache, tmp_path / "again.npz")
    again = cache_of_logits(tmp_path / "again.npz", SAMPLES, tmp_path / "a.kdcache", transform=transform, spec=EXACT)
    assert not again.level_known


def normalized(kind: str) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = getattr(torch.from_numpy(LOGITS), kind)(dim=1).numpy()
    return values


def test_rows_that_are_not_all_normalized_are_logits(tmp_path: Path) -> None:
    last = np.arange(37)[:, None] == 36
    sums = normalized("softmax").copy()
    sums[36] *= 1.05
    beyond = normalized("softmax").copy()
    beyond[36] = [1.5, -0.5] + [0.0] * 10
    cases = {
        "probabilities but for a row": np.where(last, LOGITS, normalized("softmax")),
        "log-probabilities but for a row": np.where(last, LOGITS, normalized("log_softmax")),
        "a sum of 1.05": sums,
        "outside of [0, 1]": beyond,
        "a logsumexp of 0.1": normalized("log_softmax") + np.float32(0.1),
        "both kinds": np.where(last, normalized("log_softmax"), normalized("softmax")),
        "normalized by the mean": LOGITS - LOGITS.mean(axis=1, keepdims=True),
    }
    for number, (name, logits) in enumerate(cases.items()):
        source = save(tmp_path / f"{number}.npz", logits=logits)
        cache = cache_of_logits(source, SAMPLES, tmp_path / f"{number}.kdcache", spec=EXACT)
        assert cache.level_known, name
        np.testing.assert_allclose(logits_of(cache), logits, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [0.0, "subnormal"])
def test_underflowed_probabilities_are_refused(tmp_path: Path, dtype: str, value: float | str) -> None:
    values = torch.from_numpy(LOGITS / 3).softmax(dim=1).numpy().astype(dtype)
    cache_of_logits(save(tmp_path / "good.npz", logits=values), SAMPLES, tmp_path / "good.kdcache", spec=EXACT)
    values[20, 3] = np.finfo(dtype).smallest_subnormal if value == "subnormal" else value
    values[20, 4] += 1 - values[20].sum()
    with pytest.raises(UsageError, match=f"one of sample 20 has underflowed in {dtype}"):
        cache_of_logits(save(tmp_path / "l.npz", logits=values), SAMPLES, tmp_path / "c.kdcache", spec=EXACT)
    assert not (tmp_path / "c.kdcache").exists()


def test_one_hot_rows_are_refused_as_underflowed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sample 0 has underflowed"):
        cache_of_logits(
            save(tmp_path / "l.npz", logits=np.eye(12, dtype=np.float32)[SAMPLES.labels]),
            SAMPLES,
            tmp_path / "c.kdcache",
        )


def test_infinite_log_probabilities_are_refused_with_the_reason(tmp_path: Path) -> None:
    values = normalized("log_softmax").copy()
    values[20, np.argmin(values[20])] = -np.inf
    with pytest.raises(CorruptError, match="those of sample 20 include -inf: the probability has underflowed"):
        cache_of_logits(save(tmp_path / "l.npz", logits=values), SAMPLES, tmp_path / "c.kdcache", spec=EXACT)
    values[20] = np.nan
    with pytest.raises(CorruptError, match="NaN or infinite logits for sample 20"):
        cache_of_logits(save(tmp_path / "l.npz", logits=values), SAMPLES, tmp_path / "c.kdcache", spec=EXACT)


# On the command line, with every other command of the family.


def kdcache(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def as_json(*arguments: object) -> Any:
    done = kdcache(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_every_command_on_complete_caches(tmp_path: Path) -> None:
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
        (["merge"], "two caches or more, one is given"),
    ],
)
def test_mistakes_give_one_message(tmp_path: Path, arguments: list[str], why: str) -> None:
    cache = dump_teacher(TinyTeacher(), tiny_samples(), tmp_path / "c.kdcache", spec=SPEC)
    done = kdcache(arguments[0], cache.path, "-o", tmp_path / "out.kdcache", *arguments[1:])
    assert done.exit_code == 2
    assert why in done.stderr
    assert not (tmp_path / "out.kdcache").exists()


def test_logits_alone_need_a_pipeline(tmp_path: Path) -> None:
    done = kdcache("convert", save(tmp_path / "l.npz", logits=LOGITS), "-o", tmp_path / "c.kdcache")
    assert done.exit_code == 2
    assert "--pipeline" in done.stderr
